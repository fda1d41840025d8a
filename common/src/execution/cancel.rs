//! Cancel: a pending execution ends at once, a running one is told.

use sqlx::{Connection, PgConnection};

use super::Status;
use crate::id::ExecutionId;

/// What became of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It had not started, and is over.
    Ended,
    /// Its worker is told, by notification and by its next heartbeat.
    Requested,
    /// It was over already.
    TooLate(Status),
    /// There is none.
    NotFound,
}

/// Asks an execution to stop.
pub async fn cancel(conn: &mut PgConnection, id: ExecutionId, by: &str) -> Result<Cancelled, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let status =
        sqlx::query_scalar!(r#"select status as "status: Status" from executions where id = $1 for update"#, id as _)
            .fetch_optional(&mut *tx)
            .await?;
    let done = match status {
        None => return Ok(Cancelled::NotFound),
        Some(over) if over.is_over() => return Ok(Cancelled::TooLate(over)),
        Some(Status::Pending) => {
            sqlx::query!(
                "update executions
                    set status = 'Failed', outcome = 'Cancelled', ended_at = clock_timestamp(), cancel_requested_at = clock_timestamp(),
                        error = 'cancelled on request by ' || $2 || ' before it started', error_code = 'cancelled', stage = 'Queued'
                  where id = $1",
                id as _,
                by,
            )
            .execute(&mut *tx)
            .await?;
            Cancelled::Ended
        }
        Some(_) => {
            sqlx::query!(
                "update executions set cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()) where id = $1",
                id as _
            )
            .execute(&mut *tx)
            .await?;
            Cancelled::Requested
        }
    };
    sqlx::query!(
        "insert into execution_logs (execution_id, at, level, stage, message)
         values ($1, clock_timestamp(), 'warning', 'Queued', 'cancel requested by ' || $2)",
        id as _,
        by,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(done)
}
