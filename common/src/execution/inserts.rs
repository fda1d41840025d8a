//! What a slice of triggers adds to the database.

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{
    enqueue::{JobRow, TriggerRequest},
    idempotency::Keys,
};
use crate::{
    audit::{self, Actor, Event},
    id::{ExecutionId, JobId},
    job::Overlap,
};

/// What a slice is decided from without having been read for it: it is inserted only if all of it is still so.
#[derive(Debug, Default)]
pub(super) struct Assumed {
    /// The jobs, and with each the transaction that last changed its row and the one that last changed its source's.
    pub(super) jobs: Vec<JobId>,
    pub(super) job_versions: Vec<i64>,
    pub(super) source_versions: Vec<i64>,
    /// As they are stored.
    pub(super) settings: Option<Value>,
    /// Where the sequence of `executions.seq` is: not before the first, and at most at the second.
    pub(super) sequence: (i64, i64),
}

/// Columns of the rows to insert, for `unnest`.
#[derive(Default)]
pub(crate) struct Inserts {
    id: Vec<ExecutionId>,
    job_id: Vec<JobId>,
    job_name: Vec<String>,
    job_slug: Vec<String>,
    source_id: Vec<uuid::Uuid>,
    pool: Vec<String>,
    serial: Vec<bool>,
    priority: Vec<i16>,
    max_attempts: Vec<i32>,
    kind: Vec<String>,
    label: Vec<Option<String>>,
    labels: Vec<Value>,
    locked: Vec<bool>,
    lock_days: Vec<Option<i32>>,
    traceparent: Vec<Option<String>>,
    tracestate: Vec<Option<String>>,
    start_within: Vec<Option<i32>>,
    events: audit::Columns,
    pub(super) keys: Keys,
}

impl Inserts {
    pub(super) fn push(&mut self, id: ExecutionId, job: &JobRow, request: &TriggerRequest) {
        self.id.push(id);
        self.job_id.push(job.id);
        self.job_name.push(job.name.clone());
        self.job_slug.push(job.slug.clone());
        self.source_id.push(job.source_id);
        self.pool.push(job.pool.clone());
        self.serial.push(job.overlap != Overlap::Allow);
        self.priority.push(request.priority);
        self.max_attempts.push(job.max_attempts);
        self.kind.push(request.kind.to_owned());
        self.label.push(Some(request.actor.name.clone()));
        self.labels.push(json!(request.labels));
        self.locked.push(request.locked);
        self.lock_days.push(request.lock_days);
        self.traceparent.push(request.trace.traceparent.clone());
        self.tracestate.push(request.trace.tracestate.clone());
        self.start_within.push(request.start_within_seconds);
    }

    /// Something for the audit log, in the same transaction.
    pub(crate) fn note(&mut self, actor: &Actor, event: Event) {
        self.events.push(actor, event);
    }

    /// What was decided under the locks of the jobs.
    pub(crate) async fn run(self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        self.run_if(conn, Assumed::default()).await?;
        Ok(())
    }

    /// In one statement, but for the keys that few send: a round trip takes as long as the work. With something assumed, the
    /// statement locks the jobs, compares, and inserts all or nothing: `false` for nothing.
    ///
    /// The sequence is read as by `lock_jobs`, after all locks.
    pub(super) async fn run_if(self, conn: &mut PgConnection, assumed: Assumed) -> Result<bool, sqlx::Error> {
        let events = &self.events;
        if events.kinds.is_empty() {
            return Ok(true);
        }
        let done = sqlx::query_scalar!(
            r#"with locked as (
                 select l.id, l.job_version, l.source_version,
                        (select s.last_value - (not s.is_called)::int from executions_seq_seq s where l.job_version > 0) as sequence
                   from (select j.id, j.xmin::text::bigint as job_version, s.xmin::text::bigint as source_version
                           from jobs j join sources s on s.id = j.source_id
                          where j.id = any ($27)
                          order by j.id
                            for no key update of j) as l
             ), sure as (
                 select cardinality($27::uuid[]) = 0
                        or (count(*) = cardinality($27::uuid[])
                            and bool_and(l.job_version = a.job_version and l.source_version = a.source_version)
                            and max(l.sequence) between $31 and $32
                            and (select jsonb_object_agg(name, value) from settings) is not distinct from $30::jsonb) as is_so
                   from locked l join unnest($27::uuid[], $28::bigint[], $29::bigint[]) as a (id, job_version, source_version) on a.id = l.id
             ), runs as (
                 insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, priority, max_attempts,
                                         trigger_kind, trigger_label, labels, locked, lock_days, traceparent, tracestate, start_by)
                 select id, job_id, job_name, job_slug, source_id, pool, serial, priority, max_attempts, kind, label, labels, locked, lock_days,
                        traceparent, tracestate, clock_timestamp() + start_within * interval '1 second'
                   from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::uuid[], $6::text[], $7::bool[], $8::smallint[],
                                      $9::int[], $10::text[], $11::text[], $12::jsonb[], $13::bool[], $14::int[], $15::text[], $16::text[], $17::int[])
                        as n (id, job_id, job_name, job_slug, source_id, pool, serial, priority, max_attempts, kind, label, labels, locked,
                              lock_days, traceparent, tracestate, start_within)
                  where (select is_so from sure)
             ), told as (
                 insert into audit_log (actor_kind, actor_id, actor_name, address, request_id, action, target_id, target_name, details)
                 select * from unnest($18::text[], $19::uuid[], $20::text[], $21::text[], $22::text[], $23::text[], $24::text[], $25::text[], $26::jsonb[])
                  where (select is_so from sure)
             )
             select is_so as "is_so!" from sure"#,
            &self.id[..] as _, &self.job_id[..] as _, &self.job_name, &self.job_slug, &self.source_id, &self.pool, &self.serial,
            &self.priority, &self.max_attempts, &self.kind, &self.label as &[Option<String>], &self.labels, &self.locked,
            &self.lock_days as &[Option<i32>], &self.traceparent as &[Option<String>], &self.tracestate as &[Option<String>],
            &self.start_within as &[Option<i32>],
            &events.kinds, &events.ids as &[Option<uuid::Uuid>], &events.names, &events.addresses as &[Option<String>],
            &events.requests as &[Option<String>], &events.actions, &events.targets as &[Option<String>],
            &events.target_names as &[Option<String>], &events.details,
            &assumed.jobs[..] as _, &assumed.job_versions, &assumed.source_versions, assumed.settings, assumed.sequence.0,
            assumed.sequence.1,
        )
        .fetch_one(&mut *conn)
        .await?;
        if done {
            self.keys.store(conn).await?;
        }
        Ok(done)
    }
}
