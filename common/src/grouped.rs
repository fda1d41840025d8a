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
    type Answer: Send;

    /// Answers all of them in one transaction, each in its place. An error means that nothing was done for any.
    fn answer(
        &mut self,
        questions: &[Self::Question],
    ) -> impl Future<Output = Result<Vec<Self::Answer>, DbError>> + Send;
}

struct Waiting<A: Answers, E> {
    question: A::Question,
    answer: oneshot::Sender<Result<A::Answer, E>>,
}

/// Hands questions to the task that answers them.
pub struct Grouped<A: Answers, E>(mpsc::Sender<Waiting<A, E>>);

impl<A: Answers, E> Clone for Grouped<A, E> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<A: Answers, E: From<DbError> + Clone + Send + 'static> Grouped<A, E> {
    /// Starts the task, which takes at most `most` at once; it ends when the last handle is dropped.
    pub fn start(answers: A, most: usize) -> Self {
        let (sender, receiver) = mpsc::channel(most * 4);
        tokio::spawn(answer_all(answers, most, receiver));
        Self(sender)
    }

    /// Asks. The answer comes after the commit.
    pub async fn ask(&self, question: A::Question) -> Result<A::Answer, E> {
        let (answer, answered) = oneshot::channel();
        let stopping = || E::from(DbError::Timeout(ANSWER_TIMEOUT));
        self.0.send(Waiting { question, answer }).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }
}

async fn answer_all<A: Answers, E: From<DbError> + Clone>(
    mut answers: A,
    most: usize,
    mut receiver: mpsc::Receiver<Waiting<A, E>>,
) {
    let mut waiting = Vec::new();
    while receiver.recv_many(&mut waiting, most).await > 0 {
        let (questions, askers): (Vec<_>, Vec<_>) = waiting.drain(..).map(|w| (w.question, w.answer)).unzip();
        match answers.answer(&questions).await {
            Ok(all) => {
                for (asker, answer) in askers.into_iter().zip(all) {
                    let _ = asker.send(Ok(answer));
                }
            }
            Err(error) if error.is_passing() || questions.len() == 1 => {
                let error = E::from(error);
                for asker in askers {
                    let _ = asker.send(Err(error.clone()));
                }
            }
            // One of them is bad in a way that nobody foresaw: the others must not suffer.
            Err(_) => {
                for (question, asker) in questions.iter().zip(askers) {
                    let alone = answers.answer(std::slice::from_ref(question)).await;
                    let _ = asker.send(alone.map(|mut all| all.remove(0)).map_err(E::from));
                }
            }
        }
    }
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
        let grouped: Grouped<Doubles, Arc<DbError>> = Grouped::start(doubles, 3);
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
