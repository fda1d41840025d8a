//! `dbackup restore`: brings a backup of an instance back into a database, and waits for the end.

use common::db::StartError;
use serde_json::{Map, Value};

use crate::remote::{Instance, RemoteArgs};

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
    /// Print the run's log on standard error as it is written
    #[arg(long)]
    log: bool,
    /// Print the execution's id and do not wait for its end
    #[arg(long)]
    no_wait: bool,
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
    // An answer that is lost on the way may be asked for again: it makes no second restore.
    let once = uuid::Uuid::now_v7().to_string();
    let path = ["api", "executions", &args.execution, "restore"];
    let answer =
        instance.ask(|client, url| client.post(url).header("Idempotency-Key", &once).json(&body), &path, &[]).await?;
    let id = answer["executionId"].as_str().unwrap_or_default();
    if args.no_wait {
        println!("{id}");
        return Ok(());
    }
    println!("Restore started: {id}");
    instance.follow(id, "Restore", args.log).await
}
