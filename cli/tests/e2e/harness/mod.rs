//! The tests' cluster: two API and two worker processes by default, on the real PostgreSQL, MariaDB and Redis
//! that `make test` starts, with a database of its own for each test.

pub mod audit;
mod calls;
mod database;
pub mod held;
pub mod history;
pub mod hooks;
pub mod metrics;
pub mod otlp;
pub mod people;
pub mod pgbouncer;
pub mod plans;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod readme;
pub mod redis;
pub mod s3;
pub mod source;
pub mod tls;

use std::{
    collections::BTreeMap,
    future::Future,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use common::{execution::claim::Claimant, id::WorkerId, seal::SealKey, source::Engine};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sqlx::{PgPool, postgres::PgPoolOptions};

pub use database::*;
pub use process::{Process, binary};
use proxy::Proxy;

/// Lease of the tests; the real one is 15 s.
pub const LEASE: Duration = Duration::from_secs(3);
/// Longest wait for something that should be quick.
pub const SOON: Duration = Duration::from_secs(30);

/// Waits for a condition; the tests never just sleep.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, limit: Duration, mut look: impl FnMut() -> F) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// A name that no other test has.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}_{}", &uuid::Uuid::now_v7().simple().to_string()[16..])
}

/// How a cluster is to be.
pub struct Builder {
    apis: usize,
    workers: usize,
    env: BTreeMap<String, String>,
    limit: i32,
    rate_limits: Value,
    database_url: Option<String>,
    database_port: Option<u16>,
    programs: Option<PathBuf>,
}

/// A program of another version in a folder, or the one beside this test.
fn program(folder: Option<&Path>, name: &str) -> PathBuf {
    folder.map_or_else(|| binary(name), |folder| folder.join(name))
}

impl Builder {
    /// On a database of a server of the test's own.
    pub fn on(mut self, url: String) -> Self {
        self.database_url = Some(url);
        self
    }

    /// Its processes reach their database at this port: a proxy's. The test itself goes past it.
    pub fn database_at(mut self, port: u16) -> Self {
        self.database_port = Some(port);
        self
    }

    /// Programs of another version, from a folder; see [`Cluster::use_programs`].
    #[allow(dead_code, reason = "only the upgrade test runs another version")]
    pub fn programs(mut self, folder: &Path) -> Self {
        self.programs = Some(folder.to_owned());
        self
    }

    /// The rate limits of the contract instead of none to speak of.
    pub fn contract_limits(self) -> Self {
        self.rate_limits(json!({}))
    }

    /// Rate limits from the start; what is left out is the contract's.
    pub fn rate_limits(mut self, limits: Value) -> Self {
        self.rate_limits = limits;
        self
    }

    /// So many workers.
    pub fn workers(mut self, n: usize) -> Self {
        self.workers = n;
        self
    }

    /// A variable of every process.
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.insert(name.to_owned(), value.to_string());
        self
    }

    /// The global limit at the start.
    pub fn limit(mut self, n: i32) -> Self {
        self.limit = n;
        self
    }

    /// The real times of the protocol instead of the tests'.
    pub fn real_times(mut self) -> Self {
        for name in ["DBACKUP_LEASE_MS", "DBACKUP_TICKER_MS", "DBACKUP_POLL_MS"] {
            self.env.remove(name);
        }
        self
    }

    /// Starts it.
    pub async fn start(self) -> Cluster {
        let (database, database_url) = match self.database_url {
            Some(url) => {
                migrate(&program(self.programs.as_deref(), "dbackup"), &url);
                (String::new(), url)
            }
            None => {
                let database = fresh_database().await;
                let url = postgres_url(&database);
                (database, url)
            }
        };
        let scratch = std::env::temp_dir().join(unique("dbackup-test"));
        std::fs::create_dir(&scratch).expect("a scratch folder");
        std::fs::create_dir(scratch.join("backups")).expect("a folder");
        let pool = PgPoolOptions::new().max_connections(4).connect(&database_url).await.expect("connects");
        let database_url = match self.database_port {
            Some(port) => at_port(&database_url, port),
            None => database_url,
        };
        let key_text = SealKey::generate();
        let mut env = self.env;
        for (name, value) in [
            ("DATABASE_URL", database_url),
            ("DBACKUP_ENCRYPTION_KEY", key_text),
            ("REDIS_URL", variable("REDIS_URL")),
            ("DBACKUP_LOCAL_PATHS", scratch.display().to_string()),
            ("DBACKUP_RETRY_PAUSE_MS", "200".to_owned()),
            ("DBACKUP_LOG_FORMAT", "json".to_owned()),
            // A busy test machine is not a Redis that is away.
            ("DBACKUP_REDIS_TIMEOUT_MS", "2000".to_owned()),
        ] {
            env.entry(name.to_owned()).or_insert(value);
        }
        sqlx::query("update queue_gate set max_concurrency = $1")
            .bind(self.limit)
            .execute(&pool)
            .await
            .expect("sets the limit");
        sqlx::query("insert into settings values ('rateLimit', $1)")
            .bind(self.rate_limits)
            .execute(&pool)
            .await
            .expect("sets the limits");
        let mut cluster = Cluster {
            apis: Vec::new(),
            workers: Vec::new(),
            admin_key: String::new(),
            http: reqwest::Client::builder().timeout(Duration::from_secs(40)).build().expect("a client"),
            database,
            pool,
            scratch,
            env,
            programs: self.programs,
        };
        for _ in 0..self.apis {
            cluster.add_api().await;
        }
        cluster.admin_key = cluster.key(&["*"]).await;
        for _ in 0..self.workers {
            cluster.add_worker(&[]).await;
        }
        cluster
    }
}

/// A running cluster; it ends with the test.
pub struct Cluster {
    /// API processes with their addresses.
    pub apis: Vec<(Process, String)>,
    /// Worker processes.
    pub workers: Vec<Process>,
    /// A key that may do everything.
    pub admin_key: String,
    /// For requests.
    pub http: reqwest::Client,
    /// Name of its database on the test server; empty on a server of the test's own.
    pub database: String,
    /// Its database, for what the API does not tell.
    pub pool: PgPool,
    /// A folder under DBACKUP_LOCAL_PATHS.
    pub scratch: PathBuf,
    env: BTreeMap<String, String>,
    programs: Option<PathBuf>,
}

impl Cluster {
    /// Two API and two worker processes, limit 4.
    pub fn build() -> Builder {
        let mut env = BTreeMap::new();
        for (name, value) in [
            ("DBACKUP_LEASE_MS", LEASE.as_millis().to_string()),
            ("DBACKUP_TICKER_MS", "300".into()),
            ("DBACKUP_POLL_MS", "300".into()),
        ] {
            env.insert(name.to_owned(), value);
        }
        let none = json!({ "limit": 1_000_000 });
        let rate_limits = json!({ "read": none, "write": none, "signIn": none });
        Builder {
            apis: 2,
            workers: 2,
            env,
            limit: 4,
            rate_limits,
            database_url: None,
            database_port: None,
            programs: None,
        }
    }

    /// The default.
    pub async fn start() -> Self {
        Self::build().start().await
    }

    /// Where the processes that start from now on come from; `None` for those beside this test.
    #[allow(dead_code, reason = "only the upgrade test runs another version")]
    pub fn use_programs(&mut self, folder: Option<&Path>) {
        self.programs = folder.map(Path::to_owned);
    }

    /// Another API process.
    pub async fn add_api(&mut self) {
        let api = program(self.programs.as_deref(), "dbackup-api");
        let mut process = Process::start_at(&api, &["--listen", "127.0.0.1:0"], &self.env, &[]);
        let address = process.wait_for_field("the API listens", "address").await;
        self.apis.push((process, format!("http://{address}")));
    }

    /// Another worker, with variables of its own.
    pub async fn add_worker(&mut self, extra: &[(&str, String)]) -> &mut Process {
        let worker = program(self.programs.as_deref(), "dbackup-worker");
        let mut process = Process::start_at(&worker, &[], &self.env, extra);
        process.wait_for_field("the worker claims executions", "worker").await;
        self.workers.push(process);
        self.workers.last_mut().expect("just pushed")
    }

    /// Stops an API process as a rolling restart does, and starts another in its place.
    pub async fn restart_api(&mut self, at: usize) {
        self.apis[at].0.signal(Signal::SIGTERM);
        self.apis[at].0.end(SOON).await;
        self.add_api().await;
        self.apis.swap_remove(at);
    }

    /// The same of a worker.
    pub async fn restart_worker(&mut self, at: usize) {
        self.workers[at].signal(Signal::SIGTERM);
        self.workers[at].end(SOON).await;
        self.add_worker(&[]).await;
        self.workers.swap_remove(at);
    }

    /// The worker that has a run: it has a tool.
    #[allow(dead_code, reason = "not every test binary has a run stand still")]
    pub fn busy_worker(&self) -> usize {
        self.workers.iter().position(|worker| !worker.children().is_empty()).expect("a worker with a tool")
    }

    /// Sets a variable of the processes that start from now on; `None` removes it.
    pub fn set_env(&mut self, name: &str, value: Option<&str>) {
        match value {
            Some(value) => self.env.insert(name.to_owned(), value.to_owned()),
            None => self.env.remove(name),
        };
    }

    /// Another worker, which reaches the database through a proxy of its own.
    pub async fn add_worker_behind_a_proxy(&mut self) -> Proxy {
        let proxy = Proxy::start(postgres_port()).await;
        self.add_worker(&[("DATABASE_URL", self.database_url_at(proxy.port))]).await;
        proxy
    }

    /// The URL of its database at another port: a proxy's.
    pub fn database_url_at(&self, port: u16) -> String {
        at_port(&postgres_url(&self.database), port)
    }

    /// The environment of its processes.
    pub fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }

    /// Base URL of an API process.
    pub fn url(&self, api: usize) -> &str {
        &self.apis[api].1
    }

    /// Waits until an API process that stops takes no connection any more.
    pub async fn takes_no_connection(&self, api: usize) {
        let address = self.url(api).trim_start_matches("http://");
        until("no connection is taken", SOON, || async {
            tokio::net::TcpStream::connect(address).await.is_err().then_some(())
        })
        .await;
    }

    /// Everything that every process has logged.
    pub fn logs(&self) -> String {
        let processes = self.apis.iter().map(|(p, _)| p).chain(&self.workers);
        processes.map(Process::log).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- logs of the cluster ---\n{}", self.logs());
        }
        self.apis.clear();
        self.workers.clear();
        let _ = std::fs::remove_dir_all(&self.scratch);
    }
}

/// The `id` of a thing.
pub fn id(data: &Value) -> String {
    data["id"].as_str().unwrap_or_else(|| panic!("no id in {data}")).to_owned()
}

/// Runs a program as root; a developer's own account goes through sudo.
#[allow(dead_code, reason = "not every test binary mounts")]
pub fn as_root(program: &str, args: &[&str]) {
    let mut command = match nix::unistd::geteuid().is_root() {
        true => std::process::Command::new(program),
        false => {
            let mut sudo = std::process::Command::new("sudo");
            sudo.arg("-n").arg(program);
            sudo
        }
    };
    let output = command.args(args).output().expect("runs");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A worker that no process is, with every tool: a test claims as it.
pub fn claimant() -> Claimant {
    Claimant {
        id: WorkerId::new(),
        name: "test".to_owned(),
        pools: vec!["default".to_owned()],
        engines: vec![Engine::Postgres, Engine::Mysql, Engine::Mariadb],
        out_of_reach: Vec::new(),
    }
}

/// Files under a folder, the marker left out, as paths relative to it.
pub fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.file_name().is_some_and(|n| n == ".dbackup-store") => {}
                false => found.push(path.strip_prefix(root).expect("below").to_owned()),
            }
        }
    }
    found.sort();
    found
}
