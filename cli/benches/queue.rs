//! What the queue costs, beside the least that PostgreSQL could do: triggers against a bare insert, exact claims against
//! `SKIP LOCKED` without a limit, without history and with five million executions of it, and while the service's own
//! database is dumped. `DBACKUP_BENCH_HISTORY` sets the history.

#![allow(clippy::disallowed_methods, reason = "it asks the database by itself")]

#[path = "../tests/e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;
mod load;
#[allow(dead_code)]
mod report;

use std::{
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant, SystemTime},
};

use common::execution::{
    Stage, claim,
    finish::{Ending, Failure, finish},
};
use harness::{
    Cluster, SOON, claimant,
    history::{assert_nothing_walks_in, fill, with_job},
    postgres_url, sql, until,
};
use load::{CLIENTS, Client, rate, request};
use report::Report;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

/// Length of one measurement.
const LONG: Duration = Duration::from_secs(8);
/// The exact limit, and the workers under it.
const LIMIT: i32 = 64;
const WORKERS: usize = 4;
/// Claims in one batch of a worker.
const BATCH: usize = 16;

/// The bare insert of one execution, by pgbench, on as many connections.
async fn bare_inserts(cluster: &Cluster) -> f64 {
    sql(&cluster.database, "create table bare (like executions including all)").await;
    let script = cluster.scratch.join("insert.sql");
    let insert = "insert into bare (id, job_id, job_name, job_slug, source_id, pool, serial, max_attempts, trigger_kind)
                  values (gen_random_uuid(), gen_random_uuid(), 'bench', 'bench', gen_random_uuid(), 'default', true, 3, 'Api');";
    std::fs::write(&script, insert).expect("a script");
    let bin = std::env::var("DBACKUP_PG_BIN").expect("DBACKUP_PG_BIN is set by make bench");
    let output = Command::new(format!("{bin}/pgbench"))
        .args(["-n", "-M", "prepared", "-c", &CLIENTS.to_string(), "-j", "2", "-T", &LONG.as_secs().to_string(), "-f"])
        .arg(&script)
        .arg(postgres_url(&cluster.database))
        .output()
        .expect("pgbench runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let tps = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    tps.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

async fn connections(cluster: &Cluster) -> Vec<PgConnection> {
    let mut connections = Vec::new();
    for _ in 0..WORKERS {
        connections.push(PgConnection::connect(&postgres_url(&cluster.database)).await.expect("connects"));
    }
    connections
}

/// Claims and finishes a second by so many workers, through the verbs of the service.
async fn exact_claims(cluster: &Cluster) -> f64 {
    let until = Instant::now() + LONG;
    let workers = connections(cluster).await.into_iter().map(async |mut conn| {
        let failure = Failure { error: "bench".to_owned(), code: "bench", outcome: None, stage: Stage::Dumping };
        let (ending, claimant, mut count) = (Ending::Failed(failure), claimant(), 0_u32);
        while Instant::now() < until {
            let lease = Duration::from_secs(60);
            for claim in claim::claim(&mut conn, &claimant, lease, BATCH).await.expect("claims") {
                finish(&mut conn, claim, &ending).await.expect("finishes");
                count += 1;
            }
        }
        count
    });
    f64::from(futures::future::join_all(workers).await.iter().sum::<u32>()) / LONG.as_secs_f64()
}

/// The same without any limit, lease or fencing: `SKIP LOCKED` in batches, and an update for each.
async fn bare_claims(cluster: &Cluster) -> f64 {
    let until = Instant::now() + LONG;
    let workers = connections(cluster).await.into_iter().map(async |mut conn| {
        let mut count = 0_u32;
        while Instant::now() < until {
            let claim = "update executions set status = 'Running', attempt = attempt + 1, last_token = 0,
                                started_at = clock_timestamp()
                          where id in (select id from executions where status = 'Pending'
                                        order by priority desc, seq limit $1 for update skip locked) returning id";
            let ids: Vec<uuid::Uuid> =
                sqlx::query_scalar(claim).bind(BATCH as i64).fetch_all(&mut conn).await.expect("claims");
            for id in ids {
                let finish = "update executions set status = 'Failed', ended_at = clock_timestamp(), error = 'bench' where id = $1";
                sqlx::query(finish).bind(id).execute(&mut conn).await.expect("finishes");
                count += 1;
            }
        }
        count
    });
    f64::from(futures::future::join_all(workers).await.iter().sum::<u32>()) / LONG.as_secs_f64()
}

/// Adds what the claims eat: runs of many jobs, so that no serial job holds them back.
async fn add_pending(cluster: &Cluster, count: u32) {
    let insert = format!(
        "insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, max_attempts, trigger_kind)
         select gen_random_uuid(), gen_random_uuid(), 'bench', 'bench', gen_random_uuid(), 'default', true, 3, 'Api'
           from generate_series(1, {count})"
    );
    sqlx::raw_sql(AssertSqlSafe(insert)).execute(&cluster.pool).await.expect("inserts");
    sql(&cluster.database, "vacuum analyze executions").await;
}

async fn forget_pending(cluster: &Cluster) {
    let forget = "delete from executions where status = 'Pending'";
    sqlx::query(forget).execute(&cluster.pool).await.expect("deletes");
    sql(&cluster.database, "vacuum analyze executions").await;
}

struct Claims {
    exact: f64,
    bare: f64,
}

/// Both in turn, twice, so that what warms up favours neither; the better of each.
async fn claims(cluster: &Cluster) -> Claims {
    let mut best = Claims { exact: 0.0, bare: 0.0 };
    for _ in 0..2 {
        add_pending(cluster, 200_000).await;
        best.exact = best.exact.max(exact_claims(cluster).await);
        forget_pending(cluster).await;
        add_pending(cluster, 200_000).await;
        best.bare = best.bare.max(bare_claims(cluster).await);
        forget_pending(cluster).await;
    }
    best
}

/// From the request to Running, by the one clock of the machine.
async fn trigger_to_running(cluster: &mut Cluster, job: &str) -> (f64, f64) {
    cluster.add_worker(&[]).await;
    let request = request(cluster, "POST", &format!("/api/jobs/{job}/run"));
    let mut client = Client::connect(cluster.url(0)).await;
    let mut times = Vec::new();
    for _ in 0..200 {
        let sent = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock").as_secs_f64();
        let answer = client.ask(&request).await;
        let body: serde_json::Value =
            serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("JSON");
        let run = body["executionId"].as_str().expect("an id").to_owned();
        until("it ended", SOON, || async {
            let open = format!("select count(*) from executions where id = '{run}' and ended_at is null");
            (cluster.count(&open).await == 0).then_some(())
        })
        .await;
        let started: f64 = sqlx::query_scalar(AssertSqlSafe(format!(
            "select extract(epoch from started_at)::float8 from executions where id = '{run}'"
        )))
        .fetch_one(&cluster.pool)
        .await
        .expect("it started");
        times.push((started - sent) * 1e3);
    }
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

fn resident_mib(process: &harness::Process) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("it runs");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// A dump of the service's own database, again and again until it is dropped: its snapshot keeps dead rows alive.
struct DumpOfItself(Child);

impl DumpOfItself {
    fn start(cluster: &Cluster) -> Self {
        let loops = format!("while pg_dump -Fc -Z0 '{}' >/dev/null; do :; done", postgres_url(&cluster.database));
        let dump = Command::new("setsid").args(["bash", "-c", &loops]).stdin(Stdio::null()).spawn();
        Self(dump.expect("bash runs"))
    }
}

impl Drop for DumpOfItself {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).expect("a pid"));
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

async fn http(cluster: &mut Cluster, job: &str, report: &mut Report) -> bool {
    cluster.add_worker(&[]).await;
    let (api, worker) = (resident_mib(&cluster.apis[0].0), resident_mib(&cluster.workers[0]));
    cluster.workers.clear();
    let trigger = request(cluster, "POST", &format!("/api/jobs/{job}/run"));
    let (mut triggers, mut inserts) = (0_f64, 0_f64);
    for round in 0..2 {
        triggers = triggers.max(rate(cluster.url(0), &trigger, LONG).await);
        if round > 0 {
            sql(&cluster.database, "drop table bare").await;
        }
        inserts = inserts.max(bare_inserts(cluster).await);
        forget_pending(cluster).await;
    }
    let run = cluster.trigger(job).await;
    let polls = rate(cluster.url(0), &request(cluster, "GET", &format!("/api/executions/{run}")), LONG).await;
    forget_pending(cluster).await;
    let (p50, p99) = trigger_to_running(cluster, job).await;
    report.line("| measured | value | beside | ratio | aim |");
    report.line("| --- | ---: | ---: | ---: | ---: |");
    report.line(format!(
        "| triggers/s through HTTP, {CLIENTS} connections, beside pgbench's bare insert | {triggers:.0} | {inserts:.0} | {:.2} | 1.00 |",
        triggers / inserts
    ));
    report.line(format!(
        "| polls/s, {CLIENTS} connections, beside the same insert | {polls:.0} | {inserts:.0} | {:.2} | |",
        polls / inserts
    ));
    report.line(format!("| trigger to Running, idle cluster: p50, p99 in ms | {p50:.1} | {p99:.1} | | p50 under 5 |"));
    report.line(format!(
        "| resident memory of an idle API process and an idle worker in MiB | {api:.0} | {worker:.0} | | |"
    ));
    triggers >= inserts && p50 < 5.0
}

async fn with_history(cluster: &mut Cluster, job: &str, report: &mut Report) -> bool {
    let rows: u32 = std::env::var("DBACKUP_BENCH_HISTORY").map_or(5_000_000, |v| v.parse().expect("a number"));
    sql(&cluster.database, &format!("update queue_gate set max_concurrency = {LIMIT}")).await;
    let empty = claims(cluster).await;
    fill(cluster, job, rows, 0).await;
    let full = claims(cluster).await;
    let dumped = {
        let _dump = DumpOfItself::start(cluster);
        claims(cluster).await
    };
    report.line("");
    report.line(format!(
        "| claims and finishes/s, {WORKERS} workers | exact limit of {LIMIT} | bare SKIP LOCKED | ratio | aim |"
    ));
    report.line("| --- | ---: | ---: | ---: | ---: |");
    for (name, claims, aim) in [
        ("no history".to_owned(), &empty, "0.50"),
        (format!("{rows} executions of history"), &full, "0.50"),
        ("the same during a dump of this database".to_owned(), &dumped, ""),
    ] {
        report.line(format!(
            "| {name} | {:.0} | {:.0} | {:.2} | {aim} |",
            claims.exact,
            claims.bare,
            claims.exact / claims.bare
        ));
    }
    let history = full.exact / empty.exact;
    report.line("");
    report.line(format!("Exact claims with history, beside those without: {history:.2} (aim: at least 0.90)."));
    empty.exact >= empty.bare / 2.0 && history >= 0.9
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut report = Report::new(
        "The queue",
        "Each figure is the better of two runs of eight seconds. A trigger goes through key, permission, the rate limit in \
         Redis, and a synchronous commit of its execution and its line of the audit log; pgbench inserts the execution alone, \
         prepared. A claim is a batch of at most 16, a finish a transaction.",
    );
    let mut cluster = Cluster::build().workers(1).limit(0).start().await;
    let job = with_job(&cluster).await;
    cluster.workers.clear();
    let change = json!({ "maxPending": 1_000_000, "maxPendingPerJob": 1_000_000 });
    cluster.ok("PATCH", "/api/settings", Some(change)).await;
    sql(&cluster.database, "update jobs set overlap = 'allow', max_attempts = 1").await;
    sql(&cluster.database, "update queue_gate set max_concurrency = 4").await;
    let mut kept = http(&mut cluster, &job, &mut report).await;
    cluster.workers.clear();
    kept &= with_history(&mut cluster, &job, &mut report).await;
    report.write();
    cluster.apis.clear();
    assert_nothing_walks_in(cluster, &job, 0, 200_000).await;
    println!("nothing walks the history");
    if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
