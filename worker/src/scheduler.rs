//! The scheduler: every worker fires the schedules whose time has come. There is no leader: [`fire_due`] decides each
//! time once, whoever asks. A worker sleeps to the next planned time or for a tick, whichever is shorter, on its
//! monotonic clock; what time it is, only the database says.

use std::time::Duration;

use common::{
    config::Timing,
    db::{ANSWER_TIMEOUT, Db, DbError},
    queue::{Notice, Wakeups},
    schedule::fire::{Fired, Firing, Reason, SLICE, fire_due, until_next},
};

/// Workers that wait for the same moment do not all ask at once.
const SPREAD: Duration = Duration::from_millis(50);

/// Fires for ever.
pub async fn run(db: Db, timing: Timing, wakeups: Wakeups) {
    let mut away = false;
    loop {
        let tick = timing.ticker.mul_f64(rand::random_range(0.75..1.25));
        let pause = match fire_all(&db, &wakeups).await {
            Ok(next) => {
                away = false;
                next.map_or(tick, |next| tick.min(next.saturating_add(SPREAD.mul_f64(rand::random()))))
            }
            // What is due meanwhile stays due. An outage is told once; what does not pass by itself, every time.
            Err(error) => {
                let told = std::mem::replace(&mut away, error.is_passing());
                let error = common::error::Chain(&error);
                match away {
                    true if told => {}
                    true => tracing::warn!(%error, "schedules wait until the database is back"),
                    false => tracing::error!(%error, "schedules could not be fired"),
                }
                tick
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Fires everything that is due; gives the time until the next, where it is known.
async fn fire_all(db: &Db, wakeups: &Wakeups) -> Result<Option<Duration>, DbError> {
    loop {
        match db.within(ANSWER_TIMEOUT, async |conn| until_next(conn).await).await? {
            Some(Duration::ZERO) => {}
            later => return Ok(later),
        }
        let firings = db.within(ANSWER_TIMEOUT, async |conn| fire_due(conn).await).await?;
        for firing in &firings {
            tell(firing);
        }
        if firings.iter().any(|f| matches!(f.outcome, Fired::Queued(_))) {
            wakeups.tell(Notice::Work);
        }
        // The rest is locked: whoever has it fires it, and if not, a tick later it is due still.
        if i64::try_from(firings.len()).is_ok_and(|n| n < SLICE) {
            return Ok(None);
        }
    }
}

fn tell(firing: &Firing) {
    let Firing { job, job_name, scheduled_for, due_since, outcome, trace_id } = firing;
    let missed = due_since < scheduled_for;
    match outcome {
        Fired::Queued(execution) if missed => {
            tracing::warn!(%job, job_name, %execution, trace_id, %scheduled_for, %due_since, "a schedule missed its times; the latest is made up")
        }
        Fired::Queued(execution) => {
            tracing::info!(%job, job_name, %execution, trace_id, %scheduled_for, "a schedule triggered a run")
        }
        Fired::Skipped(Reason::Active(execution)) => {
            tracing::info!(%job, job_name, %execution, %scheduled_for, "a scheduled run is left out: a run is active and overlap is reject")
        }
        Fired::Skipped(Reason::QueueFull(waiting)) => {
            tracing::warn!(%job, job_name, waiting, %scheduled_for, "a scheduled run is left out: too many wait already")
        }
        Fired::Again => {
            tracing::warn!(%job, job_name, %scheduled_for, "a schedule came to a time that was decided before; was the clock set back?")
        }
        Fired::Unreadable(error) => {
            tracing::error!(%job, job_name, "a job does not run: its schedule {error}")
        }
    }
}
