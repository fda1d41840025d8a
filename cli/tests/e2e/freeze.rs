//! The service's own database goes away in the middle of runs: they stand still, and go on when it is back.

use std::time::Duration;

use nix::unistd::Pid;
use serde_json::json;

use crate::{
    destinations::held_upload,
    harness::{
        Cluster, SOON, files,
        held::Held,
        postgres_port,
        process::{is_alive, stands_still},
        proxy::{Mode, Proxy},
        s3::S3Server,
        source::PostgresSource,
        until,
    },
};

fn children(cluster: &Cluster) -> Vec<Pid> {
    cluster.workers.iter().flat_map(|worker| worker.children()).collect()
}

async fn all_leases_are_over(cluster: &Cluster, runs: i64) {
    let over = "select count(*) from execution_leases where expires_at < clock_timestamp()";
    until("every lease is over", SOON, || async { (cluster.count(over).await == runs).then_some(()) }).await;
}

async fn count_what_was_lost(cluster: &Cluster) -> i64 {
    cluster.count("select sum(rescues + failures + attempt - 1)::bigint from executions").await
}

#[tokio::test(flavor = "multi_thread")]
async fn five_dumps_outlive_an_outage_of_the_database_without_a_rescue() {
    for mode in [Mode::Cut, Mode::Hold] {
        let database = Proxy::start(postgres_port()).await;
        let cluster = Cluster::build().limit(5).database_at(database.port).start().await;
        let mut jobs = vec![Held::mariadb(&cluster).await];
        for _ in 0..4 {
            jobs.push(Held::new(&cluster, json!({})).await);
        }
        let mut runs = Vec::new();
        for job in &jobs {
            runs.push(job.run(&cluster).await);
        }
        let tools = children(&cluster);
        assert_eq!(tools.len(), 5);

        database.set(mode);
        until("every dump stands still", SOON, || async { tools.iter().all(|t| stands_still(*t)).then_some(()) }).await;
        all_leases_are_over(&cluster, 5).await;
        assert!(tools.iter().all(|tool| stands_still(*tool)), "{mode:?}: a dump was active without a lease");
        // Let the dumps go on if they can: they may not.
        jobs.iter().for_each(|job| job.proxy.set(Mode::Pass));
        let written: Vec<_> = jobs.iter().map(|job| files(&job.root)).collect();

        database.set(Mode::Pass);
        for (run, job) in runs.iter().zip(&jobs) {
            let ended = cluster.ended(run, Duration::from_secs(60)).await;
            assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(1)), "{ended:#}");
            assert_eq!(files(&job.root).len(), 2);
        }
        assert_eq!(written.iter().map(Vec::len).sum::<usize>(), 5, "{mode:?}: published meanwhile: {written:?}");
        assert_eq!(count_what_was_lost(&cluster).await, 0);
        let log = cluster.ok("GET", &format!("/api/executions/{}?includeLogs=true", runs[0]), None).await;
        assert!(log.to_string().contains("the run stands still"), "{mode:?}: the log tells of it: {log:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_to_s3_stands_still_in_an_outage_and_goes_on_with_the_parts_that_it_has() {
    let database = Proxy::start(postgres_port()).await;
    let cluster = Cluster::build().workers(1).database_at(database.port).start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), None).await;
    let (source, run) = held_upload(&cluster, &server).await;
    let (uploads, tool) = (server.open_uploads(), children(&cluster)[0]);
    assert_eq!(uploads.len(), 1, "{uploads:?}");

    database.set(Mode::Cut);
    until("the dump stands still", SOON, || async { stands_still(tool).then_some(()) }).await;
    all_leases_are_over(&cluster, 1).await;
    source.set(Mode::Pass);
    assert_eq!((server.open_uploads(), server.objects()), (uploads, vec![]), "it went on without a lease");

    database.set(Mode::Pass);
    let ended = cluster.ended(&run, Duration::from_secs(60)).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(1)), "{ended:#}");
    assert_eq!(count_what_was_lost(&cluster).await, 0);
    assert_eq!((server.objects().len(), server.open_uploads()), (2, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_needs_the_database_in_its_middle_waits_for_it() {
    let database = Proxy::start(postgres_port()).await;
    let cluster = Cluster::build().workers(1).database_at(database.port).start().await;
    let source = PostgresSource::with_rows(60_000).await;
    let job = Held::databases(&cluster, source.config(), &[&source.database, "postgres"]).await;
    let run = job.run(&cluster).await;
    // The name of the second object is recorded before its first byte.
    database.set(Mode::Cut);
    job.proxy.set(Mode::Pass);
    all_leases_are_over(&cluster, 1).await;
    database.set(Mode::Pass);
    let ended = cluster.ended(&run, Duration::from_secs(60)).await;
    assert_eq!(ended["status"], "Success", "{ended:#}");
    assert_eq!(count_what_was_lost(&cluster).await, 0);
    assert_eq!(files(&job.root).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_stood_still_for_too_long_is_killed_and_given_back_uncounted() {
    let database = Proxy::start(postgres_port()).await;
    let cluster = Cluster::build().database_at(database.port).env("DBACKUP_FREEZE_SECONDS", 1).start().await;
    let job = Held::new(&cluster, json!({ "maxAttempts": 1 })).await;
    let run = job.run(&cluster).await;
    let tool = children(&cluster)[0];
    database.set(Mode::Cut);
    until("the dump is killed", SOON, || async { (!is_alive(tool)).then_some(()) }).await;
    job.proxy.set(Mode::Pass);
    database.set(Mode::Pass);
    let ended = cluster.ended(&run, Duration::from_secs(60)).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(2)), "{ended:#}");
    assert_eq!(cluster.count("select (rescues + failures)::bigint from executions").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_cut_off_alone_stands_still_before_anyone_takes_over_and_then_gives_up() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let database = cluster.add_worker_behind_a_proxy().await;
    let job = Held::new(&cluster, json!({})).await;
    let run = job.run(&cluster).await;
    let tool = children(&cluster)[0];

    database.set(Mode::Hold);
    cluster.in_status(&run, "Pending", SOON).await;
    assert!(stands_still(tool), "the dump was active when its lease was taken");
    cluster.add_worker(&[]).await;
    job.proxy.set(Mode::Pass);
    let ended = cluster.ended(&run, Duration::from_secs(60)).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(2)), "{ended:#}");
    assert!(stands_still(tool), "the dump went on without a lease");

    database.set(Mode::Pass);
    until("the dump is killed", SOON, || async { (!is_alive(tool)).then_some(()) }).await;
    until("nothing is left of the first attempt", SOON, || async { (files(&job.root).len() == 2).then_some(()) }).await;
    assert_eq!(cluster.execution(&run).await, ended, "the zombie changed the execution");
}
