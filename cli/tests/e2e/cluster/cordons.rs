//! Workers that claim nothing new because somebody said so.

use common::{execution::claim, worker};
use serde_json::json;

use super::{CUT_THE_WORKERS, job, named, register, view, waits_for, worker_is, worker_named};
use crate::harness::{
    Cluster, LEASE, SOON, audit, claimant, id,
    proxy::{Mode, Proxy},
    source::PostgresSource,
    until,
};

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
        let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%claim_executions_v7%'
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
