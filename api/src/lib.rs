//! The REST API: stateless processes that answer from the database.
//!
//! What is absent on purpose: no dump tool, no route to a source, no mount of a destination (workers have
//! those), and no state that another API process would miss.

pub mod auth;
pub mod config;
pub mod context;
pub mod enqueuer;
pub mod error;
pub mod extract;
pub mod router;
pub mod routes;
pub mod state;

use std::{sync::Arc, time::Duration};

use common::{db::Db, execution::ticker::Rescuer, queue::Wakeups, seal::SealKey};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use config::{ApiArgs, ApiConfig};
use state::AppState;

/// Longest time that requests under way get after SIGTERM.
const DRAIN: Duration = Duration::from_secs(20);

/// Serves until `stop`; requests under way are answered.
pub async fn serve(
    config: ApiConfig,
    listener: TcpListener,
    db: Db,
    key: Arc<SealKey>,
    wakeups: Wakeups,
    stop: CancellationToken,
) -> std::io::Result<()> {
    Rescuer::start(db.clone(), config.timing, wakeups.clone(), stop.clone());
    let state = AppState::start(db, key, wakeups, stop.clone());
    let serving = axum::serve(listener, router::router(state)).with_graceful_shutdown(stop.clone().cancelled_owned());
    tokio::select! {
        served = async { serving.await } => served,
        () = async { stop.cancelled().await; tokio::time::sleep(DRAIN).await } => {
            tracing::warn!("some requests were still open after {} s and were cut", DRAIN.as_secs());
            Ok(())
        }
    }
}
