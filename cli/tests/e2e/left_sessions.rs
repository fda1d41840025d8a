//! What a worker leaves on a server when its machine is lost: nobody closes its connections, and the server keeps their
//! transactions and locks for hours. The proxy plays the network that hears nothing any more.

use serde_json::json;
use sqlx::AssertSqlSafe;

use crate::{
    harness::{
        Cluster, SOON,
        held::Held,
        postgres_port,
        proxy::{Mode, Proxy},
        source::PostgresSource,
        until,
    },
    restores::{empty_database, job, restore},
};

/// The sessions of a run on its source: what each does, and in which process of the server.
async fn sessions(cluster: &Cluster, run: &str) -> Vec<(i32, String)> {
    let query = format!("select pid, query from pg_stat_activity where application_name = 'dbackup {run}'");
    sqlx::query_as(AssertSqlSafe(query)).fetch_all(&cluster.pool).await.expect("answers")
}

/// Waits until the run copies data in a session, and in no other than that; gives its process.
async fn copies(cluster: &Cluster, run: &str, but: Option<i32>) -> i32 {
    until(&format!("{run} copies, and {but:?} is gone"), SOON, || async {
        match &sessions(cluster, run).await[..] {
            [(pid, query)] if query.starts_with("COPY") && Some(*pid) != but => Some(*pid),
            _ => None,
        }
    })
    .await
}

/// The worker that runs it is lost with its machine: another copies, the old session is gone, and the run ends well.
async fn taken_over(cluster: &mut Cluster, run: &str, proxy: &Proxy) {
    let left = copies(cluster, run, None).await;
    proxy.lose_clients();
    let worker = cluster.busy_worker();
    cluster.workers[worker].kill().await;
    copies(cluster, run, Some(left)).await;
    proxy.set(Mode::Pass);
    let ended = cluster.ended(run, SOON).await;
    assert_eq!((&ended["status"], &ended["attempt"]), (&json!("Success"), &json!(2)), "{ended:#}");
    let logs = cluster.ok("GET", &format!("/api/executions/{run}?includeLogs=true"), None).await["logs"].to_string();
    assert!(logs.contains("1 session(s) that an earlier attempt had left on the server are ended"), "{logs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_waits_for_no_transaction_of_a_worker_whose_machine_was_lost() {
    let mut cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(60_000).await;
    let proxy = Proxy::start(postgres_port()).await;
    let mut config = source.config();
    config["port"] = json!(proxy.port);
    let (job, _) = job(&cluster, "postgres", config, json!({})).await;
    let backup = cluster.backup(&job).await;
    let into = empty_database(&source).await;
    // In the midst of the data: the table that it fills is made, and can be seen by nobody.
    proxy.set(Mode::HoldAfterSent(1_000_000));
    let restore = restore(&cluster, &backup, json!({ "into": into })).await;
    taken_over(&mut cluster, &restore, &proxy).await;
    source.assert_same(&into).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_a_worker_whose_machine_was_lost_holds_no_lock_beyond_the_next_attempt() {
    let mut cluster = Cluster::start().await;
    let held = Held::new(&cluster, json!({})).await;
    let run = held.run(&cluster).await;
    taken_over(&mut cluster, &run, &held.proxy).await;
}
