//! The global limit, exact at every moment, by an audit that the database writes.

use std::{collections::BTreeSet, time::Duration};

use common::execution::claim;
use serde_json::json;

use crate::harness::{
    Cluster, LEASE, SOON, audit, claimant, files,
    proxy::{Mode, Proxy},
    source::PostgresSource,
    until,
};

async fn all_ended(cluster: &Cluster, limit: Duration) {
    until("every execution ends", limit, || async {
        (cluster.count("select count(*) from executions where ended_at is null").await == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_runs_on_four_workers_never_exceed_the_limit_and_reach_it_while_it_changes() {
    let cluster = Cluster::build().workers(4).limit(3).start().await;
    audit::install(&cluster).await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let (destination, root) = cluster.local_destination().await;
    let mut jobs = Vec::new();
    for _ in 0..10 {
        jobs.push(cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await);
    }
    let triggers = (0..200).map(|n| cluster.trigger(&jobs[n % 10]));
    let ids: BTreeSet<String> = futures::future::join_all(triggers).await.into_iter().collect();
    assert_eq!(ids.len(), 200);

    let ended = || cluster.count("select count(*) from executions where ended_at is not null");
    for (after, limit) in [(40, 1), (60, 5)] {
        until(&format!("{after} runs end"), Duration::from_secs(90), || async {
            (ended().await >= after).then_some(())
        })
        .await;
        cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": limit }))).await;
    }
    all_ended(&cluster, Duration::from_secs(120)).await;

    assert_eq!(audit::claims_over_the_limit(&cluster).await, 0, "the limit was exceeded");
    // Without the gate's lock the primary key of the slots would still stop most claims too many, by an error: the
    // limit must be kept because claims wait for each other, not because they collide.
    assert!(!cluster.logs().contains("could not claim"), "claims collided:\n{}", cluster.logs());
    for limit in [3, 1, 5] {
        assert_eq!(
            audit::most_running_at(&cluster, limit).await,
            i64::from(limit),
            "the limit {limit} was not reached"
        );
    }
    assert_eq!(cluster.count("select count(*) from executions where status = 'Success' and attempt = 1").await, 200);
    assert_eq!(cluster.count("select count(*) from execution_leases").await, 0);
    assert_eq!(cluster.count("select count(*) from staged_objects").await, 0);
    assert_eq!(files(&root).len(), 400, "an object and a manifest each");
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_runs_of_one_job_in_one_second_make_fifty_artifacts_with_fifty_names() {
    // Nothing runs yet: the triggers shall share a second, whatever the dumps cost this machine.
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let (destination, root) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    futures::future::join_all((0..50).map(|_| cluster.trigger(&job))).await;
    let spread = "select (extract(epoch from max(queued_at) - min(queued_at)) * 1000)::bigint from executions";
    assert!(cluster.count(spread).await < 1000, "not one second: {} ms", cluster.count(spread).await);
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 8 }))).await;
    all_ended(&cluster, Duration::from_secs(60)).await;
    assert_eq!(cluster.count("select count(*) from executions where status = 'Success'").await, 50);
    assert_eq!(cluster.count("select count(distinct path) from artifacts where database_name is not null").await, 50);
    assert_eq!(files(&root).iter().filter(|f| f.extension().is_some_and(|e| e == "zst")).count(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_of_a_queue_job_never_run_together_also_when_claimed_in_one_batch() {
    // A limit of 40 and one worker with 20 free: a claim may take a batch of 20.
    let cluster = Cluster::build().workers(1).env("DBACKUP_CONCURRENCY", 20).limit(40).start().await;
    audit::install(&cluster).await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "queue" })).await;
    futures::future::join_all((0..12).map(|_| cluster.trigger(&job))).await;
    all_ended(&cluster, Duration::from_secs(60)).await;
    assert_eq!(audit::serial_overlaps(&cluster).await, 0);
    assert_eq!(cluster.count("select count(*) from executions where status = 'Success'").await, 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_never_dumped_by_more_runs_than_it_allows() {
    let cluster = Cluster::build().limit(20).start().await;
    audit::install(&cluster).await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    cluster.ok("PUT", &format!("/api/sources/{source}"), Some(json!({ "maxConcurrentRuns": 2 }))).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    futures::future::join_all((0..16).map(|_| cluster.trigger(&job))).await;
    all_ended(&cluster, Duration::from_secs(60)).await;
    assert_eq!(audit::most_of_one_job(&cluster).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_a_source_holds_while_it_is_changed_and_is_reached_at_once() {
    // A poll of a minute: a higher limit must wake the workers.
    let cluster = Cluster::build().limit(20).env("DBACKUP_POLL_MS", 60_000).start().await;
    audit::install(&cluster).await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let path = format!("/api/sources/{source}");
    let set = async |limit: i32| cluster.ok("PUT", &path, Some(json!({ "maxConcurrentRuns": limit }))).await;
    set(2).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    futures::future::join_all((0..60).map(|_| cluster.trigger(&job))).await;
    let ended = || cluster.count("select count(*) from executions where ended_at is not null");
    for (after, limit) in [(10, 1), (18, 5)] {
        until(&format!("{after} runs end"), Duration::from_secs(60), || async {
            (ended().await >= after).then_some(())
        })
        .await;
        set(limit).await;
    }
    all_ended(&cluster, Duration::from_secs(90)).await;
    assert_eq!(audit::claims_over_the_limit_of_a_source(&cluster).await, 0, "the source's limit was exceeded");
    for limit in [2, 1, 5] {
        let most = audit::most_running_at_source_limit(&cluster, limit).await;
        assert_eq!(most, i64::from(limit), "the limit {limit} was not reached");
    }
    assert_eq!(cluster.count("select count(*) from executions where status = 'Success' and attempt = 1").await, 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_higher_limit_of_a_source_wakes_the_workers() {
    // A poll of a minute: only the wake-up can be quick.
    let cluster = Cluster::build().env("DBACKUP_POLL_MS", 60_000).start().await;
    let rows = PostgresSource::with_rows(60_000).await;
    let proxy = Proxy::start(rows.port).await;
    let source = cluster.source("postgres", rows.config_at(proxy.port)).await;
    let path = format!("/api/sources/{source}");
    cluster.ok("PUT", &path, Some(json!({ "maxConcurrentRuns": 1 }))).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    proxy.set(Mode::HoldAfter(1_000_000));
    cluster.trigger(&job).await;
    proxy.passes(1_000_000).await;
    let second = cluster.trigger(&job).await;
    until("it waits for its source", SOON, || async {
        (cluster.execution(&second).await["waitingFor"]["reason"] == "source").then_some(())
    })
    .await;
    cluster.ok("PUT", &path, Some(json!({ "maxConcurrentRuns": 2 }))).await;
    cluster.in_status(&second, "Running", SOON).await;
    let entries =
        "select count(*) from audit_log where action = 'source.update' and details->'fields' ? 'maxConcurrentRuns'";
    assert_eq!(cluster.count(entries).await, 2, "each change is in the audit log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_goes_by_no_limit_of_a_source_that_was_lowered_before_the_answer() {
    let cluster = Cluster::build().workers(0).limit(20).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    // The gate is held as a claim holds it: the change of the limit has to wait for it.
    let mut claiming = cluster.pool.begin().await.expect("begins");
    sqlx::query("select only_row from queue_gate for update").execute(&mut *claiming).await.expect("locks");
    let path = format!("/api/sources/{source}");
    let change = cluster.request("PUT", &path, Some(json!({ "maxConcurrentRuns": 1 })));
    tokio::pin!(change);
    let waits = until("the change waits for the gate", SOON, || async {
        let waiting =
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%queue_gate%'
                          and datname = current_database()";
        (cluster.count(waiting).await == 1).then_some(())
    });
    tokio::select! {
        answer = &mut change => panic!("the limit changed while a claim was under way: {answer:?}"),
        () = waits => {}
    }
    claiming.commit().await.expect("commits");
    assert_eq!(change.await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_zero_and_a_pause_claim_nothing_and_their_end_is_noticed_at_once() {
    let cluster = Cluster::build().limit(0).env("DBACKUP_POLL_MS", 60_000).start().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    let first = cluster.trigger(&job).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    for change in [json!({ "paused": false }), json!({ "maxConcurrentJobs": 1, "paused": true })] {
        cluster.ok("PATCH", "/api/settings", Some(change)).await;
        // Asked as a worker asks: that none of them has claimed yet would prove nothing.
        let claims = claim::claim(&mut conn, &claimant(), LEASE, 1).await.expect("answers");
        assert!(claims.is_empty(), "{claims:?}");
    }
    assert_eq!(cluster.execution(&first).await["status"], "Pending");
    assert_eq!(cluster.count("select count(*) from execution_leases").await, 0);
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    // The poll interval is a minute: only the wake-up can be this quick.
    cluster.in_status(&first, "Success", SOON).await;
}
