//! `dbackup restore`: brings a backup of an instance back into a database, and waits for the end.

use std::{fs, path::PathBuf};

use common::{config::ConfigError, db::StartError};
use serde_json::{Map, Value};

use crate::remote::{FollowArgs, Instance, RemoteArgs};

/// Flags of `dbackup restore`.
#[derive(clap::Args)]
pub struct RestoreArgs {
    /// The execution that made the backup
    execution: String,
    #[command(flatten)]
    remote: RemoteArgs,
    /// Id or slug of the source whose server it goes to [default: where the backup came from]
    #[arg(long)]
    source: Option<String>,
    /// Which database of the backup [default: all of them]
    #[arg(long)]
    database: Option<String>,
    /// Name of the database that it becomes, made where it is missing [default: its own]
    #[arg(long)]
    into: Option<String>,
    /// Replace what the backup contains in a database that is not empty
    #[arg(long)]
    overwrite: bool,
    /// PostgreSQL: restore owners and grants too; their roles must exist
    #[arg(long)]
    keep_owners: bool,
    /// Key file of age that opens an encrypted backup, as `age-keygen` writes it
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    #[command(flatten)]
    follow: FollowArgs,
}

/// Restores, and waits: an error is a restore that failed, or an instance that refused or did not answer.
pub async fn run(args: RestoreArgs) -> Result<(), StartError> {
    let instance = Instance::new(args.remote, "a key with storage:restore and history:read")?;
    let mut body = Map::new();
    if let Some(file) = args.identity {
        let text = fs::read_to_string(&file).map_err(|e| ConfigError(format!("--identity {}: {e}", file.display())))?;
        body.insert("identity".to_owned(), Value::from(text));
    }
    for (name, value) in [("sourceId", args.source), ("database", args.database), ("into", args.into)] {
        body.extend(value.map(|value| (name.to_owned(), Value::from(value))));
    }
    for (name, value) in [("overwrite", args.overwrite), ("keepOwners", args.keep_owners)] {
        body.extend(value.then(|| (name.to_owned(), Value::from(true))));
    }
    instance.start(&["api", "executions", &args.execution, "restore"], &body, "Restore", &args.follow).await
}
