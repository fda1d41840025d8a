//! What claims cost: exact ones against `SKIP LOCKED` without a limit, without history and with five million executions
//! of it, and while the service's own database is dumped. `DBACKUP_BENCH_HISTORY` sets the history.

#![allow(clippy::disallowed_methods, reason = "it asks the database by itself")]

#[path = "../tests/e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;
#[allow(dead_code)]
mod load;
#[allow(dead_code)]
mod report;
mod turns;

use std::{
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use common::execution::{
    Stage, claim,
    finish::{Ending, Failure, finish},
    history::{self, Batch},
};
use harness::{
    Cluster, claimant,
    history::{assert_nothing_walks_in, fill, with_job},
    postgres_url, sql,
};
use load::forget_pending;
use report::Report;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use turns::quartile;

/// Length of one measurement.
const LONG: Duration = Duration::from_secs(8);
/// Length of one turn where two databases are measured side by side, and how many rounds of four the two take: one round
/// is worth little, since PostgreSQL does other work for either database when it likes.
const TURN: Duration = Duration::from_secs(1);
const ROUNDS: usize = 75;
/// What is added to what waits each so many rounds: more than they claim.
const WAITING: u32 = 400_000;
const REFILL: usize = 25;
/// Claims with history that there must be, of those without.
const AIM: f64 = 0.90;
/// The exact limit, and the workers under it.
const LIMIT: i32 = 64;
const WORKERS: usize = 4;
/// Claims in one batch of a worker.
const BATCH: usize = 16;

/// One for each worker: a new connection plans a claim anew, which is not what is measured.
async fn connections(cluster: &Cluster) -> Vec<PgConnection> {
    let mut connections = Vec::new();
    for _ in 0..WORKERS {
        connections.push(PgConnection::connect(&postgres_url(&cluster.database)).await.expect("connects"));
    }
    connections
}

/// Claims and finishes a second by so many workers, through the verbs of the service; so many ends in one transaction.
async fn exact_claims(connections: &mut [PgConnection], together: usize, long: Duration) -> f64 {
    let until = Instant::now() + long;
    let workers = connections.iter_mut().map(async |conn| {
        let failure = Failure { error: "bench".to_owned(), code: "bench", outcome: None, stage: Stage::Dumping };
        let (ending, claimant, mut count) = (Ending::Failed(failure), claimant(), 0);
        while Instant::now() < until {
            let lease = Duration::from_secs(60);
            for claims in claim::claim(conn, &claimant, lease, BATCH).await.expect("claims").chunks(together) {
                let ends: Vec<_> = claims.iter().map(|claim| (*claim, &ending)).collect();
                count += finish(conn, &ends).await.expect("finishes").len();
            }
        }
        count
    });
    let all: usize = futures::future::join_all(workers).await.iter().sum();
    f64::from(u32::try_from(all).expect("fewer")) / long.as_secs_f64()
}

/// The same without any limit, lease or fencing: `SKIP LOCKED` in batches, and an update for each.
async fn bare_claims(connections: &mut [PgConnection]) -> f64 {
    let until = Instant::now() + LONG;
    let workers = connections.iter_mut().map(async |conn| {
        let mut count = 0_u32;
        while Instant::now() < until {
            let claim = "update executions set status = 'Running', attempt = attempt + 1, last_token = 0,
                                started_at = clock_timestamp()
                          where id in (select id from executions where status = 'Pending'
                                        order by priority desc, seq limit $1 for update skip locked) returning id";
            let ids: Vec<uuid::Uuid> =
                sqlx::query_scalar(claim).bind(BATCH as i64).fetch_all(&mut *conn).await.expect("claims");
            for id in ids {
                let finish = "update executions set status = 'Failed', ended_at = clock_timestamp(), error = 'bench' where id = $1";
                sqlx::query(finish).bind(id).execute(&mut *conn).await.expect("finishes");
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

struct Claims {
    /// Runs that end together are recorded together, as a worker does.
    exact: f64,
    /// Each end in a transaction of its own, as of runs that end far apart.
    apart: f64,
    bare: f64,
}

/// All in turn, twice, so that what warms up favours neither; the better of each.
async fn claims(cluster: &Cluster) -> Claims {
    let mut best = Claims { exact: 0.0, apart: 0.0, bare: 0.0 };
    let mut connections = connections(cluster).await;
    for _ in 0..2 {
        add_pending(cluster, 200_000).await;
        best.exact = best.exact.max(exact_claims(&mut connections, BATCH, LONG).await);
        forget_pending(cluster).await;
        add_pending(cluster, 200_000).await;
        best.apart = best.apart.max(exact_claims(&mut connections, 1, LONG).await);
        forget_pending(cluster).await;
        add_pending(cluster, 200_000).await;
        best.bare = best.bare.max(bare_claims(&mut connections).await);
        forget_pending(cluster).await;
    }
    best
}

/// Exact claims on the one database beside those on the other: of each round the ratio.
async fn side_by_side(with: &Cluster, without: &Cluster) -> Vec<f64> {
    let clusters = [without, with];
    let mut connections = [connections(without).await, connections(with).await];
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        if round % REFILL == 0 {
            for cluster in clusters {
                add_pending(cluster, WAITING).await;
            }
        }
        let rates = turns::round(round, async |which| exact_claims(&mut connections[which], BATCH, TURN).await);
        let [without, with] = rates.await;
        ratios.push(with / without);
    }
    for cluster in clusters {
        let left = cluster.count("select count(*) from executions where status = 'Pending'").await;
        assert!(left > 0, "nothing was left to claim: the last rounds measured nothing");
        forget_pending(cluster).await;
    }
    ratios
}

/// A dump of the service's own database, again and again until it is dropped: its snapshot keeps dead rows alive.
struct DumpOfItself(Child);

impl DumpOfItself {
    fn start(cluster: &Cluster) -> Self {
        let loops = format!("while pg_dump -Fc -Z0 '{}' >/dev/null; do :; done", postgres_url(&cluster.database));
        let dump = Command::new("setsid").args(["bash", "-c", &loops]).stdin(Stdio::null()).spawn();
        Self(dump.expect("bash runs"))
    }

    /// A dump that failed is none.
    fn still_runs(&mut self) {
        assert!(self.0.try_wait().expect("answers").is_none(), "the dump has failed");
    }
}

impl Drop for DumpOfItself {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).expect("a pid"));
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// Executions a second that retention goes through, in batches of this size.
async fn forgets(
    cluster: &Cluster,
    size: i64,
    forget: impl AsyncFn(&mut PgConnection, i32) -> Result<Batch, sqlx::Error>,
) -> f64 {
    /// Older than most of the history.
    const DAYS: i32 = 5;
    let mut conn = PgConnection::connect(&postgres_url(&cluster.database)).await.expect("connects");
    let (began, mut gone) = (Instant::now(), 0);
    while began.elapsed() < LONG && forget(&mut conn, DAYS).await.expect("forgets") == Batch::Full {
        gone += size;
    }
    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    let gone = gone as f64;
    gone / began.elapsed().as_secs_f64()
}

async fn with_history(cluster: &Cluster, job: &str, report: &mut Report) -> bool {
    let rows: u32 = std::env::var("DBACKUP_BENCH_HISTORY").map_or(5_000_000, |v| v.parse().expect("a number"));
    let (without, _) = claimed_from().await;
    fill(cluster, job, rows, 0).await;
    let mut ratios = side_by_side(cluster, &without).await;
    let empty = claims(&without).await;
    drop(without);
    let full = claims(cluster).await;
    let dumped = {
        let mut dump = DumpOfItself::start(cluster);
        let claims = claims(cluster).await;
        dump.still_runs();
        claims
    };
    report.line("");
    report.line(format!(
        "| claims and finishes/s, {WORKERS} workers | exact limit of {LIMIT} | each end apart | bare SKIP LOCKED | ratio | apart | aim |"
    ));
    report.line("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (name, claims, aim) in [
        ("no history".to_owned(), &empty, "0.50"),
        (format!("{rows} executions of history"), &full, "0.50"),
        ("the same during a dump of this database".to_owned(), &dumped, ""),
    ] {
        report.line(format!(
            "| {name} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2} | {aim} |",
            claims.exact,
            claims.apart,
            claims.bare,
            claims.exact / claims.bare,
            claims.apart / claims.bare
        ));
    }
    let logs = forgets(cluster, history::LOGS_OF, history::forget_logs).await;
    let executions = forgets(cluster, history::EXECUTIONS, history::forget_executions).await;
    report.line("");
    report.line(format!(
        "Retention forgets the logs of {logs:.0} executions/s, and {executions:.0} executions/s that left no backup, in one process."
    ));
    let [below, ratio, above] = [1, 2, 3].map(|at| quartile(&mut ratios, at));
    report.line("");
    report.line(format!(
        "Exact claims with history, beside those without: {ratio:.2}, half of the rounds from {below:.2} to {above:.2} (aim: at least {AIM:.2})."
    ));
    [&empty, &full].iter().all(|claims| claims.exact >= claims.bare / 2.0) && ratio >= AIM
}

/// A cluster whose executions only this process claims, and a job of it.
async fn claimed_from() -> (Cluster, String) {
    let mut cluster = Cluster::build().workers(1).limit(0).start().await;
    let job = with_job(&cluster).await;
    cluster.workers.clear();
    sql(&cluster.database, "update jobs set overlap = 'allow', max_attempts = 1").await;
    sql(&cluster.database, &format!("update queue_gate set max_concurrency = {LIMIT}")).await;
    (cluster, job)
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut report = Report::new(
        "The queue",
        &format!(
            "Each figure is the better of two runs of eight seconds. A claim is a batch of at most 16. Runs that end while \
             another end is being recorded share the next transaction; \"each end apart\" gives every one its own, as the bare \
             claims do, beside which it is the like for like. With history beside without: two databases, {ROUNDS} rounds in \
             each of which the one, the other twice, and the one again take {} s each; the ratio is that of a round.",
            TURN.as_secs_f64()
        ),
    );
    let (cluster, job) = claimed_from().await;
    let kept = with_history(&cluster, &job, &mut report).await;
    report.write();
    // They belong to no job, and one of them would be asked to run again.
    sql(&cluster.database, "delete from executions where job_slug = 'bench'").await;
    assert_nothing_walks_in(cluster, &job, 0, 200_000).await;
    println!("nothing walks the history");
    if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
