//! Workers that die, stop, or lose the database.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Cluster, SOON, files,
    held::Held,
    process::is_alive,
    proxy::{Mode, Proxy},
    source::{PostgresSource, job_without_workers},
    until,
};

/// The one published backup: its object and its manifest, and nothing else.
fn assert_one_backup(root: &std::path::Path, execution: &Value) {
    let left = files(root);
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(left.iter().any(|f| f.to_str() == execution["path"].as_str()), "{left:?}");
    assert_eq!(execution["artifacts"].as_array().map(Vec::len), Some(2), "{execution:#}");
}

/// With the real times: lease 15 s, ticker 2 s.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_workers_run_leaves_running_within_20_s_although_all_others_are_busy_and_ends_elsewhere_with_one_artifact()
 {
    let mut cluster = Cluster::build().real_times().env("DBACKUP_CONCURRENCY", 1).start().await;
    let (first, second) = (Held::new(&cluster, json!({})).await, Held::new(&cluster, json!({})).await);
    let killed_run = first.run(&cluster).await;
    let victim = cluster.busy_worker();
    let busy_run = second.run(&cluster).await;
    let children = cluster.workers[victim].children();
    assert_eq!(children.len(), 1);

    let killed_at = Instant::now();
    cluster.workers[victim].kill().await;
    until("no child survives the worker", Duration::from_secs(2), || async { (!is_alive(children[0])).then_some(()) })
        .await;
    let waiting = cluster.in_status(&killed_run, "Pending", Duration::from_secs(20)).await;
    assert!(killed_at.elapsed() < Duration::from_secs(20), "{:?}", killed_at.elapsed());
    assert_eq!((waiting["stage"].as_str(), &waiting["progress"]), (Some("Queued"), &Value::Null));
    assert_eq!(cluster.execution(&busy_run).await["status"], "Running", "the other worker is busy all the while");

    second.proxy.set(Mode::Pass);
    first.proxy.set(Mode::Pass);
    let ended = cluster.ended(&killed_run, SOON).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(2)), "{ended:#}");
    cluster.ended(&busy_run, SOON).await;
    until("the sweeper removed what the killed worker left", SOON, || async {
        (files(&first.root).len() == 2).then_some(())
    })
    .await;
    assert_one_backup(&first.root, &ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_worker_that_wakes_after_its_lease_changes_nothing() {
    let cluster = Cluster::start().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    let stopped = &cluster.workers[cluster.busy_worker()];
    stopped.signal(Signal::SIGSTOP);
    // It may wait for a moment only: the other worker is free.
    until("the run is taken from it", SOON, || async {
        (cluster.count("select rescues::bigint from executions").await == 1).then_some(())
    })
    .await;
    held.proxy.set(Mode::Pass);
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(2)), "{ended:#}");

    stopped.signal(Signal::SIGCONT);
    stopped.says("the run was ended, since another worker may have it", SOON).await;
    until("its tool is gone", SOON, || async { stopped.children().is_empty().then_some(()) }).await;
    until("its part file is gone", SOON, || async { (files(&held.root).len() == 2).then_some(()) }).await;
    stopped.says("nothing was recorded", SOON).await;
    let after = cluster.execution(&id).await;
    assert_eq!(after, ended, "the zombie changed the execution");
    assert_one_backup(&held.root, &after);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_may_not_freeze_has_no_child_alive_when_its_lease_ends() {
    let mut cluster = Cluster::build().workers(0).env("DBACKUP_FREEZE_SECONDS", 0).start().await;
    let database = cluster.add_worker_behind_a_proxy().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    let child = cluster.workers[0].children()[0];

    database.set(Mode::Hold);
    until("its lease ends", SOON, || async {
        (cluster.count("select count(*) from execution_leases where expires_at < clock_timestamp()").await == 1
            || cluster.count("select count(*) from execution_leases").await == 0)
            .then_some(())
    })
    .await;
    assert!(!is_alive(child), "the dump went on after the lease");
    cluster.in_status(&id, "Pending", SOON).await;

    database.set(Mode::Pass);
    held.proxy.set(Mode::Pass);
    let ended = cluster.ended(&id, Duration::from_secs(60)).await;
    assert_eq!(ended["status"], "Success", "the worker works again when its database is back: {ended:#}");
    until("nothing is left of the first attempt", SOON, || async { (files(&held.root).len() == 2).then_some(()) })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_cut_off_from_postgres_publishes_nothing_although_its_dump_is_whole() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let database = cluster.add_worker_behind_a_proxy().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;

    database.set(Mode::Hold);
    held.proxy.set(Mode::Pass);
    until("its lease is taken", SOON, || async {
        let visible: Vec<PathBuf> = files(&held.root)
            .into_iter()
            .filter(|f| f.file_name().is_some_and(|n| !n.to_string_lossy().starts_with('.')))
            .collect();
        assert_eq!(visible, Vec::<PathBuf>::new(), "published without a lease that is known to last");
        (cluster.count("select rescues::bigint from executions").await == 1).then_some(())
    })
    .await;

    database.set(Mode::Pass);
    let ended = cluster.ended(&id, Duration::from_secs(60)).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(2)), "{ended:#}");
    until("nothing is left of the first attempt", SOON, || async { (files(&held.root).len() == 2).then_some(()) })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_between_the_commit_of_an_end_and_its_answer_tells_of_no_lost_lease() {
    let mut cluster = Cluster::build().env("DBACKUP_METRICS_LISTEN", "127.0.0.1:0").workers(0).start().await;
    let database = cluster.add_worker_behind_a_proxy().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    database.set(Mode::HoldCommitted);
    held.proxy.set(Mode::Pass);
    cluster.in_status(&id, "Success", SOON).await;
    let heartbeats = async || cluster.told_by_workers("dbackup_heartbeats_total", &[]).await;
    let before = heartbeats().await;
    // The second was sent after the commit, and once the third is counted, that one's answer has been looked at.
    until("heartbeats are answered", SOON, || async { (heartbeats().await >= before + 3.0).then_some(()) }).await;
    assert_eq!(cluster.told_by_workers("dbackup_worker_runs", &[]).await, 1.0, "the worker has heard of the end");
    database.set(Mode::Pass);
    cluster.workers[0].says("the run ended", SOON).await;
    assert!(!cluster.workers[0].log().contains("the lease was lost"), "{}", cluster.workers[0].log());
    assert_eq!(cluster.told_by_workers("dbackup_leases_lost_total", &[]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_of_the_database_that_is_set_forward_takes_no_run_from_a_worker_that_lives() {
    let cluster = Cluster::start().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    for _ in 0..8 {
        // What a step of the clock does to a lease.
        let over = "update execution_leases set expires_at = clock_timestamp() - interval '1 minute'";
        sqlx::query(over).execute(&cluster.pool).await.expect("updates");
        until("a heartbeat moves the lease on", SOON, || async {
            let moved = "select count(*) from execution_leases where expires_at > clock_timestamp()";
            (cluster.count(moved).await == 1).then_some(())
        })
        .await;
    }
    held.proxy.set(Mode::Pass);
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(1)), "{ended:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_rescued_more_than_three_times_fails_as_worker_lost() {
    let cluster = Cluster::start().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    sqlx::query("update executions set rescues = 3").execute(&cluster.pool).await.expect("updates");
    cluster.workers.iter().for_each(|w| w.signal(Signal::SIGSTOP));
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!(
        (ended["status"].as_str(), ended["outcome"].as_str(), ended["errorCode"].as_str()),
        (Some("Failed"), Some("WorkerLost"), Some("worker_lost")),
        "{ended:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_runs_end_within_the_drain_and_gives_the_rest_back_uncounted() {
    let mut cluster = Cluster::build().workers(1).env("DBACKUP_DRAIN_SECONDS", 1).start().await;
    let held = Held::new(&cluster, json!({ "maxAttempts": 1 })).await;
    let id = held.run(&cluster).await;
    cluster.workers[0].signal(Signal::SIGTERM);
    let status = cluster.workers[0].end(Duration::from_secs(15)).await;
    assert_eq!(status.code(), Some(0), "{}", cluster.workers[0].log());
    let waiting = cluster.execution(&id).await;
    assert_eq!(waiting["status"], "Pending", "{waiting:#}");
    assert_eq!(cluster.count("select (failures + rescues)::bigint from executions").await, 0);
    assert_eq!(files(&held.root), Vec::<PathBuf>::new());

    held.proxy.set(Mode::Pass);
    cluster.add_worker(&[]).await;
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(2)), "{ended:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_claims_in_the_moment_of_its_sigterm_is_given_back_uncounted() {
    let mut cluster = Cluster::build().workers(1).start().await;
    let job = job_without_workers(&cluster, json!({})).await;
    let mut gate = cluster.pool.begin().await.expect("begins");
    sqlx::query("select from queue_gate for update").execute(&mut *gate).await.expect("locks");
    let id = cluster.trigger(&job).await;
    let claims = "select count(*) from pg_stat_activity
                   where datname = current_database() and wait_event_type = 'Lock' and query like '%claim_executions%'";
    until("its claim is under way", SOON, || async { (cluster.count(claims).await == 1).then_some(()) }).await;
    cluster.workers[0].signal(Signal::SIGTERM);
    let stops = "select count(*) from workers where state <> 'Active'";
    until("the worker stops", SOON, || async { (cluster.count(stops).await == 1).then_some(()) }).await;
    gate.rollback().await.expect("rolls back");
    assert_eq!(cluster.workers[0].end(SOON).await.code(), Some(0), "{}", cluster.workers[0].log());
    // A claim is committed, whoever hears the answer.
    until("the claim has ended", SOON, || async { (cluster.count(claims).await == 0).then_some(()) }).await;
    assert_eq!(cluster.count("select count(*) from execution_leases").await, 0, "its lease has to run out");
    let waiting = cluster.execution(&id).await;
    assert_eq!((&waiting["status"], &waiting["attempt"]), (&json!("Pending"), &json!(1)), "{waiting:#}");
    assert_eq!(cluster.count("select (failures + rescues)::bigint from executions").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_the_network_is_tried_again_and_one_of_the_password_is_not() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(100).await;
    let proxy = Proxy::start(source.port).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster
        .job(
            &cluster.source("postgres", source.config_at(proxy.port)).await,
            &[&destination],
            json!({ "maxAttempts": 3 }),
        )
        .await;
    proxy.set(Mode::Cut);
    let id = cluster.trigger(&job).await;
    until("one attempt failed", SOON, || async {
        (cluster.count("select failures::bigint from executions").await >= 1).then_some(())
    })
    .await;
    proxy.set(Mode::Pass);
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!(ended["status"], "Success", "{ended:#}");
    assert!(ended["attempt"].as_i64() >= Some(2) && ended["error"] == Value::Null, "{ended:#}");

    let mut wrong = source.config();
    wrong["password"] = json!("wrong");
    let job = cluster.job(&cluster.source("postgres", wrong).await, &[&destination], json!({ "maxAttempts": 3 })).await;
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!((ended["attempt"].as_i64(), ended["errorCode"].as_str()), (Some(1), Some("source_auth")), "{ended:#}");
}
