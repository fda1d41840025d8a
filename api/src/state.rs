//! What every handler uses.

use std::{ops::Deref, path::PathBuf, sync::Arc, time::Duration};

use common::{
    audit::{self, Actor, Event},
    cluster::Queue,
    db::{ANSWER_TIMEOUT, Db, DbError},
    execution::summary::Summary,
    queue::Wakeups,
    seal::SealKey,
};
use ipnet::IpNet;
use sqlx::{Connection, PgConnection};
use tokio::sync::Semaphore;

use crate::{
    auth::{Caller, memory::Memory, strangers::Strangers},
    config::ApiConfig,
    enqueuer::{self, Enqueuer},
    error::ApiError,
    one_asks::Lately,
    rate_limit::RateLimiter,
    reason::Reasons,
    server::Stop,
    waiting::LastKnown,
    watch::Watcher,
};

/// Shared by all requests of a process. Every layer that a request passes clones it.
#[derive(Clone)]
pub struct AppState(Arc<Shared>);

impl Deref for AppState {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// What [`AppState`] gives access to.
pub struct Shared {
    /// The database.
    pub db: Db,
    /// Name of the instance: see [`common::seal::instance_name`].
    pub instance: Arc<str>,
    /// Passwords that are hashed at once, at most: each takes 19 MiB and a core.
    pub hashing: Arc<Semaphore>,
    /// Seals and opens secrets.
    pub key: Arc<SealKey>,
    /// Tells the workers.
    pub wakeups: Wakeups,
    /// Groups triggers that arrive together.
    pub enqueuer: Enqueuer,
    /// What is remembered of keys and settings.
    pub memory: Arc<Memory>,
    /// Who tries keys that nobody has.
    pub strangers: Strangers,
    /// Counts requests.
    pub rate_limiter: Arc<RateLimiter>,
    /// Proxies whose word about the client's address counts.
    pub trusted_proxies: Arc<[IpNet]>,
    /// Folders under which local destinations may lie.
    pub local_paths: Arc<[PathBuf]>,
    /// Polls that are held at once, at most.
    pub held: Arc<Semaphore>,
    /// Downloads that are sent at once, at most.
    pub downloads: Arc<Semaphore>,
    /// Executions that clients wait for.
    pub watcher: Watcher,
    /// States for when the database is away.
    pub known: Arc<LastKnown>,
    /// Places in the queue, and why executions wait.
    pub reasons: Reasons,
    /// How much waits.
    pub depth: Arc<Lately<Arc<Queue>>>,
    /// How backups went of late.
    pub summary: Arc<Lately<Arc<Summary>>>,
    /// How far its stop has come.
    pub stop: Stop,
}

/// Polls that a process holds at once.
const MOST_HELD: usize = 1_000;
/// Downloads that a process sends at once: each holds up to 32 MiB of an object in a bucket.
const MOST_DOWNLOADS: usize = 8;
/// Passwords that a process hashes at once.
const MOST_HASHING: usize = 2;
/// Time between two records of keys' last uses.
const RECORD_USES: Duration = Duration::from_secs(5);

impl AppState {
    /// Starts what runs beside the requests.
    pub fn start(
        config: &ApiConfig,
        instance: String,
        db: Db,
        key: Arc<SealKey>,
        wakeups: Wakeups,
        stop: Stop,
    ) -> Self {
        let memory = Arc::new(Memory::new(db.clone()));
        let closing = &stop.closing;
        let reasons = Reasons::new(db.clone());
        tokio::spawn(closing.clone().run_until_cancelled_owned(record_uses(memory.clone())));
        Self(Arc::new(Shared {
            enqueuer: enqueuer::start(&db, wakeups.clone()),
            instance: instance.clone().into(),
            hashing: Arc::new(Semaphore::new(MOST_HASHING)),
            rate_limiter: Arc::new(RateLimiter::start(instance, config.redis.as_ref(), closing.clone())),
            trusted_proxies: config.trusted_proxies.clone().into(),
            local_paths: config.local_paths.clone().into(),
            strangers: Strangers::default(),
            held: Arc::new(Semaphore::new(MOST_HELD)),
            downloads: Arc::new(Semaphore::new(MOST_DOWNLOADS)),
            watcher: Watcher::start(db.clone(), reasons.clone(), wakeups.clone(), closing.clone()),
            known: Arc::default(),
            reasons,
            depth: Arc::default(),
            summary: Arc::default(),
            memory,
            db,
            key,
            wakeups,
            stop,
        }))
    }

    /// Asks the database, within the time that a client waits anyway.
    pub async fn ask<T>(
        &self,
        ask: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, ApiError> {
        self.db.within(ANSWER_TIMEOUT, ask).await.map_err(ApiError::from)
    }

    /// Changes something, and writes the audit log in the same transaction: neither is there without the other. A
    /// change without an event is rolled back.
    pub async fn change<T>(
        &self,
        caller: &Caller,
        change: impl AsyncFnOnce(&mut PgConnection) -> Result<(T, Option<Event>), sqlx::Error>,
    ) -> Result<T, ApiError> {
        Ok(self.try_change(caller, change).await?)
    }

    /// As [`AppState::change`], for those that answer some failures of the database themselves.
    pub async fn try_change<T>(
        &self,
        caller: &Caller,
        change: impl AsyncFnOnce(&mut PgConnection) -> Result<(T, Option<Event>), sqlx::Error>,
    ) -> Result<T, DbError> {
        self.change_by(&caller.actor(), change).await
    }

    /// As [`AppState::try_change`], by somebody who is no caller yet.
    pub async fn change_by<T>(
        &self,
        actor: &Actor,
        change: impl AsyncFnOnce(&mut PgConnection) -> Result<(T, Option<Event>), sqlx::Error>,
    ) -> Result<T, DbError> {
        let ask = async |conn: &mut PgConnection| {
            let mut tx = conn.begin().await?;
            let (done, event) = change(&mut tx).await?;
            if event.is_some() {
                audit::record(&mut tx, actor, event.as_slice()).await?;
                tx.commit().await?;
            }
            Ok(done)
        };
        self.db.within(ANSWER_TIMEOUT, ask).await
    }
}

async fn record_uses(memory: Arc<Memory>) {
    loop {
        tokio::time::sleep(RECORD_USES).await;
        memory.record_uses().await;
    }
}
