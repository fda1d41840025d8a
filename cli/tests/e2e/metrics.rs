//! The pages of metrics: what they count, who they name, and what they do not hold up.

use std::time::Duration;

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{
    Cluster, SOON,
    held::Held,
    metrics::promtool,
    otlp::Receiver,
    postgres_port,
    proxy::{Mode, Proxy},
    redis::Redis,
    source::{PASSWORD, PostgresSource},
    until,
};

const OPEN_METRICS: &str = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

/// A cluster of which every process has a page.
fn with_pages() -> crate::harness::Builder {
    Cluster::build().env("DBACKUP_METRICS_LISTEN", "127.0.0.1:0")
}

/// Waits until a condition of the page of the first API process holds; what it knows from the database is 2 s old.
async fn told(cluster: &Cluster, name: &str, labels: &[(&str, &str)], value: f64) {
    until(&format!("{name} {labels:?} is {value}"), SOON, || async {
        (cluster.told(name, labels).await == Some(value)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_counted_by_both_kinds_of_process_and_its_trace_is_an_exemplar() {
    // Only a trace that somebody keeps is an exemplar.
    let receiver = Receiver::start().await;
    let cluster = with_pages().env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint).start().await;
    let source = PostgresSource::with_rows(1_000).await;
    let (destination, _) = cluster.local_destination().await;
    let store = cluster.ok("GET", &format!("/api/destinations/{destination}"), None).await;
    let store = store["slug"].as_str().expect("a slug");
    let more = json!({ "slug": "shop-daily", "expectEverySeconds": 86_400 });
    let job = cluster.job(&cluster.source("postgres", source.config()).await, &[&destination], more).await;
    let run = cluster.backup(&job).await;

    let of_it = [("engine", "postgres"), ("outcome", "success")];
    until("the worker has counted it", SOON, || async {
        (cluster.told_by_workers("dbackup_run_duration_seconds_count", &of_it).await == 1.0).then_some(())
    })
    .await;
    let artifact = &run["artifacts"].as_array().expect("artifacts")[0];
    let counted = async |name: &str, labels: &[(&str, &str)]| cluster.told_by_workers(name, labels).await;
    let plain = cluster.count("select plain_bytes from artifacts where plain_bytes is not null").await;
    assert_eq!(counted("dbackup_dumped_bytes_total", &[("engine", "postgres")]).await, plain as f64);
    let to = [("engine", "postgres"), ("kind", "local"), ("destination", store)];
    assert_eq!(Some(counted("dbackup_stored_bytes_total", &to).await), run["size"].as_f64(), "{artifact}");
    assert_eq!(counted("dbackup_run_wait_seconds_count", &[("engine", "postgres")]).await, 1.0);
    assert_eq!(counted("dbackup_claimed_executions_total", &[]).await, 1.0);
    assert_eq!(counted("dbackup_claim_duration_seconds_count", &[("result", "claimed")]).await, 1.0);
    assert_eq!(
        (counted("dbackup_worker_runs", &[]).await, counted("dbackup_worker_concurrency", &[]).await),
        (0.0, 8.0)
    );
    for bound in ["60", "3600", "86400"] {
        let labels = [of_it[1], ("le", bound)];
        assert_eq!(counted("dbackup_run_duration_seconds_bucket", &labels).await, 1.0, "a bucket of {bound} s");
    }

    let trace = run["traceId"].as_str().expect("a trace");
    let mut traces = Vec::new();
    for worker in &cluster.workers {
        let (content_type, page) = cluster.metrics_as(worker, OPEN_METRICS).await;
        assert!(content_type.starts_with("application/openmetrics-text; version=1.0.0"), "{content_type}");
        assert!(page.0.ends_with("# EOF\n"));
        for name in ["dbackup_run_duration_seconds_bucket", "dbackup_run_wait_seconds_bucket"] {
            traces.extend(page.traces(name));
        }
    }
    assert_eq!(traces, [trace, trace], "of the run and of its wait");
    // The first API process made the job, or triggered the run: whichever it was, its own trace is there.
    let answer = cluster.http.get(format!("{}/api/jobs", cluster.url(0))).bearer_auth(&cluster.admin_key).send().await;
    let mine = answer.expect("answers").headers()["x-trace-id"].to_str().expect("text").to_owned();
    let (_, page) = cluster.metrics_as(&cluster.apis[0].0, OPEN_METRICS).await;
    let route = [("method", "GET"), ("route", "/api/jobs"), ("status", "200")];
    assert_eq!(page.value("dbackup_http_requests_total", &route), Some(1.0));
    for name in ["dbackup_http_requests_total", "dbackup_http_request_duration_seconds_bucket"] {
        assert!(page.traces(name).contains(&mine), "{name}: {mine} is not in {}", page.0);
    }

    let snapshot: chrono::DateTime<chrono::Utc> = run["snapshotAt"].as_str().expect("a time").parse().expect("a time");
    let of_job = [("backup_job", "shop-daily")];
    told(&cluster, "dbackup_job_last_success_timestamp_seconds", &of_job, snapshot.timestamp_millis() as f64 / 1e3)
        .await;
    let page = cluster.metrics(&cluster.apis[0].0).await;
    assert_eq!(page.value("dbackup_job_last_success_size_bytes", &of_job), run["size"].as_f64());
    for (name, value) in
        [("expected_interval_seconds", 86_400.0), ("overdue", 0.0), ("never_succeeded", 0.0), ("paused", 0.0)]
    {
        assert_eq!(page.value(&format!("dbackup_job_{name}"), &of_job), Some(value), "{name}");
    }
    cluster.ok("DELETE", &format!("/api/jobs/{job}"), None).await;
    until("a job that is gone has no series", SOON, || async {
        cluster.told("dbackup_job_overdue", &of_job).await.is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_finds_nothing_wrong_and_no_page_holds_a_secret_or_the_name_of_a_database() {
    let mut cluster = with_pages().start().await;
    let source = PostgresSource::with_rows(10).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&cluster.source("postgres", source.config()).await, &[&destination], json!({})).await;
    cluster.backup(&job).await;
    cluster.request_as("dbm_nobody", "GET", "/api/jobs", None).await;
    let mut pages = Vec::new();
    for process in cluster.apis.iter().map(|(api, _)| api).chain(&cluster.workers) {
        let page = cluster.metrics(process).await;
        assert!(promtool(&["check", "metrics"], &page.0).is_empty());
        pages.push(page.0);
        pages.push(cluster.metrics_as(process, OPEN_METRICS).await.1.0);
    }
    let database_password = url::Url::parse(&cluster.env()["DATABASE_URL"]).expect("a URL");
    let key = cluster.env()["DBACKUP_ENCRYPTION_KEY"].as_str();
    let secrets = [cluster.admin_key.as_str(), "dbm_", PASSWORD, key, &source.database, &source.role];
    for page in &pages {
        for secret in secrets {
            assert!(!page.contains(secret), "{secret} is in {page}");
        }
        assert!(!page.contains(&format!(":{}@", database_password.password().expect("a password"))));
    }
    // Nothing else is served there.
    let address = Cluster::metrics_address(&cluster.apis[0].0);
    for (method, path, status) in [("GET", "/", 404), ("GET", "/api/jobs", 404), ("POST", "/metrics", 405)] {
        let request = cluster.http.request(method.parse().expect("a method"), format!("http://{address}{path}"));
        assert_eq!(request.send().await.expect("answers").status(), status, "{method} {path}");
    }
    let metrics_of_the_api = cluster.http.get(format!("{}/metrics", cluster.url(0))).send().await.expect("answers");
    assert_eq!(metrics_of_the_api.status(), 404, "metrics have a port of their own");
    // Without an address there is no page, and an empty one is none.
    cluster.set_env("DBACKUP_METRICS_LISTEN", Some(""));
    let worker = cluster.add_worker(&[]).await;
    assert!(!worker.log().contains("metrics are served"));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_path_method_or_key_that_a_client_makes_up_adds_a_series() {
    let cluster = with_pages().workers(0).start().await;
    told(&cluster, "dbackup_rate_limit_fallback", &[], 0.0).await;
    let call = async |method: &str, path: &str| {
        let request = cluster.http.request(method.parse().expect("a method"), format!("{}{path}", cluster.url(0)));
        request.bearer_auth(&cluster.admin_key).send().await.expect("answers");
    };
    let wrong = ["PUT", "PATCH", "DELETE", "OPTIONS", "BREW"];
    for method in ["GET", "POST"].into_iter().chain(wrong) {
        call(method, "/no/such/route").await;
    }
    for method in ["GET"].into_iter().chain(wrong) {
        call(method, "/api/jobs/x/run").await;
        call(method, "/api/executions/x").await;
    }
    let before = cluster.metrics(&cluster.apis[0].0).await;
    for n in 0..100 {
        let method = ["GET", "POST", "PUT", "PROPFIND", "REPORT"][n % 5];
        call(method, &format!("/made/up/{n}?q={n}")).await;
        call("GET", &format!("/api/executions/{n}")).await;
        call(&format!("MADE{n}"), "/api/jobs/x/run").await;
        cluster.request_as(&format!("dbm_{n}"), "GET", "/api/jobs/x/run", None).await;
    }
    let after = cluster.metrics(&cluster.apis[0].0).await;
    let requests =
        |page: &crate::harness::metrics::Page| page.value("dbackup_http_requests_total", &[]).expect("there are");
    // One more in turn went to the other process.
    assert!(requests(&after) - requests(&before) >= 300.0, "they were counted");
    assert_eq!(after.series(), before.series(), "{}", after.0);
    assert!(!after.0.contains("made") && !after.0.contains("MADE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_away_is_seen_as_the_fallback_and_in_where_decisions_are_made() {
    let mut redis = Redis::start().await;
    let cluster = with_pages()
        .workers(0)
        .rate_limits(json!({ "read": { "limit": 30 } }))
        .env("REDIS_URL", redis.url())
        .start()
        .await;
    told(&cluster, "dbackup_rate_limit_fallback", &[], 0.0).await;
    let read = async |place: &str, decision: &str| {
        let labels = [("class", "read"), ("place", place), ("decision", decision)];
        cluster.told("dbackup_rate_limit_decisions_total", &labels).await.unwrap_or(0.0)
    };
    let call =
        async || cluster.http.get(format!("{}/api/health", cluster.url(0))).send().await.expect("answers").status();
    call().await;
    assert_eq!((read("redis", "allowed").await, read("process", "allowed").await), (1.0, 0.0));
    redis.kill();
    until("it limits by itself", SOON, || async {
        call().await;
        (cluster.told("dbackup_rate_limit_fallback", &[]).await == Some(1.0)).then_some(())
    })
    .await;
    until("one is refused", SOON, || async { (call().await == 429).then_some(()) }).await;
    assert!(read("process", "allowed").await > 0.0 && read("process", "refused").await > 0.0);
    redis.bring_back().await;
    told(&cluster, "dbackup_rate_limit_fallback", &[], 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_told_as_gone_its_run_as_rescued_and_what_waits_by_its_age() {
    let mut cluster = with_pages().limit(1).start().await;
    let held = Held::new(&cluster, json!({ "overlap": "allow" })).await;
    held.run(&cluster).await;
    let waiting = cluster.trigger(&held.job).await;
    told(&cluster, "dbackup_queue_pending", &[("pool", "default")], 1.0).await;
    let page = cluster.metrics(&cluster.apis[0].0).await;
    let numbers = ["dbackup_slots_used", "dbackup_slots_limit"].map(|name| page.value(name, &[]));
    assert_eq!(numbers, [Some(1.0), Some(1.0)]);
    assert_eq!(page.value("dbackup_workers", &[("state", "active")]), Some(2.0));
    until("it is seen to wait for a second", SOON, || async {
        let age = cluster.told("dbackup_queue_oldest_pending_age_seconds", &[("pool", "default")]).await;
        age.is_some_and(|age| age > 1.0).then_some(())
    })
    .await;
    let victim = cluster.busy_worker();
    assert_eq!(cluster.told_by_workers("dbackup_worker_runs", &[]).await, 1.0);
    cluster.workers[victim].kill().await;
    cluster.workers.remove(victim);
    told(&cluster, "dbackup_workers", &[("state", "gone")], 1.0).await;
    until("somebody has counted the rescue", SOON, || async {
        let mut rescues = cluster.told_by_workers("dbackup_rescues_total", &[("result", "requeued")]).await;
        for (api, _) in &cluster.apis {
            rescues +=
                cluster.metrics(api).await.value("dbackup_rescues_total", &[("result", "requeued")]).expect("told");
        }
        (rescues == 1.0).then_some(())
    })
    .await;
    held.proxy.set(Mode::Pass);
    cluster.ended(&waiting, SOON).await;
    told(&cluster, "dbackup_queue_pending", &[("pool", "default")], 0.0).await;
    // By a notification: a trigger's and a run's.
    for (kind, name) in [("work", "sent"), ("work", "received"), ("changed", "received")] {
        let name = format!("dbackup_notifications_{name}_total");
        assert!(cluster.told_by_workers(&name, &[("kind", kind)]).await > 0.0, "{name} {kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_loses_its_database_counts_missed_heartbeats_the_freeze_and_the_lost_lease() {
    let mut cluster = with_pages().workers(0).start().await;
    let database = cluster.add_worker_behind_a_proxy().await;
    let held = Held::new(&cluster, json!({})).await;
    held.run(&cluster).await;
    assert_eq!(cluster.told_by_workers("dbackup_leases_lost_total", &[]).await, 0.0);
    until("a heartbeat is answered", SOON, || async {
        (cluster.told_by_workers("dbackup_heartbeats_total", &[]).await > 0.0).then_some(())
    })
    .await;
    database.set(Mode::Cut);
    until("it stands still", SOON, || async {
        (cluster.told_by_workers("dbackup_run_freezes_total", &[]).await == 1.0).then_some(())
    })
    .await;
    assert!(cluster.told_by_workers("dbackup_heartbeats_missed_total", &[]).await > 0.0);
    // Its run is taken from it, and it hears so when the database is back.
    until("the run is rescued", SOON, || async {
        (cluster.count("select rescues::bigint from executions").await == 1).then_some(())
    })
    .await;
    database.set(Mode::Pass);
    until("it knows of its loss", SOON, || async {
        (cluster.told_by_workers("dbackup_leases_lost_total", &[]).await == 1.0).then_some(())
    })
    .await;
    until("the attempt is told as lost", SOON, || async {
        let lost = cluster.told_by_workers("dbackup_run_duration_seconds_count", &[("outcome", "lost")]).await;
        (lost == 1.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_database_away_every_page_answers_and_says_so() {
    let database = Proxy::start(postgres_port()).await;
    let cluster = with_pages().database_at(database.port).start().await;
    let (api, worker) = (&cluster.apis[0].0, &cluster.workers[0]);
    for process in [api, worker] {
        let page = cluster.metrics(process).await;
        assert_eq!(page.value("dbackup_database_up", &[]), Some(1.0));
        let open = ["in_use", "idle"].map(|state| page.value("dbackup_database_connections", &[("state", state)]));
        assert!(open.iter().all(Option::is_some) && open.iter().flatten().sum::<f64>() >= 1.0, "{open:?}");
        assert!(page.value("dbackup_database_connections_max", &[]) >= Some(4.0));
    }
    for mode in [Mode::Cut, Mode::Hold] {
        database.set(mode);
        for process in [api, worker] {
            let page = until("the page says so", SOON, || async {
                let page = cluster.metrics(process).await;
                (page.value("dbackup_database_up", &[]) == Some(0.0)).then_some(page)
            })
            .await;
            assert!(page.value("dbackup_notifications_failed_total", &[]).is_some(), "{mode:?}: its own are there");
            assert_eq!(page.value("dbackup_slots_limit", &[]), None, "{mode:?}: nothing is made up");
        }
        database.set(Mode::Pass);
        told(&cluster, "dbackup_database_up", &[], 1.0).await;
        told(&cluster, "dbackup_slots_limit", &[], 4.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scrapers_that_hang_hold_up_neither_the_service_nor_for_long_each_other() {
    let cluster = with_pages().workers(0).start().await;
    let address = Cluster::metrics_address(&cluster.apis[0].0);
    let mut hanging = Vec::new();
    for _ in 0..12 {
        let mut stream = TcpStream::connect(&address).await.expect("connects");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n").await.expect("writes");
        hanging.push(stream);
    }
    let health =
        cluster.http.get(format!("{}/api/health", cluster.url(0))).timeout(Duration::from_secs(2)).send().await;
    assert_eq!(health.expect("the service answers").status(), 200);
    assert_eq!(cluster.told("dbackup_database_up", &[]).await, Some(1.0));
    let mut first = hanging.remove(0);
    let mut rest = Vec::new();
    let _ = first.read_to_end(&mut rest).await;
    assert!(!String::from_utf8_lossy(&rest).contains("200 OK"), "it was turned away");
}
