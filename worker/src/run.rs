//! A run, from its claim to its recorded end:
//!
//! 1. read what the claim is about ([`claim::assignment`]);
//! 2. stream the dump to every destination ([`pipeline::stream`]), nothing visible yet;
//! 3. have a heartbeat acknowledged, then publish ([`pipeline::publish`]);
//! 4. finish, fenced by the token ([`common::execution::finish`]).
//!
//! A restore has a story of its own ([`pipeline::restore`]) between its claim and its finish.
//!
//! Whatever stops it in between (a lost lease, a cancel, the job's time limit, the end of the process) drops the
//! stream, which kills the tools, and what was staged is cleaned away before the end is recorded.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use common::{
    db::ANSWER_TIMEOUT,
    execution::{
        Outcome, Stage,
        claim::{self, Assigned, Assignment, RestoreAssignment},
        finish::{Ending, Failure, Finished, Published},
        log::Level,
    },
    metrics::{self, Trace},
    telemetry::span::SpanKind,
};
use futures::FutureExt;
use nix::sys::signal::Signal;
use tracing::Instrument;

use crate::{
    back_off::back_off,
    backend::Claimed,
    failure::{Class, RunError, of_stop},
    finisher,
    lease::{Lease, Stop},
    pipeline::{
        self, Attempt, StagedBackup, Staging,
        restore::{Restoration, touched::Touched},
    },
    reach,
    run_log::RunLog,
    service::{Shared, patiently},
    trace::{RunTrace, noted},
};

/// What a tool gets between SIGTERM and SIGKILL when somebody cancels: all of it is to be over within two seconds.
const CANCEL_GRACE: Duration = Duration::from_millis(1_200);

/// Longest pause before a failed run is tried again.
const MOST_RETRY_PAUSE: Duration = Duration::from_secs(600);

/// Runs a claim to its end.
pub async fn run(shared: Shared, claimed: Claimed) {
    let lease = claimed.lease.clone();
    let began = Instant::now();
    let (log, log_writer) = RunLog::start(shared.db.clone(), lease.clone());
    let read = tokio::select! {
        biased;
        _ = lease.stopped() => None,
        read = assigned(&shared, &lease) => Some(read),
    };
    if let Some(Ok(assigned)) = &read {
        let (worker, briefing) = (&shared.config.name, assigned.briefing());
        lease.set_trace(RunTrace::begin(lease.claim, worker, briefing, claimed.sent));
    }
    let story = async {
        let mut counted = None;
        let ending = match read {
            Some(Ok(Assigned::Run(assignment))) => {
                let (engine, trace) = (assignment.source.engine.as_str(), Trace::stored(&assignment.briefing.trace));
                count_wait(&assignment, trace);
                counted = Some((engine, trace, Kind::Backup));
                backup(&shared, &lease, &assignment, &log).await
            }
            Some(Ok(Assigned::Restore(assignment))) => {
                let engine = assignment.target.engine.as_str();
                counted = Some((engine, Trace::stored(&assignment.briefing.trace), Kind::Restore));
                restore(&shared, &lease, &assignment, &log).await
            }
            Some(Ok(Assigned::Gone(_))) => {
                let error = RunError::give_up(
                    "job_gone",
                    "the job, or the source or a destination that it had at the trigger, was deleted or changed before the run began",
                );
                failed(&lease, error, &shared, 1)
            }
            Some(Err(error)) => failed(&lease, error, &shared, 1),
            // Nothing was begun; a cancel is recorded from its request.
            None => Ending::Released,
        };
        tell_log(&log, &ending);
        // The last lines are written under the lease, so before it goes.
        log_writer.end().await;
        let outcome = outcome_of(&ending, &lease);
        let recorded = finisher::record(&shared, &lease, ending).await;
        if let Some((engine, trace, kind)) = counted {
            let outcome = if recorded == Some(Finished::Zombie) { "lost" } else { outcome };
            match kind {
                Kind::Backup => metrics::get().ended(engine, outcome, began.elapsed(), trace),
                Kind::Restore => metrics::get().restore_ended(engine, outcome, began.elapsed(), trace),
            }
        }
    };
    story.instrument(lease.log()).await;
    drop(claimed);
}

/// What a run is, for metrics.
enum Kind {
    Backup,
    Restore,
}

/// The wait of a run until its first attempt; that of a retry is a pause.
fn count_wait(assignment: &Assignment, trace: Option<Trace>) {
    if assignment.claim.attempt == 1 {
        let wait = (assignment.briefing.claimed_at - assignment.briefing.queued_at).to_std().unwrap_or_default();
        metrics::get().waited(assignment.source.engine.as_str(), wait, trace);
    }
}

/// An ending in a word, for metrics.
fn outcome_of(ending: &Ending, lease: &Lease) -> &'static str {
    match (ending, lease.stop_reason()) {
        (Ending::Success(_) | Ending::Restored(_), _) => "success",
        (_, Some(Stop::Lost)) => "lost",
        (_, Some(Stop::Cancelled)) => "cancelled",
        (Ending::Released, _) => "released",
        (Ending::Failed(failure), _) if failure.outcome == Some(Outcome::TimedOut) => "timed_out",
        (Ending::Failed(_), _) => "failed",
        (Ending::Retry(..), _) => "retry",
    }
}

/// Ends a run whose task panicked outside the part that is guarded.
pub async fn abandon(shared: &Shared, lease: &Lease) {
    lease.groups.kill();
    let error = RunError::give_up("internal_error", "a bug in the worker ended the run; its log has the details");
    finisher::record(shared, lease, Ending::Failed(error.into_failure(lease.stage()))).await;
}

async fn assigned(shared: &Shared, lease: &Lease) -> Result<Assigned, RunError> {
    let claim = lease.claim;
    let read =
        patiently(|| shared.db.within(ANSWER_TIMEOUT, async |conn| claim::assignment(conn, claim).await)).await?;
    read.ok_or_else(|| RunError::retry("lease_lost", "the lease was lost before the run began"))
}

/// A backup. Every way out leaves nothing behind but what is published.
async fn backup(shared: &Shared, lease: &Arc<Lease>, assignment: &Assignment, log: &RunLog) -> Ending {
    tracing::info!(job = assignment.job.slug, slot = assignment.claim.slot, "the run begins");
    tell_begin(shared, lease, log);
    let staging = Staging::default();
    let work = async {
        let attempt = Attempt { shared, lease, assignment, log, staging: &staging };
        let staged = pipeline::stream(attempt).await?;
        // The last moment at which a lost lease can still keep the backup from becoming visible.
        lease.set_stage(Stage::Verifying);
        let mut span = lease.span(SpanKind::Internal, "verify");
        let verified = verify(Attempt { log: &log.within(&span), ..attempt }, staged).await;
        noted(&mut span, verified)
    };
    let timeout_seconds = assignment.job.timeout_seconds;
    match guarded(lease, log, timeout_seconds, work).await {
        Ok(published) => Ending::Success(Box::new(published)),
        Err(why) => {
            staging.discard(shared, log).await;
            match &why {
                Why::Failed(error)
                    if reach::is_for_others(shared, lease, reach::Kind::Backup(assignment.source.id), error, log)
                        .await =>
                {
                    Ending::Released
                }
                _ => unsuccessful(shared, lease, why, timeout_seconds),
            }
        }
    }
}

/// A restore. What a failure leaves in the target is told by its error: see [`pipeline::restore`].
async fn restore(shared: &Shared, lease: &Arc<Lease>, assignment: &RestoreAssignment, log: &RunLog) -> Ending {
    tracing::info!(backup = %assignment.order.backup_id, target = assignment.target.slug, "the restore begins");
    tell_begin(shared, lease, log);
    let touched = Touched::default();
    let work = pipeline::restore::restore(Restoration { shared, lease, assignment, log, touched: &touched });
    let why = match guarded(lease, log, assignment.timeout_seconds, work).await {
        Ok(restored) => return Ending::Restored(restored),
        Err(why) => why,
    };
    if let Why::Failed(error) = &why
        && !touched.remains()
        && reach::is_for_others(shared, lease, reach::Kind::Restore, error, log).await
    {
        return Ending::Released;
    }
    let told = |failure: Failure| Failure { error: failure.error + &touched.tell(), ..failure };
    match unsuccessful(shared, lease, why, assignment.timeout_seconds) {
        Ending::Failed(failure) => Ending::Failed(told(failure)),
        // Another try would find what this one left.
        Ending::Retry(failure, _) if touched.remains() => Ending::Failed(told(failure)),
        Ending::Retry(failure, pause) => Ending::Retry(told(failure), pause),
        other => other,
    }
}

fn tell_begin(shared: &Shared, lease: &Lease, log: &RunLog) {
    let claim = lease.claim;
    log.info(format!("attempt {} on worker {}, slot {}", claim.attempt, shared.config.name, claim.slot));
}

/// Why work did not come to its end.
enum Why {
    /// It failed.
    Failed(RunError),
    /// Something stopped it.
    Stopped(Stop),
}

/// Does the work of an attempt, until it is done or something stops it. When this returns, its tools are dead.
async fn guarded<T>(
    lease: &Lease,
    log: &RunLog,
    timeout_seconds: i32,
    work: impl Future<Output = Result<T, RunError>>,
) -> Result<T, Why> {
    let work = AssertUnwindSafe(unless_frozen(lease, log, work)).catch_unwind();
    let result = {
        tokio::pin!(work);
        let limit = Duration::from_secs(u64::try_from(timeout_seconds).unwrap_or(u64::MAX));
        let result = tokio::select! {
            biased;
            stop = lease.stopped() => {
                let mut late = None;
                if stop == Stop::Cancelled {
                    lease.groups.signal(Signal::SIGTERM);
                    late = tokio::time::timeout(CANCEL_GRACE, &mut work).await.ok();
                }
                // What was done all the same is done: it must not be told as if it were not.
                late.filter(|late| matches!(late, Ok(Ok(_)))).ok_or(stop)
            }
            () = tokio::time::sleep(limit) => Err(Stop::TimedOut),
            result = &mut work => Ok(result),
        };
        // Before their input is dropped: psql would take its end for that of the script, and commit what it has read.
        if result.is_err() {
            lease.groups.kill();
        }
        result
    };
    lease.groups.kill();
    match result {
        Ok(Ok(Ok(done))) => Ok(done),
        Ok(Ok(Err(error))) => Err(Why::Failed(error)),
        Ok(Err(panic)) => {
            let text = format!("a bug in the worker ended the run: {}", panic_text(&*panic));
            Err(Why::Failed(RunError::give_up("internal_error", text)))
        }
        Err(stop) => Err(Why::Stopped(stop)),
    }
}

/// How an attempt that did not come to its end is recorded. A stop that came while it failed is the reason.
fn unsuccessful(shared: &Shared, lease: &Lease, why: Why, timeout_seconds: i32) -> Ending {
    match (why, lease.stop_reason()) {
        (Why::Stopped(stop), _) | (Why::Failed(_), Some(stop)) => stopped(lease, stop, timeout_seconds),
        (Why::Failed(error), None) => failed(lease, error, shared, lease.claim.attempt),
    }
}

/// Has a heartbeat acknowledged, and makes visible what is whole in every destination.
async fn verify(attempt: Attempt<'_>, staged: StagedBackup) -> Result<Published, RunError> {
    let confirmed = attempt.shared.keeper.confirm(attempt.lease).await;
    confirmed.map_err(|_| RunError::retry("lease_lost", "the lease was lost before the backup was published"))?;
    pipeline::publish(attempt, staged).await
}

/// Does `work`, but while the run is frozen: then it is not polled, so that it neither reads nor writes.
async fn unless_frozen<T>(lease: &Lease, log: &RunLog, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        let since = tokio::select! {
            biased;
            since = lease.frozen() => since,
            done = &mut work => return done,
        };
        log.warn("DBackup's own database does not answer: the run stands still until it does");
        lease.thawed().await;
        log.info(format!("the run goes on after {:.1} s", since.elapsed().as_secs_f64()));
    }
}

fn stopped(lease: &Lease, stop: Stop, timeout_seconds: i32) -> Ending {
    match of_stop(stop, lease.stage(), timeout_seconds) {
        Some(failure) => Ending::Failed(failure),
        // A lost lease records nothing either: the finish that follows is refused, or gives back a run that
        // nobody has rescued yet.
        None => Ending::Released,
    }
}

fn failed(lease: &Lease, error: RunError, shared: &Shared, attempt: i32) -> Ending {
    let class = error.class;
    let failure = error.into_failure(lease.stage());
    match class {
        Class::GiveUp => Ending::Failed(failure),
        Class::Retry => Ending::Retry(failure, back_off(shared.config.retry_pause, attempt, MOST_RETRY_PAUSE)),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

fn tell_log(log: &RunLog, ending: &Ending) {
    match ending {
        Ending::Success(published) => {
            log.line(
                Level::Success,
                format!("backup of {} bytes published as {}", published.size_bytes, published.path),
            );
        }
        Ending::Restored(restored) => {
            log.line(Level::Success, format!("backup of {} bytes restored", restored.size_bytes));
        }
        Ending::Failed(failure) => log.line(Level::Error, failure.error.clone()),
        Ending::Retry(failure, pause) => {
            log.line(Level::Error, failure.error.clone());
            log.info(format!("trying again in {:.1} s, as far as the job's maxAttempts allow", pause.as_secs_f64()));
        }
        Ending::Released => log.info("given back to the queue"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        time::Instant,
    };

    use common::{
        execution::claim::{Claim, Token},
        id::ExecutionId,
    };

    use super::*;

    #[tokio::test]
    async fn a_frozen_run_is_not_polled_until_a_heartbeat_is_acknowledged() {
        let claim = Claim { execution: ExecutionId::new(), token: Token(1), slot: 1, attempt: 1 };
        let second = Duration::from_secs(1);
        let lease = Arc::new(Lease::new(claim, Instant::now(), second * 60, second * 600));
        let (began, steps, log) = (Instant::now(), AtomicU32::new(0), RunLog::unheard(lease.clone()));
        let work = async {
            while steps.fetch_add(1, Ordering::Relaxed) < 1_000 {
                tokio::task::yield_now().await;
            }
        };
        let freeze = async {
            lease.enforce(began + second * 61);
            let before = steps.load(Ordering::Relaxed);
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            assert_eq!(steps.load(Ordering::Relaxed), before, "it went on while it was frozen");
            lease.acknowledge(Instant::now());
        };
        tokio::join!(unless_frozen(&lease, &log, work), async {
            tokio::task::yield_now().await;
            freeze.await;
        });
        assert_eq!(steps.load(Ordering::Relaxed), 1_001);
    }
}
