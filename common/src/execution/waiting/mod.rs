//! Why an execution waits. Answered from one look at the queue for all who ask within a second: what holds runs back
//! is in small tables (the gate, the leases, the workers), so a look costs the same however many wait.

mod look;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::id::{DestinationId, ExecutionId, JobId, SourceId};

/// Positions in the queue that are told.
const MOST_QUEUED: i64 = 1_000;

/// What a claim looks at in an execution that is Pending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub id: ExecutionId,
    /// Its job.
    pub job_id: JobId,
    /// Backup or Restore: they are counted apart.
    pub kind: String,
    /// Its source.
    pub source_id: SourceId,
    /// Whose workers reach that.
    pub pool: String,
    /// No two runs of its job at once.
    pub serial: bool,
    /// Not claimed before.
    pub run_at: DateTime<Utc>,
    /// Claims so far.
    pub attempt: i32,
}

/// What holds an execution back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// An attempt failed, and the pause before the next is not over.
    Retry,
    /// Nothing is claimed: the setting `paused`.
    Paused,
    /// No worker of its pool runs.
    NoWorker,
    /// No worker of its pool has the tools for its source.
    NoTool,
    /// No worker of its pool that has the tools reaches its source and its destinations (a restore: one that has the backup).
    OutOfReach,
    /// Another run of its job is under way, and they must not overlap.
    Job,
    /// As many runs (or restores) as its source allows are under way.
    Source,
    /// Every worker that could take it is cordoned.
    WorkersCordoned,
    /// Every slot is in use, or will be by those before it.
    Limit,
    /// Every worker that could take it has as many runs as it may.
    WorkersBusy,
}

/// Why an execution waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[schema(example = json!({ "reason": "limit", "message": "all 4 slots are in use (maxConcurrentJobs)" }))]
pub struct WaitingFor {
    /// A stable word for programs.
    pub reason: WaitReason,
    /// For people.
    pub message: String,
}

/// A worker that claims, or would if it were not cordoned.
#[derive(Clone, Debug)]
struct Claimant {
    pools: Vec<String>,
    engines: Vec<String>,
    out_of_reach: Vec<Uuid>,
    cordoned: bool,
    free: i64,
}

/// A source that allows no more: how many it allows.
type Full = HashMap<(SourceId, String), i32>;

/// The queue at one moment.
#[derive(Clone, Debug)]
pub struct QueueSnapshot {
    asked: Instant,
    now: DateTime<Utc>,
    limit: i32,
    paused: bool,
    used: usize,
    positions: HashMap<ExecutionId, usize>,
    /// The run of a job that is under way.
    jobs: HashMap<(JobId, String), ExecutionId>,
    full: Full,
    workers: Vec<Claimant>,
    /// Engines of the sources that not every worker of their pool can dump: none in most clusters.
    choosy: HashMap<SourceId, String>,
    /// Where backups of a job go, where a run with a pin goes, and where the backup of a restore lies; of none as long as
    /// every worker reaches everything.
    stores: HashMap<JobId, Vec<DestinationId>>,
    pinned: HashMap<ExecutionId, Vec<DestinationId>>,
    copies: HashMap<ExecutionId, Vec<DestinationId>>,
}

impl QueueSnapshot {
    /// Looks at the queue.
    pub async fn take(conn: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let asked = Instant::now();
        let gate = sqlx::query!(r#"select max_concurrency, paused, clock_timestamp() as "now!" from queue_gate"#)
            .fetch_one(&mut *conn)
            .await?;
        let queue = sqlx::query_scalar!(
            r#"select id as "id: ExecutionId" from executions where status = 'Pending' order by priority desc, seq limit $1"#,
            MOST_QUEUED
        )
        .fetch_all(&mut *conn)
        .await?;
        let leases = look::leases(conn).await?;
        let workers = look::claimants(conn, &leases).await?;
        let hindered = workers.iter().any(|worker| !worker.out_of_reach.is_empty());
        let (mut stores, mut pinned, mut copies) = (HashMap::new(), HashMap::new(), HashMap::new());
        if hindered {
            (stores, pinned, copies) =
                (look::stores(conn).await?, look::pinned(conn).await?, look::copies(conn).await?);
        }
        Ok(Self {
            asked,
            now: gate.now,
            limit: gate.max_concurrency,
            paused: gate.paused,
            used: leases.len(),
            positions: queue.into_iter().zip(1..).collect(),
            jobs: leases.iter().map(|l| ((l.job_id, l.kind.clone()), l.execution_id)).collect(),
            full: look::full(&leases),
            workers,
            choosy: look::choosy(conn).await?,
            stores,
            pinned,
            copies,
        })
    }

    /// How old it is.
    pub fn age(&self) -> Duration {
        self.asked.elapsed()
    }

    /// Place in the order in which executions are claimed when nothing holds them back: 1 for the first, `None` past
    /// the first thousand or when it waits no longer.
    pub fn position(&self, id: ExecutionId) -> Option<usize> {
        self.positions.get(&id).copied()
    }

    /// What holds an execution back; `None` when it is about to be claimed. What would hold it back even with free
    /// slots comes first.
    pub fn waiting_for(&self, waiting: &Waiting) -> Option<WaitingFor> {
        use WaitReason::{Job, Limit, Paused, Retry, Source, WorkersBusy, WorkersCordoned};
        let because = |reason, message: String| Some(WaitingFor { reason, message });
        let Waiting { id, pool, run_at, .. } = waiting;
        if waiting.attempt > 0 && *run_at > self.now + self.age() {
            let at = run_at.format("%Y-%m-%dT%H:%M:%SZ");
            return because(Retry, format!("attempt {} failed; it is tried again at {at}", waiting.attempt));
        }
        if self.paused {
            return because(Paused, "nothing is claimed while the setting paused is true".to_owned());
        }
        let able = match self.able(waiting) {
            Ok(able) => able,
            Err(why) => return Some(why),
        };
        let same_kind = (waiting.job_id, waiting.kind.clone());
        if let Some(other) = self.jobs.get(&same_kind).filter(|other| waiting.serial && **other != *id) {
            let text = match waiting.kind.as_str() {
                "Restore" => format!("restore {other} of its job is under way, and they go one after the other"),
                _ => format!("run {other} of its job is under way, and its overlap allows one at a time"),
            };
            return because(Job, text);
        }
        if let Some(most) = self.full.get(&(waiting.source_id, waiting.kind.clone())) {
            let (what, setting) = match waiting.kind.as_str() {
                "Restore" => ("restores", "maxConcurrentRestores"),
                _ => ("runs", "maxConcurrentRuns"),
            };
            return because(
                Source,
                format!("its source allows {most} {what} at once, and so many are under way ({setting})"),
            );
        }
        if able.iter().all(|worker| worker.cordoned) {
            return because(
                WorkersCordoned,
                format!("every worker of the pool '{pool}' that could take it is cordoned"),
            );
        }
        let free = usize::try_from(self.limit).unwrap_or(0).saturating_sub(self.used);
        if free == 0 {
            return because(Limit, format!("all {} slots are in use (maxConcurrentJobs)", self.limit));
        }
        if able.iter().all(|worker| worker.cordoned || worker.free <= 0) {
            return because(
                WorkersBusy,
                format!("every worker of the pool '{pool}' that could take it has as many runs as it may"),
            );
        }
        match self.position(*id) {
            Some(position) if position <= free => None,
            _ => because(
                Limit,
                format!("{free} slots are free, and more runs than that are before it (maxConcurrentJobs)"),
            ),
        }
    }

    /// The workers that could take it, cordoned or busy ones too; or why there is none.
    fn able(&self, waiting: &Waiting) -> Result<Vec<&Claimant>, WaitingFor> {
        use WaitReason::{NoTool, NoWorker, OutOfReach};
        let because = |reason, message: String| Err(WaitingFor { reason, message });
        let pool = &waiting.pool;
        let of_pool: Vec<&Claimant> = self.workers.iter().filter(|worker| worker.pools.contains(pool)).collect();
        if of_pool.is_empty() {
            return because(
                NoWorker,
                format!("no worker of the pool '{pool}' runs: start one with DBACKUP_POOLS={pool}"),
            );
        }
        let engine = self.choosy.get(&waiting.source_id);
        let able: Vec<&Claimant> =
            of_pool.into_iter().filter(|worker| engine.is_none_or(|engine| worker.engines.contains(engine))).collect();
        if let (Some(engine), true) = (engine, able.is_empty()) {
            return because(
                NoTool,
                format!("no worker of the pool '{pool}' has the tools for {engine}: install them there"),
            );
        }
        let able: Vec<&Claimant> = able.into_iter().filter(|worker| self.reaches(worker, waiting)).collect();
        if able.is_empty() {
            return because(
                OutOfReach,
                format!(
                    "no worker of the pool '{pool}' that has its tools reaches all it needs: GET /api/cluster tells under outOfReach what is in the way"
                ),
            );
        }
        Ok(able)
    }

    fn reaches(&self, worker: &Claimant, waiting: &Waiting) -> bool {
        let within = |id: Uuid| !worker.out_of_reach.contains(&id);
        let copies = self.copies.get(&waiting.id);
        let stores = self.pinned.get(&waiting.id).or_else(|| self.stores.get(&waiting.job_id));
        let stored = match waiting.kind.as_str() {
            "Restore" => copies.is_none_or(|copies| copies.iter().any(|copy| within(copy.0))),
            _ => stores.is_none_or(|stores| stores.iter().all(|store| within(store.0))),
        };
        stored && within(waiting.source_id.0) && within(waiting.id.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The database's clock.
    const NOW: DateTime<Utc> = DateTime::UNIX_EPOCH;

    fn waiting() -> Waiting {
        Waiting {
            id: ExecutionId::new(),
            job_id: JobId::new(),
            kind: "Backup".to_owned(),
            source_id: SourceId::new(),
            pool: "default".to_owned(),
            serial: true,
            run_at: NOW,
            attempt: 0,
        }
    }

    fn idle_worker() -> Claimant {
        Claimant {
            pools: vec!["default".to_owned()],
            engines: vec!["postgres".to_owned()],
            out_of_reach: Vec::new(),
            cordoned: false,
            free: 4,
        }
    }

    /// An idle cluster where `waiting` is the first.
    fn idle(waiting: &Waiting) -> QueueSnapshot {
        QueueSnapshot {
            asked: Instant::now(),
            now: NOW,
            limit: 4,
            paused: false,
            used: 0,
            positions: [(waiting.id, 1)].into(),
            jobs: HashMap::new(),
            full: HashMap::new(),
            workers: vec![idle_worker()],
            choosy: HashMap::new(),
            stores: HashMap::new(),
            pinned: HashMap::new(),
            copies: HashMap::new(),
        }
    }

    #[test]
    fn what_holds_a_run_back_even_with_free_slots_is_told_before_the_limit() {
        let first = waiting();
        let backup = "Backup".to_owned();
        let mut queue = idle(&first);
        let reason = |queue: &QueueSnapshot| queue.waiting_for(&first).map(|waiting| waiting.reason);
        assert_eq!(reason(&queue), None, "about to be claimed");
        // From the weakest to the strongest: each hides those before it.
        queue.positions.clear();
        assert_eq!(reason(&queue), Some(WaitReason::Limit), "too many before it");
        queue.workers[0].free = 0;
        assert_eq!(reason(&queue), Some(WaitReason::WorkersBusy));
        queue.used = 4;
        assert_eq!(reason(&queue), Some(WaitReason::Limit));
        queue.workers[0].cordoned = true;
        assert_eq!(reason(&queue), Some(WaitReason::WorkersCordoned));
        queue.full.insert((first.source_id, backup.clone()), 2);
        assert_eq!(reason(&queue), Some(WaitReason::Source));
        queue.jobs.insert((first.job_id, backup), ExecutionId::new());
        assert_eq!(reason(&queue), Some(WaitReason::Job));
        queue.workers[0].out_of_reach.push(first.source_id.0);
        assert_eq!(reason(&queue), Some(WaitReason::OutOfReach));
        queue.choosy.insert(first.source_id, "mariadb".to_owned());
        assert_eq!(reason(&queue), Some(WaitReason::NoTool));
        queue.workers[0].pools.clear();
        assert_eq!(reason(&queue), Some(WaitReason::NoWorker));
        queue.paused = true;
        assert_eq!(reason(&queue), Some(WaitReason::Paused));
        let retry = Waiting { attempt: 1, run_at: NOW + Duration::from_secs(60), ..first.clone() };
        assert_eq!(queue.waiting_for(&retry).map(|waiting| waiting.reason), Some(WaitReason::Retry));
    }

    #[test]
    fn a_run_does_not_wait_for_itself_for_a_restore_or_when_runs_of_its_job_may_overlap() {
        let first = waiting();
        let mut queue = idle(&first);
        queue.jobs.insert((first.job_id, "Backup".to_owned()), first.id);
        assert_eq!(queue.waiting_for(&first), None, "its own lease of a moment ago");
        queue.jobs.insert((first.job_id, "Backup".to_owned()), ExecutionId::new());
        assert_eq!(queue.waiting_for(&Waiting { serial: false, ..first.clone() }), None);
        assert_eq!(queue.waiting_for(&Waiting { kind: "Restore".to_owned(), ..first.clone() }), None);
        assert!(queue.waiting_for(&first).is_some_and(|waiting| waiting.reason == WaitReason::Job));
    }

    #[test]
    fn a_cordoned_worker_that_has_the_tools_is_not_replaced_by_an_idle_one_that_has_not() {
        let first = waiting();
        let mut queue = idle(&first);
        queue.choosy.insert(first.source_id, "mariadb".to_owned());
        queue.workers.push(Claimant { engines: vec!["mariadb".to_owned()], cordoned: true, ..idle_worker() });
        let reason = queue.waiting_for(&first).map(|waiting| waiting.reason);
        assert_eq!(reason, Some(WaitReason::WorkersCordoned));
    }

    #[test]
    fn a_backup_needs_every_destination_within_reach_of_one_worker_and_a_restore_one_copy() {
        let (backup, stores) = (waiting(), vec![DestinationId::new(), DestinationId::new()]);
        let restore = Waiting { kind: "Restore".to_owned(), ..waiting() };
        let mut queue = idle(&backup);
        queue.positions.insert(restore.id, 2);
        queue.stores.insert(backup.job_id, stores.clone());
        queue.copies.insert(restore.id, stores.clone());
        let reasons =
            |queue: &QueueSnapshot| [&backup, &restore].map(|one| queue.waiting_for(one).map(|waiting| waiting.reason));
        assert_eq!(reasons(&queue), [None, None]);
        queue.workers[0].out_of_reach = vec![stores[0].0];
        queue.workers.push(Claimant { out_of_reach: vec![stores[1].0], ..idle_worker() });
        assert_eq!(reasons(&queue), [Some(WaitReason::OutOfReach), None], "each reaches another one");
        queue.workers[0].out_of_reach.push(stores[1].0);
        queue.workers[1].out_of_reach.push(stores[0].0);
        assert_eq!(reasons(&queue), [Some(WaitReason::OutOfReach); 2]);
        queue.workers.push(idle_worker());
        assert_eq!(reasons(&queue), [None, None]);
        // What its job goes to now is nothing to a run that keeps where it was to go.
        queue.workers.pop();
        queue.pinned.insert(backup.id, vec![DestinationId::new()]);
        assert_eq!(reasons(&queue), [None, Some(WaitReason::OutOfReach)]);
        queue.workers.iter_mut().for_each(|worker| worker.out_of_reach.push(queue.pinned[&backup.id][0].0));
        assert_eq!(reasons(&queue), [Some(WaitReason::OutOfReach); 2]);
    }
}
