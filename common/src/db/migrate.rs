//! The schema, brought up to date by whichever process comes first.

use std::time::Duration;

use sqlx::{
    Connection, PgConnection,
    migrate::{Migrate, MigrateError, Migrator},
};
use tokio::time::Instant;

use super::PrepareError;

/// Longest wait of a migration for a lock: everything that wants the table after it waits behind it. Longer than
/// `deadlock_timeout`, after which an autovacuum in the way ends.
const LOCK_TIMEOUT: &str = "set lock_timeout = '2s'";
/// Until it tries again.
const PAUSE: Duration = Duration::from_secs(3);
/// Longest time of all that; a dump of the service's own database may hold its tables for hours.
const PATIENCE: Duration = Duration::from_secs(60);

/// Applies what is missing. Processes that start at the same time wait for the first, however long it takes.
pub(super) async fn migrate(conn: &mut PgConnection) -> Result<(), PrepareError> {
    set(conn, "set statement_timeout = 0").await?;
    set(conn, "set lock_timeout = 0").await?;
    conn.lock().await?;
    set(conn, LOCK_TIMEOUT).await?;
    let mut migrator = sqlx::migrate!("../migrations");
    // By hand, above: it is waited for without limit.
    migrator.set_ignore_missing(true).set_locking(false);
    let give_up = Instant::now() + PATIENCE;
    loop {
        match apply(&migrator, conn).await {
            Ok(()) => return Ok(()),
            Err(error) if !is_locked(&error) => return Err(error.into()),
            Err(error) if Instant::now() >= give_up => return Err(PrepareError::Locked(error)),
            Err(error) => {
                tracing::warn!(error = %crate::error::Chain(&error), "a table is locked: is this database being dumped? The migration waits for at most {} s", PATIENCE.as_secs());
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Migration 22 makes an index and then drops one, which asks for a stronger lock than it holds by then: with whoever had
/// read of the table before, and then waits to write, it would deadlock. Before it, so while that index is there, the
/// stronger lock is taken first and kept to the end.
async fn apply(migrator: &Migrator, conn: &mut PgConnection) -> Result<(), MigrateError> {
    let old = "select to_regclass('executions_active_by_job') is not null";
    if !sqlx::query_scalar::<_, bool>(old).fetch_one(&mut *conn).await? {
        return migrator.run(conn).await;
    }
    let mut all = conn.begin().await?;
    let done = async {
        sqlx::query("lock table executions in access exclusive mode").execute(&mut *all).await?;
        migrator.run(&mut *all).await
    };
    match done.await {
        Ok(()) => Ok(all.commit().await?),
        Err(error) => {
            // At once, and not with what is said next: nothing is locked in the pause before the next try.
            all.rollback().await?;
            Err(error)
        }
    }
}

async fn set(conn: &mut PgConnection, what: &'static str) -> Result<(), PrepareError> {
    sqlx::query(what).execute(conn).await.map_err(PrepareError::Away)?;
    Ok(())
}

/// `lock_not_available`, or `deadlock_detected`.
fn is_locked(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else { return false };
    error.as_database_error().is_some_and(|error| matches!(error.code().as_deref(), Some("55P03" | "40P01")))
}
