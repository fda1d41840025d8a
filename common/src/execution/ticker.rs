//! The rescue ticker: every API and worker process looks for leases that ran out, so that a dead run leaves
//! Running also when every other worker is full. No leader.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::lease::{Rescue, rescue};
use crate::{
    config::Timing,
    db::Db,
    queue::{Notice, Wakeups},
};

/// Looks until `stop`. A process rescues only after its own contact with the database was unbroken for one
/// whole lease: after an outage everybody waits, and a run that lives revives its lease instead of losing it.
pub async fn run(db: Db, timing: Timing, wakeups: Wakeups, stop: CancellationToken) {
    let mut contact = Contact::default();
    loop {
        let pause = timing.ticker.mul_f64(rand::random_range(0.75..1.25));
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
        let asked = Instant::now();
        // A gap is an outage too: this process may have been stopped, and does not know what happened meanwhile.
        contact.expect_within(asked, timing.ticker * 2 + timing.heartbeat_timeout);
        let may_rescue = contact.unbroken_for(asked) >= timing.lease;
        let result = db
            .within(timing.heartbeat_timeout, async |conn| match may_rescue {
                true => rescue(conn).await,
                false => sqlx::query("select 1").execute(conn).await.map(|_| Vec::new()),
            })
            .await;
        match result {
            Ok(rescued) => {
                contact.kept(asked);
                tell(&rescued, &wakeups);
            }
            Err(error) => {
                if contact.since.is_some() {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "lost contact with the database; nothing is rescued for a lease after it is back"
                    );
                }
                contact = Contact::default();
            }
        }
    }
}

/// How long this process has been in contact with the database without a gap.
#[derive(Default)]
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
