//! Why executions wait, and where they stand in the queue: one look a second at most, for all who ask a process.

use std::{sync::Arc, time::Duration};

use common::{
    db::{ANSWER_TIMEOUT, Db},
    execution::{
        Execution,
        waiting::{QueueSnapshot, Waiting},
    },
};
use serde_json::{Value, json};

use crate::one_asks::Lately;

/// How old a look at the queue may be.
pub const QUEUE_AGE: Duration = Duration::from_secs(1);

/// Looks at the queue.
#[derive(Clone)]
pub struct Reasons {
    db: Db,
    last: Arc<Lately<Arc<QueueSnapshot>>>,
}

impl Reasons {
    /// Has not looked yet.
    pub fn new(db: Db) -> Self {
        Self { db, last: Arc::default() }
    }

    /// The queue, at most [`QUEUE_AGE`] ago; `None` while the database is away.
    pub async fn queue(&self) -> Option<Arc<QueueSnapshot>> {
        let take =
            async { self.db.within(ANSWER_TIMEOUT, async |conn| QueueSnapshot::take(conn).await).await.map(Arc::new) };
        self.last.within(QUEUE_AGE, take).await.ok()
    }

    /// Fills in what holds back those that wait.
    pub async fn tell(&self, executions: &mut [Execution]) {
        if executions.iter().any(|execution| execution.waiting.is_some())
            && let Some(queue) = self.queue().await
        {
            for execution in executions {
                execution.waiting_for = execution.waiting.as_ref().and_then(|waiting| queue.waiting_for(waiting));
            }
        }
    }

    /// The same in an execution that is an answer already.
    pub async fn tell_in(&self, data: &mut Value, waiting: Option<&Waiting>) {
        if let Some(waiting) = waiting {
            let reason = self.queue().await.and_then(|queue| queue.waiting_for(waiting));
            data["waitingFor"] = json!(reason);
        }
    }
}
