//! The rescue ticker: every API and worker process looks for leases that ran out, so that a dead run leaves
//! Running also when every other worker is full. No leader.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    expire::expire,
    lease::{Rescue, rescue},
};
use crate::{
    config::Timing,
    db::{Db, DbError},
    queue::{Notice, Wakeups},
};

/// Rescues lost runs, when this process may.
///
/// It may only after its own contact with the database was unbroken for one whole lease: after an outage
/// everybody waits, and a run that lives revives its lease instead of losing it.
#[derive(Debug)]
pub struct Rescuer {
    db: Db,
    timing: Timing,
    wakeups: Wakeups,
    contact: Mutex<Contact>,
}

impl Rescuer {
    /// Starts the ticker, which looks until `stop`.
    pub fn start(db: Db, timing: Timing, wakeups: Wakeups, stop: CancellationToken) -> Arc<Self> {
        let rescuer = Arc::new(Self { db, timing, wakeups, contact: Mutex::default() });
        tokio::spawn(stop.run_until_cancelled_owned(rescuer.clone().tick()));
        rescuer
    }

    async fn tick(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.timing.ticker.mul_f64(rand::random_range(0.75..1.25))).await;
            let asked = Instant::now();
            let result = match self.may_rescue(asked) {
                true => self.rescue().await.map(|_| ()),
                false => self.db.ping(self.timing.heartbeat_timeout).await,
            };
            let result = match result {
                Ok(()) => self.expire().await,
                error => error,
            };
            match result {
                Ok(()) => self.contact().kept(asked),
                Err(error) => {
                    if std::mem::take(&mut *self.contact()).since.is_some() {
                        tracing::warn!(
                            error = %crate::error::Chain(&error),
                            "lost contact with the database; nothing is rescued for a lease after it is back"
                        );
                    }
                }
            }
        }
    }

    /// A look beside the ticker's, for a worker that found nothing to claim: gives how many runs came back. An
    /// error is the ticker's to notice.
    pub async fn rescue_now(&self) -> usize {
        match self.may_rescue(Instant::now()) {
            true => self.rescue().await.unwrap_or(0),
            false => 0,
        }
    }

    fn contact(&self) -> MutexGuard<'_, Contact> {
        self.contact.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn may_rescue(&self, now: Instant) -> bool {
        let mut contact = self.contact();
        // A gap is an outage too: this process may have been stopped, and does not know what happened meanwhile.
        contact.expect_within(now, self.timing.ticker * 2 + self.timing.heartbeat_timeout);
        contact.unbroken_for(now) >= self.timing.lease
    }

    async fn expire(&self) -> Result<(), DbError> {
        let expired = self.db.within(self.timing.heartbeat_timeout, async |conn| expire(conn).await).await?;
        if !expired.is_empty() {
            tracing::info!(count = expired.len(), "ended runs that were not started in time");
            self.wakeups.tell(Notice::Changed(expired));
        }
        Ok(())
    }

    async fn rescue(&self) -> Result<usize, DbError> {
        let limit = self.timing.heartbeat_timeout;
        let rescued = self.db.within(limit, async |conn| rescue(conn, limit).await).await?;
        tell(&rescued, &self.wakeups);
        Ok(rescued.len())
    }
}

/// How long this process has been in contact with the database without a gap.
#[derive(Debug, Default)]
struct Contact {
    since: Option<Instant>,
    last: Option<Instant>,
}

impl Contact {
    fn expect_within(&mut self, now: Instant, gap: Duration) {
        if self.last.is_some_and(|last| now - last > gap) {
            *self = Self::default();
        }
    }

    fn unbroken_for(&self, now: Instant) -> Duration {
        self.since.map_or(Duration::ZERO, |since| now - since)
    }

    fn kept(&mut self, at: Instant) {
        self.since.get_or_insert(at);
        self.last = Some(at);
    }
}

fn tell(rescued: &[Rescue], wakeups: &Wakeups) {
    for rescue in rescued {
        let (Rescue::Requeued(id) | Rescue::Closed(id)) = rescue;
        match rescue {
            Rescue::Requeued(_) => {
                tracing::warn!(execution = %id, "took back a run whose worker was lost; it waits for another")
            }
            Rescue::Closed(_) => tracing::error!(execution = %id, "closed a run whose worker was lost"),
        }
        wakeups.tell(Notice::Changed(vec![*id]));
        wakeups.tell(Notice::Work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_in_the_contact_begins_the_wait_anew() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut contact = Contact::default();
        for tick in 0..=5 {
            contact.expect_within(start + second * tick, second * 3);
            contact.kept(start + second * tick);
        }
        assert_eq!(contact.unbroken_for(start + second * 5), second * 5);
        contact.expect_within(start + second * 9, second * 3);
        assert_eq!(contact.unbroken_for(start + second * 9), Duration::ZERO);
    }
}
