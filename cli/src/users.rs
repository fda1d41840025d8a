//! `dbackup user …`: what `/api/users` does, for somebody at the command line.

use std::{io::BufRead, path::PathBuf};

use clap::Subcommand;
use common::{
    audit::{self, Actor, Event},
    config::{self, ConfigError},
    db::{ANSWER_TIMEOUT, StartError},
    password::{self, Hashed},
    permission::PermissionSet,
    session,
    user::{self, Changed, Filter, User, UserDraft},
};
use secrecy::SecretString;
use sqlx::{Connection, PgConnection};

use crate::instance::Instance;

/// `dbackup user …`.
#[derive(Subcommand)]
pub enum UserCommand {
    /// Make a user. The password is the first line of standard input, or in DBACKUP_USER_PASSWORD (or …_FILE)
    Create {
        /// What one signs in with, in small letters
        #[arg(long)]
        name: String,
        /// What they may do, such as jobs:execute; '*' is all. May be repeated
        #[arg(long = "permission", required = true)]
        permissions: Vec<String>,
    },
    /// List the users
    List,
    /// Give a user a new password, read as by create, and end their sessions
    Password {
        /// What they sign in with
        name: String,
    },
    /// Let a disabled user sign in again
    Enable {
        /// What they sign in with
        name: String,
    },
    /// Keep a user from signing in, and end their sessions
    Disable {
        /// What they sign in with
        name: String,
    },
    /// Delete a user
    Delete {
        /// What they sign in with
        name: String,
    },
    /// Sign the tokens of sessions with a new key from now on; those that are out count until their time is over
    RotateSigningKey,
}

/// Runs one of the commands.
pub async fn run(data: Option<PathBuf>, command: UserCommand) -> Result<(), StartError> {
    let password = match &command {
        UserCommand::Create { name, permissions } => {
            if !user::is_valid_name(name) {
                return Err(
                    ConfigError("--name: must be 1 to 100 small letters, digits or any of . - _ @ +".into()).into()
                );
            }
            PermissionSet::parse(permissions).map_err(|e| ConfigError(format!("--permission: {e}")))?;
            Some(read_password()?)
        }
        UserCommand::Password { .. } => Some(read_password()?),
        _ => None,
    };
    let instance = Instance::open(data)?;
    instance.db.prepare().await?;
    if let UserCommand::RotateSigningKey = command {
        let key = instance.key.as_ref().ok_or_else(|| ConfigError("DBACKUP_ENCRYPTION_KEY is not set".into()))?;
        let rotate = async |conn: &mut PgConnection| {
            let mut tx = conn.begin().await?;
            session::signing_keys(&mut tx, key, true).await?;
            let event = Event::new("signing-key.rotate", "signing-keys", "signing keys");
            audit::record(&mut tx, &Actor::command_line(), &[event]).await?;
            tx.commit().await
        };
        instance.db.within(ANSWER_TIMEOUT, rotate).await?;
        println!("a new key signs from now on");
        return Ok(());
    }
    let said = instance.db.within(ANSWER_TIMEOUT, async |conn| change(conn, &command, password).await).await?;
    println!("{}", said.map_err(|refusal| StartError::from(std::io::Error::other(refusal)))?);
    Ok(())
}

/// Never from an argument, which everybody on the machine can read.
fn read_password() -> Result<Hashed, StartError> {
    let given = match config::secret("DBACKUP_USER_PASSWORD")? {
        Some(password) => password,
        None => {
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line)?;
            SecretString::from(line.trim_end_matches(['\r', '\n']))
        }
    };
    match password::problem(&given) {
        Some(problem) => {
            Err(ConfigError(format!("the password (standard input, or DBACKUP_USER_PASSWORD) {problem}")).into())
        }
        None => Ok(password::hash(&given)),
    }
}

/// What is printed, or why nothing was done.
async fn change(
    conn: &mut PgConnection,
    command: &UserCommand,
    password: Option<Hashed>,
) -> Result<Result<String, String>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let (name, action) = match command {
        UserCommand::List => return Ok(Ok(table(&user::list(&mut tx, &Filter::default()).await?.rows))),
        UserCommand::Create { name, .. } => (name, "user.create"),
        UserCommand::Delete { name } => (name, "user.delete"),
        UserCommand::Password { name } | UserCommand::Enable { name } | UserCommand::Disable { name } => {
            (name, "user.update")
        }
        UserCommand::RotateSigningKey => return Ok(Ok(String::new())),
    };
    let found = user::list(&mut tx, &Filter::default()).await?.rows.into_iter().find(|user| user.name == *name);
    let done = match (command, found) {
        (UserCommand::Create { permissions, .. }, None) => {
            let draft = UserDraft {
                name: name.clone(),
                display_name: String::new(),
                password,
                permissions: PermissionSet::parse(permissions).unwrap_or_default(),
                enabled: true,
            };
            user::create(&mut tx, &draft).await?.map_or(Changed::NotFound, Changed::Done)
        }
        (UserCommand::Create { .. }, Some(_)) => return Ok(Err(format!("there is a user '{name}' already"))),
        (_, None) => return Ok(Err(format!("there is no user '{name}'"))),
        (UserCommand::Delete { .. }, Some(user)) => match user::delete(&mut tx, user.id).await? {
            Changed::Done(()) => Changed::Done(user),
            Changed::NotFound | Changed::Stale => Changed::NotFound,
            Changed::LastAdministrator => Changed::LastAdministrator,
        },
        (command, Some(old)) => {
            let enabled = match command {
                UserCommand::Enable { .. } => true,
                UserCommand::Disable { .. } => false,
                _ => old.enabled,
            };
            let draft = UserDraft { password, enabled, ..UserDraft::from(&old) };
            user::update(&mut tx, &old, &draft).await?
        }
    };
    match done {
        Changed::Done(user) => {
            audit::record(&mut tx, &Actor::command_line(), &[Event::new(action, user.id, name)]).await?;
            tx.commit().await?;
            Ok(Ok(format!("{name}: done")))
        }
        Changed::NotFound => Ok(Err(format!("there is no user '{name}'"))),
        Changed::Stale => Ok(Err(format!("'{name}' was changed by somebody else at this moment: try again"))),
        Changed::LastAdministrator => {
            Ok(Err("nobody could administer the users any more: make another administrator first".to_owned()))
        }
    }
}

fn table(users: &[User]) -> String {
    let mut lines = vec![format!("{:<30}  {:<8}  {:<16}  {}", "NAME", "STATE", "LAST SIGN-IN", "PERMISSIONS")];
    for user in users {
        let at = user.last_sign_in_at.map_or("never".to_owned(), |at| at.format("%Y-%m-%d %H:%M").to_string());
        let state = if user.enabled { "enabled" } else { "disabled" };
        lines.push(format!("{:<30}  {state:<8}  {at:<16}  {}", user.name, user.permissions.join(" ")));
    }
    lines.join("\n")
}
