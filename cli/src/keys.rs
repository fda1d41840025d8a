//! `dbackup key …`: what `/api/api-keys` does, for somebody at the command line.

use std::{path::PathBuf, time::Duration};

use chrono::Utc;
use clap::Subcommand;
use common::{
    api_key::{self, Filter, KeyDraft, KeyInfo},
    audit::{self, Actor, Event},
    config::ConfigError,
    db::{ANSWER_TIMEOUT, StartError},
    id::{ApiKeyId, Reference},
    job, network,
    permission::PermissionSet,
};
use sqlx::{Connection, PgConnection};

use crate::instance::Instance;

/// `dbackup key …`.
#[derive(Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it, alone, on standard output; it is shown only once
    Create(CreateKey),
    /// List the keys
    List,
    /// Let a disabled key count again
    Enable(OneKey),
    /// Refuse a key from now on, without deleting it
    Disable(OneKey),
    /// Give a key a new secret and print it, alone, on standard output
    Rotate {
        #[command(flatten)]
        key: OneKey,
        /// How long the old secret counts too, in seconds
        #[arg(long, default_value_t = 0)]
        grace_seconds: u64,
    },
    /// Delete a key
    Delete(OneKey),
}

/// Which key.
#[derive(clap::Args)]
pub struct OneKey {
    /// Its id, as in the list
    id: String,
}

/// A key to be made.
#[derive(clap::Args)]
pub struct CreateKey {
    /// Name for people
    #[arg(long)]
    name: String,
    /// What it may do, such as jobs:execute; '*' is all. May be repeated
    #[arg(long = "permission", required = true)]
    permissions: Vec<String>,
    /// A job, by id or slug, that it sees; without any it sees all. May be repeated
    #[arg(long = "job")]
    jobs: Vec<String>,
    /// A network, such as 10.0.0.0/8, that it may be used from; without any from all. May be repeated
    #[arg(long = "network")]
    networks: Vec<String>,
    /// Days after which it is refused
    #[arg(long, value_parser = clap::value_parser!(u32).range(..=36_500))]
    expires_in_days: Option<u32>,
}

/// Runs one of the commands.
pub async fn run(data: Option<PathBuf>, command: KeyCommand) -> Result<(), StartError> {
    let checked = match command {
        KeyCommand::Create(create) => Checked::Create(check(create)?),
        KeyCommand::List => Checked::List,
        KeyCommand::Enable(key) => Checked::Switch(id_of(&key)?, true),
        KeyCommand::Disable(key) => Checked::Switch(id_of(&key)?, false),
        KeyCommand::Rotate { key, grace_seconds } => Checked::Rotate(id_of(&key)?, Duration::from_secs(grace_seconds)),
        KeyCommand::Delete(key) => Checked::Delete(id_of(&key)?),
    };
    let instance = Instance::open(data)?;
    instance.db.prepare().await?;
    let said = instance.db.within(ANSWER_TIMEOUT, async |conn| checked.run(conn).await).await?;
    println!("{}", said.map_err(|refusal| StartError::from(std::io::Error::other(refusal)))?);
    Ok(())
}

enum Checked {
    Create((KeyDraft, Vec<String>)),
    List,
    Switch(ApiKeyId, bool),
    Rotate(ApiKeyId, Duration),
    Delete(ApiKeyId),
}

fn id_of(key: &OneKey) -> Result<ApiKeyId, ConfigError> {
    key.id.parse().map_err(|_| ConfigError(format!("'{}' is not the id of a key: dbackup key list shows them", key.id)))
}

fn check(create: CreateKey) -> Result<(KeyDraft, Vec<String>), ConfigError> {
    let CreateKey { name, permissions, jobs, networks, expires_in_days } = create;
    if name.trim().is_empty() || name.chars().count() > 200 || name.chars().any(char::is_control) {
        return Err(ConfigError("--name: must have 1 to 200 characters and no control character".into()));
    }
    let permissions = PermissionSet::parse(&permissions).map_err(|e| ConfigError(format!("--permission: {e}")))?;
    let network = |text: &String| {
        network::parse(text)
            .ok_or_else(|| ConfigError(format!("--network: '{text}' is not a network such as 10.0.0.0/8")))
    };
    let networks: Vec<_> = networks.iter().map(network).collect::<Result<_, _>>()?;
    let new = KeyDraft {
        name,
        permissions,
        networks: (!networks.is_empty()).then_some(networks),
        expires_at: expires_in_days.map(|days| Utc::now() + chrono::Duration::days(days.into())),
        ..KeyDraft::default()
    };
    Ok((new, jobs))
}

impl Checked {
    /// What is printed, or why nothing was done.
    async fn run(&self, conn: &mut PgConnection) -> Result<Result<String, String>, sqlx::Error> {
        let mut tx = conn.begin().await?;
        let (said, event) = match self {
            Checked::List => return Ok(Ok(table(&api_key::list(&mut tx, &Filter::default()).await?.rows))),
            Checked::Create((new, jobs)) => {
                let mut new = new.clone();
                for name in jobs {
                    match job::find(&mut tx, &Reference::new(name)).await? {
                        Some(job) => new.jobs.get_or_insert_default().push(job.id),
                        None => return Ok(Err(format!("--job: there is no job '{name}'"))),
                    }
                }
                let (id, secret) = api_key::create(&mut tx, &new, None).await?;
                (secret.expose().to_owned(), Event::new("api-key.create", id, &new.name))
            }
            Checked::Switch(id, _) | Checked::Rotate(id, _) | Checked::Delete(id) => {
                // Once more from what the key is now, when somebody has changed it meanwhile.
                loop {
                    let Some(key) = api_key::find(&mut tx, *id).await? else {
                        return Ok(Err(format!("there is no key {id}")));
                    };
                    if let Some(done) = self.change(&mut tx, &key).await? {
                        break done;
                    }
                }
            }
        };
        audit::record(&mut tx, &Actor::command_line(), &[event]).await?;
        tx.commit().await?;
        Ok(Ok(said))
    }

    /// What is printed; `None` when somebody else has changed the key since it was read.
    async fn change(&self, conn: &mut PgConnection, key: &KeyInfo) -> Result<Option<(String, Event)>, sqlx::Error> {
        let event = |action| Event::new(action, key.id, &key.name);
        match self {
            Checked::Rotate(_, grace) => {
                let rotated = api_key::rotate(conn, key, *grace).await?;
                Ok(rotated.map(|(_, secret)| (secret.expose().to_owned(), event("api-key.rotate"))))
            }
            Checked::Switch(_, enabled) => {
                let change = KeyDraft { enabled: *enabled, ..KeyDraft::from(key) };
                let Some(_) = api_key::update(conn, key, &change).await? else { return Ok(None) };
                Ok(Some((
                    format!("{} is {}", key.name, if *enabled { "enabled" } else { "disabled" }),
                    event("api-key.update"),
                )))
            }
            _ => {
                api_key::delete(conn, key.id).await?;
                Ok(Some((format!("{} is deleted", key.name), event("api-key.delete"))))
            }
        }
    }
}

fn table(keys: &[KeyInfo]) -> String {
    let mut lines = vec![format!(
        "{:<36}  {:<8}  {:<8}  {:<16}  {:<16}  {}",
        "ID", "BEGINS", "STATE", "EXPIRES", "LAST USED", "NAME AND PERMISSIONS"
    )];
    for key in keys {
        let day = |at: Option<chrono::DateTime<Utc>>| {
            at.map_or("never".to_owned(), |at| at.format("%Y-%m-%d %H:%M").to_string())
        };
        let state = match key.expires_at {
            Some(at) if at <= Utc::now() => "expired",
            _ if key.enabled => "enabled",
            _ => "disabled",
        };
        lines.push(format!(
            "{}  {:<8}  {:<8}  {:<16}  {:<16}  {}: {}",
            key.id,
            key.hint,
            state,
            day(key.expires_at),
            day(key.last_used_at),
            key.name,
            key.permissions.join(" ")
        ));
    }
    lines.join("\n")
}
