//! Keeps the leases of a process: one heartbeat for all of them, on a connection and a task of its own.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use common::{
    config::Timing,
    db::Db,
    execution::{
        claim::Token,
        lease::{Progress, heartbeat},
    },
    metrics,
    queue::{Notice, Wakeups},
};
use sqlx::PgConnection;
use tokio::sync::{Notify, broadcast::error::RecvError};
use tokio_util::sync::CancellationToken;

use crate::{
    fence::Fence,
    lease::{Lease, Stop},
};

/// Progress is told at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// All leases of a process.
#[derive(Debug)]
pub struct Keeper {
    leases: Mutex<HashMap<Token, Arc<Lease>>>,
    fence: Fence,
    hurry: Notify,
    timing: Timing,
}

impl Keeper {
    /// Starts the heartbeat, which goes on until `end`: that is after the drain, not at its beginning.
    pub fn start(db: Db, timing: Timing, wakeups: &Wakeups, end: CancellationToken) -> std::io::Result<Arc<Self>> {
        let keeper = Arc::new(Self { leases: Mutex::default(), fence: Fence::start()?, hurry: Notify::new(), timing });
        tokio::spawn(end.clone().run_until_cancelled_owned(keeper.clone().beat(db, wakeups.clone())));
        tokio::spawn(end.run_until_cancelled_owned(keeper.clone().hear_cancels(wakeups.clone())));
        Ok(keeper)
    }

    fn leases(&self) -> MutexGuard<'_, HashMap<Token, Arc<Lease>>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a lease in.
    pub fn keep(&self, lease: &Arc<Lease>) {
        self.fence.watch(lease);
        if self.leases().insert(lease.claim.token, lease.clone()).is_none() {
            metrics::get().running.inc();
        }
    }

    /// Lets a lease go: its run is recorded, or lost.
    pub fn drop_lease(&self, token: Token) {
        if self.leases().remove(&token).is_some() {
            metrics::get().running.dec();
        }
    }

    /// Every lease that is kept.
    pub fn all(&self) -> Vec<Arc<Lease>> {
        self.leases().values().cloned().collect()
    }

    /// Waits for a heartbeat that is sent now and acknowledged: what must stand between the last byte and the
    /// moment a backup becomes visible. Ends early when the lease is lost.
    pub async fn confirm(&self, lease: &Lease) -> Result<(), Stop> {
        let since = Instant::now();
        self.hurry.notify_one();
        tokio::select! {
            biased;
            stop = lease.stopped() => Err(stop),
            () = lease.acknowledged_after(since) => Ok(()),
        }
    }

    async fn beat(self: Arc<Self>, db: Db, wakeups: Wakeups) {
        let mut conn: Option<PgConnection> = None;
        let mut last;
        let mut silence = Silence::default();
        loop {
            let leases = self.all();
            // Not short-circuited: every flag must be taken.
            let changed = leases.iter().filter(|l| l.take_changed()).count() > 0;
            let runs: Vec<Progress> = leases.iter().map(|l| l.progress()).collect();
            if !runs.is_empty() {
                let sent = Instant::now();
                let asked =
                    tokio::time::timeout(self.timing.heartbeat_timeout, ask(&db, &mut conn, self.timing.lease, &runs))
                        .await;
                match asked {
                    Ok(Ok(alive)) => {
                        metrics::get().heartbeats.inc();
                        silence.over();
                        self.learn(&leases, &alive, sent);
                        if changed {
                            wakeups.tell(Notice::Changed(leases.iter().map(|l| l.claim.execution).collect()));
                        }
                    }
                    Ok(Err(error)) => {
                        metrics::get().heartbeats_missed.inc();
                        silence.goes_on(runs.len(), &error);
                        conn = None;
                        // Sooner than the next one is due: the fence does not wait.
                        tokio::time::sleep(self.timing.heartbeat / 8).await;
                        continue;
                    }
                    Err(_) => {
                        metrics::get().heartbeats_missed.inc();
                        silence.goes_on(runs.len(), &"no answer in time");
                        conn = None;
                        continue;
                    }
                }
                last = sent;
            } else {
                last = Instant::now();
            }
            self.pause(last).await;
        }
    }

    /// Until the next heartbeat is due, or progress is worth telling, or somebody waits for a confirmation.
    async fn pause(&self, last: Instant) {
        let due = last + self.timing.heartbeat;
        let step = PROGRESS_INTERVAL.min(self.timing.heartbeat);
        loop {
            let now = Instant::now();
            if now >= due {
                tokio::select! { () = tokio::time::sleep(Duration::from_millis(10)) => {}, () = self.hurry.notified() => {} }
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(step.min(due - now)) => {
                    if self.all().iter().any(|l| l.has_changed()) { return }
                }
                () = self.hurry.notified() => return,
            }
        }
    }

    fn learn(&self, leases: &[Arc<Lease>], alive: &[common::execution::lease::Alive], sent: Instant) {
        for lease in leases {
            match alive.iter().find(|a| a.token == lease.claim.token) {
                Some(answer) => {
                    lease.acknowledge(sent);
                    if answer.cancel_requested {
                        lease.stop(Stop::Cancelled);
                    }
                }
                // Its end may have been committed while the answer to that is on its way. The record tells of a loss, too.
                None if lease.is_being_recorded() => {}
                None => {
                    tracing::error!(
                        parent: &lease.log(), execution = %lease.claim.execution, token = %lease.claim.token,
                        "the lease was lost: the run was ended, since another worker may have it"
                    );
                    lease.cut();
                }
            }
        }
    }

    async fn hear_cancels(self: Arc<Self>, wakeups: Wakeups) {
        let mut notices = wakeups.subscribe();
        loop {
            match notices.recv().await {
                Ok(Notice::Cancel(ids)) => {
                    for lease in self.all().into_iter().filter(|l| ids.contains(&l.claim.execution)) {
                        lease.stop(Stop::Cancelled);
                    }
                }
                // A missed notice comes with the next heartbeat.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
    }
}

/// Heartbeats that fail one after the other are told once, and then when they are answered again.
#[derive(Default)]
struct Silence(Option<Instant>);

impl Silence {
    fn goes_on(&mut self, runs: usize, why: &dyn std::fmt::Display) {
        if self.0.is_none() {
            tracing::warn!(runs, error = %why, "a heartbeat failed; trying again until one is answered");
            self.0 = Some(Instant::now());
        }
    }

    fn over(&mut self) {
        if let Some(since) = self.0.take() {
            tracing::info!(after_ms = since.elapsed().as_millis(), "heartbeats are answered again");
        }
    }
}

async fn ask(
    db: &Db,
    conn: &mut Option<PgConnection>,
    lease: Duration,
    runs: &[Progress],
) -> Result<Vec<common::execution::lease::Alive>, sqlx::Error> {
    let conn = match conn {
        Some(conn) => conn,
        None => conn.insert(db.connect_apart().await?),
    };
    heartbeat(conn, lease, runs).await
}
