//! What a client of the API waits for: a Redis that is up, frozen, dead or not there, and 2,000 clients that wait for one
//! run. Side by side in one run, so that the ratios hold on any machine.

#![allow(clippy::disallowed_methods, reason = "it looks into the database")]

#[path = "../tests/e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;
mod report;

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use harness::{Cluster, SOON, redis::Redis, source::PostgresSource, until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use report::Report;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Requests of one measurement.
const REQUESTS: usize = 3_000;
const WAITING: usize = 2_000;
/// The promise for those who wait.
const MOST_P99: Duration = Duration::from_millis(100);

struct Times(Vec<Duration>);

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        Self(times)
    }

    fn at(&self, percent: usize) -> f64 {
        self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)].as_secs_f64() * 1e3
    }
}

/// One client, one request after the other.
async fn requests(cluster: &Cluster) -> Times {
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let request = cluster.http.get(format!("{}/api/session", cluster.url(0))).bearer_auth(&cluster.admin_key);
        let began = Instant::now();
        let response = request.send().await.expect("answers");
        assert_eq!(response.status(), 200);
        response.bytes().await.expect("a body");
        times.push(began.elapsed());
    }
    Times::of(times)
}

async fn counted_in(cluster: &Cluster, place: &str) {
    until("the counters move", SOON, || async {
        let answer = cluster.ok("GET", "/api/health", None).await;
        (answer["rateLimits"] == place).then_some(())
    })
    .await;
}

async fn redis(report: &mut Report) {
    let mut redis = Redis::start().await;
    let none = json!({ "limit": 1_000_000 });
    let build = || Cluster::build().workers(0).rate_limits(json!({ "read": none, "write": none }));
    let with = build().env("REDIS_URL", redis.url()).env("DBACKUP_REDIS_TIMEOUT_MS", 20).start().await;
    let without = build().env("REDIS_URL", "").start().await;
    counted_in(&with, "redis").await;
    let base = requests(&without).await;
    report.line("| Redis | p50 ms | p99 ms | worst ms | p50 to none |");
    report.line("| --- | ---: | ---: | ---: | ---: |");
    let mut show = |name: &str, times: &Times| {
        report.line(format!(
            "| {name} | {:.3} | {:.3} | {:.3} | {:.2} |",
            times.at(50),
            times.at(99),
            times.at(100),
            times.at(50) / base.at(50)
        ));
    };
    show("none", &base);
    show("up", &requests(&with).await);
    redis.freeze();
    // Three requests pay the time-out, the others nothing.
    show("frozen (from the first on)", &requests(&with).await);
    redis.thaw();
    counted_in(&with, "redis").await;
    redis.kill();
    show("dead (from the first on)", &requests(&with).await);
}

/// A client as light as can be, since it shares the machine with what is measured: it gives when its answer came.
fn wait(
    cluster: &Cluster,
    execution: &str,
    asked: Arc<AtomicUsize>,
) -> impl Future<Output = (Instant, String, TcpStream)> + use<> {
    let address = cluster.url(0).trim_start_matches("http://").to_owned();
    let request = format!(
        "GET /api/executions/{execution}?wait=60 HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {}\r\n\r\n",
        cluster.admin_key
    );
    async move {
        let mut stream = TcpStream::connect(&address).await.expect("connects");
        stream.write_all(request.as_bytes()).await.expect("writes");
        asked.fetch_add(1, Ordering::Relaxed);
        let mut answer = vec![0; 16 << 10];
        let read = stream.read(&mut answer).await.expect("answers");
        (Instant::now(), String::from_utf8_lossy(&answer[..read]).into_owned(), stream)
    }
}

async fn waiting(report: &mut Report) -> bool {
    let most = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit").1;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("raises the limit");
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    report.line("");
    report.line(format!("| {WAITING} waiting clients | first ms | p50 ms | p99 ms | last ms | aim |"));
    report.line("| --- | ---: | ---: | ---: | ---: | ---: |");
    let mut kept = true;
    for round in 1..=3 {
        let execution = cluster.trigger(&job).await;
        let asked = Arc::new(AtomicUsize::new(0));
        let waits: Vec<_> = (0..WAITING).map(|_| tokio::spawn(wait(&cluster, &execution, asked.clone()))).collect();
        until("every client has asked", SOON, || async { (asked.load(Ordering::Relaxed) == WAITING).then_some(()) })
            .await;
        let commits = "select sum(xact_commit)::bigint from pg_stat_database where datname = current_database()";
        until("the first looks are over", SOON, || async {
            let before = cluster.count(commits).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            (cluster.count(commits).await - before < 300).then_some(())
        })
        .await;
        let cancel = cluster
            .http
            .post(format!("{}/api/executions/{execution}/cancel", cluster.url(1)))
            .bearer_auth(&cluster.admin_key);
        let began = Instant::now();
        assert_eq!(cancel.send().await.expect("answers").status(), 200);
        // Kept open to the end, as clients keep their connections: the closing of one is not part of another's wait.
        let (mut times, mut open) = (Vec::new(), Vec::new());
        for wait in waits {
            let (at, answer, stream) = wait.await.expect("joins");
            open.push(stream);
            assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"outcome\":\"Cancelled\""), "{answer}");
            times.push(at.saturating_duration_since(began));
        }
        let times = Times::of(times);
        report.line(format!(
            "| round {round} | {:.1} | {:.1} | {:.1} | {:.1} | p99 under {} |",
            times.at(0),
            times.at(50),
            times.at(99),
            times.at(100),
            MOST_P99.as_millis()
        ));
        kept &= times.at(99) < MOST_P99.as_secs_f64() * 1e3;
    }
    kept
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut report = Report::new(
        "What a client waits for",
        &format!(
            "{REQUESTS} requests one after the other on a Redis in each state, from the first request on. Then clients of one \
             process with `?wait=60`, ended by one cancel through the other process: from the cancel to their answers."
        ),
    );
    redis(&mut report).await;
    let kept = waiting(&mut report).await;
    report.write();
    if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
