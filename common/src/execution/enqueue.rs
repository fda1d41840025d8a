//! Enqueue: a slice of triggers in, one outcome for each out, one transaction for all of them, so that
//! requests which arrive together share one commit.

use std::collections::HashMap;

use serde_json::Value;
use sqlx::{Connection, PgConnection};

use crate::{
    id::{ApiKeyId, ExecutionId, JobId, Reference},
    job::Overlap,
    label::Labels,
    setting,
    telemetry::TraceContext,
};

/// A request to run a job.
#[derive(Clone, Debug)]
pub struct TriggerRequest {
    /// Which job.
    pub job: Reference,
    /// The jobs its caller may trigger, when the caller is scoped.
    pub only: Option<Vec<JobId>>,
    /// What kind of trigger: Api, Manual, Schedule.
    pub kind: &'static str,
    /// Who, for people.
    pub label: Option<String>,
    /// -10 to 10, higher first.
    pub priority: i16,
    /// Labels of the execution.
    pub labels: Labels,
    /// Retention leaves the backup alone.
    pub locked: bool,
    /// For so many days.
    pub lock_days: Option<i32>,
    /// Trace of the request.
    pub trace: TraceContext,
    /// `Idempotency-Key` of the request.
    pub idempotency: Option<Idempotency>,
}

/// A request that may be repeated without a second run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idempotency {
    /// Whose key it is.
    pub api_key: ApiKeyId,
    /// 1 to 255 characters.
    pub key: String,
    /// SHA-256 of the body.
    pub body_hash: Vec<u8>,
}

/// What became of a trigger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enqueued {
    /// A new execution waits.
    Queued(ExecutionId),
    /// The same request was answered before; this is its execution.
    Replayed(ExecutionId),
    /// The idempotency key was used with another body.
    KeyReused,
    /// No such job, or not one that the caller may see.
    JobNotFound,
    /// Overlap is `reject` and this run is active.
    Active(ExecutionId),
    /// The job has as many waiting as the setting allows.
    JobQueueFull(i64),
    /// All jobs together have.
    QueueFull(i64),
}

struct JobRow {
    id: JobId,
    slug: String,
    name: String,
    source_id: uuid::Uuid,
    pool: String,
    overlap: Overlap,
    max_attempts: i32,
}

/// Decides each trigger under its job's row lock and inserts those that pass. When it returns they are
/// committed with `synchronous_commit = on`: only then may a client be told.
///
/// The total cap is read once and may be overshot by one slice per process; everything else is exact.
pub async fn enqueue(conn: &mut PgConnection, requests: &[TriggerRequest]) -> Result<Vec<Enqueued>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let jobs = lock_jobs(&mut tx, requests).await?;
    let settings = setting::read(&mut tx).await?;
    let mut room = settings.max_pending - count_pending(&mut tx, settings.max_pending).await?;
    let mut pending = pending_by_job(&mut tx, &jobs).await?;
    let mut active = active_by_job(&mut tx, &jobs).await?;
    let mut stored = stored_keys(&mut tx, requests, &jobs).await?;

    let mut outcomes = Vec::with_capacity(requests.len());
    let mut inserts = Inserts::default();
    for request in requests {
        let Some(job) = jobs
            .iter()
            .find(|job| Some(job.id.0) == request.job.id() || job.slug == request.job.slug())
            .filter(|job| request.only.as_ref().is_none_or(|only| only.contains(&job.id)))
        else {
            outcomes.push(Enqueued::JobNotFound);
            continue;
        };
        // A stored key wins over caps and overlap: the client asks for an answer that it already had.
        let slot = request.idempotency.as_ref().map(|i| (i.api_key, job.id, i.key.clone()));
        if let (Some(slot), Some(idempotency)) = (&slot, &request.idempotency)
            && let Some((body_hash, execution)) = stored.get(slot)
        {
            let same = *body_hash == idempotency.body_hash;
            outcomes.push(if same { Enqueued::Replayed(*execution) } else { Enqueued::KeyReused });
            continue;
        }
        let waiting = pending.entry(job.id).or_default();
        if job.overlap == Overlap::Reject
            && let Some(running) = active.get(&job.id)
        {
            outcomes.push(Enqueued::Active(*running));
        } else if *waiting >= settings.max_pending_per_job {
            outcomes.push(Enqueued::JobQueueFull(settings.max_pending_per_job));
        } else if room <= 0 {
            outcomes.push(Enqueued::QueueFull(settings.max_pending));
        } else {
            let id = ExecutionId::new();
            *waiting += 1;
            room -= 1;
            active.insert(job.id, id);
            if let (Some(slot), Some(idempotency)) = (slot, &request.idempotency) {
                stored.insert(slot, (idempotency.body_hash.clone(), id));
            }
            inserts.push(id, job, request);
            outcomes.push(Enqueued::Queued(id));
        }
    }
    inserts.run(&mut tx).await?;
    tx.commit().await?;
    Ok(outcomes)
}

/// The jobs of a slice, locked in the order of their ids so that two processes never wait for each other in
/// a ring.
async fn lock_jobs(conn: &mut PgConnection, requests: &[TriggerRequest]) -> Result<Vec<JobRow>, sqlx::Error> {
    let ids: Vec<uuid::Uuid> = requests.iter().filter_map(|r| r.job.id()).collect();
    let slugs: Vec<String> = requests.iter().map(|r| r.job.slug().to_owned()).collect();
    sqlx::query_as!(
        JobRow,
        r#"select j.id as "id: JobId", j.slug, j.name, j.source_id, s.pool, j.overlap as "overlap: Overlap", j.max_attempts
             from jobs j join sources s on s.id = j.source_id
            where j.id = any ($1) or j.slug = any ($2)
            order by j.id
              for no key update of j"#,
        &ids,
        &slugs,
    )
    .fetch_all(conn)
    .await
}

/// Waiting executions, counted no further than the cap.
async fn count_pending(conn: &mut PgConnection, cap: i64) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        r#"select count(*) as "n!" from (select 1 from executions where status = 'Pending' limit $1) waiting"#,
        cap
    )
    .fetch_one(conn)
    .await
}

async fn pending_by_job(conn: &mut PgConnection, jobs: &[JobRow]) -> Result<HashMap<JobId, i64>, sqlx::Error> {
    let ids: Vec<JobId> = jobs.iter().map(|j| j.id).collect();
    let rows = sqlx::query!(
        r#"select job_id as "job_id: JobId", count(*) as "n!" from executions
            where status = 'Pending' and job_id = any ($1) group by job_id"#,
        &ids[..] as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (r.job_id, r.n)).collect())
}

async fn active_by_job(conn: &mut PgConnection, jobs: &[JobRow]) -> Result<HashMap<JobId, ExecutionId>, sqlx::Error> {
    let ids: Vec<JobId> = jobs.iter().filter(|j| j.overlap == Overlap::Reject).map(|j| j.id).collect();
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = sqlx::query!(
        r#"select distinct on (job_id) job_id as "job_id: JobId", id as "id: ExecutionId" from executions
            where status in ('Pending', 'Running') and job_id = any ($1) order by job_id, seq"#,
        &ids[..] as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (r.job_id, r.id)).collect())
}

type StoredKeys = HashMap<(ApiKeyId, JobId, String), (Vec<u8>, ExecutionId)>;

async fn stored_keys(
    conn: &mut PgConnection,
    requests: &[TriggerRequest],
    jobs: &[JobRow],
) -> Result<StoredKeys, sqlx::Error> {
    let keys: Vec<String> = requests.iter().filter_map(|r| Some(r.idempotency.as_ref()?.key.clone())).collect();
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let ids: Vec<JobId> = jobs.iter().map(|j| j.id).collect();
    let rows = sqlx::query!(
        r#"select api_key_id as "api_key_id: ApiKeyId", job_id as "job_id: JobId", key, body_hash, execution_id as "execution_id: ExecutionId"
             from idempotency_keys
            where job_id = any ($1) and key = any ($2) and created_at > clock_timestamp() - interval '24 hours'"#,
        &ids[..] as _,
        &keys,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| ((r.api_key_id, r.job_id, r.key), (r.body_hash, r.execution_id))).collect())
}

/// Columns of the rows to insert, for `unnest`.
#[derive(Default)]
struct Inserts {
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
    keys: Vec<(Idempotency, JobId, ExecutionId)>,
}

impl Inserts {
    fn push(&mut self, id: ExecutionId, job: &JobRow, request: &TriggerRequest) {
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
        self.label.push(request.label.clone());
        self.labels.push(serde_json::json!(request.labels));
        self.locked.push(request.locked);
        self.lock_days.push(request.lock_days);
        self.traceparent.push(request.trace.traceparent.clone());
        self.tracestate.push(request.trace.tracestate.clone());
        if let Some(idempotency) = &request.idempotency {
            self.keys.push((idempotency.clone(), job.id, id));
        }
    }

    async fn run(self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.id.is_empty() {
            return Ok(());
        }
        sqlx::query!(
            "insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, priority, max_attempts,
                                     trigger_kind, trigger_label, labels, locked, lock_days, traceparent, tracestate)
             select * from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::uuid[], $6::text[], $7::bool[], $8::smallint[],
                                  $9::int[], $10::text[], $11::text[], $12::jsonb[], $13::bool[], $14::int[], $15::text[], $16::text[])",
            &self.id[..] as _, &self.job_id[..] as _, &self.job_name, &self.job_slug, &self.source_id, &self.pool, &self.serial,
            &self.priority, &self.max_attempts, &self.kind, &self.label as &[Option<String>], &self.labels, &self.locked,
            &self.lock_days as &[Option<i32>], &self.traceparent as &[Option<String>], &self.tracestate as &[Option<String>],
        )
        .execute(&mut *conn)
        .await?;
        for (idempotency, job, execution) in self.keys {
            // A key past its 24 hours that is still in the table gives way.
            sqlx::query!(
                "insert into idempotency_keys (api_key_id, job_id, key, body_hash, execution_id) values ($1, $2, $3, $4, $5)
                 on conflict (api_key_id, job_id, key)
                 do update set body_hash = excluded.body_hash, execution_id = excluded.execution_id, created_at = clock_timestamp()",
                idempotency.api_key as _,
                job as _,
                idempotency.key,
                idempotency.body_hash,
                execution as _,
            )
            .execute(&mut *conn)
            .await?;
        }
        Ok(())
    }
}

/// Removes idempotency keys past their 24 hours, a batch at a time; gives how many.
pub async fn forget_old_keys(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from idempotency_keys where (api_key_id, job_id, key) in
             (select api_key_id, job_id, key from idempotency_keys
               where created_at < clock_timestamp() - interval '24 hours' order by created_at limit 1000)"
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}
