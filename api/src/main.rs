//! `dbackup-api`: reads its configuration, joins the cluster, serves until SIGTERM.

use std::sync::Arc;

use api::{ApiArgs, ApiConfig};
use clap::Parser;
use common::{config, db::Db, metrics, queue::Wakeups, seal::SealKey, shutdown, telemetry::Telemetry};
use tokio_util::sync::CancellationToken;

/// Many small pieces of an answer are made and freed by threads that did not make each other's: the system's allocator
/// took a third of the time of two thousand answers at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serves the REST API. Secrets come by environment: DATABASE_URL, DBACKUP_ENCRYPTION_KEY.
#[derive(Parser)]
#[command(name = "dbackup-api", version)]
struct Program {
    #[command(flatten)]
    api: ApiArgs,
    #[command(flatten)]
    metrics: metrics::MetricsArgs,
}

#[tokio::main]
async fn main() {
    let program = config::parse_or_exit::<Program>();
    let api = program.api.validate().unwrap_or_else(|e| config::exit_with(&e));
    let metrics = program.metrics.listen().unwrap_or_else(|e| config::exit_with(&e));
    let telemetry = Telemetry::start("dbackup-api").unwrap_or_else(|e| config::exit_with(&e));
    let url = config::database_url().unwrap_or_else(|e| config::exit_with(&e));
    let key = config::encryption_key().unwrap_or_else(|e| config::exit_with(&e));
    let db = Db::new(&url, "dbackup-api", 16).unwrap_or_else(|e| config::exit_with(&e));
    metrics::serve(metrics, metrics::Role::Api, &db);
    let status = match start(api, db, key).await {
        Ok(()) => 0,
        Err(error) => error.report(),
    };
    telemetry.stop().await;
    std::process::exit(status);
}

async fn start(api: ApiConfig, db: Db, key: SealKey) -> Result<(), common::db::StartError> {
    let stop = shutdown::on_signal()?;
    let listener = api::server::listen(api.listen)
        .map_err(|e| config::ConfigError(format!("DBACKUP_LISTEN: cannot listen on {}: {e}", api.listen)))?;
    common::db::start(&db, &key).await?;
    let wakeups = Wakeups::start(db.clone(), CancellationToken::new());
    tracing::info!(address = %listener.local_addr()?, "the API listens");
    api::serve(api, listener, db, Arc::new(key), wakeups, stop).await?;
    Ok(())
}
