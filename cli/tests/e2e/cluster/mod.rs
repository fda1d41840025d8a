//! The cluster at a glance, and how its workers come and go.

mod cordons;
mod pending;
mod reach;
mod tools;

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use common::{
    execution::claim,
    id::JobId,
    source::Engine,
    worker::{self, Registration},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Cluster, LEASE, SOON, claimant, id,
    proxy::{Mode, Proxy},
    source::PostgresSource,
    unique, until,
};

/// Ends the connections of this test's workers, and of no other test's on the same server; gives how many there were.
const CUT_THE_WORKERS: &str = "select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
                                where application_name = 'dbackup-worker' and datname = current_database()";

async fn view(cluster: &Cluster) -> Value {
    cluster.ok("GET", "/api/cluster", None).await
}

fn worker_named<'a>(view: &'a Value, name: &str) -> Option<&'a Value> {
    view["workers"].as_array().expect("workers").iter().find(|worker| worker["name"] == name)
}

/// Waits until a worker shows as it should.
async fn worker_is(cluster: &Cluster, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    until(&format!("worker {name} is {what}"), SOON, || async {
        worker_named(&view(cluster).await, name).filter(|worker| is(worker)).cloned()
    })
    .await
}

fn named(name: &str) -> [(&str, String); 1] {
    [("DBACKUP_WORKER_NAME", name.to_owned())]
}

/// A job on an empty PostgreSQL, whose runs may overlap, or as `more` says.
async fn job(cluster: &Cluster, more: Value) -> String {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    job_of(cluster, &source, more).await
}

/// A destination that is not tested: that would need a worker. Gives its id.
pub async fn untested_destination(cluster: &Cluster) -> String {
    let root = cluster.scratch.join("backups").join(unique("store"));
    let body = json!({ "name": unique("store"), "kind": "local", "config": { "root": root } });
    id(&cluster.ok("POST", "/api/destinations", Some(body)).await)
}

/// The same of a source, with a destination that is not tested.
async fn job_of(cluster: &Cluster, source: &str, more: Value) -> String {
    let destination = untested_destination(cluster).await;
    let mut fields = json!({ "overlap": "allow" });
    for (name, value) in more.as_object().expect("an object") {
        fields[name] = value.clone();
    }
    cluster.job(source, &[&destination], fields).await
}

/// Waits until a run waits for `reason` (`null` for nothing), and gives what it says of it.
async fn waits_for(cluster: &Cluster, execution: &str, reason: &str) -> String {
    let waiting = until(&format!("{execution} waits for {reason}"), SOON, || async {
        let state = cluster.execution(execution).await;
        assert_eq!(state["status"], "Pending", "{state:#}");
        let waiting = state.get("waitingFor").unwrap_or_else(|| panic!("no waitingFor: {state:#}")).clone();
        (waiting["reason"].as_str() == Some(reason)).then_some(waiting)
    })
    .await;
    waiting["message"].as_str().expect("a sentence").to_owned()
}

/// A folder of tools that tell their versions and do nothing else.
fn tools(folder: &Path, names: &[&str]) -> PathBuf {
    let bin = folder.join(unique("bin"));
    std::fs::create_dir_all(&bin).expect("a folder");
    for name in names {
        let path = bin.join(name);
        std::fs::write(&path, format!("#!/bin/bash\necho '{name} (PostgreSQL) 99.1 of MariaDB'\n")).expect("writes");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("makes it executable");
    }
    bin
}

/// Moves the time of a worker that has ended: a slow machine must not make it old, and no test waits until it is.
async fn last_seen(cluster: &Cluster, name: &str, when: &str) {
    let seconds = if when == "now" { 3600.0 } else { -4.0 * LEASE.as_secs_f64() };
    let query = "update workers set seen_at = clock_timestamp() + $2 * interval '1 second' where name = $1 and state = 'Stopped'";
    let done = sqlx::query(query).bind(name).bind(seconds).execute(&cluster.pool).await.expect("updates");
    assert_eq!(done.rows_affected(), 1, "{name} has not stopped");
}

/// Registers a worker that no process is.
async fn register(conn: &mut sqlx::PgConnection, me: &claim::Claimant, engines: &[Engine]) {
    let registration = Registration {
        id: me.id,
        name: me.name.clone(),
        version: "0",
        host: "test".to_owned(),
        pools: me.pools.clone(),
        concurrency: 4,
        engines: engines.to_vec(),
        tools: vec![],
        out_of_reach: me.out_of_reach.iter().map(|id| (*id, "out of reach".to_owned())).collect(),
        gone_after: LEASE,
    };
    worker::register(conn, &registration).await.expect("registers");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_shows_its_workers_and_their_tools_every_slot_and_what_waits() {
    let mut cluster = Cluster::build().workers(0).limit(1).start().await;
    cluster.add_worker(&[("DBACKUP_WORKER_NAME", "alpha".to_owned()), ("DBACKUP_CONCURRENCY", "3".to_owned())]).await;
    let pools = ("DBACKUP_POOLS", "far,near".to_owned());
    let bins = tools(&cluster.scratch, &["pg_dump", "psql"]);
    let none = cluster.scratch.display().to_string();
    let bins = [("DBACKUP_POSTGRES_BIN", bins.display().to_string()), ("DBACKUP_MARIADB_BIN", none)];
    cluster.add_worker(&[named("beta")[0].clone(), pools, bins[0].clone(), bins[1].clone()]).await;

    let source = PostgresSource::with_rows(60_000).await;
    let proxy = Proxy::start(source.port).await;
    let held = cluster.source("postgres", source.config_at(proxy.port)).await;
    proxy.set(Mode::HoldAfter(1_000_000));
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&held, &[&destination], json!({ "overlap": "allow" })).await;
    let running = cluster.trigger(&job).await;
    proxy.passes(1_000_000).await;
    let waiting = cluster.trigger(&job).await;
    let triggered = Instant::now();

    let seen = until("the run and the queue show", SOON, || async {
        let seen = view(&cluster).await;
        (seen["slots"][0]["stage"] == "Dumping" && seen["queue"]["pending"] == 1).then_some(seen)
    })
    .await;
    assert_eq!(
        (seen["maxConcurrentJobs"].as_i64(), seen["slotsUsed"].as_i64(), seen["paused"].as_bool()),
        (Some(1), Some(1), Some(false)),
        "{seen:#}"
    );
    let alpha = worker_named(&seen, "alpha").expect("alpha");
    assert_eq!((alpha["state"].as_str(), alpha["cordoned"].as_bool()), (Some("Active"), Some(false)));
    assert_eq!(alpha["slots"], json!({ "used": 1, "total": 3 }));
    assert_eq!(alpha["engines"], json!(["postgres", "mysql", "mariadb"]));
    assert_eq!((&alpha["pools"], &alpha["version"]), (&json!(["default"]), &json!(env!("CARGO_PKG_VERSION"))));
    let tools = alpha["tools"].as_array().expect("tools");
    for (name, version) in
        [("pg_dump", "PostgreSQL"), ("psql", "PostgreSQL"), ("mariadb-dump", "MariaDB"), ("mariadb", "MariaDB")]
    {
        let tool = tools.iter().find(|tool| tool["name"] == name).unwrap_or_else(|| panic!("no {name}: {alpha:#}"));
        assert!(tool["version"].as_str().is_some_and(|v| v.contains(version)), "{tool}");
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a name");
    assert_eq!(alpha["host"], host.trim());
    let time =
        |of: &Value, key: &str| of[key].as_str().and_then(|text| text.parse::<DateTime<Utc>>().ok()).expect("a time");
    let later = until("it is seen again", SOON, || async {
        let now = worker_named(&view(&cluster).await, "alpha")?.clone();
        (time(&now, "lastSeenAt") > time(alpha, "lastSeenAt")).then_some(now)
    })
    .await;
    assert!(later["since"] == alpha["since"] && time(&later, "since") < time(&later, "lastSeenAt"), "{later:#}");
    let beta = worker_named(&seen, "beta").expect("beta");
    assert_eq!((&beta["pools"], &beta["engines"]), (&json!(["far", "near"]), &json!(["postgres"])), "{beta:#}");
    assert!(beta["tools"][0]["version"].as_str().is_some_and(|v| v.contains("99.1")), "{beta:#}");

    let slot = &seen["slots"][0];
    assert_eq!((slot["slot"].as_i64(), slot["executionId"].as_str()), (Some(1), Some(running.as_str())), "{slot:#}");
    assert_eq!(
        (slot["worker"].as_str(), &slot["workerId"], slot["type"].as_str()),
        (Some("alpha"), &alpha["id"], Some("Backup"))
    );
    assert_eq!(slot["jobName"], cluster.ok("GET", &format!("/api/jobs/{job}"), None).await["name"]);
    assert_eq!((slot["jobId"].as_str(), slot["sourceId"].as_str()), (Some(job.as_str()), Some(held.as_str())));
    assert!(slot["ageMs"].as_i64().is_some_and(|age| age > 0), "{slot:#}");
    until("its lease shows", SOON, || async {
        let left = view(&cluster).await["slots"][0]["expiresInMs"].as_i64().expect("a time");
        assert!(left <= i64::try_from(LEASE.as_millis()).expect("small"), "{left} ms");
        (left > 0).then_some(())
    })
    .await;
    let queue = &seen["queue"];
    assert_eq!((queue["pending"].as_i64(), queue["due"].as_i64()), (Some(1), Some(1)), "{queue:#}");
    // It is looked at once a second at most.
    let oldest = |seen: &Value| seen["queue"]["oldestWaitMs"].as_i64().expect("a number");
    until("the oldest has waited for a second", SOON, || async {
        let waited = oldest(&view(&cluster).await);
        assert!(u128::try_from(waited).is_ok_and(|ms| ms < triggered.elapsed().as_millis() + 1_000), "{waited} ms");
        (waited >= 1_000).then_some(())
    })
    .await;
    assert_eq!(
        (&queue["pools"][0]["pool"], &queue["pools"][0]["pending"]),
        (&json!("default"), &json!(1)),
        "{queue:#}"
    );

    // A key that is bound to another job sees that the slot is in use, and not by what.
    let scoped = cluster.scoped_key(&["cluster:read"], Some(vec![JobId::new()])).await;
    let (status, answer) = cluster.request_as(&scoped, "GET", "/api/cluster", None).await;
    assert_eq!((status, answer["data"]["slotsUsed"].as_i64()), (200, Some(1)), "{answer:#}");
    let slot = &answer["data"]["slots"][0];
    for hidden in ["executionId", "jobId", "jobName", "sourceId"] {
        assert_eq!(slot[hidden], Value::Null, "{hidden}: {slot:#}");
    }
    waits_for(&cluster, &waiting, "limit").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dbackup_status_prints_the_cluster_as_a_table_and_as_json() {
    let mut cluster = Cluster::build().workers(0).limit(1).start().await;
    cluster.add_worker(&named("alpha")).await;
    cluster.ok("POST", "/api/cluster/workers/alpha/cordon", None).await;
    let job = job(&cluster, json!({})).await;
    for _ in 0..3 {
        cluster.trigger(&job).await;
    }
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let claim = claim::claim(&mut conn, &claimant(), Duration::from_secs(600), 1).await.expect("claims")[0];
    let (code, said, complaint) = cluster.dbackup(&["status"], "");
    assert_eq!((code, complaint.as_str()), (Some(0), ""), "{said}");
    let line = |word: &str| {
        let line = said.lines().find(|line| line.starts_with(word)).unwrap_or_else(|| panic!("no {word}: {said}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("slots"), "slots 1 of 1 in use");
    assert!(line("queue").starts_with("queue 2 waiting, the oldest for "), "{said}");
    assert!(line("queue").ends_with("by pool: default 2"), "{said}");
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a name");
    let shown =
        ["alpha active, cordoned 0/4 default postgres,mysql,mariadb", env!("CARGO_PKG_VERSION"), host.trim()].join(" ");
    let times = line("alpha").strip_prefix(&shown).unwrap_or_else(|| panic!("not {shown}: {said}")).to_owned();
    let times: Vec<&str> = times.split_whitespace().collect();
    let listed = worker_named(&view(&cluster).await, "alpha").expect("alpha").clone();
    let since = listed["since"].as_str().and_then(|text| text.get(..19)).expect("a time").replace('T', " ");
    assert!(times.len() == 4 && times[..2].join(" ") == since && times[2..].join(" ") >= since, "{said}");
    let tool = line("pg_dump ");
    assert!(tool.starts_with("pg_dump pg_dump (PostgreSQL) ") && tool.ends_with("/pg_dump alpha"), "{said}");
    let run = line("1 ");
    assert!(run.contains(&claim.execution.to_string()) && run.contains(" test Initializing 0 % "), "{said}");

    let (code, said, _) = cluster.dbackup(&["status", "--json"], "");
    let seen: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
    assert_eq!(
        (code, &seen["queue"]["pending"], &seen["slots"][0]["slot"]),
        (Some(0), &json!(2), &json!(1)),
        "{seen:#}"
    );
    assert_eq!(seen["workers"][0]["name"], "alpha");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_worker_shows_as_gone_and_is_forgotten_and_one_that_stops_takes_its_leave() {
    let mut cluster = Cluster::build().workers(0).start().await;
    for name in ["alpha", "beta", "gamma"] {
        cluster
            .add_worker(&[("DBACKUP_WORKER_NAME", name.to_owned()), ("RUST_LOG", "info,worker=debug".to_owned())])
            .await;
    }
    let seen = view(&cluster).await;
    let first_beat = worker_named(&seen, "gamma").expect("gamma")["lastSeenAt"].clone();
    cluster.workers[0].kill().await;
    // Its database is away when it wants to take its leave, and back before it has ended.
    let let_in = |yes: bool| {
        format!("with database as (update pg_database set datallowconn = {yes} where datname = current_database() returning 1)
                                      select count(*) from database")
    };
    // One connection for all of it: while nobody is let in, the pool may want to open another.
    let mut inside = cluster.pool.acquire().await.expect("a connection");
    let mut count = async |query: String| -> i64 {
        let answer = sqlx::query_scalar(sqlx::AssertSqlSafe(query)).fetch_one(&mut *inside).await;
        answer.expect("answers")
    };
    assert_eq!(count(let_in(false)).await, 1);
    assert!(count(CUT_THE_WORKERS.to_owned()).await > 0);
    cluster.workers[1].signal(Signal::SIGTERM);
    cluster.workers[1].says("could not take its leave", SOON).await;
    assert_eq!(count(let_in(true)).await, 1);
    drop(inside);
    cluster.workers[1].end(SOON).await;
    assert!(worker_named(&view(&cluster).await, "beta").is_none(), "it said that it stops");
    worker_is(&cluster, "alpha", "gone", |worker| worker["state"] == "Gone").await;
    worker_is(&cluster, "gamma", "seen again", |worker| {
        worker["lastSeenAt"] != first_beat && worker["state"] == "Active"
    })
    .await;

    let age = |age: &str| {
        let query = format!("update workers set seen_at = clock_timestamp() - interval '{age}' where name = 'alpha'");
        async { sqlx::query(sqlx::AssertSqlSafe(query)).execute(&cluster.pool).await.expect("updates") }
    };
    age("9 minutes").await;
    let beat = view(&cluster).await;
    let beat = worker_named(&beat, "gamma").expect("gamma")["lastSeenAt"].clone();
    worker_is(&cluster, "gamma", "seen again", |worker| worker["lastSeenAt"] != beat).await;
    assert!(worker_named(&view(&cluster).await, "alpha").is_some(), "forgotten too soon");
    age("11 minutes").await;
    until("the dead worker is forgotten", SOON, || async {
        worker_named(&view(&cluster).await, "alpha").is_none().then_some(())
    })
    .await;
    // One that was away for so long is not dead: it registers again.
    sqlx::query("delete from workers where name = 'gamma'").execute(&cluster.pool).await.expect("deletes");
    worker_is(&cluster, "gamma", "back", |worker| worker["state"] == "Active").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_drains_says_so_until_its_last_run_has_ended() {
    let mut cluster = Cluster::build().workers(0).start().await;
    cluster.add_worker(&named("alpha")).await;
    let source = PostgresSource::with_rows(60_000).await;
    let proxy = Proxy::start(source.port).await;
    let held = cluster.source("postgres", source.config_at(proxy.port)).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&held, &[&destination], json!({ "overlap": "allow" })).await;
    proxy.set(Mode::HoldAfter(1_000_000));
    let running = cluster.trigger(&job).await;
    proxy.passes(1_000_000).await;
    cluster.workers[0].signal(Signal::SIGTERM);
    worker_is(&cluster, "alpha", "draining", |worker| worker["state"] == "Draining" && worker["slots"]["used"] == 1)
        .await;
    // A worker that drains takes nothing: as if it were not there.
    let waiting = cluster.trigger(&job).await;
    waits_for(&cluster, &waiting, "no_worker").await;
    proxy.set(Mode::Pass);
    cluster.in_status(&running, "Success", SOON).await;
    cluster.workers[0].end(SOON).await;
    assert!(worker_named(&view(&cluster).await, "alpha").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn beats_leave_no_dead_entries_in_an_index() {
    let mut cluster = Cluster::build().workers(0).start().await;
    cluster.add_worker(&named("alpha")).await;
    let beats = "select coalesce(n_tup_upd, 0) from pg_stat_user_tables where relname = 'workers'";
    until("twenty beats", SOON, || async { (cluster.count(beats).await >= 20).then_some(()) }).await;
    let cold = "select n_tup_upd - n_tup_hot_upd from pg_stat_user_tables where relname = 'workers'";
    // One whose page was full, because somebody held an old snapshot, moved to another.
    assert!(cluster.count(cold).await <= 3, "{} updates touched an index", cluster.count(cold).await);
}
