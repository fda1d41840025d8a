//! Ends of runs that come while others are being recorded: they share one transaction.

use std::{sync::Arc, time::Duration};

use common::{
    db::{Db, DbError},
    execution::{
        claim::Claim,
        finish::{Ending, Finished, finish},
    },
    grouped::{Answers, Grouped},
};

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
pub async fn record_alone(db: &Db, claim: Claim, ending: &Ending) -> Result<Finished, Arc<DbError>> {
    let mut all = db.within(TIMEOUT, async |conn| finish(conn, &[(claim, ending)]).await).await?;
    Ok(all.remove(0))
}
