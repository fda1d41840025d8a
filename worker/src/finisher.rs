//! How the end of a run is recorded. Ends that come while others are being recorded share one transaction.

use std::{sync::Arc, time::Duration};

use common::{
    db::{Db, DbError},
    error::Chain,
    execution::{
        claim::Claim,
        finish::{Ending, Finished, finish},
    },
    grouped::{Answers, Grouped},
    queue::Notice,
    telemetry::span::SpanKind,
};

use crate::{lease::Lease, service::Shared, trace::ended_as};

/// Ends in one transaction, at most.
const GROUP: usize = 64;
/// Longest time of it.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Takes ends of runs; see [`Grouped::ask`].
pub type Finisher = Grouped<Recorder>;

/// Records groups of ends.
pub struct Recorder(Db);

/// Starts the task that records.
pub fn start(db: &Db) -> Finisher {
    Grouped::start(Recorder(db.apart()), GROUP)
}

impl Answers for Recorder {
    type Question = (Claim, Arc<Ending>);
    type Answer = Finished;
    type Error = Arc<DbError>;

    async fn answer(&mut self, ends: &[(Claim, Arc<Ending>)]) -> Result<Vec<Finished>, DbError> {
        let ends: Vec<(Claim, &Ending)> = ends.iter().map(|(claim, ending)| (*claim, &**ending)).collect();
        self.0.within(TIMEOUT, async |conn| finish(conn, &ends).await).await
    }
}

/// Records one end in a transaction of its own.
async fn record_alone(db: &Db, claim: Claim, ending: &Ending) -> Result<Finished, Arc<DbError>> {
    let mut all = db.within(TIMEOUT, async |conn| finish(conn, &[(claim, ending)]).await).await?;
    Ok(all.remove(0))
}

/// How long an end that the database does not take is tried again, at least; as long as a run may be frozen. A success
/// lies in its destinations already, and nobody else can publish it.
const RECORD_PATIENCE: Duration = Duration::from_secs(60);

/// Records the end of a run, for as long as that takes within the patience above; `None` when it could not be.
pub async fn record(shared: &Shared, lease: &Lease, ending: Ending) -> Option<Finished> {
    let claim = lease.claim;
    let mut span = matches!(ending, Ending::Success(_)).then(|| lease.span(SpanKind::Internal, "commit"));
    let give_up = tokio::time::Instant::now() + RECORD_PATIENCE.max(shared.config.freeze);
    let mut pause = Duration::from_millis(100);
    let ending = Arc::new(ending);
    lease.begin_record();
    let mut tried = shared.finisher.ask((claim, ending.clone())).await;
    let finished = loop {
        match tried {
            Ok(finished) => break Some(finished),
            Err(error) if tokio::time::Instant::now() < give_up => {
                tracing::warn!(execution = %claim.execution, error = %Chain(&*error), "the end of a run could not be recorded; trying again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
                // By itself: what kept the group may be another run's.
                tried = record_alone(&shared.db, claim, &ending).await;
            }
            Err(error) => {
                tracing::error!(execution = %claim.execution, error = %Chain(&*error), "the end of a run could not be recorded; its lease runs out");
                break None;
            }
        }
    };
    if let Some(span) = span.as_mut().filter(|_| finished != Some(Finished::Ended)) {
        span.fail("not_recorded", "the end of the run was not recorded: its lease was lost");
    }
    drop(span);
    if let Some(trace) = lease.trace() {
        trace.close(&ending, finished);
    }
    let code = match &*ending {
        Ending::Failed(failure) | Ending::Retry(failure, _) => Some(failure.code),
        _ => None,
    };
    match finished {
        Some(Finished::Ended) => {
            tracing::info!(execution = %claim.execution, outcome = ended_as(&ending, true), code, "the run ended")
        }
        Some(Finished::Requeued) => {
            tracing::info!(execution = %claim.execution, code, "the run waits for another attempt");
        }
        Some(Finished::Zombie) => {
            lease.note_loss();
            tracing::warn!(execution = %claim.execution, token = %claim.token, "the lease was lost: nothing was recorded")
        }
        None => {}
    }
    shared.keeper.drop_lease(claim.token);
    shared.wakeups.tell(Notice::Changed(vec![claim.execution]));
    shared.wakeups.tell(Notice::Work);
    finished
}
