//! The REST API: stateless processes that answer from the database.
//!
//! What is absent on purpose: no dump tool, no route to a source, no destination but for reading what is downloaded (workers
//! have those), and no state that another API process would miss.

pub mod auth;
mod called;
pub mod client_address;
pub mod config;
pub mod context;
pub mod enqueuer;
pub mod error;
pub mod extract;
pub mod one_asks;
pub mod openapi;
pub mod rate_limit;
pub mod reason;
pub mod router;
pub mod routes;
pub mod samples;
pub mod server;
pub mod state;
pub mod ui;
pub mod waiting;
pub mod watch;

use std::sync::Arc;

use common::{
    db::{ANSWER_TIMEOUT, Db},
    execution::ticker::Rescuer,
    queue::Wakeups,
    seal::{self, SealKey},
    user,
};
use secrecy::ExposeSecret;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use config::{ApiArgs, ApiConfig, HttpArgs};
use server::Stop;
use state::AppState;

/// Serves until `stop` and for the shutdown delay after it; requests under way are answered.
pub async fn serve(
    config: ApiConfig,
    listener: TcpListener,
    db: Db,
    key: Arc<SealKey>,
    wakeups: Wakeups,
    stop: CancellationToken,
) -> std::io::Result<()> {
    raise_open_files();
    let stop = Stop::after(stop, config.shutdown_delay);
    Rescuer::start(db.clone(), config.timing, wakeups.clone(), stop.closing.clone());
    let instance = db.within(ANSWER_TIMEOUT, async |conn| seal::instance_name(conn).await).await;
    let instance = instance.map_err(std::io::Error::other)?;
    let ask = async |conn: &mut sqlx::PgConnection| user::setup_token(conn, &key).await;
    if let Some(token) = db.within(ANSWER_TIMEOUT, ask).await.map_err(std::io::Error::other)? {
        // The one secret that is meant for the log: it is good once, and only until somebody has used it.
        let token = token.expose_secret();
        tracing::info!(
            token,
            "there is no user yet: make the administrator with POST /api/setup and this token, or with dbackup user create"
        );
    }
    let state = AppState::start(&config, instance, db, key, wakeups, stop.clone());
    server::serve(listener, router::router(state), stop).await;
    Ok(())
}

/// Every waiting client is a connection: as many as the system lets this process have.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files could not be raised: fewer clients can wait at once");
    }
}
