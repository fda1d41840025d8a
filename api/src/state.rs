//! What every handler uses.

use std::sync::Arc;

use common::{
    db::{ANSWER_TIMEOUT, Db},
    queue::Wakeups,
    seal::SealKey,
};
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

use crate::{enqueuer::Enqueuer, error::ApiError};

/// Shared by all requests of a process.
#[derive(Clone)]
pub struct AppState {
    /// The database.
    pub db: Db,
    /// Seals and opens secrets.
    pub key: Arc<SealKey>,
    /// Tells the workers.
    pub wakeups: Wakeups,
    /// Groups triggers that arrive together.
    pub enqueuer: Enqueuer,
    /// Cancelled when the process stops.
    pub stop: CancellationToken,
}

impl AppState {
    /// Starts what runs beside the requests.
    pub fn start(db: Db, key: Arc<SealKey>, wakeups: Wakeups, stop: CancellationToken) -> Self {
        let enqueuer = Enqueuer::start(db.clone(), wakeups.clone());
        Self { db, key, wakeups, enqueuer, stop }
    }

    /// Asks the database, within the time that a client waits anyway.
    pub async fn ask<T>(
        &self,
        ask: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, ApiError> {
        self.db.within(ANSWER_TIMEOUT, ask).await.map_err(ApiError::from)
    }
}
