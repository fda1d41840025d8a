//! Group commit: those who ask while one group is being answered form the next, so that they share a transaction and its
//! wait for the disk. Who asks alone waits for nobody.

use std::future::Future;

use tokio::sync::{mpsc, oneshot};

use crate::db::{ANSWER_TIMEOUT, DbError};

/// Answers a group.
pub trait Answers: Send + 'static {
    /// What one asks.
    type Question: Send + Sync;
    /// What it gets.
    type Answer: Send + 'static;
    /// Or this.
    type Error: From<DbError> + Clone + Send + 'static;

    /// Answers all of them in one transaction, each in its place. An error means that nothing was done for any.
    fn answer(
        &mut self,
        questions: &[Self::Question],
    ) -> impl Future<Output = Result<Vec<Self::Answer>, DbError>> + Send;

    /// Waits until what was answered may be told, where it may not be at once. The next group is answered meanwhile.
    fn settle(&self) -> Option<impl Future<Output = Result<(), Self::Error>> + Send + 'static> {
        None::<std::future::Ready<_>>
    }
}

/// Who waits for an answer.
type Asker<A> = oneshot::Sender<Result<<A as Answers>::Answer, <A as Answers>::Error>>;

struct Waiting<A: Answers> {
    question: A::Question,
    asker: Asker<A>,
}

/// Hands questions to the task that answers them.
pub struct Grouped<A: Answers>(mpsc::Sender<Waiting<A>>);

impl<A: Answers> Clone for Grouped<A> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<A: Answers> Grouped<A> {
    /// Starts the task, which takes at most `most` at once; it ends when the last handle is dropped.
    pub fn start(answers: A, most: usize) -> Self {
        let (sender, receiver) = mpsc::channel(most * 4);
        tokio::spawn(answer_all(answers, most, receiver));
        Self(sender)
    }

    /// Asks. The answer comes when it is settled.
    pub async fn ask(&self, question: A::Question) -> Result<A::Answer, A::Error> {
        let (asker, answered) = oneshot::channel();
        let stopping = || A::Error::from(DbError::Timeout(ANSWER_TIMEOUT));
        self.0.send(Waiting { question, asker }).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }
}

async fn answer_all<A: Answers>(mut answers: A, most: usize, mut receiver: mpsc::Receiver<Waiting<A>>) {
    let mut waiting = Vec::new();
    while receiver.recv_many(&mut waiting, most).await > 0 {
        // Whoever was woken together with the first asks in a moment, and shall come along.
        tokio::task::yield_now().await;
        while waiting.len() < most
            && let Ok(another) = receiver.try_recv()
        {
            waiting.push(another);
        }
        let (questions, askers): (Vec<_>, Vec<_>) = waiting.drain(..).map(|w| (w.question, w.asker)).unzip();
        match answers.answer(&questions).await {
            Ok(all) => tell::<A>(askers, all, answers.settle()),
            Err(error) if error.is_passing() || questions.len() == 1 => refuse::<A>(askers, &error.into()),
            // One of them is bad in a way that nobody foresaw: the others must not suffer.
            Err(_) => {
                for (question, asker) in questions.iter().zip(askers) {
                    match answers.answer(std::slice::from_ref(question)).await {
                        Ok(all) => tell::<A>(vec![asker], all, answers.settle()),
                        Err(error) => refuse::<A>(vec![asker], &error.into()),
                    }
                }
            }
        }
    }
}

fn tell<A: Answers>(
    askers: Vec<Asker<A>>,
    answers: Vec<A::Answer>,
    settled: Option<impl Future<Output = Result<(), A::Error>> + Send + 'static>,
) {
    let answered = |askers: Vec<Asker<A>>| {
        askers.into_iter().zip(answers).for_each(|(asker, answer)| drop(asker.send(Ok(answer))));
    };
    let Some(settled) = settled else { return answered(askers) };
    tokio::spawn(async move {
        match settled.await {
            Ok(()) => answered(askers),
            Err(error) => refuse::<A>(askers, &error),
        }
    });
}

fn refuse<A: Answers>(askers: Vec<Asker<A>>, error: &A::Error) {
    askers.into_iter().for_each(|asker| drop(asker.send(Err(error.clone()))));
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::sync::Semaphore;

    use super::*;

    /// Answers each with its double, once it is let; a seven is bad.
    struct Doubles {
        let_through: Arc<Semaphore>,
        groups: Arc<Mutex<Vec<Vec<u32>>>>,
    }

    impl Answers for Doubles {
        type Question = u32;
        type Answer = u32;
        type Error = Arc<DbError>;

        async fn answer(&mut self, questions: &[u32]) -> Result<Vec<u32>, DbError> {
            self.groups.lock().expect("not poisoned").push(questions.to_vec());
            self.let_through.acquire().await.expect("open").forget();
            if questions.contains(&7) {
                return Err(sqlx::Error::ColumnNotFound("seven".to_owned()).into());
            }
            Ok(questions.iter().map(|n| n * 2).collect())
        }
    }

    async fn asked(first: u32, rest: &[u32]) -> (Vec<Vec<u32>>, Vec<Option<u32>>) {
        let (let_through, groups) = (Arc::new(Semaphore::new(0)), Arc::default());
        let doubles = Doubles { let_through: let_through.clone(), groups: Arc::clone(&groups) };
        let grouped: Grouped<Doubles> = Grouped::start(doubles, 3);
        let ask = |n| {
            let grouped = grouped.clone();
            tokio::spawn(async move { grouped.ask(n).await.ok() })
        };
        let first = ask(first);
        while groups.lock().expect("not poisoned").is_empty() {
            tokio::task::yield_now().await;
        }
        let rest: Vec<_> = rest.iter().copied().map(ask).collect();
        // All of them have asked when each has run once; the one that answers waits.
        tokio::task::yield_now().await;
        let_through.add_permits(100);
        let answers = futures::future::join_all(std::iter::once(first).chain(rest)).await;
        let groups = groups.lock().expect("not poisoned").clone();
        (groups, answers.into_iter().map(|answer| answer.expect("joins")).collect())
    }

    #[tokio::test]
    async fn who_asks_while_one_is_answered_shares_the_next_group_and_gets_an_answer_of_its_own() {
        let (groups, answers) = asked(1, &[2, 3, 4, 5]).await;
        assert_eq!(groups, [vec![1], vec![2, 3, 4], vec![5]]);
        assert_eq!(answers, [2, 4, 6, 8, 10].map(Some));
    }

    #[tokio::test]
    async fn one_that_cannot_be_answered_takes_no_other_with_it() {
        let (groups, answers) = asked(1, &[2, 7, 4]).await;
        assert_eq!(groups, [vec![1], vec![2, 7, 4], vec![2], vec![7], vec![4]]);
        assert_eq!(answers, [Some(2), Some(4), None, Some(8)]);
    }
}
