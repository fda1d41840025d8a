//! What an administrator does by hand.

use std::path::PathBuf;

use clap::Subcommand;
use common::{
    api_key::{self, NewApiKey},
    config::ConfigError,
    db::{ANSWER_TIMEOUT, PrepareError, StartError},
    permission::PermissionSet,
    seal,
};

use crate::instance::Instance;

/// `dbackup key …`.
#[derive(Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it, alone, on standard output; it is shown only once
    Create {
        /// Name for people
        #[arg(long)]
        name: String,
        /// What it may do, such as jobs:execute; '*' is all. May be repeated
        #[arg(long = "permission", required = true)]
        permissions: Vec<String>,
    },
}

/// `dbackup migrate`.
pub async fn migrate(data: Option<PathBuf>) -> Result<(), StartError> {
    Instance::open(data)?.db.prepare().await?;
    Ok(())
}

/// `dbackup key create`.
pub async fn key(data: Option<PathBuf>, command: KeyCommand) -> Result<(), StartError> {
    let KeyCommand::Create { name, permissions } = command;
    if name.trim().is_empty() || name.chars().count() > 200 || name.chars().any(char::is_control) {
        return Err(ConfigError("--name: must have 1 to 200 characters and no control character".into()).into());
    }
    let permissions = PermissionSet::parse(&permissions).map_err(|e| ConfigError(format!("--permission: {e}")))?;
    let instance = Instance::open(data)?;
    instance.db.prepare().await?;
    let new = NewApiKey { name, permissions, ..NewApiKey::default() };
    let (_, key) = instance.db.within(ANSWER_TIMEOUT, async |conn| api_key::create(conn, &new).await).await?;
    println!("{}", key.expose());
    Ok(())
}

/// `dbackup health`.
pub async fn health(data: Option<PathBuf>) -> Result<(), StartError> {
    let instance = Instance::open(data)?;
    let mut conn = instance.db.connect_apart().await.map_err(PrepareError::Away)?;
    if let Some(key) = &instance.key {
        seal::check_canary(&mut conn, key).await?;
    }
    println!("healthy");
    Ok(())
}
