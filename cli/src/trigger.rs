//! `dbackup trigger`: what the samples do, as one command. It triggers a job of an instance and waits for its end.

use common::db::StartError;
use serde_json::{Map, Value};

use crate::remote::{FollowArgs, Instance, RemoteArgs};

/// Flags of `dbackup trigger`.
#[derive(clap::Args)]
pub struct TriggerArgs {
    /// The job's id or slug
    job: String,
    #[command(flatten)]
    remote: RemoteArgs,
    /// Label of the run, for later searches; may be repeated
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Keep the backup: retention leaves it alone
    #[arg(long)]
    lock: bool,
    #[command(flatten)]
    follow: FollowArgs,
}

fn label(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    pair.map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(|| "must be NAME=VALUE".to_owned())
}

/// Triggers, and waits: an error is a run that failed, or an instance that refused or did not answer.
pub async fn run(args: TriggerArgs) -> Result<(), StartError> {
    let instance = Instance::new(args.remote, "a key with jobs:execute and history:read")?;
    let mut body = Map::new();
    if !args.labels.is_empty() {
        body.insert("labels".to_owned(), args.labels.into_iter().map(|(k, v)| (k, Value::from(v))).collect());
    }
    if args.lock {
        body.insert("lock".to_owned(), true.into());
    }
    instance.start(&["api", "jobs", &args.job, "run"], &body, "Backup", &args.follow).await
}
