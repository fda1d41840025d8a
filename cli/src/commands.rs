//! What an administrator does by hand.

use std::path::PathBuf;

use common::{
    audit::Actor,
    config::{self, ConfigError},
    db::{DbError, PrepareError, StartError},
    reseal::{ResealError, reseal},
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

/// `dbackup key-rotate`.
pub async fn rotate_key(data: Option<PathBuf>) -> Result<(), StartError> {
    if data.is_some() {
        let text = "key-rotate takes no --data: stop dbackup up, rotate with DATABASE_URL and both keys set, and put the new key into DIR/dbackup.env";
        return Err(ConfigError(text.to_owned()).into());
    }
    let key = config::encryption_key()?;
    let instance = Instance::open(None)?;
    instance.db.prepare().await?;
    let mut conn = instance.db.connect_apart().await.map_err(PrepareError::Away)?;
    seal::check_canary(&mut conn, &key).await?;
    let count = reseal(&mut conn, &key, &Actor::command_line()).await.map_err(|error| match error {
        ResealError::Database(error) => StartError::Database(DbError::Sql(error)),
        error => ConfigError(error.to_string()).into(),
    })?;
    println!("sealed {count} values anew with DBACKUP_ENCRYPTION_KEY");
    Ok(())
}
