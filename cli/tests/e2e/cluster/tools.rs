//! Who may leave a run to whom, by the tools that workers have.

use nix::sys::signal::Signal;
use serde_json::json;

use super::{last_seen, named, tools, waits_for, worker_is};
use crate::harness::{Cluster, SOON, source::MariadbSource, until};

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
