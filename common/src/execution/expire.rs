//! Expiry: what was not started in time ends, so that a deploy that waits for its backup is told.

use sqlx::PgConnection;

use crate::id::ExecutionId;

/// Ends every execution that was never claimed and whose `start_by` has passed. A claim holds the row's lock and
/// checks the same condition, so that one of the two wins; what is locked is left for the next look.
///
/// Nothing is said of the status: PostgreSQL would rather walk an index of what waits than look up an id or a time, and
/// take it for empty because it was so when it last counted. Who has neither started nor ended is Pending.
pub async fn expire(conn: &mut PgConnection) -> Result<Vec<ExecutionId>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"with late as materialized (
               select id from executions
                where start_by < now() and started_at is null and ended_at is null
                order by id
                  for update skip locked
           ), ended as (
               update executions e
                  set status = 'Failed', outcome = 'Expired', ended_at = clock_timestamp(), stage = 'Queued', error_code = 'expired',
                      error = format('not started within the %s s that the trigger allowed: all slots were taken, or no worker was there',
                                     round(extract(epoch from e.start_by - e.queued_at)))
                 from late where e.id = late.id
               returning e.id
           ), told as (
               insert into execution_logs (execution_id, at, level, stage, message)
               select id, clock_timestamp(), 'error', 'Queued', 'not started in time' from ended
           )
           select id as "id!: ExecutionId" from ended"#
    )
    .fetch_all(conn)
    .await
}
