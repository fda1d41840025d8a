//! What is logged of a run: lines that clients read, and those of the processes.

use common::{execution::claim::Token, telemetry::attempt::claim_span_id};
use serde_json::{Value, json};

use crate::{
    harness::{
        Cluster, Process, SOON,
        held::Held,
        otlp::Receiver,
        proxy::Mode,
        source::{PASSWORD, PostgresSource},
        until,
    },
    trace::{named, one, plain_job, traced},
};

#[tokio::test(flavor = "multi_thread")]
async fn stored_lines_carry_the_span_in_which_they_were_told_and_older_lines_none() {
    let receiver = Receiver::start().await;
    let mut cluster = traced(&receiver).start().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    let victim = cluster.busy_worker();
    let token = cluster.count("select token from execution_leases").await;
    // As a process of the version before writes it.
    let insert = "insert into execution_logs (execution_id, at, level, stage, message)
                  select execution_id, clock_timestamp(), 'info', 'Dumping', 'of the version before' from execution_leases";
    sqlx::query(insert).execute(&cluster.pool).await.expect("inserts");
    cluster.workers[victim].kill().await;
    held.proxy.set(Mode::Pass);
    let run = cluster.ended(&id, SOON).await;
    let trace = run["traceId"].as_str().expect("a trace");
    let spans = receiver.holds(trace, &[("attempt", 2), ("dump", 1), ("claim", 2)], SOON).await;
    let lines = run["logs"].as_array().expect("lines");
    let told = |words: &str| {
        let line = lines.iter().rfind(|l| l["message"].as_str().is_some_and(|m| m.contains(words)));
        line.unwrap_or_else(|| panic!("no line '{words}'"))["spanId"].as_str().map(str::to_owned)
    };
    let [first, second] = named(&spans, "claim")[..] else { panic!("two claims") };
    assert_eq!(told("attempt 2 on worker"), Some(second.id()));
    assert_eq!(told("dumping '"), Some(one(&spans, "dump").id()));
    assert_eq!(told("stored at"), Some(one(&spans, "verify").id()));
    assert_eq!(told("stopped answering"), Some(first.id()), "told by who took the run back");
    let execution = id.parse().expect("an id");
    assert_eq!(first.id(), claim_span_id(execution, Token(token)).to_string());
    assert_eq!(told("of the version before"), None);
}

/// Every line about an execution, as JSON.
fn lines_about<'a>(log: &'a str, execution: &str) -> Vec<(&'a str, Value)> {
    let about = log.lines().filter(|line| line.contains(execution));
    about.map(|line| (line, serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_of_the_processes_about_a_run_tells_its_trace_and_no_secret() {
    let mut cluster = Cluster::build().env("RUST_LOG", "info,worker=debug,api=debug,common=debug").start().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    let victim = cluster.busy_worker();
    cluster.workers[victim].kill().await;
    held.proxy.set(Mode::Pass);
    let run = cluster.ended(&id, SOON).await;
    let trace = run["traceId"].as_str().expect("a trace, although nothing is exported");
    // A line is written some time after what it tells of is in the database.
    let told = ["triggered", "the run begins", "dumping '", "took back a run", "the run ended", "left behind"];
    let log = until("every line is there, the one of the sweeper too", SOON, || async {
        let log = cluster.logs();
        let about: Vec<&str> = log.lines().filter(|line| line.contains(&id)).collect();
        told.iter().all(|words| about.iter().any(|line| line.contains(words))).then_some(log.clone())
    })
    .await;
    let lines = lines_about(&log, &id);
    for (line, json) in &lines {
        // A request about the run is in a trace of its own, which the line tells as well.
        let told = [&json["fields"]["trace_id"], &json["span"]["trace_id"]];
        assert!(told.iter().any(|told| **told == trace) || line.contains("answered"), "{line}");
        let told = [&json["fields"]["execution"], &json["span"]["execution"]];
        assert!(told.iter().any(|told| **told == id) || line.contains("answered"), "{line}");
    }
    for secret in [PASSWORD, &cluster.admin_key, "postgres://", &cluster.env()["DBACKUP_ENCRYPTION_KEY"]] {
        assert!(!log.contains(secret), "{secret}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_worker_tells_how_a_run_ended_and_for_what_reason_it_failed() {
    let cluster = Cluster::start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = PostgresSource::with_rows(1).await;
    let (mut wrong, mut away) = (source.config(), source.config());
    wrong["password"] = json!("wrong");
    // Port 1 of this machine refuses: another attempt may succeed, but there is none.
    away["port"] = json!(1);
    let away = cluster.job(&cluster.source("postgres", away).await, &[&destination], json!({ "maxAttempts": 1 })).await;
    let wrong = cluster.job(&cluster.source("postgres", wrong).await, &[&destination], json!({})).await;
    let good = cluster.job(&cluster.source("postgres", source.config()).await, &[&destination], json!({})).await;
    for (job, outcome, code) in [
        (good, "success", Value::Null),
        (wrong, "failed", json!("source_auth")),
        (away, "failed", json!("source_unreachable")),
    ] {
        let id = cluster.trigger(&job).await;
        cluster.ended(&id, SOON).await;
        let told = until("the end is logged", SOON, || async {
            let log = cluster.logs();
            lines_about(&log, &id).into_iter().find(|(line, _)| line.contains("the run ended")).map(|(_, json)| json)
        })
        .await;
        assert_eq!((&told["fields"]["outcome"], &told["fields"]["code"]), (&json!(outcome), &code), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_lines_about_a_run_tell_its_trace_too() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let env = [("DBACKUP_LOG_FORMAT", "text".to_owned())];
    let job = {
        // Its start is told in a form that the harness does not read: so beside one that answers the connection test.
        cluster.add_worker(&[]).await;
        plain_job(&cluster, json!({})).await
    };
    cluster.workers.clear();
    let worker = Process::start("dbackup-worker", &[], cluster.env(), &env);
    let run = cluster.backup(&job).await;
    let (id, trace) = (run["id"].as_str().expect("an id"), run["traceId"].as_str().expect("a trace"));
    worker.says("the run ended", SOON).await;
    let log = worker.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains(id)).collect();
    assert!(lines.iter().any(|line| line.contains("the run begins")), "{log}");
    assert!(lines.iter().all(|line| line.contains(trace)), "{log}");
}
