//! Triggers that arrive while one group is being decided form the next: they share one transaction. Its jobs are free and
//! its runs may start before the disk has it; who triggered hears of it after that, with those of all groups that were
//! decided meanwhile.

use common::{
    db::{ANSWER_TIMEOUT, Db, DbError, flush},
    execution::{
        enqueue::{Enqueued, SESSION, TriggerRequest, enqueue},
        remembered::Remembered,
    },
    grouped::{Answers, Grouped},
    queue::{Notice, Wakeups},
};

use crate::error::ApiError;

/// Triggers in one transaction, at most.
const GROUP: usize = 256;

/// Takes triggers; see [`Grouped::ask`].
pub type Enqueuer = Grouped<Desk>;

/// Enqueues groups of triggers.
pub struct Desk {
    db: Db,
    wakeups: Wakeups,
    remembered: Remembered,
    flusher: Grouped<Flusher>,
}

/// Starts the tasks that enqueue.
pub fn start(db: &Db, wakeups: Wakeups) -> Enqueuer {
    let flusher = Grouped::start(Flusher(db.apart()), GROUP);
    let desk = Desk { db: db.apart_in(SESSION), wakeups, remembered: Remembered::default(), flusher };
    Grouped::start(desk, GROUP)
}

impl Answers for Desk {
    type Question = TriggerRequest;
    type Answer = Enqueued;
    type Error = ApiError;

    async fn answer(&mut self, requests: &[TriggerRequest]) -> Result<Vec<Enqueued>, DbError> {
        let remembered = &mut self.remembered;
        let outcomes = self.db.within(ANSWER_TIMEOUT, async |conn| enqueue(conn, remembered, requests).await).await?;
        if outcomes.iter().any(|outcome| matches!(outcome, Enqueued::Queued(_))) {
            self.wakeups.tell(Notice::Work);
        }
        Ok(outcomes)
    }

    fn settle(&self) -> Option<impl Future<Output = Result<(), ApiError>> + Send + 'static> {
        let flusher = self.flusher.clone();
        Some(async move { flusher.ask(()).await })
    }
}

/// Waits for the disk: once for all who ask while it waits.
pub struct Flusher(Db);

impl Answers for Flusher {
    type Question = ();
    type Answer = ();
    type Error = ApiError;

    async fn answer(&mut self, groups: &[()]) -> Result<Vec<()>, DbError> {
        self.0.within(ANSWER_TIMEOUT, async |conn| flush(conn).await).await?;
        Ok(groups.to_vec())
    }
}
