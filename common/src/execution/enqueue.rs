//! Enqueue: a slice of triggers in, one outcome for each out, one transaction for all of them, so that
//! requests which arrive together share one commit.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use super::{
    idempotency::{Idempotency, StoredKeys},
    inserts::Inserts,
    remembered::Remembered,
    room::Room,
};
use crate::{
    audit::{Actor, Event},
    id::{ExecutionId, JobId, Reference},
    job::Overlap,
    label::Labels,
    setting::Settings,
    telemetry::TraceContext,
    time::as_text,
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
    /// Who.
    pub actor: Actor,
    /// -10 to 10, higher first.
    pub priority: i16,
    /// Labels of the execution.
    pub labels: Labels,
    /// Retention leaves the backup alone.
    pub locked: bool,
    /// For so many days.
    pub lock_days: Option<i32>,
    /// A good backup whose data is not older, or a run that waits, is as good as a new one.
    pub max_age_seconds: Option<i32>,
    /// Ends as Expired when it has not started by then.
    pub start_within_seconds: Option<i32>,
    /// Trace of the request.
    pub trace: TraceContext,
    /// The time that a schedule named, when one triggers.
    pub scheduled_for: Option<DateTime<Utc>>,
    /// `Idempotency-Key` of the request.
    pub idempotency: Option<Idempotency>,
}

/// What became of a trigger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enqueued {
    /// A new execution waits.
    Queued(ExecutionId),
    /// One that exists already serves: see [`TriggerRequest::max_age_seconds`].
    Reused(ExecutionId),
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

#[derive(Clone, Debug)]
pub(crate) struct JobRow {
    pub(super) id: JobId,
    pub(super) slug: String,
    pub(super) name: String,
    pub(super) source_id: uuid::Uuid,
    pub(super) pool: String,
    pub(super) overlap: Overlap,
    pub(super) max_attempts: i32,
    /// The transactions that last changed this row and that of its source.
    pub(super) versions: (i64, i64),
}

impl JobRow {
    fn is_named(&self, name: &Reference) -> bool {
        Some(self.id.0) == name.id() || self.slug == name.slug()
    }
}

/// For sessions that enqueue: a slice does not wait for the disk, so that its jobs are free for the next one, and workers may
/// claim, while it is written. The number of triggers in a slice changes no plan, but PostgreSQL would take it for a reason
/// to plan each time.
pub const SESSION: &str = "set synchronous_commit = off; set plan_cache_mode = force_generic_plan";

/// Decides each trigger under its job's row lock and inserts those that pass, in one transaction. **In a session of
/// [`SESSION`] no client may be told before [`db::flush`](crate::db::flush) has returned**: until then a crash of the
/// database takes the slice back, whole.
///
/// What was read for a slice is `remembered` for the next one, which then takes a single statement: see [`Remembered`].
///
/// The cap of all executions may be overshot by one slice per process; everything else is exact. See [`Room`].
pub async fn enqueue(
    conn: &mut PgConnection,
    remembered: &mut Remembered,
    requests: &[TriggerRequest],
) -> Result<Vec<Enqueued>, sqlx::Error> {
    if let Some((mut desk, assumed)) = remembered.desk(requests) {
        let outcomes = requests.iter().map(|request| desk.decide(request)).collect();
        if desk.inserts.run_if(conn, assumed).await? {
            return Ok(outcomes);
        }
    }
    let mut tx = conn.begin().await?;
    let locked = lock_jobs(&mut tx, requests).await?;
    remembered.note(&locked);
    let mut desk = Desk::over(&mut tx, &mut remembered.room, locked, requests).await?;
    let outcomes = requests.iter().map(|request| desk.decide(request)).collect();
    desk.inserts.run(&mut tx).await?;
    tx.commit().await?;
    Ok(outcomes)
}

/// What the decisions of a slice are made from. The jobs are locked, so nobody else decides about them meanwhile; or it is
/// compared when they are.
pub(crate) struct Desk {
    jobs: Vec<JobRow>,
    settings: Settings,
    /// How many more may wait.
    room: i64,
    /// How many of each job wait.
    pending: HashMap<JobId, i64>,
    active: HashMap<JobId, ExecutionId>,
    stored: StoredKeys,
    reusable: HashMap<JobId, Reusable>,
    pub(crate) inserts: Inserts,
}

/// What a trigger with `maxAgeSeconds` may be answered with.
#[derive(Default)]
struct Reusable {
    pending: Option<ExecutionId>,
    /// The newest success, and the age of its data.
    success: Option<(ExecutionId, f64)>,
}

impl Desk {
    /// For a slice alone: everything is read, and nothing remembered.
    pub(crate) async fn open(conn: &mut PgConnection, requests: &[TriggerRequest]) -> Result<Self, sqlx::Error> {
        let locked = lock_jobs(conn, requests).await?;
        Self::over(conn, &mut Room::default(), locked, requests).await
    }

    async fn over(
        conn: &mut PgConnection,
        room: &mut Room,
        locked: Locked,
        requests: &[TriggerRequest],
    ) -> Result<Self, sqlx::Error> {
        let Locked { jobs, settings, sequence, .. } = locked;
        let wanted = |job: &JobRow| requests.iter().filter(|request| job.is_named(&request.job)).count() as i64;
        let by_job: Vec<_> = jobs.iter().map(|job| (job.id, wanted(job))).collect();
        Ok(Self {
            room: room
                .of_all(conn, sequence, settings.max_pending, by_job.iter().map(|(_, wanted)| wanted).sum())
                .await?,
            pending: room.of_jobs(conn, sequence, settings.max_pending_per_job, &by_job).await?,
            active: active_by_job(conn, &jobs).await?,
            stored: StoredKeys::of(
                conn,
                requests.iter().filter_map(|r| r.idempotency.as_ref()),
                jobs.iter().map(|j| j.id),
            )
            .await?,
            reusable: match requests.iter().any(|r| r.max_age_seconds.is_some()) {
                true => reusable_by_job(conn, &jobs).await?,
                false => HashMap::new(),
            },
            inserts: Inserts::default(),
            jobs,
            settings,
        })
    }

    /// For triggers that want nothing but a new run of a job that lets it wait: there is room for all of them.
    pub(super) fn of(jobs: Vec<JobRow>, settings: Settings) -> Self {
        Self {
            jobs,
            settings,
            room: i64::MAX,
            pending: HashMap::new(),
            active: HashMap::new(),
            stored: StoredKeys::default(),
            reusable: HashMap::new(),
            inserts: Inserts::default(),
        }
    }

    pub(crate) fn decide(&mut self, request: &TriggerRequest) -> Enqueued {
        let found = self.jobs.iter().find(|job| job.is_named(&request.job));
        let Some(job) = found.filter(|job| request.only.as_ref().is_none_or(|only| only.contains(&job.id))) else {
            return Enqueued::JobNotFound;
        };
        // A stored key wins over caps and overlap: the client asks for an answer that it already had.
        if let Some(used) = request.idempotency.as_ref().and_then(|idempotency| self.stored.used(idempotency, job.id)) {
            return used.map_or(Enqueued::KeyReused, Enqueued::Replayed);
        }
        let reused = request.max_age_seconds.and_then(|age| self.reusable.get(&job.id)?.within(age));
        let waiting = self.pending.entry(job.id).or_default();
        let (id, outcome) = if let Some(id) = reused {
            (id, Enqueued::Reused(id))
        } else if let Some(running) = self.active.get(&job.id).filter(|_| job.overlap == Overlap::Reject) {
            return Enqueued::Active(*running);
        } else if *waiting >= self.settings.max_pending_per_job {
            return Enqueued::JobQueueFull(self.settings.max_pending_per_job);
        } else if self.room <= 0 {
            return Enqueued::QueueFull(self.settings.max_pending);
        } else {
            let id = ExecutionId::new();
            *waiting += 1;
            self.room -= 1;
            self.active.insert(job.id, id);
            self.reusable.entry(job.id).or_default().pending.get_or_insert(id);
            self.inserts.push(id, job, request);
            (id, Enqueued::Queued(id))
        };
        if let Some(idempotency) = &request.idempotency {
            self.stored.insert(idempotency, job.id, id);
            self.inserts.keys.push(idempotency, job.id, id);
        }
        let action = if reused.is_some() { "execution.reuse" } else { "execution.trigger" };
        let mut details = json!({ "jobId": job.id });
        if let Some(time) = request.scheduled_for {
            details["scheduledFor"] = json!(as_text(&time));
        }
        self.inserts.note(&request.actor, Event::new(action, id, &job.name).with(details));
        outcome
    }
}

impl Reusable {
    /// A run whose data will be, or is, young enough. Never one that runs: its snapshot may be older than the request.
    fn within(&self, max_age_seconds: i32) -> Option<ExecutionId> {
        let young = self.success.filter(|(_, age)| *age <= f64::from(max_age_seconds)).map(|(id, _)| id);
        young.or(self.pending)
    }
}

/// The jobs of a slice, and what was read with them.
pub(super) struct Locked {
    pub(super) jobs: Vec<JobRow>,
    /// As they are stored, and as they are understood.
    pub(super) stored: Option<Value>,
    pub(super) settings: Settings,
    /// The last number that `executions.seq` was given, perhaps to a row that is not committed.
    pub(super) sequence: i64,
}

/// Locks the jobs of a slice, in the order of their ids so that two processes never wait for each other in a ring.
///
/// The sequence is read for each row once that is locked, and so in the last row after all locks: read before, it would
/// miss what those who held the locks have added. (PostgreSQL keeps it outside of snapshots; the condition binds the read
/// to its row, else it would be done once for all.)
async fn lock_jobs(conn: &mut PgConnection, requests: &[TriggerRequest]) -> Result<Locked, sqlx::Error> {
    let ids: Vec<uuid::Uuid> = requests.iter().filter_map(|r| r.job.id()).collect();
    let slugs: Vec<String> = requests.iter().map(|r| r.job.slug().to_owned()).collect();
    let rows = sqlx::query!(
        r#"select l.id as "id: JobId", l.slug, l.name, l.source_id, l.pool, l.overlap as "overlap: Overlap", l.max_attempts,
                  l.job_version as "job_version!", l.source_version as "source_version!",
                  (select s.last_value - (not s.is_called)::int from executions_seq_seq s where l.max_attempts > 0) as "sequence!",
                  (select jsonb_object_agg(name, value) from settings) as stored
             from (select j.id, j.slug, j.name, j.source_id, s.pool, j.overlap, j.max_attempts,
                          j.xmin::text::bigint as job_version, s.xmin::text::bigint as source_version
                     from jobs j join sources s on s.id = j.source_id
                    where j.id = any ($1) or j.slug = any ($2)
                    order by j.id
                      for no key update of j) as l"#,
        &ids,
        &slugs,
    )
    .fetch_all(conn)
    .await?;
    let sequence = rows.iter().map(|row| row.sequence).max().unwrap_or_default();
    let stored = rows.first().and_then(|row| row.stored.clone());
    let settings = Settings::default().with_stored(stored.clone());
    let jobs = rows.into_iter().map(|row| JobRow {
        id: row.id,
        slug: row.slug,
        name: row.name,
        source_id: row.source_id,
        pool: row.pool,
        overlap: row.overlap,
        max_attempts: row.max_attempts,
        versions: (row.job_version, row.source_version),
    });
    Ok(Locked { jobs: jobs.collect(), stored, settings, sequence })
}

async fn active_by_job(conn: &mut PgConnection, jobs: &[JobRow]) -> Result<HashMap<JobId, ExecutionId>, sqlx::Error> {
    let ids: Vec<JobId> = jobs.iter().filter(|j| j.overlap == Overlap::Reject).map(|j| j.id).collect();
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = sqlx::query!(
        r#"select distinct on (job_id) job_id as "job_id: JobId", id as "id: ExecutionId" from executions
            where status in ('Pending', 'Running') and type = 'Backup' and job_id = any ($1) order by job_id, seq"#,
        &ids[..] as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (r.job_id, r.id)).collect())
}

/// Only of the source that the job has now: a backup of another one is no backup of this.
async fn reusable_by_job(conn: &mut PgConnection, jobs: &[JobRow]) -> Result<HashMap<JobId, Reusable>, sqlx::Error> {
    let ids: Vec<JobId> = jobs.iter().map(|j| j.id).collect();
    let rows = sqlx::query!(
        r#"select j.id as "job!: JobId", s.id as "success?: ExecutionId",
                  extract(epoch from clock_timestamp() - s.snapshot_at)::float8 as age,
                  (select p.id from executions p
                    where p.status = 'Pending' and p.type = 'Backup' and p.job_id = j.id and p.source_id = j.source_id order by p.seq limit 1)
                      as "pending?: ExecutionId"
             from jobs j
             -- Of the latest: a job that has got another source may have many of the one before.
             left join lateral (select e.id, e.snapshot_at
                                  from (select id, snapshot_at, source_id, seq from executions
                                         where job_id = j.id and status = 'Success' and type = 'Backup' order by seq desc limit 100) e
                                 where e.source_id = j.source_id order by e.seq desc limit 1) s on true
            where j.id = any ($1)"#,
        &ids[..] as _
    )
    .fetch_all(conn)
    .await?;
    let reusable =
        |success: Option<ExecutionId>, age: Option<f64>, pending| Reusable { pending, success: success.zip(age) };
    Ok(rows.into_iter().map(|r| (r.job, reusable(r.success, r.age, r.pending))).collect())
}
