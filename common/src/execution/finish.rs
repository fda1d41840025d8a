//! Finish: the fenced end of attempts. Whoever comes with an old token changes nothing.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use sqlx::{Connection, PgConnection};

use super::{
    Outcome, Stage,
    claim::{Claim, Token},
};
use crate::{
    artifact::NewArtifact,
    id::{ExecutionId, JobId},
};

/// How an attempt ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// Published.
    Success(Box<Published>),
    /// A backup was brought back.
    Restored(Restored),
    /// Failed, and another try would fail as well.
    Failed(Failure),
    /// Failed, and another try after a pause may succeed.
    Retry(Failure, Duration),
    /// The process stops, or cannot serve the run and another can, and gives it back; counts against nothing.
    Released,
}

/// A backup that lies in all its destinations.
#[derive(Clone, Debug)]
pub struct Published {
    /// Its job.
    pub job: JobId,
    /// Stored bytes of one copy.
    pub size_bytes: i64,
    /// Where it lies in the first destination.
    pub path: String,
    /// `sha256:<hex>` of what lies at `path`.
    pub checksum: String,
    /// The time whose data it holds.
    pub snapshot_at: DateTime<Utc>,
    /// Every object.
    pub artifacts: Vec<NewArtifact>,
}

/// A backup that is in its database again.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Bytes that were read, as stored.
    pub size_bytes: i64,
    /// The time whose data is there now.
    pub snapshot_at: DateTime<Utc>,
}

/// Why an attempt failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// For people: what was done to what, what the tool said, what to do.
    pub error: String,
    /// For programs.
    pub code: &'static str,
    /// Finer than Failed.
    pub outcome: Option<Outcome>,
    /// Where the bytes were.
    pub stage: Stage,
}

/// What became of a finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The execution is over.
    Ended,
    /// It waits again.
    Requeued,
    /// The claim was no longer ours: nothing was recorded.
    Zombie,
}

/// Ends attempts in one transaction: an execution is written only where the token is still its newest and it still runs,
/// its lease goes, and a success leaves its artifact rows. Gives one outcome for each. It may be repeated when its answer
/// was lost: an execution that this very claim ended already counts as ended.
///
/// An error is all of theirs: nothing was recorded.
pub async fn finish(conn: &mut PgConnection, ends: &[(Claim, &Ending)]) -> Result<Vec<Finished>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let recorded: HashMap<Token, bool> = record(&mut tx, ends).await?.into_iter().collect();
    let published: Vec<_> = ends
        .iter()
        .filter(|(claim, _)| recorded.contains_key(&claim.token))
        .filter_map(|(claim, ending)| match ending {
            Ending::Success(published) => Some((*claim, &**published)),
            _ => None,
        })
        .collect();
    if !published.is_empty() {
        let tokens: Vec<Token> = published.iter().map(|(claim, _)| claim.token).collect();
        crate::artifact::insert(&mut tx, &published).await?;
        crate::staged_object::forget(&mut tx, &tokens).await?;
    }
    tx.commit().await?;
    let unknown: Vec<Claim> = ends.iter().map(|(c, _)| *c).filter(|c| !recorded.contains_key(&c.token)).collect();
    let ended = if unknown.is_empty() { Vec::new() } else { ended_before(conn, &unknown).await? };
    Ok(ends
        .iter()
        .map(|(claim, _)| match recorded.get(&claim.token) {
            Some(true) => Finished::Requeued,
            Some(false) => Finished::Ended,
            None if ended.contains(&claim.token) => Finished::Ended,
            None => Finished::Zombie,
        })
        .collect())
}

/// What became of those whose claim still held: whether they wait again. Executions first, leases after them, each in
/// one order: the lock order, also between a finish and a heartbeat of the same runs. An execution that runs without its
/// lease would be a broken invariant; it is left alone. Executions are looked up by their ids alone: see `expire`. A run
/// that somebody cancelled ends as Cancelled, whatever it failed of; what its worker says of a cancel stays.
async fn record(conn: &mut PgConnection, ends: &[(Claim, &Ending)]) -> Result<Vec<(Token, bool)>, sqlx::Error> {
    let mut rows = Columns::default();
    for (claim, ending) in ends {
        rows.push(claim, ending);
    }
    let recorded = sqlx::query!(
        r#"with told as (
               select * from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bigint[],
                                    $9::bigint[], $10::text[], $11::text[], $12::timestamptz[])
                   as t (id, token, ending, error, error_code, outcome, stage, pause_ms, size_bytes, path, checksum, snapshot_at)
           ), held as materialized (
               select t.*, e.status = 'Running' as running, e.attempt, e.cancel_requested_at is not null and t.ending <> 'success' as cancelled,
                      e.cancel_requested_at is null
                      and (t.ending = 'released' or t.ending = 'retry' and e.failures + 1 < e.max_attempts) as again
                 from told t join executions e on e.id = t.id and e.last_token = t.token
                order by e.id
                  for update of e
           ), leases as materialized (
               select l.token, l.worker, l.claimed_at, l.stage
                 from execution_leases l join held h on h.token = l.token and h.running
                order by l.token
                  for update of l
           ), gone as (
               delete from execution_leases l using leases where l.token = leases.token
           ), tried as (
               insert into execution_attempts (execution_id, attempt, worker, started_at, ended_at, outcome, stage, error, error_code)
               select h.id, h.attempt, l.worker, l.claimed_at, clock_timestamp(),
                      case when h.cancelled then 'Cancelled' when h.ending = 'success' then 'Success' when h.ending = 'released' then 'Released'
                           else coalesce(h.outcome, 'Failed') end,
                      coalesce(h.stage, l.stage), h.error, case when h.cancelled then 'cancelled' else h.error_code end
                 from held h join leases l on l.token = h.token
                where h.ending <> 'success' or h.attempt > 1
           )
           update executions e
              set status = case when h.again then 'Pending' when h.ending = 'success' then 'Success' else 'Failed' end,
                  outcome = case when h.cancelled then 'Cancelled' when not h.again then h.outcome end,
                  failures = e.failures + case when h.ending in ('failed', 'retry') then 1 else 0 end,
                  previous_token = case when h.ending = 'success' then e.previous_token else h.token end,
                  requeued_at = case when h.again then clock_timestamp() else e.requeued_at end,
                  run_at = case when h.again and h.ending = 'retry' then clock_timestamp() + h.pause_ms * interval '1 millisecond'
                                else e.run_at end,
                  ended_at = case when not h.again then clock_timestamp() end,
                  stage = case when not h.again then h.stage end,
                  error = case when h.cancelled and h.outcome is distinct from 'Cancelled' then 'cancelled on request' else h.error end,
                  error_code = case when h.cancelled then 'cancelled' else h.error_code end,
                  size_bytes = h.size_bytes, path = h.path, checksum = h.checksum, snapshot_at = h.snapshot_at
             from held h join leases l on l.token = h.token
            where e.id = h.id
           returning h.token as "token!: Token", h.again as "again!""#,
        rows.id as _,
        rows.token as _,
        rows.ending as _,
        rows.error as _,
        rows.error_code as _,
        rows.outcome as _,
        rows.stage as _,
        rows.pause_ms as _,
        rows.size_bytes as _,
        rows.path as _,
        rows.checksum as _,
        rows.snapshot_at as _,
    )
    .fetch_all(conn)
    .await?;
    Ok(recorded.into_iter().map(|r| (r.token, r.again)).collect())
}

/// Those whose end was recorded before, by a finish whose answer was lost. A statement after the one that records: that
/// one's snapshot may be older than the commit it waited for.
async fn ended_before(conn: &mut PgConnection, claims: &[Claim]) -> Result<Vec<Token>, sqlx::Error> {
    let (ids, tokens): (Vec<_>, Vec<_>) = claims.iter().map(|claim| (claim.execution, claim.token)).unzip();
    sqlx::query_scalar!(
        r#"select e.last_token as "token!: Token"
             from executions e join unnest($1::uuid[], $2::bigint[]) as t (id, token) on e.id = t.id and e.last_token = t.token
            where e.ended_at is not null"#,
        ids as _,
        tokens as _,
    )
    .fetch_all(conn)
    .await
}

/// Endings, a list for each column.
#[derive(Default)]
struct Columns<'a> {
    id: Vec<ExecutionId>,
    token: Vec<Token>,
    ending: Vec<&'static str>,
    error: Vec<Option<String>>,
    error_code: Vec<Option<&'static str>>,
    outcome: Vec<Option<&'static str>>,
    stage: Vec<Option<&'static str>>,
    pause_ms: Vec<Option<i64>>,
    size_bytes: Vec<Option<i64>>,
    path: Vec<Option<&'a str>>,
    checksum: Vec<Option<&'a str>>,
    snapshot_at: Vec<Option<DateTime<Utc>>>,
}

impl<'a> Columns<'a> {
    fn push(&mut self, claim: &Claim, ending: &'a Ending) {
        let (word, published, restored, failure, pause) = match ending {
            Ending::Success(published) => ("success", Some(published), None, None, None),
            Ending::Restored(restored) => ("success", None, Some(restored), None, None),
            Ending::Failed(failure) => ("failed", None, None, Some(failure), None),
            Ending::Retry(failure, pause) => ("retry", None, None, Some(failure), Some(pause)),
            Ending::Released => ("released", None, None, None, None),
        };
        self.id.push(claim.execution);
        self.token.push(claim.token);
        self.ending.push(word);
        self.error.push(failure.map(|f| f.error.replace('\0', "\u{fffd}")));
        self.error_code.push(failure.map(|f| f.code));
        self.outcome.push(failure.and_then(|f| f.outcome).map(Outcome::as_str));
        let completed = (word == "success").then_some(Stage::Completed);
        self.stage.push(completed.or(failure.map(|f| f.stage)).map(Stage::as_str));
        self.pause_ms.push(pause.copied().map(crate::time::ms));
        self.size_bytes.push(published.map(|p| p.size_bytes).or(restored.map(|r| r.size_bytes)));
        self.path.push(published.map(|p| p.path.as_str()));
        self.checksum.push(published.map(|p| p.checksum.as_str()));
        self.snapshot_at.push(published.map(|p| p.snapshot_at).or(restored.map(|r| r.snapshot_at)));
    }
}
