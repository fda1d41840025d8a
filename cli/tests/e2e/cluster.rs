//! The cluster at a glance, cordons, who may leave a run to whom, and what a run waits for.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use common::{
    execution::claim,
    id::JobId,
    source::Engine,
    worker::{self, Registration},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Cluster, LEASE, SOON, audit, claimant, id,
    proxy::{Mode, Proxy},
    source::{MariadbSource, PostgresSource},
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

/// The same of a source. Its destination is not tested: that would need a worker.
async fn job_of(cluster: &Cluster, source: &str, more: Value) -> String {
    let root = cluster.scratch.join("backups").join(unique("store"));
    let body = json!({ "name": unique("store"), "kind": "local", "config": { "root": root } });
    let destination = id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
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

/// A folder of tools: psql is the real one, the others tell versions only.
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
    let beta = worker_named(&seen, "beta").expect("beta");
    assert_eq!((&beta["pools"], &beta["engines"]), (&json!(["far", "near"]), &json!(["postgres"])), "{beta:#}");
    assert!(beta["tools"][0]["version"].as_str().is_some_and(|v| v.contains("99.1")), "{beta:#}");

    let slot = &seen["slots"][0];
    assert_eq!((slot["slot"].as_i64(), slot["executionId"].as_str()), (Some(1), Some(running.as_str())), "{slot:#}");
    assert_eq!(
        (slot["worker"].as_str(), &slot["workerId"], slot["type"].as_str()),
        (Some("alpha"), &alpha["id"], Some("Backup"))
    );
    assert_eq!((slot["jobId"].as_str(), slot["sourceId"].as_str()), (Some(job.as_str()), Some(held.as_str())));
    assert!(slot["ageMs"].as_i64().is_some_and(|age| age > 0), "{slot:#}");
    let left = slot["expiresInMs"].as_i64().expect("a time");
    assert!(left <= i64::try_from(LEASE.as_millis()).expect("small"), "{slot:#}");
    let queue = &seen["queue"];
    assert_eq!((queue["pending"].as_i64(), queue["due"].as_i64()), (Some(1), Some(1)), "{queue:#}");
    assert!(queue["oldestWaitMs"].as_i64().is_some_and(|ms| ms >= 0), "{queue:#}");
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
    assert!(line("alpha").starts_with("alpha active, cordoned 0/4 default postgres,mysql,mariadb "), "{said}");
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
    assert_eq!(cluster.count(&let_in(false)).await, 1);
    assert!(cluster.count(CUT_THE_WORKERS).await > 0);
    cluster.workers[1].signal(Signal::SIGTERM);
    cluster.workers[1].says("could not take its leave", SOON).await;
    assert_eq!(cluster.count(&let_in(true)).await, 1);
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
    assert!(cluster.count(cold).await <= 1, "{} updates touched an index", cluster.count(cold).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cordoned_worker_claims_nothing_from_the_answer_on_and_its_run_goes_on() {
    let mut cluster = Cluster::build().workers(0).limit(10).start().await;
    audit::install(&cluster).await;
    cluster.add_worker(&named("alpha")).await;
    let alpha = id(worker_named(&view(&cluster).await, "alpha").expect("alpha"));
    let source = PostgresSource::with_rows(60_000).await;
    let proxy = Proxy::start(source.port).await;
    let held = cluster.source("postgres", source.config_at(proxy.port)).await;
    let (destination, _) = cluster.local_destination().await;
    let held = cluster.job(&held, &[&destination], json!({})).await;
    proxy.set(Mode::HoldAfter(1_000_000));
    let running = cluster.trigger(&held).await;
    proxy.passes(1_000_000).await;

    let cordoned = cluster.ok("POST", &format!("/api/cluster/workers/{alpha}/cordon"), None).await;
    assert_eq!((&cordoned["cordoned"], &cordoned["name"]), (&json!(true), &json!("alpha")), "{cordoned:#}");
    let job = job(&cluster, json!({})).await;
    let waiting = cluster.trigger(&job).await;
    let said = waits_for(&cluster, &waiting, "workers_cordoned").await;
    assert!(said.contains("'default'") && said.contains("cordoned"), "{said}");
    // Asked as it asks: that it has not claimed yet would prove nothing.
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let as_alpha = claim::Claimant { id: alpha.parse().expect("an id"), ..claimant() };
    assert_eq!(claim::claim(&mut conn, &as_alpha, LEASE, 4).await.expect("answers"), vec![]);
    proxy.set(Mode::Pass);
    cluster.in_status(&running, "Success", SOON).await;
    assert_eq!(cluster.execution(&waiting).await["status"], "Pending");

    // It holds over the worker's reconnects and for its successor; another worker takes over what waits.
    assert!(cluster.count(CUT_THE_WORKERS).await > 0);
    cluster.workers[0].kill().await;
    cluster.add_worker(&named("alpha")).await;
    let successor = worker_is(&cluster, "alpha", "back", |worker| worker["id"] != json!(alpha)).await;
    assert_eq!(successor["cordoned"], true, "{successor:#}");
    assert_eq!(cluster.count("select count(*) from lease_audit where change = 1").await, 1, "something was claimed");
    cluster.add_worker(&named("beta")).await;
    cluster.in_status(&waiting, "Failed", SOON).await;
    let ran = cluster.execution(&waiting).await["logs"].to_string();
    assert!(ran.contains("on worker beta") && !ran.contains("on worker alpha"), "{ran}");

    let events: i64 =
        cluster.count("select count(*) from audit_log where action = 'worker.cordon' and target_name = 'alpha'").await;
    assert_eq!(events, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uncordoned_worker_claims_at_once_and_unknown_and_doubled_names_are_refused() {
    // A poll of a minute: only the wake-up can be quick.
    let mut cluster = Cluster::build().workers(0).env("DBACKUP_POLL_MS", 60_000).start().await;
    cluster.add_worker(&named("alpha")).await;
    let (destination, _) = cluster.local_destination().await;
    cluster.ok("POST", "/api/cluster/workers/alpha/cordon", None).await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let waiting = cluster.trigger(&job).await;
    waits_for(&cluster, &waiting, "workers_cordoned").await;
    let list = cluster.ok("GET", "/api/executions", None).await;
    assert_eq!(list[0]["waitingFor"]["reason"], "workers_cordoned", "{list:#}");
    cluster.ok("POST", "/api/cluster/workers/alpha/uncordon", None).await;
    cluster.in_status(&waiting, "Success", SOON).await;
    assert_eq!(cluster.count("select count(*) from audit_log where action = 'worker.uncordon'").await, 1);

    let (status, answer) = cluster.request("POST", "/api/cluster/workers/nobody/cordon", None).await;
    assert_eq!((status, answer["code"].as_str()), (404, Some("worker_not_found")), "{answer}");
    cluster.add_worker(&named("alpha")).await;
    cluster.workers[1].says("another worker of this name", SOON).await;
    let seen = view(&cluster).await;
    let ids: Vec<String> = seen["workers"].as_array().expect("workers").iter().map(id).collect();
    assert!(ids.len() == 2 && ids[0] != ids[1], "{seen:#}");
    let (status, answer) = cluster.request("POST", "/api/cluster/workers/alpha/cordon", None).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("ambiguous_name")), "{answer}");
    cluster.ok("POST", &format!("/api/cluster/workers/{}/cordon", ids[0]), None).await;
    let (status, _) = cluster
        .request_as(
            &cluster.key(&["cluster:read"]).await,
            "POST",
            &format!("/api/cluster/workers/{}/cordon", ids[1]),
            None,
        )
        .await;
    assert_eq!(status, 403, "to read the cluster is not to change it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_waits_for_the_gate_while_its_worker_is_cordoned_gets_nothing() {
    let cluster = Cluster::build().workers(0).start().await;
    cluster.trigger(&job(&cluster, json!({})).await).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let me = claimant();
    register(&mut conn, &me, &me.engines).await;
    // The cordon holds the gate; the claim has passed its look without locks and waits.
    let mut tx = cluster.pool.begin().await.expect("begins");
    sqlx::query("select only_row from queue_gate for update").execute(&mut *tx).await.expect("locks");
    let claiming = {
        let (pool, me) = (cluster.pool.clone(), me.clone());
        tokio::spawn(async move {
            let mut conn = pool.acquire().await.expect("a connection");
            claim::claim(&mut conn, &me, LEASE, 4).await.expect("answers")
        })
    };
    until("the claim waits for the gate", SOON, || async {
        let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%claim_executions_v5%'
                          and datname = current_database()";
        (cluster.count(waiting).await == 1).then_some(())
    })
    .await;
    assert!(matches!(worker::cordon(&mut tx, "test", true).await.expect("cordons"), worker::Cordoned::Done(_)));
    tx.commit().await.expect("commits");
    assert_eq!(claiming.await.expect("joins"), vec![], "claimed after the cordon");
    // And once it is taken away:
    worker::cordon(&mut conn, &me.id.to_string(), false).await.expect("uncordons");
    assert_eq!(claim::claim(&mut conn, &me, LEASE, 4).await.expect("claims").len(), 1);
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
        gone_after: LEASE,
    };
    worker::register(conn, &registration).await.expect("registers");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_keeps_its_cordon_until_that_is_taken_away_and_not_longer() {
    let cluster = Cluster::build().workers(0).start().await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let [crashed, stopped, third, fourth] = [claimant(), claimant(), claimant(), claimant()];
    let is_cordoned = async |conn: &mut sqlx::PgConnection, me: &claim::Claimant| {
        worker::beat(conn, me.id, false).await.expect("beats").expect("has a row")
    };
    let rows = || cluster.count("select count(*) from workers");
    register(&mut conn, &crashed, &[]).await;
    cluster.ok("POST", "/api/cluster/workers/test/cordon", None).await;
    // The one that crashed still looks alive; by the next beat it does not.
    register(&mut conn, &stopped, &[]).await;
    assert_eq!((is_cordoned(&mut conn, &stopped).await, rows().await), (true, 2));
    let age = "update workers set seen_at = clock_timestamp() - interval '1 minute' where id::text = $1";
    sqlx::query(age).bind(crashed.id.to_string()).execute(&mut *conn).await.expect("updates");
    assert_eq!((is_cordoned(&mut conn, &stopped).await, rows().await), (true, 1), "its place is taken");
    // One that stops is shown for its cordon, and its successor takes that over.
    worker::leave(&mut conn, stopped.id).await.expect("leaves");
    assert_eq!(view(&cluster).await["workers"][0]["state"], "Stopped");
    assert_eq!(worker::beat(&mut conn, stopped.id, false).await.expect("beats"), None, "a late beat brings it back");
    register(&mut conn, &third, &[]).await;
    assert_eq!((is_cordoned(&mut conn, &third).await, rows().await), (true, 1));
    // Taken away from the one that runs, it is on none that is over: the next does not inherit it.
    register(&mut conn, &fourth, &[]).await;
    sqlx::query(age).bind(third.id.to_string()).execute(&mut *conn).await.expect("updates");
    cluster.ok("POST", "/api/cluster/workers/test/uncordon", None).await;
    let fifth = claimant();
    worker::leave(&mut conn, fourth.id).await.expect("leaves");
    register(&mut conn, &fifth, &[]).await;
    assert_eq!((is_cordoned(&mut conn, &fifth).await, rows().await), (false, 1));
}

/// Moves the time of a worker that has ended: a slow machine must not make it old, and no test waits until it is.
async fn last_seen(cluster: &Cluster, name: &str, when: &str) {
    let seconds = if when == "now" { 3600.0 } else { -4.0 * LEASE.as_secs_f64() };
    let query = "update workers set seen_at = clock_timestamp() + $2 * interval '1 second' where name = $1 and state = 'Stopped'";
    let done = sqlx::query(query).bind(name).bind(seconds).execute(&cluster.pool).await.expect("updates");
    assert_eq!(done.rows_affected(), 1, "{name} has not stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_left_to_the_workers_that_have_its_tools_and_fails_only_when_there_are_none() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let none = cluster.scratch.display().to_string();
    let lacking = [("DBACKUP_WORKER_NAME", "lacking".to_owned()), ("DBACKUP_MARIADB_BIN", none)];
    cluster.add_worker(&lacking).await;
    cluster.add_worker(&named("able")).await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("mariadb", MariadbSource::with_rows(10).config()).await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    for _ in 0..8 {
        cluster.trigger(&job).await;
    }
    until("all are backed up", SOON, || async {
        (cluster.count("select count(*) from executions where status = 'Success' and attempt = 1").await == 8)
            .then_some(())
    })
    .await;
    // Cordoned, it is waited for.
    cluster.ok("POST", "/api/cluster/workers/able/cordon", None).await;
    let waiting = cluster.trigger(&job).await;
    waits_for(&cluster, &waiting, "workers_cordoned").await;
    // Stopped, so is its successor: a restart fails nothing.
    cluster.workers[1].signal(Signal::SIGTERM);
    cluster.workers[1].end(SOON).await;
    last_seen(&cluster, "able", "now").await;
    let said = waits_for(&cluster, &waiting, "no_tool").await;
    assert!(said.contains("mariadb") && said.contains("'default'"), "{said}");
    cluster.add_worker(&named("able")).await;
    cluster.ok("POST", "/api/cluster/workers/able/uncordon", None).await;
    cluster.in_status(&waiting, "Success", SOON).await;
    // Nobody had the tools for four leases: it ends, and says what to install.
    cluster.workers[2].signal(Signal::SIGTERM);
    cluster.workers[2].end(SOON).await;
    last_seen(&cluster, "able", "now").await;
    let hopeless = cluster.trigger(&job).await;
    waits_for(&cluster, &hopeless, "no_tool").await;
    last_seen(&cluster, "able", "four leases ago").await;
    let ended = cluster.ended(&hopeless, SOON).await;
    assert_eq!(
        (ended["status"].as_str(), ended["errorCode"].as_str()),
        (Some("Failed"), Some("tool_missing")),
        "{ended:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_is_installed_or_removed_while_the_worker_runs_is_noticed() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let bin = tools(&cluster.scratch, &["psql"]);
    let none = cluster.scratch.display().to_string();
    let bins = [("DBACKUP_POSTGRES_BIN", bin.display().to_string()), ("DBACKUP_MARIADB_BIN", none)];
    cluster.add_worker(&[named("alpha")[0].clone(), bins[0].clone(), bins[1].clone()]).await;
    let seen = worker_is(&cluster, "alpha", "there", |_| true).await;
    assert_eq!(seen["engines"], json!([]), "{seen:#}");
    std::fs::rename(tools(&cluster.scratch, &["pg_dump"]).join("pg_dump"), bin.join("pg_dump")).expect("installs");
    let seen = worker_is(&cluster, "alpha", "able", |worker| worker["engines"] == json!(["postgres"])).await;
    assert_eq!(seen["tools"].as_array().map(Vec::len), Some(2), "{seen:#}");
    std::fs::remove_file(bin.join("pg_dump")).expect("removes");
    worker_is(&cluster, "alpha", "unable again", |worker| worker["engines"] == json!([])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pending_run_says_what_it_waits_for() {
    let cluster = Cluster::build().workers(0).limit(10).start().await;
    let serial = job(&cluster, json!({ "overlap": "queue" })).await;
    let first = cluster.trigger(&serial).await;
    let said = waits_for(&cluster, &first, "no_worker").await;
    assert!(said.contains("DBACKUP_POOLS=default"), "{said}");
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    waits_for(&cluster, &first, "paused").await;

    // A worker with room for one run that claims only when the test does.
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let me = claimant();
    register(&mut conn, &me, &me.engines).await;
    let lease = Duration::from_secs(600);
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    sqlx::query("update workers set gone_after_ms = 600000, concurrency = 1")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    until("it is about to be claimed", SOON, || async {
        (cluster.execution(&first).await["waitingFor"] == Value::Null).then_some(())
    })
    .await;
    assert_eq!(claim::claim(&mut conn, &me, lease, 1).await.expect("claims").len(), 1);
    let second = cluster.trigger(&serial).await;
    let said = waits_for(&cluster, &second, "job").await;
    assert!(said.contains(&first), "{said}");

    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let other = job_of(&cluster, &source, json!({})).await;
    let third = cluster.trigger(&other).await;
    waits_for(&cluster, &third, "workers_busy").await;
    sqlx::query("update workers set concurrency = 4").execute(&cluster.pool).await.expect("updates");
    assert_eq!(claim::claim(&mut conn, &me, lease, 1).await.expect("claims").len(), 1);
    let fourth = cluster.trigger(&other).await;
    cluster.ok("PUT", &format!("/api/sources/{source}"), Some(json!({ "maxConcurrentRuns": 1 }))).await;
    let said = waits_for(&cluster, &fourth, "source").await;
    assert!(said.contains("allows 1 runs") && said.contains("maxConcurrentRuns"), "{said}");
    cluster.ok("PUT", &format!("/api/sources/{source}"), Some(json!({ "maxConcurrentRuns": null }))).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 2 }))).await;
    let said = waits_for(&cluster, &fourth, "limit").await;
    assert_eq!(said, "all 2 slots are in use (maxConcurrentJobs)");
    sqlx::query(
        "update executions set attempt = 1, run_at = clock_timestamp() + interval '1 hour' where id::text = $1",
    )
    .bind(&fourth)
    .execute(&cluster.pool)
    .await
    .expect("updates");
    let said = waits_for(&cluster, &fourth, "retry").await;
    assert!(said.contains("attempt 1 failed"), "{said}");
    // Who runs or has ended waits for nothing.
    assert!(cluster.execution(&first).await.get("waitingFor").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_hundred_polls_wait_for_costs_one_look_at_the_queue() {
    let cluster = Cluster::build().workers(0).start().await;
    let job = job(&cluster, json!({})).await;
    let waiting = cluster.trigger(&job).await;
    let began = std::time::Instant::now();
    let url = format!("{}/api/executions/{waiting}", cluster.url(0));
    let polls =
        futures::future::join_all((0..200).map(|_| cluster.http.get(&url).bearer_auth(&cluster.admin_key).send()))
            .await;
    for poll in polls {
        let body: Value = poll.expect("answers").json().await.expect("JSON");
        assert_eq!(body["data"]["waitingFor"]["reason"], "no_worker", "{body}");
    }
    // A backend tells its statistics at the latest when it ends.
    let ended = "select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
                  where application_name = 'dbackup-api' and datname = current_database()";
    assert!(cluster.count(ended).await > 0);
    // Of all that a poll asks, only the look at the queue reads the workers, and twice.
    let looks = cluster.count("select seq_scan from pg_stat_user_tables where relname = 'workers'").await;
    let allowed = i64::try_from(began.elapsed().as_secs()).expect("short") + 2;
    assert!(looks > 0 && looks <= allowed * 3, "{looks} scans of the workers for 200 polls in {:?}", began.elapsed());
}
