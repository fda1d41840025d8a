//! One trace from the caller to the stored byte.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::{Value, json};

use crate::{
    encryption::key_file,
    harness::{
        Cluster, SOON,
        held::Held,
        hooks::Hooks,
        otlp::{Received, Receiver},
        proxy::Mode,
        source::{PASSWORD, PostgresSource},
        until,
    },
    schedules::set_due,
    webhooks::webhook,
};

/// A trace of a caller.
pub const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
/// The caller's span in it.
pub const CALLER: &str = "00f067aa0ba902b7";

/// A cluster that sends its spans at once, or nearly.
pub fn traced(receiver: &Receiver) -> crate::harness::Builder {
    Cluster::build().env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint).env("OTEL_BSP_SCHEDULE_DELAY", 100)
}

/// A cluster whose processes send nothing of themselves but what they send at once.
fn seldom(receiver: &Receiver) -> crate::harness::Builder {
    traced(receiver).env("OTEL_BSP_SCHEDULE_DELAY", 3_600_000)
}

/// Has a job's schedule fire; gives the run.
async fn fired(cluster: &Cluster, job: &str) -> Value {
    set_due(cluster, job).await;
    until("it fires", SOON, || async {
        let runs = cluster.ok("GET", &format!("/api/executions?jobId={job}"), None).await;
        runs.get(0).cloned()
    })
    .await
}

/// Triggers a job as a pipeline that traces itself; gives the execution's id.
pub async fn trigger(cluster: &Cluster, job: &str, traceparent: &str) -> String {
    let request = cluster.http.post(format!("{}/api/jobs/{job}/run", cluster.url(1))).bearer_auth(&cluster.admin_key);
    let request = request.header("traceparent", traceparent).header("tracestate", "vendor=opaque");
    let response = request.send().await.expect("answers");
    let trace = traceparent.split('-').nth(1).expect("a trace");
    assert_eq!(response.headers()["x-trace-id"], trace);
    let answer: Value = response.json().await.expect("JSON");
    answer["executionId"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

/// A job on a small database.
pub async fn plain_job(cluster: &Cluster, more: Value) -> String {
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    cluster.job(&source, &[&destination], more).await
}

/// Those of this name, in the order of time.
pub fn named<'a>(spans: &'a [Received], name: &str) -> Vec<&'a Received> {
    spans.iter().filter(|s| s.span.name == name).collect()
}

/// The one of this name.
pub fn one<'a>(spans: &'a [Received], name: &str) -> &'a Received {
    match named(spans, name)[..] {
        [one] => one,
        _ => panic!("{} spans of the name {name}", named(spans, name).len()),
    }
}

/// Every span has a parent that came too, but for the root.
fn assert_whole(spans: &[Received], root: &str) {
    let by_id: HashMap<String, &Received> = spans.iter().map(|s| (s.id(), s)).collect();
    assert_eq!(by_id.len(), spans.len(), "two spans of one id");
    for span in spans.iter().filter(|s| s.parent() != root) {
        assert!(by_id.contains_key(&span.parent()), "the parent of {} is missing", span.span.name);
    }
}

/// The names of the spans under one, each with how often it is there.
fn under(spans: &[Received], parent: &str) -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    for span in spans.iter().filter(|s| s.parent() == parent) {
        *names.entry(span.span.name.clone()).or_default() += 1;
    }
    names
}

fn counted(names: &[(&str, usize)]) -> BTreeMap<String, usize> {
    names.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_worker_was_killed_is_one_story_from_the_callers_span_to_the_commit_on_another_worker() {
    let receiver = Receiver::start().await;
    let mut cluster = traced(&receiver).start().await;
    let (_, recipient) = key_file(&cluster.scratch);
    let hooks = Hooks::start().await;
    webhook(&cluster, &hooks, json!({ "events": ["succeeded"] })).await;
    let held = Held::new(&cluster, json!({ "encryption": { "recipients": [recipient] } })).await;
    held.proxy.set(Mode::HoldAfter(1_000_000));
    let id = trigger(&cluster, &held.job, &format!("00-{TRACE}-{CALLER}-01")).await;
    held.proxy.passes(1_000_000).await;
    let victim = cluster.busy_worker();
    let lost = cluster.text("select worker from execution_leases").await;
    // As the last heartbeat told.
    let dumping = "select count(*) from execution_leases where stage = 'Dumping'";
    until("a heartbeat tells its stage", SOON, || async { (cluster.count(dumping).await == 1).then_some(()) }).await;
    receiver.holds(TRACE, &[("claim", 1), ("inspect", 1)], SOON).await;
    cluster.workers[victim].kill().await;
    held.proxy.set(Mode::Pass);
    let execution = cluster.ended(&id, SOON).await;
    assert_eq!(
        (execution["status"].as_str(), execution["attempt"].as_i64(), execution["traceId"].as_str()),
        (Some("Success"), Some(2), Some(TRACE)),
        "{execution:#}"
    );

    let spans = receiver
        .holds(TRACE, &[("POST /api/jobs/{id}/run", 1), ("attempt", 2), ("commit", 1), ("notify", 1)], SOON)
        .await;
    assert_whole(&spans, CALLER);
    let request = one(&spans, "POST /api/jobs/{id}/run");
    assert_eq!(request.parent(), CALLER, "the request continues the caller's span");
    assert_eq!(request.span.trace_state, "vendor=opaque");
    assert_eq!(under(&spans, &request.id()), counted(&[("auth", 1), ("rate_limit", 1), ("enqueue", 1)]));
    let enqueue = one(&spans, "enqueue");
    assert_eq!(
        under(&spans, &enqueue.id()),
        counted(&[("queue.wait", 2), ("claim", 2), ("attempt", 2), ("notify", 1)])
    );
    let context = format!("00-{TRACE}-{}-01", one(&spans, "notify").id());
    assert_eq!(hooks.receives(1, SOON).await[0].header("traceparent"), context, "who is told continues the trace");

    let [first, second] = named(&spans, "claim")[..] else { panic!("two claims") };
    assert_eq!(under(&spans, &first.id()), counted(&[("inspect", 1)]), "what the killed worker had ended");
    let stages =
        [("inspect", 1), ("dump", 1), ("compress", 1), ("encrypt", 1), ("upload", 1), ("verify", 1), ("commit", 1)];
    assert_eq!(under(&spans, &second.id()), counted(&stages));
    assert_eq!((first.links(), second.links()), (vec![], vec![first.id()]), "the second claim links to the first");
    let of = |key: &str| [first, second].map(|claim| claim.get(key));
    assert_eq!(of("dbackup.attempt"), [Some("1".to_owned()), Some("2".to_owned())]);
    assert_eq!(first.get("dbackup.worker"), Some(lost.clone()));
    assert_ne!(first.of_process("service.instance.id"), second.of_process("service.instance.id"));

    let [closed, success] = named(&spans, "attempt")[..] else { panic!("two attempts") };
    assert_eq!((closed.links(), success.links()), (vec![first.id()], vec![second.id()]));
    assert!(closed.error().is_some_and(|text| text.contains(&lost) && text.contains("dumping")), "{closed:?}");
    assert_eq!(closed.get("dbackup.outcome").as_deref(), Some("worker_lost"));
    assert_eq!(closed.get("dbackup.worker"), Some(lost));
    let silent: u64 = closed.get("dbackup.without_heartbeat_ms").and_then(|ms| ms.parse().ok()).expect("a number");
    assert!((3_000..30_000).contains(&silent), "a lease of 3 s ran out first: {silent} ms");
    assert_eq!((success.error(), success.get("dbackup.outcome").as_deref()), (None, Some("success")));
    assert!(named(&spans, "queue.wait").iter().all(|wait| wait.length() < Duration::from_secs(20)));
    assert_conventions(&spans, &execution);
}

/// The kinds and attributes that OpenTelemetry's conventions name. All that are wrong are told at once.
fn assert_conventions(spans: &[Received], execution: &Value) {
    use SpanKind::{Client, Consumer, Internal, Producer, Server};
    let id = execution["id"].as_str().expect("an id");
    let mut wrong = Vec::new();
    for (name, kind, service, attributes) in [
        (
            "POST /api/jobs/{id}/run",
            Server,
            "dbackup-api",
            &[
                ("http.request.method", "POST"),
                ("http.route", "/api/jobs/{id}/run"),
                ("http.response.status_code", "200"),
                ("url.path", &format!("/api/jobs/{}/run", execution["jobId"].as_str().expect("a job"))),
                ("url.scheme", "http"),
                ("network.protocol.version", "1.1"),
                ("client.address", "127.0.0.1"),
                ("server.address", "127.0.0.1"),
            ][..],
        ),
        ("rate_limit", Internal, "dbackup-api", &[("dbackup.rate_limit.class", "write")]),
        (
            "enqueue",
            Producer,
            "dbackup-api",
            &[
                ("messaging.system", "dbackup"),
                ("messaging.operation.type", "send"),
                ("messaging.operation.name", "enqueue"),
                ("messaging.message.id", id),
            ],
        ),
        (
            "claim",
            Consumer,
            "dbackup-worker",
            &[
                ("messaging.system", "dbackup"),
                ("messaging.operation.type", "receive"),
                ("messaging.operation.name", "claim"),
                ("messaging.destination.name", "default"),
                ("messaging.message.id", id),
            ],
        ),
        ("inspect", Client, "dbackup-worker", &[("db.system.name", "postgresql"), ("server.address", "127.0.0.1")]),
        (
            "dump",
            Client,
            "dbackup-worker",
            &[("db.system.name", "postgresql"), ("process.executable.name", "pg_dump"), ("process.exit.code", "0")],
        ),
        ("compress", Internal, "dbackup-worker", &[("dbackup.compression", "zstd")]),
        ("encrypt", Internal, "dbackup-worker", &[("dbackup.encryption", "age"), ("dbackup.recipients", "1")]),
        ("upload", Client, "dbackup-worker", &[("dbackup.destination.kind", "local")]),
        ("attempt", Internal, "dbackup-worker", &[("dbackup.execution.id", id)]),
        (
            "notify",
            Client,
            "dbackup-worker",
            &[
                ("http.request.method", "POST"),
                ("http.response.status_code", "204"),
                ("server.address", "127.0.0.1"),
                ("dbackup.webhook", "On call"),
                ("dbackup.event", "succeeded"),
            ],
        ),
    ] {
        let span = *named(spans, name).last().unwrap_or_else(|| panic!("no {name}"));
        if span.span.kind() != kind {
            wrong.push(format!("{name}: its kind is {:?} and not {kind:?}", span.span.kind()));
        }
        let told = |key: &str| span.get(key).or_else(|| span.of_process(key));
        for (key, value) in attributes.iter().copied().chain([("service.name", service)]) {
            if told(key).as_deref() != Some(value) {
                wrong.push(format!("{name}: {key} is {:?} and not {value}", told(key)));
            }
        }
        let more = ["service.version", "host.name"].into_iter().filter(|key| told(key).is_none());
        wrong.extend(more.map(|key| format!("{name}: no {key}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let number = |name: &str, key: &str| one(spans, name).get(key).and_then(|text| text.parse::<i64>().ok());
    assert_eq!(number("upload", "dbackup.bytes"), execution["size"].as_i64());
    assert_eq!(number("encrypt", "dbackup.bytes"), execution["size"].as_i64());
    assert!(number("compress", "dbackup.bytes") < execution["size"].as_i64());
    assert!(number("dump", "dbackup.bytes") > execution["size"].as_i64());
    for name in ["dump", "compress", "encrypt", "upload"] {
        assert!(number(name, "dbackup.bytes_per_second").is_some_and(|rate| rate > 0), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_sent_at_once_and_does_not_wait_for_a_batch() {
    let receiver = Receiver::start().await;
    let cluster = seldom(&receiver).start().await;
    let job = plain_job(&cluster, json!({})).await;
    let run = cluster.backup(&job).await;
    receiver.holds(run["traceId"].as_str().expect("a trace"), &[("claim", 1)], Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_is_sent_at_once_so_that_the_trace_is_whole_though_its_api_process_was_killed() {
    let receiver = Receiver::start().await;
    let mut cluster = seldom(&receiver).start().await;
    let job = plain_job(&cluster, json!({})).await;
    cluster.workers.clear();
    let id = trigger(&cluster, &job, &format!("00-{TRACE}-{CALLER}-01")).await;
    let of_trigger = [("POST /api/jobs/{id}/run", 1), ("auth", 1), ("rate_limit", 1), ("enqueue", 1)];
    receiver.holds(TRACE, &of_trigger, SOON).await;
    cluster.apis[1].0.kill().await;
    cluster.apis.truncate(1);
    cluster.add_worker(&[("OTEL_BSP_SCHEDULE_DELAY", "100".to_owned())]).await;
    let run = cluster.ended(&id, SOON).await;
    assert_eq!(run["status"], "Success", "{run:#}");
    assert_whole(&receiver.holds(TRACE, &[("attempt", 1), ("commit", 1)], SOON).await, CALLER);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_waits_for_the_end_is_sent_before_it() {
    let receiver = Receiver::start().await;
    let cluster = seldom(&receiver).limit(0).start().await;
    let job = plain_job(&cluster, json!({})).await;
    let url = format!("{}/api/jobs/{job}/run", cluster.url(0));
    let request = cluster.http.post(url).bearer_auth(&cluster.admin_key).json(&json!({ "wait": 60 }));
    let waiting = tokio::spawn(request.header("traceparent", format!("00-{TRACE}-{CALLER}-01")).send());
    receiver.holds(TRACE, &[("auth", 1), ("rate_limit", 1), ("enqueue", 1)], SOON).await;
    assert!(!waiting.is_finished(), "nobody claims it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_firing_is_sent_at_once_and_does_not_wait_for_a_batch() {
    let receiver = Receiver::start().await;
    let cluster = seldom(&receiver).limit(0).start().await;
    let job = plain_job(&cluster, json!({ "schedule": "0 0 1 1 *" })).await;
    let run = fired(&cluster, &job).await;
    receiver.holds(run["traceId"].as_str().expect("a trace"), &[("schedule.fire", 1)], SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_fails_is_told_with_its_exit_status_and_last_words_and_the_next_attempt_links_to_it() {
    let receiver = Receiver::start().await;
    let script = "echo PGDMP; echo 'pg_dump: error: the disk of the server is on fire' >&2; exit 3";
    let (cluster, folder) = crate::bad_dumps::cluster_with(script, traced(&receiver)).await;
    let job = plain_job(&cluster, json!({ "maxAttempts": 2 })).await;
    let run = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!((run["status"].as_str(), run["attempt"].as_i64()), (Some("Failed"), Some(2)), "{run:#}");
    let trace = run["traceId"].as_str().expect("a trace");
    let spans = receiver.holds(trace, &[("attempt", 2), ("dump", 2)], SOON).await;
    std::fs::remove_dir_all(folder).expect("removes");
    let request = one(&spans, "POST /api/jobs/{id}/run");
    assert_eq!(request.parent(), "", "a trigger without a trace begins one");
    assert_whole(&spans, "");
    for dump in named(&spans, "dump") {
        assert_eq!(dump.get("process.exit.code").as_deref(), Some("3"));
        assert_eq!(dump.of_event("process.exit", "process.exit.code").as_deref(), Some("3"));
        let words = dump.of_event("process.stderr", "dbackup.stderr.tail").expect("its last words");
        assert!(words.contains("on fire"), "{words}");
        assert!(dump.error().is_some_and(|text| text.contains("status 3")), "{:?}", dump.error());
        assert_eq!(dump.get("error.type").as_deref(), Some("dump_failed"));
    }
    let [first, second] = named(&spans, "claim")[..] else { panic!("two claims") };
    assert_eq!(second.links(), vec![first.id()]);
    let outcomes: Vec<_> = named(&spans, "attempt").iter().map(|a| a.get("dbackup.outcome").expect("one")).collect();
    assert_eq!(outcomes, ["retry", "failed"]);
    assert!(named(&spans, "attempt").iter().all(|attempt| attempt.error().is_some()));
    let [_, wait] = named(&spans, "queue.wait")[..] else { panic!("two waits") };
    assert!(wait.span.start_time_unix_nano > first.span.end_time_unix_nano, "the second wait begins after the failure");
    // The whole of what was sent, by whomever.
    let all = format!("{:?}", receiver.spans());
    assert!(!all.contains(PASSWORD) && !all.contains(&cluster.admin_key) && !all.contains("postgres://"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_traced_whole_or_not_at_all_however_differently_the_processes_sample() {
    let receiver = Receiver::start().await;
    let half = traced(&receiver).env("OTEL_TRACES_SAMPLER", "traceidratio").env("OTEL_TRACES_SAMPLER_ARG", 0.5);
    let mut cluster = half.workers(0).limit(16).start().await;
    cluster.add_worker(&[("OTEL_TRACES_SAMPLER", "always_off".to_owned())]).await;
    cluster.add_worker(&[("OTEL_TRACES_SAMPLER", "always_on".to_owned())]).await;
    let job = plain_job(&cluster, json!({ "overlap": "allow" })).await;
    let mut runs = Vec::new();
    for n in 0..8_u128 {
        // Half of the callers sample: then everybody does.
        let trace = format!("{:032x}", n + 1);
        runs.push((trigger(&cluster, &job, &format!("00-{trace}-{CALLER}-0{}", n % 2)).await, Some(n % 2 == 1)));
        runs.push((cluster.trigger(&job).await, None));
    }
    let mut sampled = Vec::new();
    for (id, expected) in runs {
        let run = cluster.ended(&id, SOON).await;
        assert_eq!(run["status"], "Success", "{run:#}");
        sampled.push((run["traceId"].as_str().expect("a trace").to_owned(), expected));
    }
    let whole = [("POST /api/jobs/{id}/run", 1), ("enqueue", 1), ("claim", 1), ("commit", 1), ("attempt", 1)];
    for (trace, expected) in &sampled {
        let known = !receiver.of(trace).is_empty();
        if let Some(expected) = expected {
            assert!(!known || *expected, "{trace}: spans of a trace that its caller does not sample");
        }
        if known || *expected == Some(true) {
            receiver.holds(trace, &whole, SOON).await;
        }
    }
    // What was not known at first has not begun to come meanwhile, or came whole.
    for (trace, _) in &sampled {
        if !receiver.of(trace).is_empty() {
            receiver.holds(trace, &whole, SOON).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedules_run_is_a_trace_of_its_own_that_begins_with_the_firing() {
    let receiver = Receiver::start().await;
    let cluster = traced(&receiver).start().await;
    let job = plain_job(&cluster, json!({ "schedule": "0 0 1 1 *" })).await;
    let run = fired(&cluster, &job).await;
    let run = cluster.ended(run["id"].as_str().expect("an id"), SOON).await;
    assert_eq!(run["status"], "Success", "{run:#}");
    let trace = run["traceId"].as_str().expect("a trace");
    let spans = receiver.holds(trace, &[("schedule.fire", 1), ("claim", 1), ("attempt", 1)], SOON).await;
    assert_whole(&spans, "");
    let fire = one(&spans, "schedule.fire");
    assert_eq!(fire.get("messaging.message.id").as_deref(), run["id"].as_str());
    assert_eq!(under(&spans, &fire.id()), counted(&[("queue.wait", 1), ("claim", 1), ("attempt", 1)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_wakes_after_its_lease_writes_no_second_closing_span() {
    let receiver = Receiver::start().await;
    let mut cluster = traced(&receiver).start().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    let stopped = cluster.busy_worker();
    cluster.workers[stopped].signal(Signal::SIGSTOP);
    until("the run is taken from it", SOON, || async {
        (cluster.count("select rescues::bigint from executions").await == 1).then_some(())
    })
    .await;
    held.proxy.set(Mode::Pass);
    let run = cluster.ended(&id, SOON).await;
    assert_eq!((run["status"].as_str(), run["attempt"].as_i64()), (Some("Success"), Some(2)), "{run:#}");
    cluster.workers[stopped].signal(Signal::SIGCONT);
    cluster.workers[stopped].says("nothing was recorded", SOON).await;
    // At its end it sends whatever it has.
    cluster.workers[stopped].signal(Signal::SIGTERM);
    cluster.workers[stopped].end(SOON).await;
    let trace = run["traceId"].as_str().expect("a trace");
    let spans = receiver.holds(trace, &[("attempt", 2), ("commit", 1)], SOON).await;
    assert_whole(&spans, "");
    let outcomes: Vec<_> = named(&spans, "attempt").iter().map(|a| a.get("dbackup.outcome").expect("one")).collect();
    assert_eq!(outcomes, ["worker_lost", "success"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_execution_has_a_link_to_its_trace_where_the_setting_has_a_template() {
    let cluster = Cluster::start().await;
    let job = plain_job(&cluster, json!({})).await;
    let run = cluster.backup(&job).await;
    assert!(run.get("traceUrl").is_none(), "{run:#}");
    let change =
        |template: Value| cluster.request("PATCH", "/api/settings", Some(json!({ "traceUrlTemplate": template })));
    let (status, refused) = change(json!("https://traces.example/")).await;
    assert_eq!((status, &refused["fields"][0]["field"]), (422, &json!("traceUrlTemplate")), "{refused}");
    let template = "https://traces.example/trace/{traceId}";
    let (status, settings) = change(json!(template)).await;
    assert_eq!((status, &settings["data"]["traceUrlTemplate"]), (200, &json!(template)), "{settings}");
    let id = run["id"].as_str().expect("an id");
    let url = format!("https://traces.example/trace/{}", run["traceId"].as_str().expect("a trace"));
    assert_eq!(cluster.execution(id).await["traceUrl"], url);
    assert_eq!(cluster.ok("GET", "/api/executions", None).await[0]["traceUrl"], url);
    let group = cluster.ok("POST", "/api/runs", Some(json!({ "jobs": [job] }))).await;
    let group = cluster.ended(group["executionId"].as_str().expect("an id"), SOON).await;
    let of_group = format!("https://traces.example/trace/{}", group["traceId"].as_str().expect("a trace"));
    assert_eq!(group["traceUrl"], of_group);
    let audited = cluster.ok("GET", "/api/audit", None).await;
    assert!(audited.to_string().contains(template), "{audited:#}");
    let (status, settings) = change(Value::Null).await;
    assert_eq!((status, &settings["data"]["traceUrlTemplate"]), (200, &Value::Null));
    assert!(cluster.execution(id).await.get("traceUrl").is_none());
}
