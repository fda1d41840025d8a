//! How processes begin and end: probes, SIGTERM.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Cluster, Process, SOON, postgres_port,
    process::is_alive,
    proxy::{Mode, Proxy},
    source::PostgresSource,
    until,
};

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_an_api_process_answer_what_it_took_and_take_nothing_more() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    // Without a worker the answer takes five seconds.
    let request = cluster.http.post(format!("{}/api/sources/{source}/test", cluster.url(0)));
    let under_way = tokio::spawn(request.bearer_auth(&cluster.admin_key).send());
    until("the request is under way", SOON, || async {
        (cluster.count("select count(*) from connection_tests").await == 1).then_some(())
    })
    .await;

    cluster.apis[0].0.signal(Signal::SIGTERM);
    cluster.takes_no_connection(0).await;
    assert!(!under_way.is_finished(), "it was answered before the end began");
    let answer = under_way.await.expect("joins").expect("it is answered");
    let (status, body) = (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"));
    assert_eq!((status, body["code"].as_str()), (503, Some("no_worker")), "{body}");
    let ended = cluster.apis[0].0.end(Duration::from_secs(5)).await;
    assert_eq!(ended.code(), Some(0), "{}", cluster.apis[0].0.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_an_api_process_say_that_it_stops_serve_for_the_delay_and_then_tell_those_who_wait() {
    const DELAY: Duration = Duration::from_secs(5);
    let delay = DELAY.as_secs();
    let mut cluster = Cluster::build().env("DBACKUP_SHUTDOWN_DELAY_SECONDS", delay).limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    let execution = cluster.trigger(&job).await;
    let url = cluster.url(0).to_owned();
    let (http, key) = (cluster.http.clone(), cluster.admin_key.clone());
    let get = |path: String| http.get(format!("{url}{path}")).bearer_auth(&key);
    let wait = tokio::spawn(get(format!("/api/executions/{execution}?wait=60")).send());
    let mut events = get(format!("/api/executions/{execution}/events")).send().await.expect("a stream");
    events.chunk().await.expect("a stream").expect("its first event");

    cluster.apis[0].0.signal(Signal::SIGTERM);
    let signalled = Instant::now();
    until("it is not ready", SOON, || async {
        let answer = get("/readyz".to_owned()).send().await.expect("it still answers");
        (answer.status() == 503).then_some(())
    })
    .await;
    let (status, _, said) = cluster.dbackup(&["health", "--api", &url], "");
    assert_eq!(
        (status, said.trim()),
        (Some(1), format!("error: {} is not ready: /readyz answers 503", &url[7..]).as_str())
    );
    let (mut clock, mut triggers) = (tokio::time::interval(DELAY / 20), 0);
    while signalled.elapsed() < DELAY * 9 / 10 {
        clock.tick().await;
        let run = http.post(format!("{url}/api/jobs/{job}/run")).bearer_auth(&key);
        let triggered = run.send().await.unwrap_or_else(|e| panic!("after {:?}: {e:?}", signalled.elapsed()));
        assert_eq!(triggered.status(), 200);
        assert_eq!(triggered.headers()["connection"], "close", "a client would keep a connection that is about to end");
        triggers += 1;
    }
    assert!(!wait.is_finished(), "the wait ended before the delay");

    let answer = wait.await.expect("joins").expect("it is answered");
    assert!(signalled.elapsed() >= DELAY, "the wait ended after {:?}", signalled.elapsed());
    let (status, body) = (answer.status(), answer.json::<Value>().await.expect("JSON"));
    assert_eq!((status.as_u16(), body["data"]["status"].as_str()), (200, Some("Pending")), "{body}");
    while events.chunk().await.expect("the stream ends, and is not cut").is_some() {}
    let ended = cluster.apis[0].0.end(Duration::from_secs(5)).await;
    assert_eq!(ended.code(), Some(0), "{}", cluster.apis[0].0.log());
    assert!(signalled.elapsed() < DELAY + SOON / 3, "it ended after {:?}", signalled.elapsed());
    assert_eq!(cluster.count("select count(*) from executions").await, 1 + triggers, "a trigger of the delay was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_ends_at_once_on_sigterm_and_on_sigint_with_status_0() {
    let mut cluster = Cluster::start().await;
    for (worker, signal) in cluster.workers.iter_mut().zip([Signal::SIGTERM, Signal::SIGINT]) {
        worker.signal(signal);
        assert_eq!(worker.end(Duration::from_secs(5)).await.code(), Some(0), "{}", worker.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_a_draining_worker_at_once_with_the_status_of_its_death() {
    let mut cluster = Cluster::build().workers(1).start().await;
    let source = PostgresSource::with_rows(60_000).await;
    let proxy = Proxy::start(source.port).await;
    let (destination, _) = cluster.local_destination().await;
    let source_id = cluster.source("postgres", source.config_at(proxy.port)).await;
    let job = cluster.job(&source_id, &[&destination], json!({})).await;
    proxy.set(Mode::HoldAfter(1_000_000));
    cluster.trigger(&job).await;
    proxy.passes(1_000_000).await;
    let child = cluster.workers[0].children()[0];
    cluster.workers[0].signal(Signal::SIGTERM);
    cluster.workers[0].says("waiting at most 25 s for runs to end", SOON).await;
    cluster.workers[0].signal(Signal::SIGTERM);
    let ended = cluster.workers[0].end(Duration::from_secs(5)).await;
    assert_eq!(ended.code(), Some(128 + 15), "{}", cluster.workers[0].log());
    until("no child survives it", Duration::from_secs(2), || async { (!is_alive(child)).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_start_and_work_on_a_schema_that_a_later_version_has_brought_up_to_date() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let later = "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
                 values (9999, 'of a later version', true, '\\x00', 0)";
    sqlx::query(later).execute(&cluster.pool).await.expect("inserts");
    cluster.restart_api(0).await;
    cluster.add_worker(&[]).await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let run = cluster.backup(&job).await;
    assert_eq!(run["status"], "Success", "{run:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn readyz_follows_the_database_and_livez_does_not() {
    let cluster = Cluster::build().workers(0).start().await;
    let database = Proxy::start(postgres_port()).await;
    let url = cluster.database_url_at(database.port);
    let args = ["--listen", "127.0.0.1:0"];
    let mut api = Process::start("dbackup-api", &args, cluster.env(), &[("DATABASE_URL", url)]);
    let address = api.wait_for_field("the API listens", "address").await;
    let (http, address) = (&cluster.http, &address);
    let status = async |path: &str| {
        let answer = http.get(format!("http://{address}{path}")).send().await.expect("answers");
        answer.status().as_u16()
    };
    assert_eq!(status("/readyz").await, 200);
    for mode in [Mode::Cut, Mode::Hold] {
        database.set(mode);
        until("it is not ready", SOON, || async { (status("/readyz").await == 503).then_some(()) }).await;
        assert_eq!(status("/livez").await, 200);
        database.set(Mode::Pass);
        until("it is ready again", SOON, || async { (status("/readyz").await == 200).then_some(()) }).await;
    }
}
