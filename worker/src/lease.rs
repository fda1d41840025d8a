//! The lease of a run, as the run sees it: how far it is, whether it must stop, and what dies with it.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use common::{
    execution::{Stage, claim::Claim, lease::Progress},
    metrics,
    telemetry::{
        Span,
        span::{SpanContext, SpanKind},
    },
};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::trace::RunTrace;

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
    allowed: Allowed,
}

/// What the groups may do, those that are added later too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Allowed {
    #[default]
    Run,
    StandStill,
    Nothing,
}

impl ProcessGroups {
    /// Takes a group in; `false` when it is too late, and the caller must kill it.
    #[must_use]
    pub fn add(&self, group: i32) -> bool {
        let mut groups = lock(&self.0);
        match groups.allowed {
            Allowed::Nothing => return false,
            Allowed::StandStill => send(group, Signal::SIGSTOP),
            Allowed::Run => {}
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
            send(*group, signal);
        }
    }

    /// Kills every group, and every one that is added later.
    pub fn kill(&self) {
        self.allow(Allowed::Nothing, Signal::SIGKILL);
    }

    /// Has every group stand still, and every one that is added later.
    fn freeze(&self) {
        self.allow(Allowed::StandStill, Signal::SIGSTOP);
    }

    /// Lets the groups go on.
    fn thaw(&self) {
        self.allow(Allowed::Run, Signal::SIGCONT);
    }

    fn allow(&self, allowed: Allowed, signal: Signal) {
        let mut groups = lock(&self.0);
        // What is dead stays dead.
        if groups.allowed != Allowed::Nothing || allowed == Allowed::Nothing {
            groups.allowed = allowed;
            groups.alive.iter().for_each(|group| send(*group, signal));
        }
    }
}

fn send(group: i32, signal: Signal) {
    // ESRCH: it ended by itself.
    let _ = killpg(Pid::from_raw(group), signal);
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
    recording: std::sync::atomic::AtomicBool,
    progress: Mutex<(Stage, i16)>,
    bytes: std::sync::atomic::AtomicU64,
    pace: Mutex<Pace>,
    changed: std::sync::atomic::AtomicBool,
    /// When the newest acknowledged heartbeat was *sent*: only from then on is the lease known to last.
    acknowledged: watch::Sender<Instant>,
    /// How long after that the run may be active.
    fence: Duration,
    /// Since when the run stands still, and how long it may.
    frozen: watch::Sender<Option<Instant>>,
    most_frozen: Mutex<Duration>,
    trace: OnceLock<RunTrace>,
}

/// How fast a run reads, as far as it was told.
#[derive(Clone, Copy, Debug)]
struct Pace {
    at: Instant,
    bytes: u64,
    per_second: Option<u64>,
}

/// Shortest time over which a pace is told.
const PACE_OVER: Duration = Duration::from_millis(900);

/// What the fence made of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fenced {
    /// It goes on, until then at least.
    Active(Instant),
    /// It stands still now.
    Froze,
    /// It stands still, until then at most.
    Frozen(Instant),
    /// It is over: it stood still for too long.
    Cut,
}

impl Lease {
    /// A lease whose claim was sent at `sent`: its run may be active for `fence` after that and after each acknowledged
    /// heartbeat, and then stands still for `most_frozen` before it ends.
    pub fn new(claim: Claim, sent: Instant, fence: Duration, most_frozen: Duration) -> Self {
        Self {
            claim,
            groups: ProcessGroups::default(),
            stop: CancellationToken::new(),
            reason: OnceLock::new(),
            recording: false.into(),
            progress: Mutex::new((Stage::Initializing, 0)),
            bytes: 0.into(),
            pace: Mutex::new(Pace { at: Instant::now(), bytes: 0, per_second: None }),
            changed: false.into(),
            acknowledged: watch::channel(sent).0,
            fence,
            frozen: watch::channel(None).0,
            most_frozen: Mutex::new(most_frozen),
            trace: OnceLock::new(),
        }
    }

    /// The run's trace, once it is known what the claim is about.
    pub fn trace(&self) -> Option<&RunTrace> {
        self.trace.get()
    }

    /// See [`Lease::trace`]; the first one stays.
    pub fn set_trace(&self, trace: RunTrace) {
        let _ = self.trace.set(trace);
    }

    /// A span of the run.
    pub fn span(&self, kind: SpanKind, name: &'static str) -> Span {
        match self.trace() {
            Some(trace) => trace.span(kind, name),
            None => Span::child(&SpanContext::NONE, kind, name),
        }
    }

    /// Where lines of the log about the run are told, whoever tells them.
    pub fn log(&self) -> tracing::Span {
        self.trace().map_or_else(tracing::Span::none, |trace| trace.log().clone())
    }

    /// Stops the run; the first reason stays.
    pub fn stop(&self, reason: Stop) {
        let _ = self.reason.set(reason);
        self.stop.cancel();
    }

    /// Stops the run and kills its children here and now, on the caller's thread.
    pub fn cut(&self) {
        self.note_loss();
        self.groups.kill();
        self.stop.cancel();
    }

    /// Counts a lost lease once, unless the run was stopped for another reason before.
    pub fn note_loss(&self) {
        if self.reason.set(Stop::Lost).is_ok() {
            metrics::get().leases_lost.inc();
        }
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

    /// The run is over, and its end is being recorded from now on: whether that was in time, the record itself tells.
    pub fn begin_record(&self) {
        self.recording.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// See [`Lease::begin_record`].
    pub fn is_being_recorded(&self) -> bool {
        self.recording.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Notes where the bytes are.
    pub fn set_stage(&self, stage: Stage) {
        let mut progress = lock(&self.progress);
        if progress.0 != stage {
            progress.0 = stage;
            self.changed.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Counts bytes that were read, by which `done` of `of` are: the percentage is 0 to 99 and never goes back.
    pub fn count(&self, bytes: usize, done: u64, of: u64) {
        self.bytes.fetch_add(bytes as u64, std::sync::atomic::Ordering::Relaxed);
        let percent = i16::try_from(done.saturating_mul(100) / of.max(1)).unwrap_or(99).min(99);
        let mut progress = lock(&self.progress);
        if percent > progress.1 {
            progress.1 = percent;
            self.changed.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn bytes_per_second(&self, bytes: u64) -> Option<u64> {
        let mut pace = lock(&self.pace);
        let (now, over) = (Instant::now(), pace.at.elapsed());
        if over >= PACE_OVER {
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "for people"
            )]
            let per_second = ((bytes - pace.bytes) as f64 / over.as_secs_f64()) as u64;
            *pace = Pace { at: now, bytes, per_second: (bytes > 0).then_some(per_second) };
        }
        pace.per_second
    }

    /// Where the bytes are.
    pub fn stage(&self) -> Stage {
        lock(&self.progress).0
    }

    /// What the next heartbeat tells.
    pub fn progress(&self) -> Progress {
        let (stage, percent) = *lock(&self.progress);
        let bytes = self.bytes.load(std::sync::atomic::Ordering::Relaxed);
        Progress { token: self.claim.token, stage, percent, bytes, bytes_per_second: self.bytes_per_second(bytes) }
    }

    /// Whether stage or percent changed since the last call.
    pub fn take_changed(&self) -> bool {
        self.changed.swap(false, std::sync::atomic::Ordering::Relaxed)
    }

    /// Whether stage or percent changed since [`Lease::take_changed`].
    pub fn has_changed(&self) -> bool {
        self.changed.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// A heartbeat sent at `sent` was acknowledged: a run that stands still goes on.
    pub fn acknowledge(&self, sent: Instant) {
        self.acknowledged.send_if_modified(|last| {
            let newer = sent > *last;
            *last = sent.max(*last);
            newer
        });
        self.frozen.send_if_modified(|frozen| {
            // Under the lock of `enforce`. An answer that was long on its way proves nothing about now.
            let Some(since) = frozen.filter(|_| self.falls_at() > Instant::now()) else { return false };
            self.groups.thaw();
            tracing::warn!(
                parent: &self.log(), execution = %self.claim.execution, token = %self.claim.token, frozen_ms = since.elapsed().as_millis(),
                "the lease was revived: the run goes on"
            );
            *frozen = None;
            true
        });
    }

    /// When the run's activity must end unless another heartbeat is acknowledged.
    fn falls_at(&self) -> Instant {
        *self.acknowledged.borrow() + self.fence
    }

    /// Stops the run's activity here and now, on the caller's thread, when its time is up.
    pub fn enforce(&self, now: Instant) -> Fenced {
        let mut fenced = Fenced::Cut;
        self.frozen.send_if_modified(|frozen| {
            let falls_at = self.falls_at();
            fenced = match *frozen {
                None if falls_at > now => Fenced::Active(falls_at),
                None if self.most_frozen().is_zero() => Fenced::Cut,
                None => {
                    metrics::get().freezes.inc();
                    self.groups.freeze();
                    *frozen = Some(now);
                    Fenced::Froze
                }
                Some(since) if since + self.most_frozen() > now => Fenced::Frozen(since + self.most_frozen()),
                Some(_) => Fenced::Cut,
            };
            fenced == Fenced::Froze
        });
        if fenced == Fenced::Cut {
            self.cut();
        }
        fenced
    }

    fn most_frozen(&self) -> Duration {
        *lock(&self.most_frozen)
    }

    /// The run cannot stand still for longer than this: something it is connected to would give it up.
    pub fn limit_freeze(&self, most: Duration) {
        let mut most_frozen = lock(&self.most_frozen);
        *most_frozen = most.min(*most_frozen);
    }

    /// Waits until the run stands still, and gives since when.
    pub async fn frozen(&self) -> Instant {
        let mut frozen = self.frozen.subscribe();
        let since = frozen.wait_for(Option::is_some).await.ok().and_then(|frozen| *frozen);
        since.unwrap_or_else(Instant::now)
    }

    /// Waits until the run may be active.
    pub async fn thawed(&self) {
        let _ = self.frozen.subscribe().wait_for(Option::is_none).await;
    }

    /// Waits for a heartbeat that was sent after `since`.
    pub async fn acknowledged_after(&self, since: Instant) {
        let mut acknowledged = self.acknowledged.subscribe();
        let _ = acknowledged.wait_for(|sent| *sent >= since).await;
    }
}
