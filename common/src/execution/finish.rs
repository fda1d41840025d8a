//! Finish: the fenced end of an attempt. Whoever comes with an old token changes nothing.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{Connection, PgConnection};

use super::{Outcome, Stage, claim::Claim};
use crate::{artifact::NewArtifact, id::JobId};

/// How an attempt ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// Published.
    Success(Box<Published>),
    /// Failed, and another try would fail as well.
    Failed(Failure),
    /// Failed, and another try after a pause may succeed.
    Retry(Failure, Duration),
    /// The process stops and gives the run back; counts against nothing.
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

/// Ends an attempt in one transaction: the execution is written only where the token is still its newest and it
/// still runs, the lease goes, and a success leaves its artifact rows. It may be repeated when its answer was
/// lost: an execution that this very claim ended already counts as ended.
pub async fn finish(conn: &mut PgConnection, claim: Claim, ending: &Ending) -> Result<Finished, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let now_pending = match ending {
        Ending::Success(published) => succeed(&mut tx, claim, published).await?.map(|()| false),
        Ending::Failed(failure) => fail(&mut tx, claim, failure, None).await?,
        Ending::Retry(failure, pause) => fail(&mut tx, claim, failure, Some(*pause)).await?,
        Ending::Released => release(&mut tx, claim).await?,
    };
    let Some(now_pending) = now_pending else {
        let ours = sqlx::query_scalar!(
            r#"select exists (select 1 from executions where id = $1 and last_token = $2 and ended_at is not null) as "ours!""#,
            claim.execution as _,
            claim.token as _,
        )
        .fetch_one(&mut *tx)
        .await?;
        return Ok(if ours { Finished::Ended } else { Finished::Zombie });
    };
    let gone =
        sqlx::query!("delete from execution_leases where token = $1", claim.token as _).execute(&mut *tx).await?;
    if gone.rows_affected() != 1 {
        // Rolled back: an execution that runs without a lease would be a broken invariant, not a race.
        return Ok(Finished::Zombie);
    }
    tx.commit().await?;
    Ok(if now_pending { Finished::Requeued } else { Finished::Ended })
}

async fn succeed(conn: &mut PgConnection, claim: Claim, published: &Published) -> Result<Option<()>, sqlx::Error> {
    let done = sqlx::query!(
        "update executions
            set status = 'Success', outcome = null, ended_at = clock_timestamp(), stage = 'Completed', size_bytes = $3, path = $4,
                checksum = $5, snapshot_at = $6, error = null, error_code = null
          where id = $1 and last_token = $2 and status = 'Running'",
        claim.execution as _,
        claim.token as _,
        published.size_bytes,
        published.path,
        published.checksum,
        published.snapshot_at,
    )
    .execute(&mut *conn)
    .await?;
    if done.rows_affected() != 1 {
        return Ok(None);
    }
    crate::artifact::insert(conn, claim.execution, published.job, &published.artifacts).await?;
    crate::staged_object::forget(conn, claim.token).await?;
    Ok(Some(()))
}

/// A run that somebody cancelled ends as Cancelled, whatever it failed of.
async fn fail(
    conn: &mut PgConnection,
    claim: Claim,
    failure: &Failure,
    pause: Option<Duration>,
) -> Result<Option<bool>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"update executions e
              set failures = e.failures + 1,
                  previous_token = e.last_token,
                  requeued_at = case when r.again then clock_timestamp() else e.requeued_at end,
                  status = case when r.again then 'Pending' else 'Failed' end,
                  run_at = case when r.again then clock_timestamp() + $7::bigint * interval '1 millisecond' else e.run_at end,
                  ended_at = case when r.again then null else clock_timestamp() end,
                  outcome = case when r.again then null when e.cancel_requested_at is not null then 'Cancelled' else $5 end,
                  stage = case when r.again then null else $6 end,
                  error = case when e.cancel_requested_at is not null then 'cancelled on request' else $3 end,
                  error_code = case when e.cancel_requested_at is not null then 'cancelled' else $4 end
             from (select id, $7::bigint is not null and cancel_requested_at is null and failures + 1 < max_attempts as again
                     from executions where id = $1 and last_token = $2 and status = 'Running' for update) r
            where e.id = r.id
           returning r.again as "again!""#,
        claim.execution as _,
        claim.token as _,
        failure.error.replace('\0', "\u{fffd}"),
        failure.code,
        failure.outcome.map(Outcome::as_str),
        failure.stage.as_str(),
        pause.map(|p| i64::try_from(p.as_millis()).unwrap_or(i64::MAX)),
    )
    .fetch_optional(conn)
    .await
}

async fn release(conn: &mut PgConnection, claim: Claim) -> Result<Option<bool>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"update executions
              set status = case when cancel_requested_at is null then 'Pending' else 'Failed' end,
                  previous_token = last_token,
                  requeued_at = clock_timestamp(),
                  outcome = case when cancel_requested_at is not null then 'Cancelled' end,
                  error = case when cancel_requested_at is not null then 'cancelled on request' end,
                  error_code = case when cancel_requested_at is not null then 'cancelled' end,
                  ended_at = case when cancel_requested_at is not null then clock_timestamp() end
            where id = $1 and last_token = $2 and status = 'Running'
           returning (status = 'Pending') as "pending!""#,
        claim.execution as _,
        claim.token as _,
    )
    .fetch_optional(conn)
    .await
}
