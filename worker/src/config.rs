//! What a worker reads from its flags and environment.

use std::{path::PathBuf, time::Duration};

use common::config::{self, ConfigError, Timing, TimingArgs};

/// Flags of a worker; each is also an environment variable.
#[derive(clap::Args, Clone, Debug)]
pub struct WorkerArgs {
    /// Runs at once in this process; the limit over all processes is the setting maxConcurrentJobs
    #[arg(long, env = "DBACKUP_CONCURRENCY", default_value_t = 4)]
    pub concurrency: usize,
    /// Pools whose sources this worker reaches, separated by commas
    #[arg(long, env = "DBACKUP_POOLS", default_value = "default", value_delimiter = ',')]
    pub pools: Vec<String>,
    /// Name in logs and leases [default: the host's name and the process id]
    #[arg(long, env = "DBACKUP_WORKER_NAME")]
    pub worker_name: Option<String>,
    /// Folders under which local destinations may lie, separated by colons
    #[arg(long, env = "DBACKUP_LOCAL_PATHS", default_value = "/var/backups/dbackup", value_delimiter = ':')]
    pub local_paths: Vec<PathBuf>,
    /// How long runs may go on after SIGTERM before they are given back, in seconds
    #[arg(long, env = "DBACKUP_DRAIN_SECONDS", default_value_t = 25)]
    pub drain_seconds: u64,
    /// First pause before a failed run is tried again; doubles each time, in milliseconds
    #[arg(long, env = "DBACKUP_RETRY_PAUSE_MS", default_value_t = 10_000)]
    pub retry_pause_ms: u64,
    /// How long a run stands still when the service's database does not answer, before it is killed, in seconds
    #[arg(long, env = "DBACKUP_FREEZE_SECONDS", default_value_t = 600)]
    pub freeze_seconds: u64,
    /// How long a dump of PostgreSQL waits for a table that somebody has locked before it fails, in seconds
    #[arg(long, env = "DBACKUP_LOCK_WAIT_SECONDS", default_value_t = 300)]
    pub lock_wait_seconds: u32,
    /// Folders with pg_dump and psql, separated by colons [default: every /usr/lib/postgresql/*/bin, then PATH]
    #[arg(long, env = "DBACKUP_POSTGRES_BIN", value_delimiter = ':')]
    pub postgres_bin: Vec<PathBuf>,
    /// Folders with mariadb-dump or mysqldump, separated by colons [default: PATH]
    #[arg(long, env = "DBACKUP_MARIADB_BIN", value_delimiter = ':')]
    pub mariadb_bin: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub timing: TimingArgs,
}

/// Validated configuration of a worker.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Name in logs and leases.
    pub name: String,
    /// Runs at once in this process.
    pub concurrency: usize,
    /// Pools it claims from.
    pub pools: Vec<String>,
    /// Folders under which local destinations may lie.
    pub local_paths: Vec<PathBuf>,
    /// Time that runs get after SIGTERM.
    pub drain: Duration,
    /// First pause before a retry.
    pub retry_pause: Duration,
    /// How long a run may stand still without a heartbeat before it is killed.
    pub freeze: Duration,
    /// Longest wait of a dump for a locked table.
    pub lock_wait: Duration,
    /// Where PostgreSQL's tools are looked for.
    pub postgres_bin: Vec<PathBuf>,
    /// Where MariaDB's and MySQL's tools are looked for.
    pub mariadb_bin: Vec<PathBuf>,
    /// The clockwork.
    pub timing: Timing,
}

impl WorkerArgs {
    /// Checks everything, relations too.
    pub fn validate(self) -> Result<WorkerConfig, ConfigError> {
        let fail = |text: String| Err(ConfigError(text));
        let timing = self.timing.validate()?;
        if !(1..=1000).contains(&self.concurrency) {
            return fail(format!("DBACKUP_CONCURRENCY is {} but must be between 1 and 1000", self.concurrency));
        }
        if self.pools.iter().any(|p| p.trim().is_empty()) {
            return fail("DBACKUP_POOLS holds an empty name".to_owned());
        }
        let local_paths = config::local_paths(self.local_paths)?;
        if self.drain_seconds > 86_400 {
            return fail(format!("DBACKUP_DRAIN_SECONDS is {} but must be at most 86400", self.drain_seconds));
        }
        // A run that is done publishes only after one more acknowledged heartbeat: a drain that is shorter than the wait
        // for it would give back what is finished.
        if self.drain_seconds > 0 && Duration::from_secs(self.drain_seconds) < timing.heartbeat_timeout {
            return fail(format!(
                "DBACKUP_DRAIN_SECONDS is {} but must be 0 or at least DBACKUP_HEARTBEAT_TIMEOUT_MS ({}): a finished run waits so long for its last heartbeat",
                self.drain_seconds,
                timing.heartbeat_timeout.as_millis()
            ));
        }
        if self.freeze_seconds > 3_600 {
            return fail(format!(
                "DBACKUP_FREEZE_SECONDS is {} but must be at most 3600; 0 kills at once",
                self.freeze_seconds
            ));
        }
        // PostgreSQL takes 0 for "wait for ever", and no more milliseconds than fit into an int.
        if !(1..=86_400).contains(&self.lock_wait_seconds) {
            return fail(format!(
                "DBACKUP_LOCK_WAIT_SECONDS is {} but must be between 1 and 86400",
                self.lock_wait_seconds
            ));
        }
        if self
            .worker_name
            .as_ref()
            .is_some_and(|n| !(1..=200).contains(&n.chars().count()) || n.chars().any(char::is_control))
        {
            return fail("DBACKUP_WORKER_NAME must have 1 to 200 characters and no control character".to_owned());
        }
        let name = self.worker_name.unwrap_or_else(|| format!("{}-{}", host(), std::process::id()));
        Ok(WorkerConfig {
            name,
            concurrency: self.concurrency,
            pools: self.pools.iter().map(|p| p.trim().to_owned()).collect(),
            local_paths,
            drain: Duration::from_secs(self.drain_seconds),
            retry_pause: Duration::from_millis(self.retry_pause_ms),
            freeze: Duration::from_secs(self.freeze_seconds),
            lock_wait: Duration::from_secs(self.lock_wait_seconds.into()),
            postgres_bin: if self.postgres_bin.is_empty() { default_postgres_bin() } else { self.postgres_bin },
            mariadb_bin: if self.mariadb_bin.is_empty() { search_path() } else { self.mariadb_bin },
            timing,
        })
    }
}

/// Name of the machine, or of the container.
pub fn host() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "worker".to_owned());
    host.trim().to_owned()
}

fn search_path() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

/// Debian keeps each major's tools in a folder of its own.
fn default_postgres_bin() -> Vec<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    versions.map(|entry| entry.path().join("bin")).chain(search_path()).collect()
}
