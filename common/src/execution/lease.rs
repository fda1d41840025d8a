//! Leases: kept by heartbeats, and taken back when the heartbeats stop.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::{Stage, claim::Token};
use crate::{
    id::ExecutionId,
    telemetry::{TraceContext, attempt::Attempt},
};

/// Rescues after which an execution fails instead of going back to the queue.
pub const MAX_RESCUES: i32 = 3;

/// How a run tells how far it is; rides on the heartbeat so that the wide row is left alone while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Whose.
    pub token: Token,
    /// Where the bytes are.
    pub stage: Stage,
    /// Percent, 0 to 99.
    pub percent: i16,
    /// Bytes read so far.
    pub bytes: u64,
    /// How fast, of late.
    pub bytes_per_second: Option<u64>,
}

/// What a heartbeat learned of a lease that is still ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alive {
    /// Whose.
    pub token: Token,
    /// Somebody asked the run to stop.
    pub cancel_requested: bool,
}

/// One heartbeat for all runs of a process. A token that does not come back is lost: its lease was rescued. A
/// lease past its end that nobody rescued yet is revived, so that an outage of the database loses no run.
///
/// Leases are locked in the order of their tokens, here as in a finish and a rescue of several.
pub async fn heartbeat(conn: &mut PgConnection, lease: Duration, runs: &[Progress]) -> Result<Vec<Alive>, sqlx::Error> {
    let tokens: Vec<i64> = runs.iter().map(|r| r.token.0).collect();
    let stages: Vec<String> = runs.iter().map(|r| r.stage.as_str().to_owned()).collect();
    let percents: Vec<i16> = runs.iter().map(|r| r.percent.clamp(0, 99)).collect();
    let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let bytes: Vec<i64> = runs.iter().map(|r| whole(r.bytes)).collect();
    let rates: Vec<Option<i64>> = runs.iter().map(|r| r.bytes_per_second.map(whole)).collect();
    let rows = sqlx::query!(
        r#"with held as materialized (
               select r.*
                 from unnest($1::bigint[], $2::text[], $3::smallint[], $5::bigint[], $6::bigint[])
                      as r (token, stage, percent, bytes, bytes_per_second)
                 join execution_leases l on l.token = r.token
                order by l.token
                  for update of l
           )
           update execution_leases l
              set expires_at = clock_timestamp() + $4::bigint * interval '1 millisecond',
                  stage = h.stage,
                  progress = greatest(l.progress, h.percent),
                  bytes = h.bytes, bytes_per_second = h.bytes_per_second
             from held h, executions e
            where l.token = h.token and e.id = l.execution_id
           returning l.token as "token!: Token", e.cancel_requested_at is not null as "cancel_requested!""#,
        &tokens,
        &stages,
        &percents,
        crate::time::ms(lease),
        &bytes,
        &rates as &[Option<i64>],
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| Alive { token: r.token, cancel_requested: r.cancel_requested }).collect())
}

/// What became of a run whose worker was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rescue {
    /// Waits again.
    Requeued(ExecutionId),
    /// Over: cancelled meanwhile, or rescued too often.
    Closed(ExecutionId),
}

/// A run that was taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rescued {
    /// What became of it.
    pub rescue: Rescue,
    /// The attempt that was lost: nobody but who took it back can tell of its end.
    pub attempt: Attempt,
    /// Where its bytes were.
    pub stage: String,
    /// When it was claimed.
    pub claimed_at: DateTime<Utc>,
    /// When its lease ended.
    pub expired_at: DateTime<Utc>,
    /// When it was taken back. All by the database's clock.
    pub at: DateTime<Utc>,
}

/// A lease as somebody else saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Whose.
    pub token: Token,
    /// Moved on by every heartbeat.
    pub expires_at: DateTime<Utc>,
    /// The database's clock then.
    pub at: DateTime<Utc>,
}

/// Every lease.
pub async fn all(conn: &mut PgConnection) -> Result<Vec<Sight>, sqlx::Error> {
    sqlx::query_as!(
        Sight,
        r#"select token as "token: Token", expires_at, clock_timestamp() as "at!" from execution_leases"#
    )
    .fetch_all(conn)
    .await
}

/// Takes back those of the leases whose time is up and which are still as they were seen. Any process may call it, for
/// leases that it has seen unchanged for a whole lease by its own clock, in unbroken contact with the database: the
/// database's clock may be set, and after an outage the runs that live must get the chance to revive their leases first.
///
/// A statement may lie in the network for as long as an outage lasts and be carried out at its end, before any heartbeat
/// is. So it does nothing when it arrives more than `patience` after the database's clock showed [`Sight::at`].
///
/// It needs no gate, since it only ever lowers the number of leases. The execution is locked before its lease
/// (the lock order), and the lease's time is looked at again under the lock: a heartbeat may have won. Executions are
/// looked up by their ids alone: see `expire`.
pub async fn rescue(conn: &mut PgConnection, seen: &[Sight], patience: Duration) -> Result<Vec<Rescued>, sqlx::Error> {
    let Some(newest) = seen.iter().map(|sight| sight.at).max() else { return Ok(Vec::new()) };
    let tokens: Vec<i64> = seen.iter().map(|sight| sight.token.0).collect();
    let expiries: Vec<DateTime<Utc>> = seen.iter().map(|sight| sight.expires_at).collect();
    let rows = sqlx::query!(
        r#"with expired as materialized (
               select e.id, l.token, l.expires_at, e.status = 'Running' and e.last_token = l.token as running
                 from unnest($3::bigint[], $4::timestamptz[]) as s (token, expires_at)
                 join execution_leases l on l.token = s.token and l.expires_at = s.expires_at
                 join executions e on e.id = l.execution_id
                where l.expires_at < clock_timestamp() and clock_timestamp() < $2
                order by e.id
                  for update of e skip locked
           ), held as materialized (
               select l.token
                 from execution_leases l join expired x on l.token = x.token and l.expires_at = x.expires_at
                order by l.token
                  for update of l
           ), dead as (
               delete from execution_leases l using held h
                where l.token = h.token
               returning l.execution_id, l.token, l.worker, l.stage, l.claimed_at, l.expires_at
           ), closed as (
               update executions e
                  set status = case when e.cancel_requested_at is not null or e.rescues >= $1 then 'Failed' else 'Pending' end,
                      outcome = case when e.cancel_requested_at is not null then 'Cancelled'
                                     when e.rescues >= $1 then 'WorkerLost' end,
                      ended_at = case when e.cancel_requested_at is not null or e.rescues >= $1 then clock_timestamp() end,
                      error_code = case when e.cancel_requested_at is not null then 'cancelled'
                                        when e.rescues >= $1 then 'worker_lost' end,
                      error = case when e.cancel_requested_at is not null then 'cancelled on request'
                                   when e.rescues >= $1
                                   then format('the worker was lost %s times, at last %s while %s: look at its log and memory',
                                               e.rescues + 1, d.worker, lower(d.stage)) end,
                      stage = case when e.cancel_requested_at is not null or e.rescues >= $1 then d.stage end,
                      rescues = e.rescues + 1,
                      previous_token = d.token,
                      requeued_at = clock_timestamp()
                 from dead d join expired x on x.token = d.token and x.running
                where e.id = d.execution_id
               returning e.id, e.status, e.attempt, e.traceparent, e.tracestate, d.token, d.worker, d.stage, d.claimed_at, d.expires_at
           ), tried as (
               insert into execution_attempts (execution_id, attempt, worker, started_at, ended_at, outcome, stage, error, error_code)
               select id, attempt, worker, claimed_at, clock_timestamp(), 'WorkerLost', stage,
                      format('worker %s stopped answering', worker), 'worker_lost'
                 from closed
           ), told as (
               insert into execution_logs (execution_id, at, level, stage, message, span_id)
               select id, clock_timestamp(), 'warning', stage,
                      format('worker %s stopped answering; %s', worker,
                             case status when 'Pending' then 'the run waits for another worker' else 'the run is closed' end),
                      -- As telemetry::attempt::claim_span_id.
                      encode(substring(sha256(uuid_send(id) || int8send(token)) from 1 for 8), 'hex')
                 from closed
           )
           select id as "id!: ExecutionId", status as "status!", attempt as "attempt!", traceparent, tracestate, token as "token!: Token",
                  worker as "worker!", stage as "stage!", claimed_at as "claimed_at!", expires_at as "expires_at!",
                  clock_timestamp() as "at!"
             from closed"#,
        MAX_RESCUES,
        newest + patience,
        &tokens,
        &expiries,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|r| Rescued {
            rescue: if r.status == "Pending" { Rescue::Requeued(r.id) } else { Rescue::Closed(r.id) },
            attempt: Attempt {
                execution: r.id,
                token: r.token,
                number: r.attempt,
                worker: r.worker,
                trace: TraceContext { traceparent: r.traceparent, tracestate: r.tracestate },
            },
            stage: r.stage,
            claimed_at: r.claimed_at,
            expired_at: r.expires_at,
            at: r.at,
        })
        .collect())
}
