//! Collectors: how spans reach them, and that one which is slow or away is in nobody's way.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    harness::{
        Builder, Cluster, Process, SOON,
        otlp::{self, Receiver},
        source::PostgresSource,
        until,
    },
    trace::{CALLER, TRACE, traced, trigger},
};

async fn job(cluster: &Cluster) -> String {
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    cluster.job(&source, &[&destination], json!({})).await
}

/// A run that is traced by such a cluster, from the request to the end.
async fn is_traced(receiver: &Receiver, cluster: Builder) -> Vec<crate::harness::otlp::Received> {
    let cluster = cluster
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)
        .env("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=of%20the%20tests,x-dataset=backups")
        .env("OTEL_BSP_SCHEDULE_DELAY", 100)
        .start()
        .await;
    let run = cluster.backup(&job(&cluster).await).await;
    let trace = run["traceId"].as_str().expect("a trace");
    let spans = receiver.holds(trace, &[("enqueue", 1), ("claim", 1), ("commit", 1), ("attempt", 1)], SOON).await;
    for span in &spans {
        assert_eq!(span.headers["x-api-key"], "of the tests");
        assert_eq!(span.headers["x-dataset"], "backups");
    }
    assert!(!cluster.logs().contains("of the tests"), "a header is in the log");
    spans
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_go_by_grpc_where_the_variable_says_so() {
    let receiver = Receiver::start().await;
    let spans = is_traced(&receiver, Cluster::build().env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")).await;
    assert!(spans.iter().all(|s| s.headers["content-type"] == "application/grpc"));
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_go_over_tls_by_both_protocols_to_a_collector_whose_authority_is_trusted() {
    let (receiver, authority) = Receiver::with_tls().await;
    for protocol in ["http/protobuf", "grpc"] {
        let cluster = Cluster::build()
            .env("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
            .env("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
            .env("SSL_CERT_FILE", authority.display());
        is_traced(&receiver, cluster).await;
    }
    // Without the authority among those of the system, nothing is sent.
    let before = receiver.spans().len();
    for protocol in ["http/protobuf", "grpc"] {
        let cluster = Cluster::build()
            .env("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)
            .env("OTEL_EXPORTER_OTLP_TIMEOUT", 2_000)
            .env("OTEL_BSP_SCHEDULE_DELAY", 100)
            .start()
            .await;
        cluster.backup(&job(&cluster).await).await;
        until("a process tells that nobody takes its spans", SOON, || async {
            cluster.logs().contains("spans could not be sent").then_some(())
        })
        .await;
    }
    assert_eq!(receiver.spans().len(), before, "sent to a stranger");
    std::fs::remove_dir_all(authority.parent().expect("a folder")).expect("removes");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_is_named_as_the_operator_wants() {
    let receiver = Receiver::start().await;
    let named = Cluster::build()
        .env("OTEL_SERVICE_NAME", "backups")
        .env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.name=ignored");
    for span in is_traced(&receiver, named).await {
        assert_eq!(span.of_process("service.name").as_deref(), Some("backups"));
        assert_eq!(span.of_process("deployment.environment.name").as_deref(), Some("test"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_keeps_no_more_than_the_variables_allow_and_says_how_much_was_left_out() {
    let receiver = Receiver::start().await;
    let limited = Cluster::build().env("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", 3).env("OTEL_SPAN_LINK_COUNT_LIMIT", 0);
    let spans = is_traced(&receiver, limited).await;
    let of = |name: &str| &spans.iter().find(|span| span.span.name == name).expect("it is there").span;
    let (request, attempt) = (of("POST /api/jobs/{id}/run"), of("attempt"));
    assert_eq!(request.attributes.len(), 3);
    assert_eq!(request.attributes[0].key, "http.request.method", "what is noted first stays");
    assert!(request.dropped_attributes_count > 0, "{request:?}");
    assert_eq!((attempt.links.len(), attempt.dropped_links_count), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_when_the_exporter_is_none_or_the_sdk_disabled_and_then_nobody_else_is_told_to() {
    let receiver = Receiver::start().await;
    for (name, value) in [("OTEL_TRACES_EXPORTER", "none"), ("OTEL_SDK_DISABLED", "true")] {
        let cluster = traced(&receiver).env(name, value).start().await;
        let job = job(&cluster).await;
        // A flag that says otherwise would have others record the children of spans that nobody has.
        let id = trigger(&cluster, &job, &format!("00-{TRACE}-{CALLER}-01")).await;
        let run = cluster.ended(&id, SOON).await;
        assert_eq!(run["traceId"], TRACE, "a trace id is there all the same");
        let stored: String = sqlx::query_scalar("select traceparent from executions where id = $1::uuid")
            .bind(&id)
            .fetch_one(&cluster.pool)
            .await
            .expect("a traceparent");
        assert!(stored.ends_with("-00"), "{name}: {stored}");
        assert_nothing_came(cluster, &receiver).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_that_begins_here_is_not_sent_where_the_sampler_says_so() {
    let receiver = Receiver::start().await;
    let cluster = traced(&receiver).env("OTEL_TRACES_SAMPLER", "always_off").start().await;
    cluster.backup(&job(&cluster).await).await;
    assert_nothing_came(cluster, &receiver).await;
}

/// Stops all processes at once, and waits for their end.
async fn stop(cluster: &mut Cluster) {
    for process in cluster.workers.iter_mut().chain(cluster.apis.iter_mut().map(|(api, _)| api)) {
        process.signal(Signal::SIGTERM);
    }
    for process in cluster.workers.iter_mut().chain(cluster.apis.iter_mut().map(|(api, _)| api)) {
        process.end(SOON).await;
    }
}

/// Not even at their end, when they send what they have.
async fn assert_nothing_came(mut cluster: Cluster, receiver: &Receiver) {
    stop(&mut cluster).await;
    assert_eq!(receiver.spans().len(), 0, "{:?}", receiver.spans());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_sends_what_it_has_at_its_end() {
    let receiver = Receiver::start().await;
    let mut cluster = Cluster::build()
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)
        .env("OTEL_BSP_SCHEDULE_DELAY", 600_000)
        .start()
        .await;
    let run = cluster.backup(&job(&cluster).await).await;
    stop(&mut cluster).await;
    let trace = run["traceId"].as_str().expect("a trace");
    receiver.holds(trace, &[("enqueue", 1), ("attempt", 1)], Duration::from_secs(1)).await;
}

/// Policy and niceness of the threads of a process whose names begin so, by `/proc` (proc(5)).
fn scheduling(process: &Process, name: &str) -> Vec<(u32, i32)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid())).expect("a process");
    // A thread may end meanwhile.
    let stats = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    let of_name = stats.filter_map(|stat| {
        let (before, after) = stat.rsplit_once(") ").expect("a name in brackets");
        let named = before.split_once('(').is_some_and(|(_, of)| of.starts_with(name));
        let field = |number: usize| {
            after.split(' ').nth(number - 3).and_then(|text| text.parse::<i32>().ok()).expect("a number")
        };
        named.then(|| (field(41).unsigned_abs(), field(19)))
    });
    of_name.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_threads_that_export_never_interrupt_those_that_answer_and_yield_to_them() {
    const BATCH: u32 = 3;
    let receiver = Receiver::start().await;
    let cluster = traced(&receiver).start().await;
    for process in cluster.workers.iter().chain(cluster.apis.iter().map(|(api, _)| api)) {
        for name in ["OpenTelemetry", "reqwest"] {
            assert_eq!(scheduling(process, name), [(BATCH, 10)], "{name}");
        }
        let answering = scheduling(process, "tokio");
        assert!(!answering.is_empty() && answering.iter().all(|of| *of == (0, 0)), "{answering:?}");
    }
}

/// The longest of some triggers, and the longest of their runs, with the time that the processes took to stop.
async fn times(cluster: Builder) -> (Duration, Duration, Duration) {
    let mut cluster = cluster.start().await;
    let job = job(&cluster).await;
    let (mut trigger, mut run) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..3 {
        let began = Instant::now();
        let id = cluster.trigger(&job).await;
        trigger = trigger.max(began.elapsed());
        assert_eq!(cluster.ended(&id, SOON).await["status"], "Success");
        run = run.max(began.elapsed());
    }
    let began = Instant::now();
    stop(&mut cluster).await;
    (trigger, run, began.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_or_never_answers_costs_no_trigger_no_run_and_two_seconds_of_a_stop() {
    let without = times(Cluster::build()).await;
    let silent = otlp::silent().await;
    for (protocol, endpoint) in [
        ("http/protobuf", silent.as_str()),
        ("grpc", &silent),
        ("http/protobuf", "http://127.0.0.1:1"),
        ("grpc", "http://127.0.0.1:1"),
    ] {
        let cluster = Cluster::build()
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
            .env("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
            .env("OTEL_BSP_SCHEDULE_DELAY", 100);
        let with = times(cluster).await;
        let second = Duration::from_secs(1);
        assert!(with.0 < without.0 + second, "triggers by {protocol} to {endpoint}: {with:?}, {without:?} without");
        assert!(with.1 < without.1 + second * 2, "runs by {protocol} to {endpoint}: {with:?}, {without:?} without");
        assert!(with.2 < without.2 + second * 4, "stops by {protocol} to {endpoint}: {with:?}, {without:?} without");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_sent_so_few_at_once_as_to_hold_up_no_request_unless_more_are_asked_for() {
    const REQUESTS: usize = 400;
    for (asked, (fewest, most)) in [(None, (100, 128)), (Some(512), (129, 512))] {
        let receiver = Receiver::start().await;
        // What is not sent because it is many waits for the end.
        let mut cluster = Cluster::build().workers(0).env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint);
        cluster = cluster.env("OTEL_BSP_SCHEDULE_DELAY", 600_000);
        if let Some(asked) = asked {
            cluster = cluster.env("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", asked);
        }
        let mut cluster = cluster.start().await;
        for _ in 0..REQUESTS {
            cluster.ok("GET", "/api/jobs", None).await;
        }
        stop(&mut cluster).await;
        let largest = receiver.largest();
        assert!((fewest..=most).contains(&largest), "{largest} at once, asked for {asked:?}");
        let came = receiver.spans().iter().filter(|span| span.span.name == "GET /api/jobs").count();
        assert_eq!(came, REQUESTS, "nothing is left out");
    }
}
