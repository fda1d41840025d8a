//! Dumps by the engine's own tools.

pub(super) mod child;
pub(super) mod mariadb;
pub(super) mod postgres;
pub mod tools;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, Utc};
use common::{
    source::{Engine, SourceAccess},
    telemetry::{Span, span::KeyValue},
};
use tokio::process::ChildStdout;

use super::meter::Streamed;
use crate::{
    config::WorkerConfig,
    failure::RunError,
    lease::{Lease, ProcessGroups},
    run_log::RunLog,
};
use child::{Ended, Program, Running};

/// What to do when a server's TLS is not what the source demands.
const TLS_HINT: &str = "Check tls of the source: the server must offer TLS, caCertificate must be the authority that \
     signed its certificate, and that certificate must name the host of the source.";

/// A source and the tools to dump it.
pub struct Dump {
    access: SourceAccess,
    bins: Vec<PathBuf>,
    lock_wait: Duration,
}

/// What a look at the source told.
#[derive(Clone, Debug)]
pub struct Inspected {
    /// Version of the server, as it says.
    pub server_version: String,
    /// Version of the tool that will write the dump.
    pub tool_version: String,
    /// That tool.
    pub tool: PathBuf,
    /// By the server's clock, before the dump: the backup holds the data of this time or a little later.
    pub snapshot_at: DateTime<Utc>,
    /// Every database that will be dumped.
    pub databases: Vec<Database>,
    /// Names of all databases that the server shows, those that will not be dumped too.
    pub all_databases: Vec<String>,
    /// How long the server keeps a connection to a tool that takes nothing; `None` for ever.
    pub most_frozen: Option<Duration>,
}

/// One database.
#[derive(Clone, Debug)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// Bytes by the server's own account.
    pub estimate: u64,
}

impl Inspected {
    /// Bytes of all databases together.
    pub fn estimate(&self) -> u64 {
        self.databases.iter().map(|d| d.estimate).sum()
    }
}

/// A tool that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tool {
    pub path: PathBuf,
    /// The whole line that `--version` prints.
    pub version: String,
}

impl Dump {
    /// For one source.
    pub fn new(config: &WorkerConfig, access: SourceAccess) -> Self {
        let bins = match access.engine {
            Engine::Postgres => config.postgres_bin.clone(),
            Engine::Mysql | Engine::Mariadb => config.mariadb_bin.clone(),
        };
        Self { access, bins, lock_wait: config.lock_wait }
    }

    /// Signs in, finds the right tool and measures the databases.
    pub async fn inspect(&self, groups: &ProcessGroups, log: &RunLog) -> Result<Inspected, RunError> {
        let (inspected, warning) = self.look(groups).await?;
        if let Some(warning) = warning {
            log.warn(warning);
        }
        Ok(inspected)
    }

    /// Ends what an attempt before has left on the server. MariaDB and MySQL end it themselves: they wait for a client that
    /// takes nothing no longer than `net_write_timeout`.
    pub async fn end_former(&self, groups: &ProcessGroups, log: &RunLog) {
        if self.access.engine == Engine::Postgres {
            postgres::end_former(&self.access, &self.bins, groups, log).await;
        }
    }

    /// As [`Dump::inspect`], for a connection test: without a log, the warning apart.
    pub async fn look(&self, groups: &ProcessGroups) -> Result<(Inspected, Option<String>), RunError> {
        match self.access.engine {
            Engine::Postgres => postgres::inspect(&self.access, &self.bins, groups).await,
            Engine::Mysql | Engine::Mariadb => mariadb::inspect(&self.access, &self.bins, groups).await,
        }
    }

    /// What is dumped, by the conventions of OpenTelemetry for databases.
    pub fn describe(&self, span: &mut Span, database: Option<&str>) {
        describe_source(&self.access, span, database);
    }

    /// Starts the dump of one database.
    pub fn start(
        &self,
        database: &str,
        inspected: &Inspected,
        lease: &Arc<Lease>,
        log: &RunLog,
    ) -> Result<RunningDump, RunError> {
        let program = match self.access.engine {
            Engine::Postgres => postgres::dump(&self.access, &inspected.tool, database, self.lock_wait)?,
            Engine::Mysql | Engine::Mariadb => {
                mariadb::dump(&self.access, &inspected.tool, &inspected.tool_version, database)?
            }
        };
        Ok(RunningDump {
            running: program.start(lease, log)?,
            engine: self.access.engine,
            database: database.to_owned(),
        })
    }

    /// A last look at the bytes themselves: a whole dump begins and ends as its format says.
    pub fn check_complete(&self, database: &str, facts: &Streamed) -> Result<(), RunError> {
        let whole = match self.access.engine {
            Engine::Postgres => facts.plain_ends.head.starts_with(postgres::MAGIC),
            Engine::Mysql | Engine::Mariadb => contains(&facts.plain_ends.tail, mariadb::LAST_LINE),
        };
        if whole {
            return Ok(());
        }
        Err(RunError::retry(
            "dump_incomplete",
            format!("the dump of '{database}' is not whole, although the tool reported success"),
        ))
    }
}

/// A server and one of its databases, by the conventions of OpenTelemetry for databases.
pub(super) fn describe_source(access: &SourceAccess, span: &mut Span, database: Option<&str>) {
    if !span.is_recording() {
        return;
    }
    let SourceAccess { engine, config, .. } = access;
    span.set(
        "db.system.name",
        match engine {
            Engine::Postgres => "postgresql",
            Engine::Mysql => "mysql",
            Engine::Mariadb => "mariadb",
        },
    );
    if let Some(database) = database {
        span.set("db.namespace", database.to_owned());
    }
    if let Some(socket) = &config.socket {
        span.set("server.address", socket.display().to_string());
    } else if let Some(host) = &config.host {
        span.set("server.address", host.clone());
        span.set("server.port", i64::from(config.port.unwrap_or(engine.default_port())));
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// A dump under way. Dropping it kills the tool.
pub struct RunningDump {
    running: Running,
    engine: Engine,
    database: String,
}

impl RunningDump {
    /// The dump itself; may be taken once.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.running.stdout()
    }

    /// Waits for the tool. Only an exit status of 0 makes a good dump, whatever was written.
    pub async fn finish(&mut self, span: &mut Span) -> Result<(), RunError> {
        let ended = self.running.wait().await?;
        tell(&ended, span);
        let Ended { status, stderr, name, .. } = ended;
        if status.success() {
            return Ok(());
        }
        let how = describe_exit(status);
        let said = if stderr.is_empty() { String::new() } else { format!(": {stderr}") };
        let doing = format!("{name} of '{}' {how}{said}", self.database);
        Err(match self.engine {
            Engine::Postgres => postgres::classify(&stderr, doing),
            Engine::Mysql | Engine::Mariadb => mariadb::classify(&stderr, doing),
        })
    }
}

/// How the tool ended, by the conventions of OpenTelemetry for processes. Never its arguments; what it wrote to its
/// standard error is what the log of the execution has, too.
pub(super) fn tell(ended: &Ended, span: &mut Span) {
    use std::os::unix::process::ExitStatusExt;
    if !span.is_recording() {
        return;
    }
    span.set("process.executable.name", ended.name.clone());
    span.set("process.pid", i64::from(ended.pid));
    let (code, signal) = (ended.status.code().map(i64::from), ended.status.signal().map(i64::from));
    if let Some(code) = code {
        span.set("process.exit.code", code);
    }
    if ended.status.success() {
        return;
    }
    let mut facts: Vec<KeyValue> = code.map(|code| KeyValue::new("process.exit.code", code)).into_iter().collect();
    facts.extend(signal.map(|signal| KeyValue::new("dbackup.process.signal", signal)));
    span.event("process.exit", facts);
    if !ended.stderr.is_empty() {
        span.event("process.stderr", vec![KeyValue::new("dbackup.stderr.tail", ended.stderr.clone())]);
    }
}

pub(super) fn describe_exit(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(9)) => "was killed (signal 9): perhaps by the system, for want of memory".to_owned(),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// Every `name` in the folders, with its version; the same file under two names counts once.
pub(super) async fn find_tools(bins: &[PathBuf], name: &str, groups: &ProcessGroups) -> Vec<Tool> {
    let (mut tools, mut seen) = (Vec::new(), HashSet::new());
    for bin in bins {
        let started = bin.join(name);
        let Ok(path) = std::fs::canonicalize(&started) else { continue };
        // Debian's /usr/bin/pg_dump is a wrapper that chooses by itself; the folders of the majors come first.
        if !path.is_file() || !seen.insert(path) {
            continue;
        }
        if let Some(version) = version_of(&started, groups).await {
            tools.push(Tool { path: started, version });
        }
    }
    tools
}

async fn version_of(path: &Path, groups: &ProcessGroups) -> Option<String> {
    let mut program = Program::new(path);
    program.arg("--version");
    let output = program.output(groups).await.ok()?;
    output.status.success().then(|| output.stdout.lines().next().unwrap_or_default().trim().to_owned())
}

pub(super) fn missing(tool: &str, bins: &[PathBuf], variable: &str, package: &str) -> RunError {
    let looked: Vec<String> = bins.iter().map(|b| b.display().to_string()).collect();
    RunError::give_up(
        "tool_missing",
        format!(
            "this worker has no {tool} (looked in {}): install {package}, or name its folder in {variable}",
            looked.join(", ")
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[tokio::test]
    async fn a_tool_that_is_found_by_two_folders_counts_once() {
        let scratch = std::env::temp_dir().join(format!("dbackup-tools-{}", uuid::Uuid::now_v7()));
        let [first, second] = ["usr", "bin"].map(|name| scratch.join(name));
        std::fs::create_dir_all(&first).expect("a folder");
        symlink(&first, &second).expect("a second name");
        let tool = first.join("pg_dump");
        std::fs::write(&tool, "#!/bin/sh\necho 'pg_dump (PostgreSQL) 15.18'\n").expect("a script");
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).expect("executable");
        let found = find_tools(&[second.clone(), first], "pg_dump", &ProcessGroups::default()).await;
        std::fs::remove_dir_all(&scratch).expect("removes");
        let expected = Tool { path: second.join("pg_dump"), version: "pg_dump (PostgreSQL) 15.18".to_owned() };
        assert_eq!(found, [expected]);
    }
}
