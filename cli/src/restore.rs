//! `dbackup restore`: brings a backup of an instance back into a database, and waits for the end.

use common::db::StartError;
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
    #[command(flatten)]
    follow: FollowArgs,
}

/// Restores, and waits: an error is a restore that failed, or an instance that refused or did not answer.
pub async fn run(args: RestoreArgs) -> Result<(), StartError> {
    let instance = Instance::new(args.remote, "a key with storage:restore and history:read")?;
    let mut body = Map::new();
    for (name, value) in [("sourceId", args.source), ("database", args.database), ("into", args.into)] {
        body.extend(value.map(|value| (name.to_owned(), Value::from(value))));
    }
    for (name, value) in [("overwrite", args.overwrite), ("keepOwners", args.keep_owners)] {
        body.extend(value.then(|| (name.to_owned(), Value::from(true))));
    }
    instance.start(&["api", "executions", &args.execution, "restore"], &body, "Restore", &args.follow).await
}
