//! The backend that apalis drives: it claims executions under the global limit and hands them to the handler.
//!
//! What apalis 1.0.0 needs, each reproduced once: an error from `poll_next` would drop every running job, so a
//! failed claim is retried inside; a committed claim must not die with a dropped poll future, so claims are
//! spawned and travel by channel; `poll_ready` is not called while draining, so no heartbeat lives there.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use apalis::prelude::{Backend, Status, Task, TaskBuilder, TaskId, WorkerContext};
use apalis_core::backend::{BackendConfig, finalize::Ephemeral};
use common::{
    db::Db,
    execution::{claim, finish::Ending, ticker::Rescuer},
    metrics,
    queue::{Notice, heard},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tower::layer::util::Identity;

use crate::{lease::Lease, service::Shared};

/// Longest time of the claim's round trip.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(5);

/// A claimed execution on its way to the handler. It holds a unit of this worker's concurrency until it is dropped.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The lease, already kept.
    pub lease: Arc<Lease>,
    /// When the claim was sent.
    pub sent: Instant,
    _slot: Arc<OwnedSemaphorePermit>,
}

/// Never surfaces; apalis wants a type.
#[derive(Debug, thiserror::Error)]
#[error("the backend does not fail")]
pub struct NoError;

/// See the module.
pub struct LeaseBackend {
    claimed: mpsc::Receiver<Claimed>,
    started: bool,
    shared: Shared,
}

impl LeaseBackend {
    /// Starts claiming, until `stop`. The task ends when nothing is claimed any more, and no claim is under way: one that the
    /// database has begun is committed, whoever hears the answer.
    pub fn start(shared: Shared, rescuer: Arc<Rescuer>, stop: CancellationToken) -> (Self, JoinHandle<()>) {
        // A claim goes through the channel only with a permit, so this bound is never waited for.
        let (sender, claimed) = mpsc::channel(shared.config.concurrency);
        let slots = Arc::new(Semaphore::new(shared.config.concurrency));
        let claimer = Claimer { slots, db: shared.db.apart(), shared: shared.clone(), rescuer, stop, sender };
        (Self { claimed, started: false, shared }, tokio::spawn(claimer.run()))
    }
}

struct Claimer {
    shared: Shared,
    db: Db,
    rescuer: Arc<Rescuer>,
    stop: CancellationToken,
    slots: Arc<Semaphore>,
    sender: mpsc::Sender<Claimed>,
}

impl Claimer {
    async fn run(self) {
        let mut notices = self.shared.wakeups.subscribe();
        let mut pause = self.shared.config.timing.poll;
        while let Some(first) = self.free_slot().await {
            // Register for the wake-up before asking the database, or a trigger in between waits a whole poll.
            notices = notices.resubscribe();
            match self.claim(first).await {
                // Nothing to claim: perhaps only because a dead run holds a slot.
                Ok(0) if self.rescuer.rescue_now().await > 0 => {}
                Ok(0) => {
                    pause = self.shared.config.timing.poll;
                    let Some(sleep) = self.stop.run_until_cancelled(self.until_next_look()).await else { break };
                    if self
                        .stop
                        .run_until_cancelled(heard(&mut notices, sleep, |notice| *notice == Notice::Work))
                        .await
                        .is_none()
                    {
                        break;
                    }
                }
                Ok(_) => pause = self.shared.config.timing.poll,
                Err(error) => {
                    tracing::warn!(
                        error = %common::error::Chain(&error),
                        "could not claim; trying again in {} ms",
                        pause.as_millis()
                    );
                    if self.stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                        break;
                    }
                    pause = (pause * 2).min(Duration::from_secs(5));
                }
            }
        }
    }

    async fn free_slot(&self) -> Option<OwnedSemaphorePermit> {
        let permit = self.stop.run_until_cancelled(self.slots.clone().acquire_owned()).await?.ok()?;
        (!self.stop.is_cancelled()).then_some(permit)
    }

    /// Claims as many as this worker has free, and sends them on.
    async fn claim(&self, first: OwnedSemaphorePermit) -> Result<usize, common::db::DbError> {
        let mut slots = vec![first];
        while let Ok(more) = self.slots.clone().try_acquire_owned() {
            slots.push(more);
        }
        let claimant = self.shared.presence.claimant();
        let lease = self.shared.config.timing.lease;
        let sent = Instant::now();
        let claims =
            self.db.within(CLAIM_TIMEOUT, async |conn| claim::claim(conn, &claimant, lease, slots.len()).await).await?;
        let count = claims.len();
        metrics::get().claimed(count, sent.elapsed());
        for (claim, slot) in claims.into_iter().zip(slots) {
            let lease = Arc::new(Lease::new(claim, sent, self.shared.config.timing.fence, self.shared.config.freeze));
            self.shared.keeper.keep(&lease);
            let claimed = Claimed { lease, sent, _slot: Arc::new(slot) };
            if self.stop.is_cancelled() {
                self.give_back(claimed).await;
            } else if let Err(mpsc::error::SendError(claimed)) = self.sender.send(claimed).await {
                self.give_back(claimed).await;
            }
        }
        Ok(count)
    }

    async fn give_back(&self, claimed: Claimed) {
        give_back(&self.shared, &claimed.lease).await;
    }

    /// A poll interval with jitter, less when a back-off ends before.
    async fn until_next_look(&self) -> Duration {
        let poll = self.shared.config.timing.poll.mul_f64(rand::random_range(0.8..1.2));
        let due =
            self.db.within(CLAIM_TIMEOUT, async |conn| claim::next_due(conn, &self.shared.config.pools).await).await;
        due.ok().flatten().map_or(poll, |due| due.min(poll))
    }
}

/// Returns a claim that will not be run; its lease would run out by itself, only later.
async fn give_back(shared: &Shared, lease: &Lease) {
    let claim = lease.claim;
    lease.begin_record();
    let released = shared.finisher.ask((claim, Arc::new(Ending::Released))).await;
    if let Err(error) = released {
        tracing::warn!(execution = %claim.execution, error = %common::error::Chain(&*error), "a claim could not be given back; its lease runs out");
    }
    shared.keeper.drop_lease(claim.token);
    shared.wakeups.tell(Notice::Work);
}

impl Backend for LeaseBackend {
    type Task = Task<Claimed>;
    type Error = NoError;

    fn poll_ready(&mut self, cx: &mut Context<'_>, worker: &WorkerContext) -> Poll<Result<(), NoError>> {
        if !std::mem::replace(&mut self.started, true) {
            worker.heartbeat(cx);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, _: &WorkerContext) -> Poll<Option<Result<Self::Task, NoError>>> {
        self.claimed.poll_recv(cx).map(|claimed| {
            let claimed = claimed?;
            let claim = claimed.lease.claim;
            Some(Ok(TaskBuilder::new(claimed)
                .task_id(TaskId::from_uuid(claim.execution.0))
                .attempt(usize::try_from(claim.attempt - 1).unwrap_or(0)) // apalis adds one
                .status(Status::Queued)
                .build()))
        })
    }

    fn poll_close(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), NoError>> {
        self.give_back_unstarted();
        Poll::Ready(Ok(()))
    }
}

impl LeaseBackend {
    /// Claims that no handler took: they would count against the limit until their leases run out.
    fn give_back_unstarted(&mut self) {
        self.claimed.close();
        while let Ok(claimed) = self.claimed.try_recv() {
            let shared = self.shared.clone();
            tokio::spawn(async move { give_back(&shared, &claimed.lease).await });
        }
    }
}

impl Drop for LeaseBackend {
    fn drop(&mut self) {
        self.give_back_unstarted();
    }
}

impl BackendConfig for LeaseBackend {
    type Args = Claimed;
    type Id = uuid::Uuid;
    type Kind = Ephemeral;
    type Config = ();
    type Layer = Identity;

    fn config(&self) -> &() {
        &()
    }

    fn middleware(&mut self, _: &mut WorkerContext) -> Identity {
        Identity::new()
    }
}
