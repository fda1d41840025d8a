//! Firing: every worker looks for jobs whose time has come, without a leader, and each time of each schedule is
//! decided exactly once.
//!
//! 1. The row of a job is locked before anything is decided, and `next_run_at` is moved on in the transaction that
//!    enqueues. A worker that dies in between leaves nothing behind, and the next look finds the job due again.
//! 2. `job_firings` has each time once, so that a `next_run_at` that was set back (a clock that jumped, a restored
//!    row) does not fire twice.
//! 3. "Now" is the database's. Of several times that were missed, the latest is made up, once.

use std::{collections::HashSet, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use sqlx::{Connection, PgConnection};

use super::{Schedule, ScheduleError};
use crate::{
    audit::{Actor, Event},
    db,
    execution::enqueue::{Desk, Enqueued, TriggerRequest},
    id::{ExecutionId, JobId, Reference},
    label::Labels,
    telemetry::{
        Span, TraceContext,
        span::{SpanContext, SpanKind, flush_soon},
    },
    time::as_text,
};

/// Jobs in one transaction: ten thousand that are due at midnight must not be one, nor all one worker's.
pub const SLICE: i64 = 100;
/// Scheduled runs give way to those that somebody waits for.
const PRIORITY: i16 = -5;
/// A schedule that this version cannot read is looked at again after this time: perhaps by a newer worker.
const UNREADABLE_PAUSE: TimeDelta = TimeDelta::hours(1);

/// What became of a job that was due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firing {
    /// The job.
    pub job: JobId,
    /// Its name, for the log.
    pub job_name: String,
    /// The first time that was due; earlier than `scheduled_for` when times were missed.
    pub due_since: DateTime<Utc>,
    /// The time that was decided.
    pub scheduled_for: DateTime<Utc>,
    /// What was decided.
    pub outcome: Fired,
    /// The trace of the run that was made.
    pub trace_id: Option<String>,
}

/// What was decided about a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fired {
    /// A run waits.
    Queued(ExecutionId),
    /// Left out, as any trigger would have been.
    Skipped(Reason),
    /// This time was decided before.
    Again,
    /// This version cannot read the schedule.
    Unreadable(ScheduleError),
}

/// Why a time made no run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Overlap is `reject` and this run is active.
    Active(ExecutionId),
    /// So many wait already, of this job or in all.
    QueueFull(i64),
}

/// Time until the next job is due, zero when one is; `None` when nothing is planned. Takes no lock.
pub async fn until_next(conn: &mut PgConnection) -> Result<Option<Duration>, sqlx::Error> {
    let seconds = sqlx::query_scalar!(
        r#"select extract(epoch from next_run_at - clock_timestamp())::float8 as "seconds!" from jobs
            where enabled and next_run_at is not null order by next_run_at limit 1"#
    )
    .fetch_optional(conn)
    .await?;
    // What is too far off for a duration is far enough.
    Ok(seconds.map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)))
}

/// Fires jobs whose time has come, the longest due first, at most [`SLICE`], all in one transaction. Fewer than that
/// means that nothing more is due but what another worker has in hand.
pub async fn fire_due(conn: &mut PgConnection) -> Result<Vec<Firing>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let due = lock_due(&mut tx).await?;
    if due.is_empty() {
        return Ok(Vec::new());
    }
    // After the locks, in a statement of its own: not earlier than anything that is due.
    let now = db::now(&mut tx).await?;
    let plans: Vec<Plan> = due.iter().map(|job| job.plan(now)).collect();
    let fresh = record(&mut tx, &plans).await?;
    let fresh = plans.iter().filter(|p| fresh.contains(&p.job.id));
    // They end after the commit: what a rollback leaves is made again, by a span of its own.
    let (requests, mut spans): (Vec<TriggerRequest>, Vec<Span>) = fresh.map(Plan::request).unzip();
    let mut desk = Desk::open(&mut tx, &requests).await?;
    let firings: Vec<Firing> = plans
        .iter()
        .map(|plan| plan.fire(&mut desk, requests.iter().find(|r| r.job.id() == Some(plan.job.id.0))))
        .collect();
    desk.inserts.run(&mut tx).await?;
    advance(&mut tx, &plans).await?;
    forget_old(&mut tx, &plans).await?;
    tx.commit().await?;
    for (request, span) in requests.iter().zip(&mut spans) {
        if let Some(firing) = firings.iter().find(|firing| request.job.id() == Some(firing.job.0)) {
            firing.tell(span);
        }
    }
    drop(spans);
    // Whoever claims the runs names them as parents.
    flush_soon();
    Ok(firings)
}

impl Firing {
    fn tell(&self, span: &mut Span) {
        span.set("dbackup.scheduled_for", as_text(&self.scheduled_for));
        match &self.outcome {
            Fired::Queued(id) => span.set("messaging.message.id", id.to_string()),
            Fired::Skipped(Reason::Active(_)) => span.set("dbackup.skipped", "already_active"),
            Fired::Skipped(Reason::QueueFull(_)) => span.set("dbackup.skipped", "queue_full"),
            Fired::Again | Fired::Unreadable(_) => {}
        }
    }
}

struct DueJob {
    id: JobId,
    name: String,
    schedule: String,
    timezone: String,
    next_run_at: DateTime<Utc>,
}

/// What one transaction is going to do with a job.
struct Plan<'a> {
    job: &'a DueJob,
    scheduled_for: DateTime<Utc>,
    next_run_at: Option<DateTime<Utc>>,
    unreadable: Option<ScheduleError>,
}

impl DueJob {
    fn plan(&self, now: DateTime<Utc>) -> Plan<'_> {
        let (schedule, unreadable) = match Schedule::parse(&self.schedule, &self.timezone) {
            Ok(schedule) => (Some(schedule), None),
            Err(error) => (None, Some(error)),
        };
        let next = schedule.as_ref().map(|s| s.next_after(now));
        Plan {
            job: self,
            scheduled_for: schedule.and_then(|s| s.latest_until(now)).unwrap_or(self.next_run_at),
            next_run_at: next.unwrap_or(Some(now + UNREADABLE_PAUSE)),
            unreadable,
        }
    }
}

impl Plan<'_> {
    /// The trigger, and the span that begins its trace.
    fn request(&self) -> (TriggerRequest, Span) {
        let mut span = Span::root(&SpanContext::NONE, SpanKind::Producer, "schedule.fire");
        if span.is_recording() {
            span.set("messaging.system", "dbackup");
            span.set("messaging.operation.type", "send");
            span.set("messaging.operation.name", "schedule.fire");
            span.set("dbackup.job.id", self.job.id.to_string());
        }
        let request = TriggerRequest {
            job: Reference::new(self.job.id.to_string()),
            only: None,
            kind: "Schedule",
            actor: Actor::schedule(&self.job.schedule, &self.job.timezone),
            priority: PRIORITY,
            labels: Labels::default(),
            locked: false,
            lock_days: None,
            max_age_seconds: None,
            start_within_seconds: None,
            trace: TraceContext::of(span.context()),
            scheduled_for: Some(self.scheduled_for),
            idempotency: None,
        };
        (request, span)
    }

    fn fire(&self, desk: &mut Desk, request: Option<&TriggerRequest>) -> Firing {
        let outcome = match (&self.unreadable, request) {
            (Some(error), _) => Fired::Unreadable(error.clone()),
            (None, None) => Fired::Again,
            (None, Some(request)) => {
                let fired = match desk.decide(request) {
                    Enqueued::Active(execution) => Fired::Skipped(Reason::Active(execution)),
                    Enqueued::JobQueueFull(cap) | Enqueued::QueueFull(cap) => Fired::Skipped(Reason::QueueFull(cap)),
                    Enqueued::Queued(id) | Enqueued::Reused(id) | Enqueued::Replayed(id) => Fired::Queued(id),
                    // The row is locked, and there is no key.
                    Enqueued::JobNotFound | Enqueued::KeyReused => Fired::Again,
                };
                if let Fired::Skipped(reason) = &fired {
                    desk.inserts.note(&request.actor, self.skip_event(reason));
                }
                fired
            }
        };
        let queued = matches!(outcome, Fired::Queued(_));
        Firing {
            job: self.job.id,
            job_name: self.job.name.clone(),
            due_since: self.job.next_run_at,
            scheduled_for: self.scheduled_for,
            trace_id: request.filter(|_| queued).and_then(|request| request.trace.trace_id()).map(str::to_owned),
            outcome,
        }
    }

    /// What is left out must not be lost in silence.
    fn skip_event(&self, reason: &Reason) -> Event {
        let mut details = json!({ "scheduledFor": as_text(&self.scheduled_for) });
        match reason {
            Reason::Active(execution) => {
                details["reason"] = json!("already_active");
                details["executionId"] = json!(execution);
            }
            Reason::QueueFull(cap) => {
                details["reason"] = json!("queue_full");
                details["waiting"] = json!(cap);
            }
        }
        Event::new("schedule.skip", self.job.id, &self.job.name).with(details)
    }
}

/// Locked rows are left to whoever has them: another worker that fires them, or a change that plans them anew.
/// Nobody waits here, so the order of the locks needs no care.
async fn lock_due(conn: &mut PgConnection) -> Result<Vec<DueJob>, sqlx::Error> {
    // In a sub-select the clock is read once, and the index serves.
    sqlx::query_as!(
        DueJob,
        r#"select id as "id: JobId", name, schedule as "schedule!", timezone, next_run_at as "next_run_at!" from jobs
            where enabled and schedule is not null and next_run_at <= (select clock_timestamp())
            order by next_run_at limit $1
              for no key update skip locked"#,
        SLICE
    )
    .fetch_all(conn)
    .await
}

/// Takes the times; gives the jobs whose time nobody had taken.
async fn record(conn: &mut PgConnection, plans: &[Plan<'_>]) -> Result<HashSet<JobId>, sqlx::Error> {
    let readable = || plans.iter().filter(|p| p.unreadable.is_none());
    let jobs: Vec<JobId> = readable().map(|p| p.job.id).collect();
    let times: Vec<DateTime<Utc>> = readable().map(|p| p.scheduled_for).collect();
    let fresh = sqlx::query_scalar!(
        r#"insert into job_firings (job_id, scheduled_for) select * from unnest($1::uuid[], $2::timestamptz[])
           on conflict (job_id, scheduled_for) do nothing
           returning job_id as "job_id: JobId""#,
        &jobs[..] as _,
        &times,
    )
    .fetch_all(conn)
    .await?;
    Ok(fresh.into_iter().collect())
}

async fn advance(conn: &mut PgConnection, plans: &[Plan<'_>]) -> Result<(), sqlx::Error> {
    let jobs: Vec<JobId> = plans.iter().map(|p| p.job.id).collect();
    let times: Vec<Option<DateTime<Utc>>> = plans.iter().map(|p| p.next_run_at).collect();
    sqlx::query!(
        "update jobs set next_run_at = n.next_run_at from unnest($1::uuid[], $2::timestamptz[]) as n (id, next_run_at)
          where jobs.id = n.id",
        &jobs[..] as _,
        &times as &[Option<DateTime<Utc>>],
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Times of these jobs a week before the ones that are decided: no clock is set back so far.
async fn forget_old(conn: &mut PgConnection, plans: &[Plan<'_>]) -> Result<(), sqlx::Error> {
    let jobs: Vec<JobId> = plans.iter().map(|p| p.job.id).collect();
    let times: Vec<DateTime<Utc>> = plans.iter().map(|p| p.scheduled_for).collect();
    sqlx::query!(
        "delete from job_firings f using unnest($1::uuid[], $2::timestamptz[]) as n (id, scheduled_for)
          where f.job_id = n.id and f.scheduled_for < n.scheduled_for - interval '7 days'",
        &jobs[..] as _,
        &times,
    )
    .execute(conn)
    .await?;
    Ok(())
}
