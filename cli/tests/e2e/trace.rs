//! One trace from the caller to the stored byte.

use serde_json::json;

use crate::harness::{Cluster, SOON, otlp::Receiver, source::PostgresSource, until};

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_trace_holds_the_spans_of_api_and_worker() {
    let receiver = Receiver::start().await;
    let cluster = Cluster::build()
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)
        .env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        .env("OTEL_BSP_SCHEDULE_DELAY", 100)
        .start()
        .await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let response = cluster
        .http
        .post(format!("{}/api/jobs/{job}/run", cluster.url(1)))
        .bearer_auth(&cluster.admin_key)
        .header("traceparent", format!("00-{trace}-{parent}-01"))
        .send()
        .await
        .expect("answers");
    assert_eq!(response.headers()["x-trace-id"], trace);
    let id =
        response.json::<serde_json::Value>().await.expect("JSON")["executionId"].as_str().expect("an id").to_owned();
    let execution = cluster.ended(&id, SOON).await;
    assert_eq!(
        (execution["status"].as_str(), execution["traceId"].as_str()),
        (Some("Success"), Some(trace)),
        "{execution:#}"
    );

    let wanted = [
        "POST /api/jobs/{id}/run",
        "execution.run",
        "source.inspect",
        "pipeline.dump",
        "pipeline.upload",
        "pipeline.publish",
    ];
    let spans = until("every span arrives", SOON, || async {
        let spans: Vec<_> = receiver.spans().into_iter().filter(|s| hex::encode(&s.span.trace_id) == trace).collect();
        wanted.iter().all(|name| spans.iter().any(|s| s.span.name == *name)).then_some(spans)
    })
    .await;
    let named = |name: &str| spans.iter().find(|s| s.span.name == name).expect("it is there");
    let (request, run) = (named(wanted[0]), named(wanted[1]));
    assert_eq!(hex::encode(&request.span.parent_span_id), parent, "the request continues the caller's span");
    assert_eq!(run.span.parent_span_id, request.span.span_id, "the run continues the request");
    assert!(
        request.service.contains("dbackup-api") && run.service.contains("dbackup-worker"),
        "{} {}",
        request.service,
        run.service
    );
    for stage in &wanted[2..] {
        assert_eq!(named(stage).span.parent_span_id, run.span.span_id, "{stage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_without_a_trace_begins_one() {
    let receiver = Receiver::start().await;
    let cluster = Cluster::build()
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)
        .env("OTEL_BSP_SCHEDULE_DELAY", 100)
        .start()
        .await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    let (first, second) = (cluster.backup(&job).await, cluster.backup(&job).await);
    let trace = first["traceId"].as_str().expect("a trace");
    assert_ne!(first["traceId"], second["traceId"], "each trigger has its own");
    until("the run's span continues the request's", SOON, || async {
        let spans = receiver.spans();
        let run = spans.iter().find(|s| s.span.name == "execution.run" && hex::encode(&s.span.trace_id) == trace)?;
        let request = spans.iter().find(|s| s.span.span_id == run.span.parent_span_id)?;
        assert!(request.span.parent_span_id.is_empty(), "the request has a parent");
        Some(())
    })
    .await;
}
