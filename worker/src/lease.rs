//! The lease of a run, as the run sees it: how far it is, whether it must stop, and what dies with it.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use common::execution::{Stage, claim::Claim, lease::Progress};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Why a run must stop before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The lease is lost or about to be: nothing more may be written.
    Lost,
    /// Somebody asked.
    Cancelled,
    /// Longer than the job allows.
    TimedOut,
    /// The process stops.
    Released,
}

/// Process groups that die with what started them.
#[derive(Debug, Default)]
pub struct ProcessGroups(Mutex<Groups>);

#[derive(Debug, Default)]
struct Groups {
    alive: BTreeSet<i32>,
    closed: bool,
}

impl ProcessGroups {
    /// Takes a group in; `false` when it is too late, and the caller must kill it.
    #[must_use]
    pub fn add(&self, group: i32) -> bool {
        let mut groups = lock(&self.0);
        if groups.closed {
            return false;
        }
        groups.alive.insert(group)
    }

    /// Forgets a group whose leader was reaped.
    pub fn remove(&self, group: i32) {
        lock(&self.0).alive.remove(&group);
    }

    /// Sends a signal to every group.
    pub fn signal(&self, signal: Signal) {
        for group in &lock(&self.0).alive {
            // ESRCH: it ended by itself.
            let _ = killpg(Pid::from_raw(*group), signal);
        }
    }

    /// Kills every group, and every one that is added later.
    pub fn kill(&self) {
        lock(&self.0).closed = true;
        self.signal(Signal::SIGKILL);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A claim that is kept alive.
#[derive(Debug)]
pub struct Lease {
    /// What was claimed.
    pub claim: Claim,
    /// Child processes of the run.
    pub groups: ProcessGroups,
    stop: CancellationToken,
    reason: OnceLock<Stop>,
    progress: Mutex<(Stage, i16)>,
    changed: std::sync::atomic::AtomicBool,
    /// When the newest acknowledged heartbeat was *sent*: only from then on is the lease known to last.
    acknowledged: watch::Sender<Instant>,
}

impl Lease {
    /// A lease whose claim was sent at `sent`.
    pub fn new(claim: Claim, sent: Instant) -> Self {
        Self {
            claim,
            groups: ProcessGroups::default(),
            stop: CancellationToken::new(),
            reason: OnceLock::new(),
            progress: Mutex::new((Stage::Initializing, 0)),
            changed: false.into(),
            acknowledged: watch::channel(sent).0,
        }
    }

    /// Stops the run; the first reason stays.
    pub fn stop(&self, reason: Stop) {
        let _ = self.reason.set(reason);
        self.stop.cancel();
    }

    /// Stops the run and kills its children here and now, on the caller's thread.
    pub fn cut(&self) {
        let _ = self.reason.set(Stop::Lost);
        self.groups.kill();
        self.stop.cancel();
    }

    /// Waits until the run must stop, and says why.
    pub async fn stopped(&self) -> Stop {
        self.stop.cancelled().await;
        self.reason.get().copied().unwrap_or(Stop::Lost)
    }

    /// Why the run must stop, if it must.
    pub fn stop_reason(&self) -> Option<Stop> {
        self.stop.is_cancelled().then(|| self.reason.get().copied().unwrap_or(Stop::Lost))
    }

    /// Notes where the bytes are.
    pub fn set_stage(&self, stage: Stage) {
        let mut progress = lock(&self.progress);
        if progress.0 != stage {
            progress.0 = stage;
            self.changed.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Notes how far it is, 0 to 99; never goes back.
    pub fn set_percent(&self, percent: i16) {
        let mut progress = lock(&self.progress);
        if percent.clamp(0, 99) > progress.1 {
            progress.1 = percent.clamp(0, 99);
            self.changed.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Where the bytes are.
    pub fn stage(&self) -> Stage {
        lock(&self.progress).0
    }

    /// What the next heartbeat tells.
    pub fn progress(&self) -> Progress {
        let (stage, percent) = *lock(&self.progress);
        Progress { token: self.claim.token, stage, percent }
    }

    /// Whether stage or percent changed since the last call.
    pub fn take_changed(&self) -> bool {
        self.changed.swap(false, std::sync::atomic::Ordering::Relaxed)
    }

    /// Whether stage or percent changed since [`Lease::take_changed`].
    pub fn has_changed(&self) -> bool {
        self.changed.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// A heartbeat sent at `sent` was acknowledged.
    pub fn acknowledge(&self, sent: Instant) {
        self.acknowledged.send_if_modified(|last| {
            let newer = sent > *last;
            *last = sent.max(*last);
            newer
        });
    }

    /// When the run's activity must end unless another heartbeat is acknowledged.
    pub fn fence_at(&self, fence: Duration) -> Instant {
        *self.acknowledged.borrow() + fence
    }

    /// Waits for a heartbeat that was sent after `since`.
    pub async fn acknowledged_after(&self, since: Instant) {
        let mut acknowledged = self.acknowledged.subscribe();
        let _ = acknowledged.wait_for(|sent| *sent >= since).await;
    }
}
