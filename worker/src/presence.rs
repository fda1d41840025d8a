//! The presence of a worker in the cluster: a row that says what it is and which tools it has, and a beat that says that
//! it lives. Apart from the heartbeats of its runs: those decide over leases, this one over nothing but a view and who
//! may leave a run to whom.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use common::{
    db::{Db, DbError},
    error::Chain,
    execution::claim::Claimant,
    id::WorkerId,
    source::Engine,
    worker::{self, Registration, Tool},
};
use tokio_util::sync::CancellationToken;

use crate::{config::WorkerConfig, pipeline::dump::tools, reach::Reach};

/// Longest time of a beat.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time of the last word: a stop does not wait for a database that is away.
const FAREWELL: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub struct Presence {
    /// What it cannot serve.
    pub reach: Reach,
    id: WorkerId,
    config: Arc<WorkerConfig>,
    db: Db,
    kit: Mutex<Kit>,
}

/// What it has, as last seen.
#[derive(Clone, Debug, Default)]
struct Kit {
    files: Vec<(PathBuf, Option<SystemTime>)>,
    engines: Vec<Engine>,
    tools: Vec<Tool>,
}

impl Presence {
    /// Registers the worker, however long that takes, or until `stop`. To be done before the first claim: a cordon of its
    /// name holds for it too.
    pub async fn begin(config: Arc<WorkerConfig>, db: Db, stop: &CancellationToken) -> Arc<Self> {
        let presence =
            Arc::new(Self { reach: Reach::default(), id: WorkerId::new(), config, db, kit: Mutex::default() });
        presence.look_at_tools().await;
        while !stop.is_cancelled() && !presence.registers().await {
            stop.run_until_cancelled(tokio::time::sleep(presence.config.timing.poll)).await;
        }
        presence
    }

    /// Beats for ever, and tells from `stop` on that the worker drains.
    pub async fn keep(self: Arc<Self>, stop: CancellationToken) {
        let (mut told, mut cordoned) = (true, false);
        loop {
            told &= !self.look_at_tools().await;
            told &= !self.reach.take_untold();
            told = told || self.registers().await;
            told &= self.beat(stop.is_cancelled(), &mut cordoned).await;
            tokio::select! {
                () = tokio::time::sleep(self.config.timing.ticker.mul_f64(rand::random_range(0.75..1.25))) => {}
                () = stop.cancelled(), if !stop.is_cancelled() => {}
            }
        }
    }

    /// Tells that the worker has ended.
    pub async fn end(&self) {
        let leave = async {
            // Any connection of the pool may be broken since its last use, after a failover all of them are: another each time.
            while let Err(error) = self.db.within(FAREWELL, async |conn| worker::leave(conn, self.id).await).await {
                tracing::debug!(error = %Chain(&error), "the worker could not take its leave yet");
                tokio::time::sleep(FAREWELL / 20).await;
            }
        };
        if tokio::time::timeout(FAREWELL, leave).await.is_err() {
            tracing::debug!("the worker could not take its leave; it is forgotten by time");
        }
    }

    /// As whom the worker claims.
    pub fn claimant(&self) -> Claimant {
        Claimant {
            id: self.id,
            name: self.config.name.clone(),
            pools: self.config.pools.clone(),
            engines: self.kit().engines.clone(),
            out_of_reach: self.reach.out_of_reach().into_keys().collect(),
        }
    }

    fn kit(&self) -> std::sync::MutexGuard<'_, Kit> {
        self.kit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks whether the tools changed; only then are they asked for their versions.
    async fn look_at_tools(&self) -> bool {
        let files = tools::files(&self.config);
        if files == self.kit().files {
            return false;
        }
        // What it can dump counts for the next claim already, however long the versions take.
        self.kit().engines = tools::engines(&self.config);
        self.reach.other_tools();
        let tools = tools::inventory(&self.config).await;
        let mut kit = self.kit();
        (kit.files, kit.tools) = (files, tools);
        true
    }

    /// Whether what it is now could be written down.
    async fn registers(&self) -> bool {
        let registered = self.register().await;
        if let Err(error) = &registered {
            tracing::warn!(error = %Chain(error), "the worker could not register; trying again");
        }
        registered.is_ok()
    }

    /// Writes down what it is now.
    pub async fn register(&self) -> Result<(), DbError> {
        let Kit { engines, tools, .. } = self.kit().clone();
        let registration = Registration {
            id: self.id,
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION"),
            host: crate::config::host(),
            pools: self.config.pools.clone(),
            concurrency: self.config.concurrency,
            engines,
            tools,
            out_of_reach: self.reach.out_of_reach(),
            gone_after: self.config.timing.lease,
        };
        let registered = self.db.within(TIMEOUT, async |conn| worker::register(conn, &registration).await).await?;
        if registered.namesakes > 0 {
            tracing::warn!(
                worker = self.config.name,
                "another worker of this name was seen a moment ago: if it still runs, give them different names (DBACKUP_WORKER_NAME)"
            );
        }
        Ok(())
    }

    /// Whether the row is there and tells what is.
    async fn beat(&self, draining: bool, cordoned: &mut bool) -> bool {
        match self.db.within(TIMEOUT, async |conn| worker::beat(conn, self.id, draining).await).await {
            Ok(Some(now)) => {
                if std::mem::replace(cordoned, now) != now {
                    let now = if now { "cordoned: it claims nothing more" } else { "no longer cordoned" };
                    tracing::info!(worker = self.config.name, "the worker is {now}");
                }
                true
            }
            // It was away for so long that it was forgotten.
            Ok(None) => false,
            Err(error) => {
                tracing::debug!(error = %Chain(&error), "a beat of the worker failed");
                true
            }
        }
    }
}
