//! An upgrade without downtime, and the way back: two versions of the programs on one database. The schema goes first,
//! then every process one by one; in between each version triggers, runs, polls, cancels, restores and rescues what the
//! other began, and both keep the one limit.
//!
//! `make upgrade-test` builds the earlier version (`FROM=<commit>`; by default that before the newest migration).

#![allow(clippy::disallowed_methods, reason = "it looks into the database")]

#[path = "../e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;

use std::{collections::BTreeSet, path::PathBuf, time::Instant};

use clap::Parser;
use harness::{
    Cluster, SOON, audit, files,
    held::Held,
    id, migrate, postgres_url,
    process::binary,
    proxy::Mode,
    source::{PostgresSource, psql},
    sql, unique,
};
use serde_json::{Value, json};

/// All that the source holds of its own.
const ROWS: &str = "select count(*), md5(string_agg(text, '' order by id)) from item";

#[derive(Parser)]
struct Args {
    /// Folder with dbackup, dbackup-api and dbackup-worker of the earlier version
    #[arg(long)]
    from: PathBuf,
}

struct Upgrade {
    cluster: Cluster,
    source: PostgresSource,
    job: String,
    /// Of the workers, in their order.
    names: Vec<String>,
    started: usize,
}

impl Upgrade {
    /// A worker whose name tells its version.
    async fn worker(&mut self, version: &str) {
        self.started += 1;
        let name = format!("{version}-{}", self.started);
        self.cluster.add_worker(&[("DBACKUP_WORKER_NAME", name.clone())]).await;
        self.names.push(name);
    }

    async fn ask(&self, api: usize, method: &str, path: &str, body: Option<Value>) -> Value {
        let url = format!("{}{path}", self.cluster.url(api));
        let method: reqwest::Method = method.parse().expect("a method");
        let request = self.cluster.http.request(method, url).bearer_auth(&self.cluster.admin_key);
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        let answer = request.send().await.expect("answers");
        let status = answer.status().as_u16();
        let answer: Value = answer.json().await.expect("JSON");
        assert!(status < 300, "{path} through API {api}: {status} {answer}");
        answer
    }

    /// Triggers through every API process, polls through all, until workers of each version have run what it triggered.
    async fn everybody_serves(&self, when: &str, versions: &[&str]) {
        let end = Instant::now() + SOON * u32::try_from(self.cluster.apis.len()).expect("few");
        for api in 0..self.cluster.apis.len() {
            let mut ran = BTreeSet::new();
            while !versions.iter().all(|version| ran.contains(*version)) {
                assert!(Instant::now() < end, "{when}: only {ran:?} run what API {api} triggers");
                let answer = self.ask(api, "POST", &format!("/api/jobs/{}/run", self.job), None).await;
                let id = answer["executionId"].as_str().expect("an id").to_owned();
                for other in 0..self.cluster.apis.len() {
                    let polled = self.ask(other, "GET", &format!("/api/executions/{id}?wait=30"), None).await;
                    assert_eq!(polled["data"]["status"], "Success", "{when}: {polled:#}");
                }
                ran.insert(self.version_of(&id).await);
            }
            assert_eq!(ran.len(), versions.len(), "{when}: {ran:?}");
        }
        println!("{when}: {} API processes, workers {versions:?}", self.cluster.apis.len());
    }

    /// The version of the worker that had an execution's last attempt.
    async fn version_of(&self, execution: &str) -> String {
        let query = format!(
            "select split_part(substring(message from 'on worker ([^,]+),'), '-', 1) from execution_logs
              where execution_id = '{execution}' and message like 'attempt %' order by seq desc limit 1"
        );
        self.cluster.text(&query).await
    }

    /// Cordons, or uncordons, all workers but those of one version.
    async fn tell_others(&self, version: &str, verb: &str) {
        for name in self.names.iter().filter(|name| !name.starts_with(version)) {
            let id = self.cluster.text(&format!("select id::text from workers where name = '{name}'")).await;
            self.ask(0, "POST", &format!("/api/cluster/workers/{id}/{verb}"), None).await;
        }
    }

    /// A run in the middle of its dump, on a worker of this version.
    async fn held_by(&self, held: &Held, version: &str) -> String {
        self.tell_others(version, "cordon").await;
        let id = held.run(&self.cluster).await;
        self.tell_others(version, "uncordon").await;
        let holder = self.cluster.text("select worker from execution_leases").await;
        assert!(holder.starts_with(version), "{holder} runs it");
        id
    }

    /// Every worker of one version dies, with a run in its middle: one of the other takes over.
    async fn rescues(&mut self, held: &Held, from: &str, by: &str) {
        let id = self.held_by(held, from).await;
        for at in (0..self.names.len()).rev().filter(|at| self.names[*at].starts_with(from)).collect::<Vec<_>>() {
            self.names.remove(at);
            self.cluster.workers.remove(at).kill().await;
        }
        held.proxy.set(Mode::Pass);
        let ended = self.cluster.ended(&id, SOON).await;
        assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(2)), "{ended:#}");
        assert_eq!(self.version_of(&id).await, by);
        println!("a run of a killed {from} worker was ended by a {by} one");
    }

    /// A run on a worker of one version is cancelled through an API process of the other.
    async fn cancels(&self, held: &Held, version: &str, api: usize) {
        let id = self.held_by(held, version).await;
        self.ask(api, "POST", &format!("/api/executions/{id}/cancel"), None).await;
        let ended = self.cluster.ended(&id, SOON).await;
        assert_eq!(ended["outcome"], "Cancelled", "{ended:#}");
        println!("a run on a {version} worker was cancelled through API {api}");
    }

    /// A worker of one version restores what one of the other has stored, asked through an API process of the other.
    async fn restores(&self, by: &str, from: &str, api: usize) {
        self.tell_others(from, "cordon").await;
        let backup = self.cluster.backup(&self.job).await;
        self.tell_others(from, "uncordon").await;
        self.tell_others(by, "cordon").await;
        let into = unique("restored");
        sql("postgres", &format!("create database {into} owner {}", self.source.role)).await;
        let path = format!("/api/executions/{}/restore", id(&backup));
        let answer = self.ask(api, "POST", &path, Some(json!({ "into": into }))).await;
        let restore = answer["executionId"].as_str().expect("an id");
        let ended = self.cluster.ended(restore, SOON).await;
        self.tell_others(by, "uncordon").await;
        assert_eq!(ended["status"], "Success", "{ended:#}");
        let versions = (self.version_of(&id(&backup)).await, self.version_of(restore).await);
        assert_eq!((versions.0.as_str(), versions.1.as_str()), (from, by));
        assert_eq!(psql(&into, ROWS), psql(&self.source.database, ROWS));
        println!("a {by} worker restored what a {from} one had stored, asked through API {api}");
    }

    /// All versions together keep the limit, by the database's own record of every lease.
    async fn share_the_limit(&self) {
        self.ask(0, "PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 2 }))).await;
        let mut runs = Vec::new();
        for at in 0..60 {
            let api = at % self.cluster.apis.len();
            let answer = self.ask(api, "POST", &format!("/api/jobs/{}/run", self.job), None).await;
            runs.push(answer["executionId"].as_str().expect("an id").to_owned());
        }
        let mut by = BTreeSet::new();
        for run in &runs {
            let ended = self.cluster.ended(run, SOON).await;
            assert_eq!(ended["status"], "Success", "{ended:#}");
            by.insert(self.version_of(run).await);
        }
        assert_eq!(by.len(), 2, "{by:?}");
        assert_eq!(audit::most_running_at(&self.cluster, 2).await, 2);
        println!("{} runs of both versions under a limit of two", runs.len());
        self.ask(0, "PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 4 }))).await;
    }
}

#[tokio::main]
async fn main() {
    let from = Args::parse().from;
    let database = unique("upgrade");
    sql("postgres", &format!("create database {database}")).await;
    let url = postgres_url(&database);
    let cluster = Cluster::build().programs(&from).on(url.clone()).workers(0).start().await;
    audit::install(&cluster).await;
    let source = PostgresSource::with_rows(100).await;
    let mut upgrade = Upgrade { cluster, source, job: String::new(), names: Vec::new(), started: 0 };
    for _ in 0..2 {
        upgrade.worker("old").await;
    }
    let source = upgrade.cluster.source("postgres", upgrade.source.config()).await;
    let (destination, root) = upgrade.cluster.local_destination().await;
    upgrade.job = upgrade.cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    let held = Held::new(&upgrade.cluster, json!({ "overlap": "allow" })).await;
    upgrade.everybody_serves("before", &["old"]).await;

    migrate(&binary("dbackup"), &url);
    upgrade.everybody_serves("with the new schema", &["old"]).await;
    // Processes of the earlier version start on a schema that is newer than they are.
    upgrade.cluster.restart_api(0).await;
    upgrade.worker("old").await;
    upgrade.everybody_serves("restarted on the new schema", &["old"]).await;

    upgrade.cluster.use_programs(None);
    upgrade.cluster.add_api().await;
    upgrade.worker("new").await;
    upgrade.everybody_serves("side by side", &["old", "new"]).await;
    let newest = upgrade.cluster.apis.len() - 1;
    upgrade.share_the_limit().await;
    upgrade.restores("new", "old", 0).await;
    upgrade.restores("old", "new", newest).await;
    upgrade.cancels(&held, "old", newest).await;
    upgrade.cancels(&held, "new", 0).await;
    upgrade.rescues(&held, "old", "new").await;

    // The way back: the earlier programs take over from the newer ones.
    upgrade.cluster.use_programs(Some(&from));
    upgrade.worker("old").await;
    upgrade.rescues(&held, "new", "old").await;
    upgrade.everybody_serves("the way back", &["old"]).await;

    upgrade.cluster.use_programs(None);
    for _ in 0..2 {
        upgrade.cluster.restart_api(0).await;
    }
    upgrade.cluster.workers.clear();
    upgrade.names.clear();
    for _ in 0..2 {
        upgrade.worker("new").await;
    }
    upgrade.everybody_serves("after", &["new"]).await;
    assert_eq!(audit::claims_over_the_limit(&upgrade.cluster).await, 0);
    let doubled = "select count(*) from executions e where type = 'Backup' and status = 'Success'
                      and (select count(*) from artifacts a where a.execution_id = e.id) <> 2";
    assert_eq!(upgrade.cluster.count(doubled).await, 0, "a dump and its manifest each");
    let recorded = format!("select count(*) from artifacts where destination_id = '{destination}'");
    assert_eq!(files(&root).len() as i64, upgrade.cluster.count(&recorded).await);
    println!("no lease over the limit, nothing published twice");
}
