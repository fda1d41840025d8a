//! Self-fencing: a thread of its own, on the monotonic clock, ends the activity of every run whose last
//! acknowledged heartbeat is too long ago, before anybody else may take its slot. A thread and not a task: it
//! must fall also when the runtime is busy.
//!
//! The run is frozen and not killed: its tools stand still and its stream is not polled. When a heartbeat revives its
//! lease it goes on; when the lease was rescued meanwhile, or after the longest freeze, it is killed.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use crate::lease::{Fenced, Lease};

#[derive(Debug, Default)]
struct Shared {
    leases: Mutex<Vec<Weak<Lease>>>,
    changed: Condvar,
}

/// The running thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Fence(Arc<Shared>);

impl Fence {
    /// Starts the thread.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let watched = Arc::downgrade(&shared);
        std::thread::Builder::new().name("fence".to_owned()).spawn(move || watch(&watched))?;
        Ok(Self(shared))
    }

    /// Watches a lease until it is dropped.
    pub fn watch(&self, lease: &Arc<Lease>) {
        self.0.leases.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(lease));
        self.0.changed.notify_one();
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        self.0.changed.notify_one();
    }
}

/// Longest sleep: bounds how late the thread notices that its owner is gone.
const IDLE: Duration = Duration::from_millis(200);

fn watch(shared: &Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let mut leases = shared.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let mut sleep = IDLE;
        leases.retain(|lease| {
            let Some(lease) = lease.upgrade() else { return false };
            let (execution, token) = (lease.claim.execution, lease.claim.token);
            match lease.enforce(now) {
                Fenced::Active(until) | Fenced::Frozen(until) => sleep = sleep.min(until - now),
                Fenced::Froze => {
                    tracing::error!(parent: &lease.log(), %execution, %token, "no heartbeat was acknowledged: the run stands still until one is");
                }
                Fenced::Cut => {
                    tracing::error!(parent: &lease.log(), %execution, %token, "no heartbeat was acknowledged: the run was ended so that another worker may take it");
                    return false;
                }
            }
            true
        });
        // The wait gives the lock back, and uses the monotonic clock.
        let _ = shared.changed.wait_timeout(leases, sleep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Stop;
    use common::{
        execution::claim::{Claim, Token},
        id::ExecutionId,
    };

    fn ago(seconds: u64) -> Instant {
        Instant::now().checked_sub(Duration::from_secs(seconds)).expect("the machine runs for a while")
    }

    fn lease(sent: Instant, most_frozen: u64) -> Arc<Lease> {
        let claim = Claim { execution: ExecutionId::new(), token: Token(1), slot: 1, attempt: 1 };
        Arc::new(Lease::new(claim, sent, Duration::from_secs(5), Duration::from_secs(most_frozen)))
    }

    #[tokio::test]
    async fn a_run_without_an_acknowledged_heartbeat_is_frozen_and_a_kept_one_is_not() {
        let fence = Fence::start().expect("a thread");
        let (lost, kept) = (lease(ago(6), 600), lease(Instant::now(), 600));
        fence.watch(&kept);
        fence.watch(&lost);
        lost.frozen().await;
        assert_eq!((lost.stop_reason(), kept.stop_reason()), (None, None));
        kept.thawed().await;
    }

    #[tokio::test]
    async fn a_run_that_may_not_stand_still_is_cut_with_its_children() {
        let fence = Fence::start().expect("a thread");
        let lost = lease(ago(6), 0);
        fence.watch(&lost);
        assert_eq!(lost.stopped().await, Stop::Lost);
        assert!(!lost.groups.add(1), "a child that starts late must be killed by its starter");
    }

    #[test]
    fn a_frozen_run_goes_on_only_after_a_heartbeat_of_now_and_ends_after_the_longest_freeze() {
        let frozen = lease(ago(6), 60);
        assert_eq!(frozen.enforce(Instant::now()), Fenced::Froze);
        frozen.acknowledge(ago(5));
        assert!(matches!(frozen.enforce(Instant::now()), Fenced::Frozen(_)), "an old answer proves nothing");
        frozen.acknowledge(Instant::now());
        assert!(matches!(frozen.enforce(Instant::now()), Fenced::Active(_)));
        let later = Instant::now() + Duration::from_secs(10);
        assert_eq!(frozen.enforce(later), Fenced::Froze);
        frozen.limit_freeze(Duration::from_secs(20));
        assert!(matches!(frozen.enforce(later + Duration::from_secs(19)), Fenced::Frozen(_)));
        assert_eq!(frozen.enforce(later + Duration::from_secs(20)), Fenced::Cut);
        assert_eq!(frozen.stop_reason(), Some(Stop::Lost));
    }
}
