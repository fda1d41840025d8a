//! Chaos: workers are killed, stopped, terminated and cut off at random (by a fixed seed) while real backups run
//! and the limit changes. At the end the database's own record is read: the limit was never exceeded, every
//! acknowledged trigger ended well, each with exactly one published backup, and nothing is left over.
//!
//! `cargo test -p cli --test chaos -- --seed 7 --kills 20 --lease-ms 3000`; `make chaos` runs it long, with the
//! real lease.

#![allow(clippy::disallowed_methods, reason = "it looks into the database")]

#[path = "../e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;

use std::{
    collections::BTreeMap,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use harness::{
    Cluster, audit, files, postgres_url,
    proxy::{Mode, Proxy},
    source::PostgresSource,
    until,
};
use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// Of the random numbers; the same seed disturbs in the same order
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Workers killed with SIGKILL; stops, terminations and cut connections come on top
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// Lease of the cluster
    #[arg(long, default_value_t = 15_000)]
    lease_ms: u64,
    /// Workers
    #[arg(long, default_value_t = 4)]
    workers: usize,
}

struct Chaos {
    cluster: Cluster,
    random: StdRng,
    database: Proxy,
    worker_url: String,
    lease: Duration,
    done: BTreeMap<&'static str, usize>,
}

impl Chaos {
    async fn worker(&mut self) {
        let url = self.worker_url.clone();
        self.cluster.add_worker(&[("DATABASE_URL", url)]).await;
    }

    fn pick(&mut self) -> usize {
        self.random.random_range(0..self.cluster.workers.len())
    }

    fn note(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    async fn kill(&mut self) {
        let victim = self.pick();
        self.cluster.workers[victim].kill().await;
        self.cluster.workers.swap_remove(victim);
        self.worker().await;
        self.note("kill -9");
    }

    async fn disturb(&mut self) {
        match self.random.random_range(0..10) {
            0..5 => self.kill().await,
            5 => {
                let victim = self.pick();
                self.cluster.workers[victim].signal(Signal::SIGSTOP);
                // Longer than the lease: somebody else has its run by then.
                let until = Instant::now() + self.lease + Duration::from_secs(1);
                tokio::time::sleep_until(until.into()).await;
                self.cluster.workers[victim].signal(Signal::SIGCONT);
                self.note("SIGSTOP longer than the lease");
            }
            6 => {
                let victim = self.pick();
                self.cluster.workers[victim].signal(Signal::SIGTERM);
                self.worker().await;
                let status = self.cluster.workers[victim].end(Duration::from_secs(60)).await;
                assert_eq!(status.code(), Some(0), "{}", self.cluster.workers[victim].log());
                self.cluster.workers.swap_remove(victim);
                self.note("SIGTERM");
            }
            7 => {
                self.database.set(Mode::Cut);
                tokio::time::sleep(Duration::from_millis(300)).await;
                self.database.set(Mode::Pass);
                self.note("connections to the database cut");
            }
            _ => {
                let limit = self.random.random_range(1..=6);
                self.cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": limit }))).await;
                self.note("limit changed");
            }
        }
        let pause = self.random.random_range(100..1500);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    fn kills(&self) -> usize {
        self.done.get("kill -9").copied().unwrap_or(0)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let began = Instant::now();
    let lease = args.lease_ms.to_string();
    let mut builder =
        Cluster::build().workers(0).limit(4).env("DBACKUP_LEASE_MS", lease).env("DBACKUP_DRAIN_SECONDS", 1);
    if args.lease_ms >= 15_000 {
        builder = builder.env("DBACKUP_TICKER_MS", 2_000).env("DBACKUP_POLL_MS", 1_000);
    }
    let cluster = builder.start().await;
    audit::install(&cluster).await;
    let port = url::Url::parse(&postgres_url("postgres")).ok().and_then(|u| u.port()).expect("a port");
    let database = Proxy::start(port).await;
    let worker_url = postgres_url(&cluster.database).replace(&format!(":{port}/"), &format!(":{}/", database.port));
    let mut chaos = Chaos {
        cluster,
        random: StdRng::seed_from_u64(args.seed),
        database,
        worker_url,
        lease: Duration::from_millis(args.lease_ms),
        done: BTreeMap::new(),
    };
    for _ in 0..args.workers {
        chaos.worker().await;
    }
    let source = PostgresSource::with_rows(20_000).await;
    let source = chaos.cluster.source("postgres", source.config()).await;
    let (destination, root) = chaos.cluster.local_destination().await;
    let mut jobs = Vec::new();
    for overlap in ["allow", "allow", "queue", "queue"] {
        jobs.push(chaos.cluster.job(&source, &[&destination], json!({ "overlap": overlap, "maxAttempts": 20 })).await);
    }

    let mut triggered = 0;
    while chaos.kills() < args.kills {
        // Enough to keep every slot busy, and no more.
        let waiting = chaos.cluster.count("select count(*) from executions where status = 'Pending'").await;
        for n in 0..(8 - waiting.min(8)) {
            let job = &jobs[usize::try_from(n).unwrap_or(0) % jobs.len()];
            chaos.cluster.trigger(job).await;
            triggered += 1;
        }
        chaos.disturb().await;
    }
    let disturbed = began.elapsed();
    chaos.cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 8 }))).await;
    let cluster = &chaos.cluster;
    until("every execution ends", Duration::from_secs(120) + chaos.lease * 4, || async {
        (cluster.count("select count(*) from executions where ended_at is null").await == 0).then_some(())
    })
    .await;
    until("nothing is left to sweep", Duration::from_secs(60), || async {
        (cluster.count("select count(*) from staged_objects where swept_at is null").await == 0).then_some(())
    })
    .await;
    let wrong = check(cluster, triggered, &root).await;
    println!(
        "seed {}, {} kills wanted, lease {} ms, {} workers: {:?}",
        args.seed, args.kills, args.lease_ms, args.workers, chaos.done
    );
    println!(
        "{triggered} runs, {} attempts, {} rescues; disturbed for {:.0} s, all over after {:.0} s",
        cluster.count("select sum(attempt)::bigint from executions").await,
        cluster.count("select sum(rescues)::bigint from executions").await,
        disturbed.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    audit::verdict(&wrong)
}

async fn check(cluster: &Cluster, triggered: i64, root: &std::path::Path) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expect = |what: &str, found: i64, wanted: i64| {
        if found != wanted {
            wrong.push(format!("{what}: {found} instead of {wanted}"));
        }
    };
    expect("claims over the limit", audit::claims_over_the_limit(cluster).await, 0);
    expect("executions", cluster.count("select count(*) from executions").await, triggered);
    // Three rescues are allowed; a run that chaos hit a fourth time is closed as WorkerLost, which is the rule.
    let lost = cluster.count("select count(*) from executions where outcome = 'WorkerLost' and rescues > 3").await;
    expect(
        "successes",
        cluster.count("select count(*) from executions where status = 'Success'").await,
        triggered - lost,
    );
    expect("leases left", cluster.count("select count(*) from execution_leases").await, 0);
    expect(
        "backups",
        cluster.count("select count(*) from artifacts where database_name is not null").await,
        triggered - lost,
    );
    let twice = "select count(*) from (select from artifacts where database_name is not null
                                       group by execution_id having count(*) > 1) x";
    expect("runs with two backups", cluster.count(twice).await, 0);
    expect("serial jobs running twice", audit::serial_overlaps(cluster).await, 0);
    let recorded: std::collections::BTreeSet<String> = sqlx::query_scalar("select path from artifacts")
        .fetch_all(&cluster.pool)
        .await
        .expect("rows")
        .into_iter()
        .collect();
    let stored: std::collections::BTreeSet<String> = files(root).into_iter().map(|p| p.display().to_string()).collect();
    for path in recorded.symmetric_difference(&stored) {
        wrong.push(format!("{path} is recorded or stored, but not both"));
    }
    wrong
}
