//! The service's own PostgreSQL is lost for good, and a synchronous standby takes its place.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{
    Cluster, SOON,
    held::Held,
    postgres::OwnPostgres,
    proxy::{Mode, Proxy},
    until,
};

/// Triggers at once, before and after the standby stops following.
const TRIGGERS: usize = 40;

/// Triggers under a key of its own, until it is acknowledged; gives the execution.
async fn trigger(cluster: &Cluster, api: usize, job: &str, n: usize) -> String {
    until(&format!("trigger {n} is acknowledged"), 2 * SOON, || async {
        let request = cluster.http.post(format!("{}/api/jobs/{job}/run", cluster.url(api)));
        let request = request.bearer_auth(&cluster.admin_key).header("Idempotency-Key", format!("trigger-{n}"));
        let answer = request.send().await.ok().filter(|answer| answer.status() == 200)?;
        let answer: Value = answer.json().await.ok()?;
        Some(answer["executionId"].as_str().expect("an id").to_owned())
    })
    .await
}

/// Each through both API processes at once.
async fn all(cluster: &Cluster, job: &str, numbers: std::ops::Range<usize>) -> Vec<String> {
    let both = |n| async move {
        let (one, other) = tokio::join!(trigger(cluster, 0, job, n), trigger(cluster, 1, job, n));
        assert_eq!(one, other, "trigger {n} was acknowledged as two runs");
        one
    };
    futures::future::join_all(numbers.map(both)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_the_loss_of_the_primary_and_a_run_under_way_goes_on_by_the_standby() {
    let mut primary = OwnPostgres::start().await;
    let followed = Proxy::start(primary.port()).await;
    let standby = primary.standby(followed.port).await;
    let database = Proxy::start(primary.port()).await;
    let cluster = Cluster::build().on(primary.url("postgres")).database_at(database.port).start().await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPendingPerJob": 1000 }))).await;
    let held = Held::new(&cluster, json!({})).await;
    let under_way = held.run(&cluster).await;
    let quick = crate::trace::plain_job(&cluster, json!({ "overlap": "allow" })).await;
    let first = all(&cluster, &quick, 0..TRIGGERS).await;

    // The standby hears nothing more: what is triggered now is on the primary alone, and nobody may be told.
    followed.set(Mode::Hold);
    let (later, outcome) = tokio::join!(all(&cluster, &quick, TRIGGERS..2 * TRIGGERS), async {
        let alone = format!("select count(*) from executions where job_id = '{quick}'");
        until("they are on the primary", SOON, || async {
            (primary.count(&alone).await > i64::try_from(TRIGGERS).expect("few")).then_some(())
        })
        .await;
        until("a commit waits for the standby", SOON, || async {
            let waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and application_name = 'dbackup-api'";
            (primary.count(waits).await > 0).then_some(())
        })
        .await;
        database.set(Mode::Cut);
        primary.crash();
        followed.set(Mode::Cut);
        standby.promote().await;
        let kept = standby.count(&alone).await;
        database.lead_to(standby.port());
        database.set(Mode::Pass);
        kept
    });
    assert_eq!(outcome, i64::try_from(TRIGGERS).expect("few"), "what the standby has is what was acknowledged");

    assert_eq!(all(&cluster, &quick, 0..TRIGGERS).await, first, "a repeated trigger has the execution of the first");
    held.proxy.set(Mode::Pass);
    for execution in first.iter().chain(&later).chain([&under_way]) {
        let run = cluster.ended(execution, Duration::from_secs(60)).await;
        assert_eq!(run["status"], "Success", "{run:#}");
    }
    let run = cluster.execution(&under_way).await;
    assert_eq!(run["attempt"], 1, "it stood still, and went on: {run:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_took_over_without_the_end_of_a_run_leaves_its_backup_alone_and_runs_it_again() {
    let mut primary = OwnPostgres::start().await;
    let followed = Proxy::start(primary.port()).await;
    let standby = primary.standby(followed.port).await;
    let database = Proxy::start(primary.port()).await;
    let cluster = Cluster::build().on(primary.url("postgres")).database_at(database.port).start().await;
    let held = Held::new(&cluster, json!({})).await;
    let run = held.run(&cluster).await;
    // From here on the standby hears nothing, and nobody waits for it.
    primary.execute("alter system set synchronous_standby_names = ''").await;
    primary.execute("select pg_reload_conf()").await;
    followed.set(Mode::Hold);
    held.proxy.set(Mode::Pass);
    let first = cluster.ended(&run, SOON).await;
    assert_eq!(first["status"], "Success", "{first:#}");
    let stored = held.root.join(first["path"].as_str().expect("a path"));
    database.set(Mode::Cut);
    primary.crash();
    followed.set(Mode::Cut);
    standby.promote().await;
    let named = standby.count("select count(*) from staged_objects").await;
    assert!(named > 0, "it does not know of what the run was about to write");
    assert_eq!(
        standby.count("select count(*) from executions where status = 'Running'").await,
        1,
        "it knows of the end"
    );
    database.lead_to(standby.port());
    database.set(Mode::Pass);
    let again = until("it runs again", 2 * SOON, || async {
        let (status, answer) = cluster.request("GET", &format!("/api/executions/{run}"), None).await;
        // Until it reaches the database again, the process tells what it knew.
        let is_another = answer["data"]["status"] == "Success" && answer["data"]["path"] != first["path"];
        (status == 200 && is_another).then(|| answer["data"].clone())
    })
    .await;
    until("the sweeper was there", SOON, || async {
        (standby.count("select count(*) from staged_objects where swept_at is null").await == 0).then_some(())
    })
    .await;
    assert!(stored.exists() && held.root.join(again["path"].as_str().expect("a path")).exists(), "a backup is gone");
}
