//! The Compose project under test: Docker's own commands, the address of its proxy, its database.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::process::Command;

use crate::harness::{audit::Audited, id, unique, until};

/// Longest wait for something that needs a new container.
pub const A_WHILE: Duration = Duration::from_secs(120);
/// The pool of every worker, and that of the workers with a right clock.
pub const POOLS: [&str; 2] = ["default", "stores"];
/// Host name of the worker whose clock is an hour wrong, with which its name begins.
pub const SKEWED: &str = "skewed";
/// Where the volume of all workers is mounted.
pub const BACKUPS: &str = "/var/backups/dbackup";

/// A project that `.dev/cluster-test` has started.
#[derive(Clone)]
pub struct Project {
    /// Address of its proxy.
    pub url: String,
    /// A key that may do everything.
    pub key: String,
    /// For requests.
    pub http: reqwest::Client,
    /// Its database, for what the API does not tell.
    pub pool: PgPool,
    /// This machine, as the workers see it.
    pub here: IpAddr,
    /// The server that is backed up.
    pub source: IpAddr,
    /// Executions whose trigger was acknowledged, to whomever.
    pub acknowledged: Arc<Mutex<Vec<String>>>,
}

impl Audited for Project {
    fn pool(&self) -> &PgPool {
        &self.pool
    }
}

/// How an execution ended.
#[derive(Debug, sqlx::FromRow)]
pub struct End {
    status: String,
    outcome: Option<String>,
    error_code: Option<String>,
    /// How often it was taken from a worker that was lost.
    pub rescues: i32,
}

impl End {
    /// Well.
    pub fn is_success(&self) -> bool {
        self.status == "Success"
    }

    /// Closed as lost, since it was taken from its worker a fourth time: that is the rule.
    pub fn is_lost(&self) -> bool {
        self.outcome.as_deref() == Some("WorkerLost") && self.rescues > 3
    }

    /// On request.
    pub fn is_cancelled(&self) -> bool {
        self.outcome.as_deref() == Some("Cancelled")
    }

    /// A restore whose tool committed before its lost worker could end it: the next attempt has refused what is there.
    pub fn is_overtaken(&self) -> bool {
        self.error_code.as_deref() == Some("target_not_empty") && self.rescues > 0
    }
}

/// `docker …`; gives what it printed.
pub async fn docker(args: &[&str]) -> String {
    try_docker(args).await.unwrap_or_else(|said| panic!("docker {}: {said}", args.join(" ")))
}

/// The same; what it said when it failed.
pub async fn try_docker(args: &[&str]) -> Result<String, String> {
    let output = Command::new("docker").args(args).output().await.expect("docker runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// `docker compose …`, on the project that the environment names.
pub async fn compose(args: &[&str]) -> String {
    docker(&[&["compose"], args].concat()).await
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run this with make cluster-test"))
}

/// The name that Compose knows it by.
pub fn project_name() -> String {
    variable("COMPOSE_PROJECT_NAME")
}

impl Project {
    /// Waits until the project serves.
    pub async fn open() -> Self {
        let net = variable("CLUSTER_TEST_NET");
        let url = format!("http://127.0.0.1:{}", variable("DBACKUP_PORT"));
        let http = reqwest::Client::builder().timeout(Duration::from_secs(100)).build().expect("a client");
        until("the cluster is ready", A_WHILE, || async {
            http.get(format!("{url}/readyz")).send().await.ok().filter(|answer| answer.status() == 200)
        })
        .await;
        let create = ["exec", "-T", "api", "dbackup", "key", "create", "--name", "test", "--permission", "*"];
        let password = compose(&["exec", "-T", "postgres", "cat", "/run/secrets/password"]).await;
        let database = format!("postgres://dbackup:{password}@10.214.{net}.10/dbackup");
        // A database that is stopped for a minute must not end the test.
        let pool = PgPoolOptions::new().max_connections(8).acquire_timeout(A_WHILE);
        Self {
            url,
            key: compose(&create).await,
            http,
            pool: pool.connect(&database).await.expect("connects to the database"),
            here: format!("10.215.{net}.1").parse().expect("an address"),
            source: format!("10.215.{net}.10").parse().expect("an address"),
            acknowledged: Arc::default(),
        }
    }

    /// The ids of the containers of a service, those too that somebody has just killed.
    pub async fn containers(&self, service: &str) -> Vec<String> {
        compose(&["ps", "--all", "--quiet", service]).await.lines().map(str::to_owned).collect()
    }

    /// The container that a worker's name is from: its host's name is the beginning of the container's id, but for the
    /// one whose clock is wrong.
    pub async fn container_of(&self, worker: &str) -> String {
        let host = worker.split('-').next().unwrap_or_default();
        if host == SKEWED {
            return self.containers("worker-skewed").await.remove(0);
        }
        docker(&["inspect", "--format", "{{.Id}}", host]).await
    }

    /// How often Docker started each container again because its process had ended by itself.
    pub async fn restarts(&self) -> BTreeMap<String, u32> {
        let ids = compose(&["ps", "--all", "--quiet"]).await;
        let mut command = vec!["inspect", "--format", "{{.Id}} {{.RestartCount}}"];
        command.extend(ids.lines());
        let counts = docker(&command).await;
        let count = |line: &str| {
            let (id, count) = line.split_once(' ').expect("two words");
            (id.to_owned(), count.parse().expect("a number"))
        };
        counts.lines().map(count).collect()
    }

    /// Waits until a container's own probe succeeds.
    pub async fn healthy(&self, container: &str) {
        until(&format!("{container} is healthy"), A_WHILE, || async {
            let state = docker(&["inspect", "--format", "{{.State.Health.Status}}", container]).await;
            (state == "healthy").then_some(())
        })
        .await;
    }

    /// A request through the proxy.
    pub fn request(&self, method: &str, path: &str, body: Option<Value>) -> reqwest::RequestBuilder {
        let method = method.parse().expect("a method");
        let request = self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key);
        match body {
            Some(body) => request.json(&body),
            None => request,
        }
    }

    /// A request that must succeed; gives `data`.
    pub async fn ok(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let answer = self.request(method, path, body).send().await.unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        let status = answer.status().as_u16();
        let answer: Value = answer.json().await.unwrap_or_else(|e| panic!("{method} {path} answered {status}: {e}"));
        assert!(status < 300, "{method} {path}: {status} {answer}");
        answer.get("data").cloned().unwrap_or(answer)
    }

    /// Makes a source of the server that is backed up, reached at another address.
    pub async fn make_source(&self, host: IpAddr, port: u16, pool: &str) -> String {
        let config =
            json!({ "host": host, "port": port, "username": "postgres", "password": "source", "databases": ["shop"] });
        let body = json!({ "name": unique("source"), "engine": "postgres", "config": config, "pool": pool });
        id(&self.ok("POST", "/api/sources", Some(body)).await)
    }

    /// Makes a destination, tested.
    pub async fn make_destination(&self, kind: &str, config: Value, pool: &str) -> String {
        let body = json!({ "name": unique("store"), "kind": kind, "config": config, "pool": pool });
        let id = id(&self.ok("POST", "/api/destinations", Some(body)).await);
        let tested = self.ok("POST", &format!("/api/destinations/{id}/test"), None).await;
        assert_eq!(tested["ok"], true, "{tested}");
        id
    }

    /// Makes a job whose runs may overlap.
    pub async fn make_job(&self, source: &str, destination: &str) -> String {
        let body = json!({ "name": unique("job"), "sourceId": source, "destinationIds": [destination], "overlap": "allow", "maxAttempts": 20 });
        id(&self.ok("POST", "/api/jobs", Some(body)).await)
    }

    /// Triggers a job; gives the execution's id.
    pub async fn trigger(&self, job: &str) -> String {
        self.accepted(self.ok("POST", &format!("/api/jobs/{job}/run"), None).await)
    }

    /// The execution's id in the answer to a trigger, which is noted.
    pub fn accepted(&self, answer: Value) -> String {
        let execution = answer["executionId"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned();
        self.acknowledge(&execution);
        execution
    }

    /// Notes a trigger that was acknowledged: at the end it is looked for.
    pub fn acknowledge(&self, execution: &str) {
        self.acknowledged.lock().expect("not poisoned").push(execution.to_owned());
    }

    /// Waits until an execution has ended; gives how.
    pub async fn ended(&self, execution: &str) -> End {
        until(&format!("execution {execution} ends"), A_WHILE, || self.end_of(execution)).await
    }

    /// As [`Project::ended`], if it has.
    pub async fn end_of(&self, execution: &str) -> Option<End> {
        let query = "select status, outcome, error_code, rescues::int from executions where id = $1::uuid and ended_at is not null";
        sqlx::query_as(query).bind(execution).fetch_optional(&self.pool).await.expect("answers")
    }

    /// The worker that holds an execution's lease in this stage, if one does.
    pub async fn worker_in(&self, execution: &str, stage: &str) -> Option<String> {
        let query = "select worker from execution_leases where execution_id = $1::uuid and stage = $2";
        sqlx::query_scalar(query).bind(execution).bind(stage).fetch_optional(&self.pool).await.expect("answers")
    }

    /// The one column of text that a query gives.
    pub async fn texts(&self, query: String) -> Vec<String> {
        sqlx::query_scalar(sqlx::AssertSqlSafe(query)).fetch_all(&self.pool).await.expect("rows")
    }

    /// How often an execution's lease ended, by the audit.
    pub async fn leases_ended(&self, execution: &str) -> i64 {
        self.number(&format!("select count(*) from lease_audit where change = -1 and execution_id = '{execution}'"))
            .await
    }
}
