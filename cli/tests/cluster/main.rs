//! The Compose cluster: whether its containers are as its file promises; then disturbed in every way that its README
//! promises to survive, while the limit changes every second and one worker's clock is an hour wrong. At the end the
//! database's own record is read: the limit was never exceeded, every acknowledged trigger ended, nothing was published
//! twice, and what is recorded lies in the stores.
//!
//! `make cluster-test` starts the project and this; `ARGS="--disturbances 20 --only redis"` for a part of it.

#![allow(clippy::disallowed_methods, reason = "it drives Docker, and looks into the database")]

#[path = "../e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;

mod check;
mod disturb;
mod load;
mod outages;
mod project;
mod proxy;
mod restoring;
mod shape;
mod stages;

use std::{process::ExitCode, sync::Arc, time::Instant};

use clap::{Parser, ValueEnum};
use harness::audit::{self, Audited};
use load::{Limits, Load};
use project::{BACKUPS, POOLS, Project, compose};
use serde_json::json;
use stages::Stage;

#[derive(Parser)]
struct Args {
    /// Of the random limits
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Workers killed or paused, in all
    #[arg(long, default_value_t = 100)]
    disturbances: usize,
    /// Triggers a second during a rolling restart
    #[arg(long, default_value_t = 20)]
    rate: u32,
    /// Only this part; may be repeated
    #[arg(long)]
    only: Vec<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Part {
    Shape,
    Workers,
    CutOff,
    Redis,
    Api,
    Rolling,
    PostgresRestart,
    PostgresStop,
    Proxy,
}

/// Triggers a second where the rate is not what is tested.
const BESIDE: u32 = 4;

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let began = Instant::now();
    let project = Project::open().await;
    audit::install(&project).await;
    let most = json!({ "limit": 1_000_000 });
    let settings = json!({ "maxPendingPerJob": 100_000, "maxPending": 100_000, "rateLimit": { "read": most, "write": most, "signIn": most } });
    project.ok("PATCH", "/api/settings", Some(settings)).await;
    fill_source().await;
    let source = project.make_source(project.source, 5432, POOLS[0]).await;
    let local = project.make_destination("local", json!({ "root": BACKUPS }), POOLS[0]).await;
    let job = project.make_job(&source, &local).await;
    let scratch = std::env::temp_dir().join(harness::unique("cluster-test"));
    let stages = Arc::new(Stage::all(&project, &local, &scratch).await);

    let limits = Limits::change(&project, args.seed);
    let beside = Load::at_rate(&project, &job, 1);
    for part in Part::value_variants() {
        if !args.only.is_empty() && !args.only.contains(part) {
            continue;
        }
        println!("{part:?}, {:.0} s after the start", began.elapsed().as_secs_f64());
        let restarts = project.restarts().await;
        let (failed, refused) = (beside.tally.failed().len(), beside.tally.refused());
        match part {
            Part::Shape => {
                shape::confines(&project).await;
                shape::skewed().await;
                shape::scales(&project).await;
                shape::finds_the_scaled(&project).await;
                shape::starts_again(&project).await;
                shape::proxied(&project, &stages[1]).await;
            }
            Part::Workers => println!("  {:?}", disturb::workers(&project, &stages, args.disturbances).await),
            Part::CutOff => outages::cut_off(&project, &local).await,
            Part::Redis => outages::without_redis(&project, &job, BESIDE).await,
            Part::Api => outages::killed_api(&project, &source, &local).await,
            Part::Rolling => outages::rolling_restart(&project, &stages[1], &source, &local, args.rate).await,
            Part::PostgresRestart => outages::restarted_postgres(&project, &job, BESIDE).await,
            Part::PostgresStop => outages::stopped_postgres(&project, &local, &job, BESIDE).await,
            Part::Proxy => {
                proxy::refuses_in_the_form_of_the_api(&project).await;
                proxy::repeats_no_trigger(&project, &source, &local).await;
            }
        }
        // But for those that were to, no process has ended by itself and been started again unseen.
        let died =
            project.restarts().await.into_iter().filter(|(id, n)| restarts.get(id).is_some_and(|before| before < n));
        let died: Vec<_> = died.collect();
        assert!(*part == Part::Shape || died.is_empty(), "{part:?}: processes died: {died:?}");
        // Where no API process is killed, nobody hears of what befalls the others; of PostgreSQL by 503 with Retry-After.
        if !matches!(part, Part::Shape | Part::Api | Part::Proxy) {
            let heard = &beside.tally.failed()[failed..];
            assert!(heard.is_empty(), "{part:?}: a client beside it heard of it: {heard:#?}");
        }
        if matches!(part, Part::Workers | Part::CutOff | Part::Redis | Part::Rolling) {
            assert_eq!(beside.tally.refused(), refused, "{part:?}: requests were refused beside it");
        }
    }
    beside.end().await;
    let changes = limits.so_far();
    drop(limits);
    project.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 10 }))).await;
    outages::drained(&project).await;
    let mut wrong = check::everything(&project, &local, &stages).await;
    // Parts alone may be over before every limit was there.
    if args.only.is_empty() {
        wrong.extend(check::disturbances(&project, changes).await);
    }
    let _ = std::fs::remove_dir_all(&scratch);
    let acknowledged = project.acknowledged.lock().expect("not poisoned").len();
    println!(
        "{} runs of {acknowledged} acknowledged triggers, {} attempts, {} rescues, {} at once at most; all over after {:.0} s",
        project.number("select count(*) from executions").await,
        project.number("select coalesce(sum(attempt), 0)::bigint from executions").await,
        project.number("select coalesce(sum(rescues), 0)::bigint from executions").await,
        project.number("select coalesce(max(running), 0)::bigint from lease_history").await,
        began.elapsed().as_secs_f64()
    );
    audit::verdict(&wrong)
}

/// A few megabytes: enough that a dump can be held in its middle.
async fn fill_source() {
    let sql = "create table item as select i as id, md5(i::text) || md5((i * 7)::text) as text from generate_series(1, 30000) i";
    let psql = ["exec", "-T", "-u", "postgres", "source", "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-U", "postgres"];
    compose(&[&psql[..], &["-c", "create database shop"]].concat()).await;
    compose(&[&psql[..], &["-d", "shop", "-c", sql]].concat()).await;
}
