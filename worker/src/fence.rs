//! Self-fencing: a thread of its own, on the monotonic clock, ends the activity of every run whose last
//! acknowledged heartbeat is too long ago, before anybody else may take its slot. A thread and not a task: it
//! must fall also when the runtime is busy.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use crate::lease::Lease;

#[derive(Debug, Default)]
struct Shared {
    leases: Mutex<Vec<Weak<Lease>>>,
    changed: Condvar,
}

/// The running thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Fence(Arc<Shared>);

impl Fence {
    /// Starts the thread. `limit` counts from when the last acknowledged heartbeat was sent.
    pub fn start(limit: Duration) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let watched = Arc::downgrade(&shared);
        std::thread::Builder::new().name("fence".to_owned()).spawn(move || watch(&watched, limit))?;
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

fn watch(shared: &Weak<Shared>, limit: Duration) {
    while let Some(shared) = shared.upgrade() {
        let mut leases = shared.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let mut sleep = IDLE;
        leases.retain(|lease| {
            let Some(lease) = lease.upgrade() else { return false };
            let fall = lease.fence_at(limit);
            if fall <= now {
                lease.cut();
                tracing::error!(
                    execution = %lease.claim.execution, token = %lease.claim.token,
                    "no heartbeat was acknowledged for {} ms: the run was ended so that another worker may take it",
                    limit.as_millis()
                );
                return false;
            }
            sleep = sleep.min(fall - now);
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

    fn lease(sent: Instant) -> Arc<Lease> {
        Arc::new(Lease::new(Claim { execution: ExecutionId::new(), token: Token(1), slot: 1, attempt: 1 }, sent))
    }

    #[tokio::test]
    async fn a_run_without_an_acknowledged_heartbeat_is_cut_with_its_children_and_a_kept_one_is_not() {
        let fence = Fence::start(Duration::from_secs(5)).expect("a thread");
        let long_ago = Instant::now().checked_sub(Duration::from_secs(6)).expect("the machine runs for a while");
        let (lost, kept) = (lease(long_ago), lease(Instant::now()));
        fence.watch(&kept);
        fence.watch(&lost);
        assert_eq!(lost.stopped().await, Stop::Lost);
        assert!(!lost.groups.add(1), "a child that starts late must be killed by its starter");
        assert_eq!(kept.stop_reason(), None);
    }
}
