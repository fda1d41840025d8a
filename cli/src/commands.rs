//! What an administrator does by hand.

use std::{path::PathBuf, time::Duration};

use common::{
    audit::Actor,
    config::{self, ConfigError},
    db::{DbError, PrepareError, StartError},
    reseal::{ResealError, reseal},
    seal,
    telemetry::Telemetry,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use url::Url;

use crate::instance::Instance;

/// `dbackup migrate`.
pub async fn migrate(data: Option<PathBuf>) -> Result<(), StartError> {
    let instance = Instance::open(data)?;
    // It may have to wait, and says for what.
    let telemetry = Telemetry::start("dbackup")?;
    let done = instance.db.prepare().await;
    telemetry.stop().await;
    Ok(done?)
}

/// Longest time for all answers of the database: less than what the health check of the `Dockerfile` gives, so that it
/// learns why.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(8);

/// `dbackup health`; with `--worker` also a worker that hangs, or cannot register, is not healthy.
pub async fn health(data: Option<PathBuf>, worker: bool) -> Result<(), StartError> {
    let instance = Instance::open(data)?;
    let asked = tokio::time::timeout(HEALTH_TIMEOUT, look_after(&instance, worker)).await;
    asked.map_err(|_| DbError::Timeout(HEALTH_TIMEOUT))??;
    println!("healthy");
    Ok(())
}

async fn look_after(instance: &Instance, worker: bool) -> Result<(), StartError> {
    let mut conn = instance.db.connect_apart().await.map_err(PrepareError::Away)?;
    if let Some(key) = &instance.key {
        seal::check_canary(&mut conn, key).await?;
    }
    if worker {
        let host = worker::config::host();
        if !common::worker::runs_on(&mut conn, &host).await.map_err(PrepareError::Away)? {
            return Err(std::io::Error::other(format!("no worker of {host} was seen within its lease")).into());
        }
    }
    Ok(())
}

/// `dbackup key-rotate`.
pub async fn rotate_key(data: Option<PathBuf>) -> Result<(), StartError> {
    let Instance { db, key } = Instance::open(data)?;
    let key = key.map_or_else(config::encryption_key, Ok)?;
    db.prepare().await?;
    let mut conn = db.connect_apart().await.map_err(PrepareError::Away)?;
    seal::check_canary(&mut conn, &key).await?;
    let count = reseal(&mut conn, &key, &Actor::command_line()).await.map_err(|error| match error {
        ResealError::Database(error) => StartError::Database(DbError::Sql(error)),
        error => ConfigError(error.to_string()).into(),
    })?;
    println!("sealed {count} values anew with DBACKUP_ENCRYPTION_KEY");
    Ok(())
}

/// Longest time for the answer of an API process; a probe that takes longer is a failed one.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// `dbackup health --api`: a probe for containers, which have no curl. By plain HTTP, from beside the process.
pub async fn api_health(url: &Url) -> Result<(), StartError> {
    let (Some(host), Some(port), "http") = (url.host_str(), url.port_or_known_default(), url.scheme()) else {
        return Err(ConfigError(format!("--api: '{url}' is not a URL such as http://127.0.0.1:3000")).into());
    };
    let asked = tokio::time::timeout(PROBE_TIMEOUT, ready(host, port)).await;
    let status = asked.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
    let failed = |why: String| std::io::Error::other(format!("{host}:{port} {why}"));
    match status.map_err(|error| failed(format!("does not answer: {error}")))?.as_str() {
        "200" => println!("healthy"),
        other => return Err(failed(format!("is not ready: /readyz answers {other}")).into()),
    }
    Ok(())
}

/// The status of `/readyz`.
async fn ready(host: &str, port: u16) -> std::io::Result<String> {
    // Without the brackets of an IPv6 address in a URL.
    let mut stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.split(' ').nth(1).unwrap_or_default().to_owned())
}
