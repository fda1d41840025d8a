//! What an administrator does by hand.

use std::path::PathBuf;

use common::{
    db::{PrepareError, StartError},
    seal,
};

use crate::instance::Instance;

/// `dbackup migrate`.
pub async fn migrate(data: Option<PathBuf>) -> Result<(), StartError> {
    Instance::open(data)?.db.prepare().await?;
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
