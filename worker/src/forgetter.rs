//! The forgetter: removes what is past its time from the service's own database, in small batches: idempotency keys,
//! sessions, identities of restores that have ended, logs and executions. Every worker does it; row locks keep them out of each other's way.

use std::time::Duration;

use common::{
    db::DbError,
    execution::{
        history::{self, Batch},
        idempotency::forget_old_keys,
        restore,
    },
    session, setting,
    webhook::delivery,
};

use crate::service::Shared;

/// Longest time of one batch.
const LIMIT: Duration = Duration::from_secs(10);
/// Pause after a full batch: claims and triggers come first.
const BREATH: Duration = Duration::from_millis(100);

/// Forgets for ever, every few ticks.
pub async fn run(shared: Shared) {
    let mut pause = Duration::ZERO;
    loop {
        tokio::time::sleep(pause).await;
        pause = match forget(&shared).await {
            Ok(Batch::Full) => BREATH,
            Ok(Batch::Last) => shared.config.timing.ticker.mul_f64(rand::random_range(1.0..2.0)),
            Err(error) => {
                tracing::debug!(error = %common::error::Chain(&error), "what is old stays until the next look");
                shared.config.timing.ticker * 2
            }
        };
    }
}

async fn forget(shared: &Shared) -> Result<Batch, DbError> {
    let db = &shared.db;
    db.within(LIMIT, async |conn| forget_old_keys(conn).await).await?;
    db.within(LIMIT, async |conn| session::forget_old(conn).await).await?;
    db.within(LIMIT, async |conn| delivery::forget_tests(conn).await).await?;
    db.within(LIMIT, async |conn| restore::erase_identities(conn).await).await?;
    let settings = db.within(LIMIT, async |conn| setting::read(conn).await).await?;
    let logs = db.within(LIMIT, async |conn| history::forget_logs(conn, settings.keep_logs_days).await).await?;
    let days = settings.keep_executions_days;
    let executions = db.within(LIMIT, async |conn| history::forget_executions(conn, days).await).await?;
    let restores = db.within(LIMIT, async |conn| history::forget_restores(conn, days).await).await?;
    Ok(if [logs, executions, restores].contains(&Batch::Full) { Batch::Full } else { Batch::Last })
}
