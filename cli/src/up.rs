//! `dbackup up`: API and workers in one process, on a private PostgreSQL.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use common::{
    config::{self, ConfigError, TimingArgs},
    db::{Db, StartError},
    metrics,
    queue::Wakeups,
    seal::SealKey,
    shutdown,
    telemetry::Telemetry,
};
use nix::fcntl::{Flock, FlockArg};
use secrecy::{ExposeSecret, SecretString};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    embedded::{self, Embedded, EmbeddedError},
    instance::InstanceSecrets,
};

/// Flags of `dbackup up`. The clockwork (DBACKUP_LEASE_MS …) and the worker's other variables apply too.
#[derive(clap::Args)]
pub struct UpArgs {
    /// Address and port to listen on
    #[arg(long, env = "DBACKUP_LISTEN", default_value = "127.0.0.1:3000")]
    listen: SocketAddr,
    /// Workers in this process
    #[arg(long, env = "DBACKUP_WORKERS", default_value_t = 2)]
    workers: usize,
    #[command(flatten)]
    http: api::HttpArgs,
    #[command(flatten)]
    worker: worker::WorkerArgs,
    #[command(flatten)]
    metrics: metrics::MetricsArgs,
}

fn start_error(error: EmbeddedError) -> StartError {
    match error {
        EmbeddedError::Config(error) => error.into(),
        error => std::io::Error::other(common::error::Chain(&error).to_string()).into(),
    }
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(data: Option<PathBuf>, args: UpArgs) -> Result<(), StartError> {
    let folder = data.ok_or_else(|| ConfigError("--data (DBACKUP_DATA): name the folder of the instance".into()))?;
    let workers = args.workers;
    if !(1..=64).contains(&workers) {
        return Err(ConfigError(format!("DBACKUP_WORKERS is {workers} but must be between 1 and 64")).into());
    }
    let timing: TimingArgs = args.worker.timing.clone();
    let folder = prepare_folder(&folder)?;
    let worker = worker_config(args.worker, &folder)?;
    let api = args.http.validate(args.listen, worker.local_paths.clone(), timing.validate()?)?;
    let named = |n| worker::WorkerConfig { name: format!("{}-{n}", worker.name), ..worker.clone() };
    let workers: Vec<_> = (1..=workers).map(named).collect();
    let telemetry = Telemetry::start("dbackup")?;
    let stop = shutdown::on_signal()?;
    let _lock = lock(&folder)?;
    let listener = api::server::listen(api.listen)
        .map_err(|e| ConfigError(format!("DBACKUP_LISTEN: cannot listen on {}: {e}", api.listen)))?;
    let metrics = args.metrics.listen()?;

    let secrets = secrets(&folder)?;
    let db = Db::new(&secrets.database_url, "dbackup", 24)?;
    metrics::serve(metrics, metrics::Role::Both, &db);
    let (password, start_folder) = (password_of(&secrets)?, folder.clone());
    let postgres = tokio::task::spawn_blocking(move || Embedded::start(&start_folder, &password))
        .await
        .map_err(std::io::Error::other)?
        .map_err(start_error)?;
    let served = serve(&folder, secrets, db, api, workers, listener, stop).await;
    let _ = tokio::task::spawn_blocking(move || postgres.stop()).await;
    telemetry.stop().await;
    served
}

async fn serve(
    folder: &Path,
    secrets: InstanceSecrets,
    db: Db,
    api: api::ApiConfig,
    workers: Vec<worker::WorkerConfig>,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), StartError> {
    let key = Arc::new(config::key_of(&secrets.encryption_key)?);
    common::db::start(&db, &key).await?;
    let wakeups = Wakeups::start(db.clone(), CancellationToken::new());
    let mut running = JoinSet::new();
    let count = workers.len();
    for config in workers {
        running.spawn(worker::serve(config, db.clone(), key.clone(), wakeups.clone(), stop.clone()));
    }
    let address = listener.local_addr()?;
    println!("DBackup listens on http://{address} with {count} workers; data in {}", folder.display());
    let served = api::serve(api, listener, db, key, wakeups, stop.clone()).await;
    // A failed listener ends the workers too.
    stop.cancel();
    while running.join_next().await.is_some() {}
    Ok(served?)
}

fn prepare_folder(folder: &Path) -> Result<PathBuf, StartError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(folder)
        .map_err(|e| ConfigError(format!("--data (DBACKUP_DATA): cannot make {}: {e}", folder.display())))?;
    let folder = fs::canonicalize(folder)?;
    let backups = folder.join("backups");
    if !backups.exists() {
        fs::DirBuilder::new().mode(0o700).create(backups)?;
    }
    Ok(folder)
}

fn worker_config(args: worker::WorkerArgs, folder: &Path) -> Result<worker::WorkerConfig, ConfigError> {
    let mut config = args.validate()?;
    config.local_paths.push(folder.join("backups"));
    Ok(config)
}

/// One `dbackup up` for a folder; the system takes the lock away when the process dies.
fn lock(folder: &Path) -> Result<Flock<fs::File>, StartError> {
    let path = folder.join("dbackup.lock");
    let file = fs::OpenOptions::new().create(true).write(true).truncate(false).open(&path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
        ConfigError(format!("--data (DBACKUP_DATA): another dbackup up runs on {}", folder.display())).into()
    })
}

/// The secrets of the folder, made the first time. They are written before the cluster exists: a cluster whose
/// password nobody knows could not be used. Written at every start, since the folder may have moved.
fn secrets(folder: &Path) -> Result<InstanceSecrets, StartError> {
    let (password, encryption_key) = match InstanceSecrets::read(folder)? {
        Some(secrets) => (password_of(&secrets)?, secrets.encryption_key),
        None => (hex::encode(rand::random::<[u8; 16]>()).into(), SealKey::generate().into()),
    };
    let secrets = InstanceSecrets { database_url: embedded::url(folder, &password), encryption_key };
    secrets.write(folder)?;
    Ok(secrets)
}

fn password_of(secrets: &InstanceSecrets) -> Result<SecretString, ConfigError> {
    let url = url::Url::parse(secrets.database_url.expose_secret()).ok();
    let password = url.as_ref().and_then(url::Url::password).map(|p| p.to_owned().into());
    password.ok_or_else(|| ConfigError("dbackup.env: DATABASE_URL holds no password".into()))
}
