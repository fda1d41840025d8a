//! Triggers that arrive while one group is being committed form the next: they share one transaction.

use common::{
    db::{ANSWER_TIMEOUT, Db, DbError},
    execution::{
        enqueue::{Enqueued, TriggerRequest, enqueue},
        room::Room,
    },
    queue::{Notice, Wakeups},
};
use tokio::sync::{mpsc, oneshot};

use crate::error::ApiError;

/// Triggers in one transaction, at most.
const GROUP: usize = 256;

struct Waiting {
    request: TriggerRequest,
    answer: oneshot::Sender<Result<Enqueued, ApiError>>,
}

/// Hands triggers to the grouping task.
#[derive(Clone)]
pub struct Enqueuer(mpsc::Sender<Waiting>);

impl Enqueuer {
    /// Starts the grouping task; it ends when the last handle is dropped.
    pub fn start(db: Db, wakeups: Wakeups) -> Self {
        let (sender, receiver) = mpsc::channel(GROUP * 4);
        tokio::spawn(group(db, wakeups, receiver));
        Self(sender)
    }

    /// Enqueues one trigger. The answer comes after the commit.
    pub async fn enqueue(&self, request: TriggerRequest) -> Result<Enqueued, ApiError> {
        let (answer, answered) = oneshot::channel();
        let stopping = || ApiError::from(DbError::Timeout(ANSWER_TIMEOUT));
        self.0.send(Waiting { request, answer }).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }
}

async fn group(db: Db, wakeups: Wakeups, mut receiver: mpsc::Receiver<Waiting>) {
    let (mut waiting, mut room) = (Vec::new(), Room::default());
    while receiver.recv_many(&mut waiting, GROUP).await > 0 {
        let (requests, answers): (Vec<_>, Vec<_>) = waiting.drain(..).map(|w| (w.request, w.answer)).unzip();
        match db.within(ANSWER_TIMEOUT, async |conn| enqueue(conn, &mut room, &requests).await).await {
            Ok(outcomes) => {
                tell(&wakeups, &outcomes);
                for (answer, outcome) in answers.into_iter().zip(outcomes) {
                    let _ = answer.send(Ok(outcome));
                }
            }
            Err(error) if error.is_passing() || requests.len() == 1 => {
                let error = ApiError::from(error);
                for answer in answers {
                    let _ = answer.send(Err(error.clone()));
                }
            }
            // One of them is bad in a way that nobody foresaw: the others must not suffer.
            Err(_) => {
                for (request, answer) in requests.into_iter().zip(answers) {
                    let alone = db
                        .within(ANSWER_TIMEOUT, async |conn| {
                            enqueue(conn, &mut room, std::slice::from_ref(&request)).await
                        })
                        .await;
                    let outcome = alone.map_err(ApiError::from).map(|mut outcomes| outcomes.remove(0));
                    if let Ok(outcome) = &outcome {
                        tell(&wakeups, std::slice::from_ref(outcome));
                    }
                    let _ = answer.send(outcome);
                }
            }
        }
    }
}

fn tell(wakeups: &Wakeups, outcomes: &[Enqueued]) {
    if outcomes.iter().any(|o| matches!(o, Enqueued::Queued(_))) {
        wakeups.tell(Notice::Work);
    }
}
