//! What a run waits for.

use std::time::Duration;

use common::execution::claim;
use serde_json::{Value, json};

use super::{job, job_of, register, waits_for};
use crate::harness::{Cluster, SOON, claimant, source::PostgresSource, until};

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
