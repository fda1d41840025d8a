//! Triggers that arrive while one group is being committed form the next: they share one transaction.

use common::{
    db::{ANSWER_TIMEOUT, Db, DbError},
    execution::{
        enqueue::{Enqueued, TriggerRequest, enqueue},
        room::Room,
    },
    grouped::{Answers, Grouped},
    queue::{Notice, Wakeups},
};

use crate::error::ApiError;

/// Triggers in one transaction, at most.
const GROUP: usize = 256;

/// Takes triggers; see [`Grouped::ask`].
pub type Enqueuer = Grouped<Desk, ApiError>;

/// Enqueues groups of triggers.
pub struct Desk {
    db: Db,
    wakeups: Wakeups,
    room: Room,
}

/// Starts the task that enqueues.
pub fn start(db: &Db, wakeups: Wakeups) -> Enqueuer {
    Grouped::start(Desk { db: db.apart(), wakeups, room: Room::default() }, GROUP)
}

impl Answers for Desk {
    type Question = TriggerRequest;
    type Answer = Enqueued;

    async fn answer(&mut self, requests: &[TriggerRequest]) -> Result<Vec<Enqueued>, DbError> {
        let room = &mut self.room;
        let outcomes = self.db.within(ANSWER_TIMEOUT, async |conn| enqueue(conn, room, requests).await).await?;
        if outcomes.iter().any(|outcome| matches!(outcome, Enqueued::Queued(_))) {
            self.wakeups.tell(Notice::Work);
        }
        Ok(outcomes)
    }
}
