//! What has ended is forgotten when it is old, in small batches, each a transaction of its own: first its log, then,
//! where it left no backup, the execution; of restores those that succeeded too.
//!
//! The time is `now()` in these and in every other statement that looks for what is old: `clock_timestamp()` may differ
//! from row to row, so PostgreSQL would read the whole index for it.
//!
//! An execution that published stays, however old: its artifacts are the only record of where the backup lies.

use sqlx::PgConnection;

/// Executions whose logs go in one batch; a run has at most some thousand lines.
pub const LOGS_OF: i64 = 200;
/// Executions that go in one batch.
pub const EXECUTIONS: i64 = 500;

/// Whether more is waiting to be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// The batch was full: look again soon.
    Full,
    /// Nothing more is old enough.
    Last,
}

impl Batch {
    fn of(count: i64, most: i64) -> Self {
        if count < most { Batch::Last } else { Batch::Full }
    }
}

/// Removes the logs of executions that ended more than `days` ago, the oldest first. How far that went is kept in a row
/// whose lock lets one process at a time do it; the others do nothing.
pub async fn forget_logs(conn: &mut PgConnection, days: i32) -> Result<Batch, sqlx::Error> {
    let count = sqlx::query_scalar!(
        r#"with progress as materialized (
               select logs_ended_at, logs_id from history_progress for update skip locked
           ), old as materialized (
               select e.id, e.ended_at
                 from progress p, executions e
                where e.status in ('Success', 'Failed')
                  and e.ended_at < now() - $1 * interval '1 day'
                  and e.ended_at >= p.logs_ended_at and (e.ended_at, e.id) > (p.logs_ended_at, p.logs_id)
                order by e.ended_at, e.id
                limit $2
           ), gone as (
               delete from execution_logs l using old o where l.execution_id = o.id
           ), moved as (
               update history_progress h set logs_ended_at = o.ended_at, logs_id = o.id
                 from (select ended_at, id from old order by ended_at desc, id desc limit 1) o
           )
           select count(*) as "n!" from old"#,
        f64::from(days),
        LOGS_OF,
    )
    .fetch_one(conn)
    .await?;
    Ok(Batch::of(count, LOGS_OF))
}

/// Removes restores that succeeded and ended more than `days` ago, the oldest first.
pub async fn forget_restores(conn: &mut PgConnection, days: i32) -> Result<Batch, sqlx::Error> {
    // No index of executions has them alone, and each of those is written by every run. But their ids are UUIDs of version 7,
    // which begin with the milliseconds of their trigger: what ended before a time was triggered before it.
    let gone = sqlx::query_scalar!(
        r#"with old as materialized (
               select e.id
                 from (select execution_id from restores
                        where execution_id < (lpad(to_hex((extract(epoch from now() - $1 * interval '1 day') * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
                        order by execution_id) r
                 join lateral (select id from executions
                                where id = r.execution_id and status = 'Success' and ended_at < now() - $1 * interval '1 day'
                                  for update skip locked) e on true
                limit $2
           ), gone as (
               delete from executions e using old o where e.id = o.id returning 1
           )
           select count(*) as "n!" from gone"#,
        f64::from(days),
        EXECUTIONS,
    )
    .fetch_one(conn)
    .await?;
    Ok(Batch::of(gone, EXECUTIONS))
}

/// Removes executions without a backup that ended more than `days` ago, the oldest first, and the groups that they are of:
/// what became of a group follows from its executions, and without its failures it would turn into a success.
pub async fn forget_executions(conn: &mut PgConnection, days: i32) -> Result<Batch, sqlx::Error> {
    // What an attempt may have left in a store is known from its row alone: that goes first.
    let gone = sqlx::query_scalar!(
        r#"with old as materialized (
               select e.id from executions e
                where e.status = 'Failed' and e.ended_at < now() - $1 * interval '1 day'
                  and not exists (select 1 from staged_objects s where s.execution_id = e.id)
                  and not exists (select 1 from artifacts a where a.execution_id = e.id)
                order by e.ended_at, e.id
                limit $2
                  for update of e skip locked
           ), groups as (
               delete from execution_groups g using execution_group_members m, old o
                where m.execution_id = o.id and g.id = m.group_id
           ), gone as (
               delete from executions e using old o where e.id = o.id returning 1
           )
           select count(*) as "n!" from gone"#,
        f64::from(days),
        EXECUTIONS,
    )
    .fetch_one(conn)
    .await?;
    Ok(Batch::of(gone, EXECUTIONS))
}
