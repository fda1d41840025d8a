//! Many requests need the same answer of the database at the same moment: one of them asks, the others share what it
//! gets. Its failure too: one after the other they would each wait for a database that hangs.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use common::db::DbError;

/// One question at a time.
#[derive(Default)]
pub struct OneAsks {
    /// When the last one failed.
    failed: tokio::sync::Mutex<Option<Instant>>,
}

impl OneAsks {
    /// What is `known`, else what `ask` brings. Whoever waited for another's question that failed gets no turn of its own.
    pub async fn or_ask<T>(
        &self,
        known: impl Fn() -> Option<T>,
        ask: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, DbError> {
        if let Some(known) = known() {
            return Ok(known);
        }
        let came = Instant::now();
        let mut failed = self.failed.lock().await;
        if let Some(known) = known() {
            return Ok(known);
        }
        if failed.is_some_and(|failed| failed > came) {
            return Err(DbError::Timeout(came.elapsed()));
        }
        ask.await.inspect_err(|_| *failed = Some(Instant::now()))
    }
}

/// An answer that serves for a while.
pub struct Lately<T> {
    last: Mutex<Option<Last<T>>>,
    asking: OneAsks,
}

#[derive(Clone)]
struct Last<T> {
    asked: Instant,
    took: Duration,
    answer: T,
}

impl<T> Default for Lately<T> {
    fn default() -> Self {
        Self { last: Mutex::default(), asking: OneAsks::default() }
    }
}

impl<T: Clone> Lately<T> {
    /// An answer to a question that was asked at most `age` ago.
    pub async fn within(&self, age: Duration, ask: impl Future<Output = Result<T, DbError>>) -> Result<T, DbError> {
        let known = || self.last().as_ref().filter(|last| last.asked.elapsed() < age).map(|last| last.answer.clone());
        self.asking.or_ask(known, self.remember(ask)).await
    }

    /// An answer at most `times` as old as it took to get, so that a dear one is asked for seldom; and when there may be
    /// a newer one, unless this is new.
    pub async fn at_most(
        &self,
        times: u32,
        ask: impl Future<Output = Result<T, DbError>>,
    ) -> Result<(T, Option<Duration>), DbError> {
        let known = || {
            let last = self.last().clone()?;
            let left = (last.took * times).checked_sub(last.asked.elapsed()).filter(|left| !left.is_zero())?;
            Some((last.answer, Some(left)))
        };
        self.asking.or_ask(known, async { Ok((self.remember(ask).await?, None)) }).await
    }

    async fn remember(&self, ask: impl Future<Output = Result<T, DbError>>) -> Result<T, DbError> {
        let asked = Instant::now();
        let answer = ask.await?;
        *self.last() = Some(Last { asked, took: asked.elapsed(), answer: answer.clone() });
        Ok(answer)
    }

    fn last(&self) -> MutexGuard<'_, Option<Last<T>>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn those_who_wait_for_a_question_share_its_answer_and_its_failure_and_the_next_asks_again() {
        let (lately, asked, hour) = (Lately::default(), AtomicU32::new(0), Duration::from_secs(3_600));
        let ask = async |fails: bool| {
            asked.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            if fails { Err(DbError::Timeout(Duration::ZERO)) } else { Ok(7) }
        };
        let both = tokio::join!(lately.within(hour, ask(true)), lately.within(hour, ask(true)));
        assert!(both.0.is_err() && both.1.is_err());
        assert_eq!(asked.load(Ordering::Relaxed), 1, "each asked for itself");
        let both = tokio::join!(lately.within(hour, ask(false)), lately.within(hour, ask(false)));
        assert_eq!((both.0.ok(), both.1.ok(), asked.load(Ordering::Relaxed)), (Some(7), Some(7), 2));
        assert_eq!(lately.within(Duration::ZERO, ask(false)).await.ok(), Some(7));
        assert_eq!(asked.load(Ordering::Relaxed), 3, "an answer that is too old served");
    }

    #[tokio::test]
    async fn an_answer_serves_for_as_many_times_as_it_took_to_get_and_says_for_how_long_yet() {
        let (lately, cost) = (Lately::default(), Duration::from_millis(20));
        let dear = |answer: u32| async move {
            tokio::time::sleep(cost).await;
            Ok::<_, DbError>(answer)
        };
        let began = Instant::now();
        assert_eq!(lately.at_most(1_000, dear(1)).await.ok(), Some((1, None)));
        let took = began.elapsed();
        let (answer, left) = lately.at_most(1_000, dear(2)).await.expect("an answer");
        let left = left.expect("it is an old one");
        assert_eq!(answer, 1);
        assert!(cost * 1_000 - began.elapsed() <= left && left <= took * 1_000, "{left:?}, and it took {took:?}");
        assert_eq!(lately.at_most(0, dear(3)).await.ok(), Some((3, None)));
    }
}
