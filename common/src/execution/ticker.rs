//! The rescue ticker: every API and worker process looks for leases that ran out, so that a dead run leaves
//! Running also when every other worker is full. No leader.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use opentelemetry::KeyValue;
use tokio_util::sync::CancellationToken;

use super::{
    claim::Token,
    expire::expire,
    lease::{self, Rescue, Rescued, Sight},
};
use crate::{
    config::Timing,
    db::{Db, DbError},
    metrics,
    queue::{Notice, Wakeups},
    telemetry::attempt::Closing,
};

/// Rescues lost runs, when this process may.
///
/// It may only after its own contact with the database was unbroken for one whole lease: after an outage everybody waits,
/// and a run that lives revives its lease instead of losing it. And it takes only a lease that it has seen unchanged for
/// a whole lease by its own clock: the database's clock says when a lease ends, and may be set forward.
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
            let tick = self.timing.ticker.mul_f64(rand::random_range(0.75..1.25));
            // No later than a lease that nobody moves on has been seen for long enough.
            let due = self.contact().next_due(self.timing.lease, Instant::now());
            tokio::time::sleep(due.map_or(tick, |due| tick.min(due))).await;
            let asked = Instant::now();
            let result = match self.rescue(asked).await {
                Ok(_) => self.expire().await,
                Err(error) => Err(error),
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
        self.rescue(Instant::now()).await.unwrap_or(0)
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
        let expired = self.db.at_once(self.timing.heartbeat_timeout, async |conn| expire(conn).await).await?;
        if !expired.is_empty() {
            metrics::get().expired.inc_by(expired.len() as u64);
            tracing::info!(count = expired.len(), "ended runs that were not started in time");
            self.wakeups.tell(Notice::Changed(expired));
        }
        Ok(())
    }

    async fn rescue(&self, asked: Instant) -> Result<usize, DbError> {
        let (limit, may) = (self.timing.heartbeat_timeout, self.may_rescue(asked));
        // At once: a look that waits for its connection as long as an outage lasts would not notice the outage.
        let leases = self.db.at_once(limit, async |conn| lease::all(conn).await).await?;
        let due = self.contact().sight(leases, self.timing.lease, Instant::now());
        if !may || due.is_empty() {
            return Ok(0);
        }
        let rescued = self.db.at_once(limit, async |conn| lease::rescue(conn, &due, limit).await).await?;
        for rescued in &rescued {
            close(rescued, self.timing.lease);
            tell(rescued, &self.wakeups);
        }
        Ok(rescued.len())
    }
}

/// How long this process has been in contact with the database without a gap, and what it has seen meanwhile.
#[derive(Debug, Default)]
struct Contact {
    since: Option<Instant>,
    last: Option<Instant>,
    /// When each lease was first seen with the end that it has.
    seen: HashMap<Token, (DateTime<Utc>, Instant)>,
}

impl Contact {
    /// Takes in a look at all leases, and gives those that are over and have not changed for `lease`.
    fn sight(&mut self, leases: Vec<Sight>, lease: Duration, now: Instant) -> Vec<Sight> {
        let before = std::mem::take(&mut self.seen);
        for sight in &leases {
            let same = before.get(&sight.token).filter(|(expires_at, _)| *expires_at == sight.expires_at);
            self.seen.insert(sight.token, (sight.expires_at, same.map_or(now, |(_, since)| *since)));
        }
        let over = |sight: &Sight| sight.expires_at < sight.at && now - self.seen[&sight.token].1 >= lease;
        leases.into_iter().filter(over).collect()
    }

    /// Until some lease may be taken, if none is moved on.
    fn next_due(&self, lease: Duration, now: Instant) -> Option<Duration> {
        let due = self.seen.values().map(|(_, since)| (*since + lease).saturating_duration_since(now));
        // One that may be taken already and was not: another process is at it, or the database's clock is behind.
        due.filter(|due| !due.is_zero()).min()
    }

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

/// Writes the closing span of an attempt in place of its worker. Should that be alive and wake up, it finds its lease lost
/// and writes none.
fn close(rescued: &Rescued, lease: Duration) {
    let Rescued { attempt, stage, .. } = rescued;
    // The last heartbeat set the end of the lease; with another length of lease there this is a little off.
    let silent = (rescued.at - rescued.expired_at).to_std().unwrap_or_default() + lease;
    let silent_ms = crate::time::ms(silent);
    attempt.close(Closing {
        from: rescued.claimed_at.into(),
        to: rescued.at.into(),
        outcome: "worker_lost",
        error: Some((
            "worker_lost".to_owned(),
            format!("worker {} stopped answering while {}", attempt.worker, stage.to_lowercase()),
        )),
        attributes: vec![
            KeyValue::new("dbackup.stage", stage.clone()),
            KeyValue::new("dbackup.without_heartbeat_ms", silent_ms),
        ],
    });
}

fn tell(rescued: &Rescued, wakeups: &Wakeups) {
    metrics::get().rescued(matches!(rescued.rescue, Rescue::Closed(_)));
    let (Rescue::Requeued(id) | Rescue::Closed(id)) = rescued.rescue;
    let (trace_id, worker) = (rescued.attempt.trace.trace_id(), &rescued.attempt.worker);
    match rescued.rescue {
        Rescue::Requeued(_) => {
            tracing::warn!(execution = %id, trace_id, worker, "took back a run whose worker was lost; it waits for another")
        }
        Rescue::Closed(_) => tracing::error!(execution = %id, trace_id, worker, "closed a run whose worker was lost"),
    }
    wakeups.tell(Notice::Changed(vec![id]));
    wakeups.tell(Notice::Work);
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

    #[test]
    fn a_lease_is_over_only_when_it_was_seen_unchanged_for_a_lease_whatever_the_databases_clock_says() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let (lease, mut contact) = (second * 15, Contact::default());
        let at = |seconds: i64| DateTime::from_timestamp(1_000_000 + seconds, 0).expect("a time");
        let sight = |expires: i64, clock: i64| vec![Sight { token: Token(1), expires_at: at(expires), at: at(clock) }];
        // The clock is set forward by a minute while the worker beats.
        for beat in 0_u32..10 {
            let clock = i64::from(beat) * 3;
            let over = contact.sight(sight(clock + 15, clock + 60), lease, start + second * 3 * beat);
            assert_eq!(over, vec![], "beat {beat}");
        }
        // Now it is dead: its last end stays.
        assert_eq!(contact.next_due(lease, start + second * 30), Some(second * 12));
        assert_eq!(contact.sight(sight(42, 100), lease, start + second * 41), vec![]);
        assert_eq!(contact.sight(sight(42, 101), lease, start + second * 42), sight(42, 101));
        // One that is gone is forgotten.
        assert_eq!(contact.sight(Vec::new(), lease, start + second * 43), vec![]);
        assert_eq!(contact.next_due(lease, start + second * 43), None);
    }
}
