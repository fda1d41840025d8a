//! What a trigger and a poll cost through HTTP, beside the least that PostgreSQL could do, and what idle processes hold.

#![allow(clippy::disallowed_methods, reason = "it asks the database by itself")]

#[path = "../tests/e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;
mod load;
#[allow(dead_code)]
mod report;
#[allow(dead_code)]
mod turns;

use std::{
    process::{Command, ExitCode},
    time::{Duration, SystemTime},
};

use harness::{Cluster, SOON, history::with_job, postgres_url, sql, until};
use load::{CLIENTS, Client, forget_pending, lift_caps, rate, request};
use report::Report;
use sqlx::AssertSqlSafe;
use turns::quartile;

/// Length of one measurement.
const LONG: Duration = Duration::from_secs(3);
/// Measurements of each, in turns: what else the machine does changes more from minute to minute than what is compared.
const ROUNDS: usize = 9;

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

/// Without Redis a trigger would cost less.
async fn redis_counts(cluster: &Cluster) {
    let health = cluster.request("GET", "/api/health", None).await.1;
    assert_eq!(health["rateLimits"], "redis", "{health}");
}

fn resident_mib(process: &harness::Process) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("it runs");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

async fn http(cluster: &mut Cluster, job: &str, report: &mut Report) -> bool {
    cluster.add_worker(&[]).await;
    let (api, worker) = (resident_mib(&cluster.apis[0].0), resident_mib(&cluster.workers[0]));
    cluster.workers.clear();
    let trigger = request(cluster, "POST", &format!("/api/jobs/{job}/run"));
    redis_counts(cluster).await;
    let (mut triggers, mut inserts, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        triggers.push(rate(cluster.url(0), &trigger, LONG).await);
        inserts.push(bare_inserts(cluster).await);
        ratios.push(triggers[triggers.len() - 1] / inserts[inserts.len() - 1]);
        sql(&cluster.database, "drop table bare").await;
        forget_pending(cluster).await;
    }
    let [triggers, inserts] = [&mut triggers, &mut inserts].map(|all| quartile(all, 2));
    let [below, ratio, above] = [1, 2, 3].map(|at| quartile(&mut ratios, at));
    redis_counts(cluster).await;
    let run = cluster.trigger(job).await;
    let polls = rate(cluster.url(0), &request(cluster, "GET", &format!("/api/executions/{run}")), LONG).await;
    forget_pending(cluster).await;
    let (p50, p99) = trigger_to_running(cluster, job).await;
    report.line("| measured | value | beside | ratio | aim |");
    report.line("| --- | ---: | ---: | ---: | ---: |");
    report.line(format!(
        "| triggers/s through HTTP, {CLIENTS} connections, beside pgbench's bare insert | {triggers:.0} | {inserts:.0} | {ratio:.2} | 1.00 |"
    ));
    report.line(format!(
        "| polls/s, {CLIENTS} connections, beside the same insert | {polls:.0} | {inserts:.0} | {:.2} | |",
        polls / inserts
    ));
    report.line(format!("| trigger to Running, idle cluster: p50, p99 in ms | {p50:.1} | {p99:.1} | | p50 under 5 |"));
    report.line(format!(
        "| resident memory of an idle API process and an idle worker in MiB | {api:.0} | {worker:.0} | | |"
    ));
    report.line("");
    report.line(format!("Of the ratios of triggers, half lay from {below:.2} to {above:.2}."));
    ratio >= 1.0 && p50 < 5.0
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut report = Report::new(
        "A trigger",
        "Triggers and inserts took turns, nine times three seconds each; the figures are medians. A trigger goes through key, permission, the rate limit in \
         Redis, and a synchronous commit of its execution and its line of the audit log; pgbench inserts the execution alone, \
         prepared.",
    );
    let mut cluster = Cluster::build().workers(1).limit(0).start().await;
    let job = with_job(&cluster).await;
    cluster.workers.clear();
    lift_caps(&cluster).await;
    sql(&cluster.database, "update queue_gate set max_concurrency = 4").await;
    let kept = http(&mut cluster, &job, &mut report).await;
    report.write();
    if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
