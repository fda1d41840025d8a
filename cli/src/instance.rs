//! Where an instance is: the folder of `dbackup up`, or the environment.

use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use common::{
    config::{self, ConfigError},
    db::{Db, StartError},
    seal::SealKey,
};
use secrecy::{ExposeSecret, SecretString};

/// File in the folder that holds what another process needs to join.
const ENV_FILE: &str = "dbackup.env";

/// What `dbackup.env` holds.
#[derive(Clone, Debug)]
pub struct InstanceSecrets {
    pub database_url: SecretString,
    pub encryption_key: SecretString,
}

impl InstanceSecrets {
    /// Reads the file of a folder; `None` when there is none yet.
    pub fn read(folder: &Path) -> Result<Option<Self>, ConfigError> {
        let path = env_file(folder);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(ConfigError(format!("--data (DBACKUP_DATA): cannot read {}: {error}", path.display())));
            }
        };
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
            let value = line.map(|v| v.trim_matches('\'').to_owned().into());
            value.ok_or_else(|| ConfigError(format!("{} holds no {name}", path.display())))
        };
        Ok(Some(Self { database_url: value("DATABASE_URL")?, encryption_key: value("DBACKUP_ENCRYPTION_KEY")? }))
    }

    /// Writes the file whole or not at all, readable for its owner only.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        let part = folder.join(format!(".{ENV_FILE}.part"));
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        write!(
            file,
            "# Secrets of this instance. A worker joins with: set -a; . {ENV_FILE}; dbackup-worker\nDATABASE_URL='{}'\nDBACKUP_ENCRYPTION_KEY='{}'\nDBACKUP_LOCAL_PATHS='{}'\n",
            self.database_url.expose_secret(),
            self.encryption_key.expose_secret(),
            folder.join("backups").display(),
        )?;
        file.sync_all()?;
        fs::rename(part, env_file(folder))
    }
}

fn env_file(folder: &Path) -> PathBuf {
    folder.join(ENV_FILE)
}

/// An instance to speak to.
pub struct Instance {
    pub db: Db,
    pub key: Option<SealKey>,
}

impl Instance {
    /// By `--data`, else by environment. The key is optional: not every command opens secrets.
    pub fn open(data: Option<PathBuf>) -> Result<Self, StartError> {
        let (url, key) = match data {
            Some(folder) => {
                let secrets = InstanceSecrets::read(&folder)?.ok_or_else(|| {
                    ConfigError(format!(
                        "--data (DBACKUP_DATA): {} is not an instance: start one with dbackup --data {} up",
                        folder.display(),
                        folder.display()
                    ))
                })?;
                (secrets.database_url, Some(secrets.encryption_key))
            }
            None => {
                let set = config::secret("DATABASE_URL")?.is_some();
                let url = config::database_url().map_err(|error| match set {
                    true => error,
                    false => ConfigError(format!(
                        "{error}; or name the folder of a dbackup up by --data, before the command"
                    )),
                })?;
                (url, config::secret("DBACKUP_ENCRYPTION_KEY")?)
            }
        };
        let key = key.map(|text| config::key_of(&text)).transpose()?;
        Ok(Self { db: Db::new(&url, "dbackup", 2)?, key })
    }
}
