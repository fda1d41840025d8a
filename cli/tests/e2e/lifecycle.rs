//! How processes begin and end: probes, SIGTERM.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Cluster, Process, SOON, at_port, postgres_port, postgres_url,
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
    let address = cluster.url(0).trim_start_matches("http://").to_owned();
    until("no connection is taken", SOON, || async {
        tokio::net::TcpStream::connect(&address).await.is_err().then_some(())
    })
    .await;
    assert!(!under_way.is_finished(), "it was answered before the end began");
    let answer = under_way.await.expect("joins").expect("it is answered");
    let (status, body) = (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"));
    assert_eq!((status, body["code"].as_str()), (503, Some("no_worker")), "{body}");
    let ended = cluster.apis[0].0.end(Duration::from_secs(5)).await;
    assert_eq!(ended.code(), Some(0), "{}", cluster.apis[0].0.log());
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
async fn readyz_follows_the_database_and_livez_does_not() {
    let cluster = Cluster::build().workers(0).start().await;
    let database = Proxy::start(postgres_port()).await;
    let url = at_port(&postgres_url(&cluster.database), database.port);
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
