//! One worker from start to drain.

use std::{sync::Arc, time::Duration};

use apalis::{layers::WorkerBuilderExt, prelude::*};
use common::{
    db::{ANSWER_TIMEOUT, Db, DbError},
    execution::ticker::Rescuer,
    freshness,
    id::SourceId,
    metrics,
    queue::Wakeups,
    seal::SealKey,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    backend::{Claimed, LeaseBackend},
    config::WorkerConfig,
    finisher::{self, Finisher},
    forgetter,
    keeper::Keeper,
    lease::Stop,
    notifier,
    pipeline::dump::Inspected,
    presence::Presence,
    reach, run, scheduler, sweeper, tester,
};

/// What every run of a worker uses.
#[derive(Clone)]
pub struct Shared {
    /// Its configuration.
    pub config: Arc<WorkerConfig>,
    /// The database.
    pub db: Db,
    /// Opens secrets.
    pub key: Arc<SealKey>,
    /// Tells the others.
    pub wakeups: Wakeups,
    /// Keeps the leases.
    pub keeper: Arc<Keeper>,
    /// Records the ends of runs.
    pub finisher: Finisher,
    /// Tells the cluster that this worker lives.
    pub presence: Arc<Presence>,
}

impl Shared {
    /// Notes which databases the server of a source has, beside the run: it does not wait for that, nor fail of it.
    pub fn note_inventory(&self, source: SourceId, inspected: &Inspected) {
        let (db, mut names) = (self.db.clone(), inspected.all_databases.clone());
        names.sort();
        tokio::spawn(async move {
            let noted = db.within(ANSWER_TIMEOUT, async |conn| freshness::saw(conn, source, &names).await).await;
            if let Err(error) = noted {
                tracing::debug!(%source, error = %common::error::Chain(&error), "the databases of a source could not be noted");
            }
        });
    }
}

/// Time between two tries of a run to reach the service's database.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// Asks the service's database for a run. While it is away the run waits: its lease may still be revived, and when it is
/// lost, or the run is stopped, this is dropped with the run.
pub async fn patiently<T, F>(ask: impl Fn() -> F) -> Result<T, DbError>
where
    F: Future<Output = Result<T, DbError>>,
{
    loop {
        match ask().await {
            Err(error) if error.is_passing() => tokio::time::sleep(ASK_AGAIN).await,
            answer => return answer,
        }
    }
}

/// Extra time after the drain for runs to clean up behind themselves.
const CLEAN_UP: Duration = Duration::from_secs(10);

/// Works until `stop`, then claims nothing more, lets runs go on for the drain time, gives the rest back, and
/// returns when the last one is recorded.
pub async fn serve(config: WorkerConfig, db: Db, key: Arc<SealKey>, wakeups: Wakeups, stop: CancellationToken) {
    let config = Arc::new(config);
    let end = CancellationToken::new();
    let keeper = match Keeper::start(db.clone(), config.timing, &wakeups, end.clone()) {
        Ok(keeper) => keeper,
        Err(error) => {
            tracing::error!(%error, "the worker could not start a thread");
            return;
        }
    };
    metrics::get().concurrency.inc_by(i64::try_from(config.concurrency).unwrap_or(i64::MAX));
    let presence = Presence::begin(config.clone(), db.clone(), &stop).await;
    let shared = Shared {
        config: config.clone(),
        db: db.clone(),
        key,
        wakeups: wakeups.clone(),
        keeper: keeper.clone(),
        finisher: finisher::start(&db),
        presence: presence.clone(),
    };
    // Until the end and not until the stop: it lives while it drains.
    tokio::spawn(end.clone().run_until_cancelled_owned(presence.clone().keep(stop.clone())));
    stop.run_until_cancelled(reach::begin(&shared)).await;
    tokio::spawn(stop.clone().run_until_cancelled_owned(reach::run(shared.clone())));
    let rescuer = Rescuer::start(db.clone(), config.timing, wakeups.clone(), stop.clone());
    tokio::spawn(stop.clone().run_until_cancelled_owned(scheduler::run(db.clone(), config.timing, wakeups.clone())));
    tokio::spawn(stop.clone().run_until_cancelled_owned(sweeper::run(shared.clone())));
    tokio::spawn(stop.clone().run_until_cancelled_owned(forgetter::run(shared.clone())));
    tokio::spawn(stop.clone().run_until_cancelled_owned(tester::run(shared.clone())));
    tokio::spawn(end.clone().run_until_cancelled_owned(notifier::run(shared.clone())));
    tracing::info!(
        worker = config.name, concurrency = config.concurrency, pools = ?config.pools,
        lease_ms = config.timing.lease.as_millis(), "the worker claims executions"
    );

    let (backend, claimer) = LeaseBackend::start(shared.clone(), rescuer, stop.clone());
    let worker = WorkerBuilder::new(config.name.as_str())
        .backend(backend)
        .concurrency(config.concurrency)
        .catch_panic()
        .data(shared.clone())
        .build(handle);
    let signal = {
        let stop = stop.clone();
        async move {
            stop.cancelled().await;
            Ok::<(), std::io::Error>(())
        }
    };
    let running = tokio::spawn(worker.run_until(signal));
    stop.cancelled().await;
    drain(&shared, &claimer).await;
    end.cancel();
    presence.end().await;
    running.abort();
    tracing::info!(worker = config.name, "the worker stopped");
}

async fn handle(claimed: Claimed, shared: Data<Shared>) -> Result<(), BoxDynError> {
    // A task of its own: apalis drops its futures when it stops, and a run must still record its end.
    let lease = claimed.lease.clone();
    let ended = tokio::spawn(run::run((*shared).clone(), claimed)).await;
    if ended.is_err() {
        // Its lease would be kept alive for ever, and the execution stay in Running.
        run::abandon(&shared, &lease).await;
    }
    ended.map_err(Into::into)
}

/// Waits for the runs; those that need longer than the drain time are given back. A claim that was under way comes first: it
/// would hold its lease until that runs out, which counts as a lost worker.
async fn drain(shared: &Shared, claimer: &JoinHandle<()>) {
    let runs = shared.keeper.all().len();
    if runs > 0 {
        tracing::info!(runs, "waiting at most {} s for runs to end", shared.config.drain.as_secs());
    }
    if tokio::time::timeout(shared.config.drain, all_gone(shared, claimer)).await.is_ok() {
        return;
    }
    for lease in shared.keeper.all() {
        lease.stop(Stop::Released);
    }
    if tokio::time::timeout(CLEAN_UP, all_gone(shared, claimer)).await.is_err() {
        for lease in shared.keeper.all() {
            tracing::warn!(parent: &lease.log(), execution = %lease.claim.execution, "not recorded in time; its lease runs out and another worker takes it");
            lease.cut();
        }
    }
}

async fn all_gone(shared: &Shared, claimer: &JoinHandle<()>) {
    while !claimer.is_finished() || !shared.keeper.all().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
