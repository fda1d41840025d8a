//! `dbackup-worker`: reads its configuration, joins the cluster, works until SIGTERM.

use clap::Parser;
use common::{config, db::Db, metrics, queue::Wakeups, seal, shutdown, telemetry::Telemetry};
use worker::{WorkerArgs, WorkerConfig};

/// Runs backups that the API has queued. Secrets come by environment: DATABASE_URL, DBACKUP_ENCRYPTION_KEY.
#[derive(Parser)]
#[command(name = "dbackup-worker", version)]
struct Program {
    #[command(flatten)]
    worker: WorkerArgs,
    #[command(flatten)]
    metrics: metrics::MetricsArgs,
}

fn main() {
    let program = config::parse_or_exit::<Program>();
    let worker = program.worker.validate().unwrap_or_else(|e| config::exit_with(&e));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime can be made");
    let status = runtime.block_on(run(worker, program.metrics));
    // Dropped without waiting: a blocking read of a frozen pipe must not keep the process.
    runtime.shutdown_background();
    std::process::exit(status);
}

async fn run(worker: WorkerConfig, metrics: metrics::MetricsArgs) -> i32 {
    let metrics = metrics.listen().unwrap_or_else(|e| config::exit_with(&e));
    let telemetry = Telemetry::start("dbackup-worker").unwrap_or_else(|e| config::exit_with(&e));
    let url = config::database_url().unwrap_or_else(|e| config::exit_with(&e));
    let key = config::encryption_key().unwrap_or_else(|e| config::exit_with(&e));
    let connections = u32::try_from(worker.concurrency).unwrap_or(16).clamp(4, 16);
    let db = Db::new(&url, "dbackup-worker", connections).unwrap_or_else(|e| config::exit_with(&e));
    metrics::serve(metrics, metrics::Role::Worker, &db);
    let status = match start(worker, db, key).await {
        Ok(()) => 0,
        Err(error) => error.report(),
    };
    telemetry.stop().await;
    status
}

async fn start(worker: WorkerConfig, db: Db, key: seal::SealKey) -> Result<(), common::db::StartError> {
    let stop = shutdown::on_signal()?;
    common::db::start(&db, &key).await?;
    let wakeups = Wakeups::start(db.clone(), tokio_util::sync::CancellationToken::new());
    worker::serve(worker, db, std::sync::Arc::new(key), wakeups, stop).await;
    Ok(())
}
