//! The cluster at a glance: its limit, its workers, every slot in use, and the queue.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{Connection, PgConnection};

use crate::{
    id::{ExecutionId, JobId, SourceId, WorkerId},
    worker::{self, Worker},
};

/// A slot in use, and so a run under way.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeldSlot {
    /// Its number.
    pub slot: i32,
    /// What runs; null for a key that does not see its job, as are the next three.
    pub execution_id: Option<ExecutionId>,
    /// The job of that.
    pub job_id: Option<JobId>,
    /// The name of the job at the trigger.
    pub job_name: Option<String>,
    /// The source of that.
    pub source_id: Option<SourceId>,
    /// Backup or Restore.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name of the worker that holds it.
    pub worker: String,
    /// Its id; null when its program is of a version that does not tell.
    pub worker_id: Option<WorkerId>,
    /// When the attempt began.
    #[serde(serialize_with = "crate::time::millis")]
    pub claimed_at: DateTime<Utc>,
    /// Milliseconds since then.
    pub age_ms: i64,
    /// Milliseconds that the lease lasts without another heartbeat; negative when the run is about to be rescued.
    pub expires_in_ms: i64,
    /// Where the bytes are.
    pub stage: String,
    /// Percent.
    pub progress: i16,
}

/// What waits in one pool.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolQueue {
    /// The pool.
    pub pool: String,
    /// Executions that wait.
    pub pending: i64,
    /// Those of them that do not wait for the time of a retry.
    pub due: i64,
    /// Milliseconds that the oldest of them waits.
    pub oldest_wait_ms: i64,
}

/// What waits.
#[derive(Clone, Debug, Default, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Queue {
    /// Executions that wait.
    pub pending: i64,
    /// Those of them that do not wait for the time of a retry.
    pub due: i64,
    /// Milliseconds that the oldest of them waits; null when nothing waits.
    pub oldest_wait_ms: Option<i64>,
    /// The same for each pool in which something waits.
    pub pools: Vec<PoolQueue>,
}

/// The cluster, as it was a moment ago.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "maxConcurrentJobs": 4, "slotsUsed": 1, "paused": false,
    "workers": [{ "id": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d2e", "name": "worker-1", "version": "0.1.0", "host": "backup-1",
                  "pools": ["default"], "state": "Active", "cordoned": false, "slots": { "used": 1, "total": 4 }, "engines": ["postgres"],
                  "tools": [{ "name": "pg_dump", "version": "pg_dump (PostgreSQL) 17.2", "path": "/usr/lib/postgresql/17/bin/pg_dump" }],
                  "since": "2025-01-15T08:00:00.000Z", "lastSeenAt": "2025-01-15T10:30:00.000Z" }],
    "slots": [{ "slot": 1, "executionId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d2f", "jobId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d30",
                "jobName": "Shop daily", "sourceId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d31", "type": "Backup", "worker": "worker-1",
                "workerId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d2e", "claimedAt": "2025-01-15T10:29:48.000Z", "ageMs": 12000,
                "expiresInMs": 13100, "stage": "Dumping", "progress": 41 }],
    "queue": { "pending": 1, "due": 1, "oldestWaitMs": 8200,
               "pools": [{ "pool": "default", "pending": 1, "due": 1, "oldestWaitMs": 8200 }] }
}))]
pub struct Cluster {
    /// Runs at once over all workers.
    pub max_concurrent_jobs: i32,
    /// Slots in use; more than the limit just after that was lowered.
    pub slots_used: usize,
    /// Nothing new is claimed.
    pub paused: bool,
    /// Workers that run, are cordoned, or were lost a while ago.
    pub workers: Vec<Worker>,
    /// Every slot in use.
    pub slots: Vec<HeldSlot>,
    /// What waits.
    pub queue: Queue,
}

impl Cluster {
    /// Looks at it, but for the queue: see [`queue`], which may be dear.
    pub async fn look(conn: &mut PgConnection, queue: Queue) -> Result<Self, sqlx::Error> {
        let gate = sqlx::query!("select max_concurrency, paused from queue_gate").fetch_one(&mut *conn).await?;
        let mut workers = worker::all(conn).await?;
        workers.retain(|worker| worker.cordoned || worker.state != worker::WorkerState::Stopped);
        let slots = held_slots(conn).await?;
        // From the same look as the slots, so that the numbers agree.
        for worker in &mut workers {
            let held = slots.iter().filter(|slot| slot.worker_id == Some(worker.id)).count();
            worker.slots.used = i64::try_from(held).unwrap_or(i64::MAX);
        }
        Ok(Self {
            max_concurrent_jobs: gate.max_concurrency,
            slots_used: slots.len(),
            paused: gate.paused,
            workers,
            slots,
            queue,
        })
    }

    /// Hides what is not of these jobs.
    pub fn show_only(&mut self, jobs: &[JobId]) {
        for slot in &mut self.slots {
            if slot.job_id.is_some_and(|job| !jobs.contains(&job)) {
                (slot.execution_id, slot.job_id, slot.job_name, slot.source_id) = (None, None, None, None);
            }
        }
        // Names of sources and folders of destinations, whosever they are.
        for worker in &mut self.workers {
            worker.out_of_reach.clear();
        }
    }
}

async fn held_slots(conn: &mut PgConnection) -> Result<Vec<HeldSlot>, sqlx::Error> {
    sqlx::query_as!(
        HeldSlot,
        r#"select l.slot, l.execution_id as "execution_id: ExecutionId", l.job_id as "job_id: JobId", e.job_name as "job_name?",
                  l.source_id as "source_id: SourceId", l.type as kind, l.worker, l.worker_id as "worker_id: WorkerId", l.claimed_at,
                  (extract(epoch from clock_timestamp() - l.claimed_at) * 1000)::bigint as "age_ms!",
                  (extract(epoch from l.expires_at - clock_timestamp()) * 1000)::bigint as "expires_in_ms!",
                  l.stage, l.progress
             from execution_leases l join executions e on e.id = l.execution_id
            order by l.slot"#
    )
    .fetch_all(conn)
    .await
}

/// What a scrape tells of the cluster, but for the queue.
#[derive(Clone, Debug)]
pub struct Numbers {
    /// Runs at once over all workers.
    pub limit: i32,
    /// Nothing new is claimed.
    pub paused: bool,
    /// Slots in use.
    pub used: i64,
    /// Every pool that a source or a worker names.
    pub pools: Vec<String>,
    /// Workers by state, every state.
    pub workers: Vec<(&'static str, i64)>,
    /// Workers that run and cannot serve a source or a destination.
    pub hindered: i64,
}

/// Counts slots and workers. What is looked at is small: the gate, the leases, the workers and the sources.
pub async fn numbers(conn: &mut PgConnection) -> Result<Numbers, sqlx::Error> {
    let row = sqlx::query!(
        r#"with seen as (
               select case when state <> 'Stopped' and seen_at < clock_timestamp() - gone_after_ms * interval '1 millisecond' then 'Gone'
                           else state end as state, cordoned, out_of_reach <> '{}' as hindered from workers
           )
           select max_concurrency, paused, (select count(*) from execution_leases) as "used!",
                  array(select pool from sources union select unnest(pools) from workers order by 1) as "pools!: Vec<String>",
                  (select count(*) from seen where state = 'Active' and not cordoned) as "active!",
                  (select count(*) from seen where state = 'Active' and cordoned) as "cordoned!",
                  (select count(*) from seen where state = 'Draining') as "draining!",
                  (select count(*) from seen where state = 'Gone') as "gone!",
                  (select count(*) from seen where state = 'Active' and hindered) as "hindered!"
             from queue_gate"#
    )
    .fetch_one(conn)
    .await?;
    Ok(Numbers {
        limit: row.max_concurrency,
        paused: row.paused,
        used: row.used,
        pools: row.pools,
        workers: vec![
            ("active", row.active),
            ("cordoned", row.cordoned),
            ("draining", row.draining),
            ("gone", row.gone),
        ],
        hindered: row.hindered,
    })
}

/// PostgreSQL does not know that what waits lies close together. With 200,000 of it in five million rows it takes a walk
/// over all of them, by two processes more, for cheaper than the index.
const BY_INDEX: &str = "begin read only; set local enable_seqscan = off; set local max_parallel_workers_per_gather = 0";

/// What waits, counted: by the index of what is Pending, so history costs nothing, but each row that waits is looked
/// at (some 0.2 s for 200,000). Not within a transaction.
pub async fn queue(conn: &mut PgConnection) -> Result<Queue, sqlx::Error> {
    let mut tx = conn.begin_with(BY_INDEX).await?;
    let pools = sqlx::query_as!(
        PoolQueue,
        r#"select pool, count(*) as "pending!", count(*) filter (where run_at <= clock_timestamp()) as "due!",
                  (extract(epoch from clock_timestamp() - min(queued_at)) * 1000)::bigint as "oldest_wait_ms!"
             from executions where status = 'Pending' group by pool order by pool"#
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Queue {
        pending: pools.iter().map(|pool| pool.pending).sum(),
        due: pools.iter().map(|pool| pool.due).sum(),
        oldest_wait_ms: pools.iter().map(|pool| pool.oldest_wait_ms).max(),
        pools,
    })
}
