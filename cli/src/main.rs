//! `dbackup`: everything in one process (`up`), and what an administrator does by hand.

mod commands;
mod download;
mod embedded;
mod instance;
mod keys;
mod remote;
mod restore;
mod status;
mod trigger;
mod up;
mod users;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use common::config;

/// As in dbackup-api, which `up` runs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Database backups by REST: run all of it in one process, or administer an instance.
#[derive(Parser)]
#[command(name = "dbackup", version)]
struct Program {
    /// Folder of an instance made by `dbackup up`; without it DATABASE_URL names the instance
    #[arg(long, env = "DBACKUP_DATA", global = true)]
    data: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run API and workers in one process, on a private PostgreSQL in --data
    Up(Box<up::UpArgs>),
    /// Bring the database's schema up to date
    Migrate,
    /// API keys
    #[command(subcommand)]
    Key(keys::KeyCommand),
    /// Seal every stored secret with DBACKUP_ENCRYPTION_KEY that opens with DBACKUP_OTHER_ENCRYPTION_KEY
    KeyRotate,
    /// People who sign in
    #[command(subcommand)]
    User(users::UserCommand),
    /// Print the OpenAPI document of the API
    Openapi,
    /// Ask whether the instance's database answers and the encryption key fits
    Health {
        /// Ask an API process instead, such as http://127.0.0.1:3000, whether it is ready
        #[arg(long)]
        api: Option<url::Url>,
        /// Ask besides whether a worker of this machine (or container) was seen within its lease
        #[arg(long, conflicts_with = "api")]
        worker: bool,
    },
    /// Show the workers, the slots in use and what waits
    Status(status::StatusArgs),
    /// Trigger a job of an instance over HTTP and wait for its end; the exit status is 0 for Success alone
    Trigger(trigger::TriggerArgs),
    /// Bring a backup of an instance back into a database and wait for the end
    Restore(restore::RestoreArgs),
    /// Fetch the files of a backup from an instance and compare their checksums
    Download(download::DownloadArgs),
}

#[tokio::main]
async fn main() {
    let program = config::parse_or_exit::<Program>();
    let done = match program.command {
        Command::Up(args) => up::run(program.data, *args).await,
        Command::Migrate => commands::migrate(program.data).await,
        Command::Key(command) => keys::run(program.data, command).await,
        Command::User(command) => users::run(program.data, command).await,
        Command::Openapi => {
            println!("{:#}", api::openapi::document());
            Ok(())
        }
        Command::Health { api: None, worker } => commands::health(program.data, worker).await,
        Command::Health { api: Some(url), .. } => commands::api_health(&url).await,
        Command::KeyRotate => commands::rotate_key(program.data).await,
        Command::Status(args) => status::run(program.data, args).await,
        Command::Trigger(args) => trigger::run(args).await,
        Command::Restore(args) => restore::run(args).await,
        Command::Download(args) => download::run(args).await,
    };
    std::process::exit(done.map_or_else(|error| error.report(), |()| 0));
}
