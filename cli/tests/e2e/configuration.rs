//! Starting: mistakes are one line that names the variable, and many may start at once.

use std::{
    collections::BTreeMap,
    process::{Command, Output},
};

use crate::harness::{Cluster, Process, binary, postgres_url, sql, unique};

fn start(program: &str, env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(binary(program));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).envs(env.iter().copied());
    command.output().expect("it runs")
}

#[test]
fn a_mistake_is_one_line_that_names_the_variable_and_exit_status_2() {
    let key = common::seal::SealKey::generate();
    let file = std::env::temp_dir().join(unique("no-such-file"));
    let file = file.to_str().expect("text");
    let url = "postgres://u:hidden-password@127.0.0.1:1/x";
    for (program, env, variable) in [
        ("dbackup-worker", vec![], "DATABASE_URL"),
        ("dbackup-api", vec![], "DATABASE_URL"),
        ("dbackup-api", vec![("DATABASE_URL", "mysql://hidden-password@x")], "DATABASE_URL"),
        ("dbackup-api", vec![("DATABASE_URL_FILE", file)], "DATABASE_URL_FILE"),
        ("dbackup-api", vec![("DATABASE_URL", url), ("DATABASE_URL_FILE", file)], "DATABASE_URL"),
        ("dbackup-api", vec![("DATABASE_URL", url)], "DBACKUP_ENCRYPTION_KEY"),
        (
            "dbackup-worker",
            vec![("DATABASE_URL", url), ("DBACKUP_ENCRYPTION_KEY", "hidden-password")],
            "DBACKUP_ENCRYPTION_KEY",
        ),
        (
            "dbackup-api",
            vec![("DATABASE_URL", url), ("DBACKUP_ENCRYPTION_KEY", &key), ("REDIS_URL", "hidden-password")],
            "REDIS_URL",
        ),
        ("dbackup-api", vec![("DBACKUP_LISTEN", "nowhere")], "DBACKUP_LISTEN"),
        ("dbackup-api", vec![("DBACKUP_TRUSTED_PROXIES", "somewhere")], "DBACKUP_TRUSTED_PROXIES"),
        ("dbackup-api", vec![("DBACKUP_REDIS_TIMEOUT_MS", "0")], "DBACKUP_REDIS_TIMEOUT_MS"),
        ("dbackup-api", vec![("DBACKUP_SHUTDOWN_DELAY_SECONDS", "601")], "DBACKUP_SHUTDOWN_DELAY_SECONDS"),
        ("dbackup-worker", vec![("DBACKUP_CONCURRENCY", "0")], "DBACKUP_CONCURRENCY"),
        ("dbackup-worker", vec![("DBACKUP_CONCURRENCY", "many")], "DBACKUP_CONCURRENCY"),
        ("dbackup-worker", vec![("DBACKUP_HEARTBEAT_MS", "14000")], "DBACKUP_HEARTBEAT_MS"),
        ("dbackup-worker", vec![("DBACKUP_LOCAL_PATHS", "relative")], "DBACKUP_LOCAL_PATHS"),
        ("dbackup-worker", vec![("DBACKUP_DRAIN_SECONDS", "86401")], "DBACKUP_DRAIN_SECONDS"),
        ("dbackup-worker", vec![("DBACKUP_DRAIN_SECONDS", "1")], "DBACKUP_DRAIN_SECONDS"),
        ("dbackup-worker", vec![("DBACKUP_LOCK_WAIT_SECONDS", "0")], "DBACKUP_LOCK_WAIT_SECONDS"),
        ("dbackup-worker", vec![("DBACKUP_POOLS", "a,,b")], "DBACKUP_POOLS"),
        ("dbackup-worker", vec![("DBACKUP_WORKER_NAME", "")], "DBACKUP_WORKER_NAME"),
        ("dbackup-api", vec![("DBACKUP_TICKER_MS", "20000")], "DBACKUP_TICKER_MS"),
        ("dbackup-worker", vec![("DBACKUP_FENCE_MS", "14900")], "DBACKUP_FENCE_MS"),
        ("dbackup-api", vec![("DBACKUP_METRICS_LISTEN", "9464")], "DBACKUP_METRICS_LISTEN"),
        ("dbackup-worker", vec![("DBACKUP_METRICS_LISTEN", "192.0.2.1:9464")], "DBACKUP_METRICS_LISTEN"),
        ("dbackup-worker", vec![("DBACKUP_LOG_FORMAT", "xml")], "DBACKUP_LOG_FORMAT"),
        (
            "dbackup-api",
            vec![("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")],
            "OTEL_EXPORTER_OTLP_PROTOCOL",
        ),
        ("dbackup-worker", vec![("OTEL_TRACES_SAMPLER", "sometimes")], "OTEL_TRACES_SAMPLER"),
        (
            "dbackup-api",
            vec![("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key:hidden-password")],
            "OTEL_EXPORTER_OTLP_HEADERS",
        ),
        ("dbackup", vec![], "Usage"),
    ] {
        let output = start(program, &env);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{program} {env:?}: {said}");
        assert!(said.contains(variable) && !said.contains("hidden-password"), "{program} {env:?}: {said}");
        assert!(program == "dbackup" || said.trim().lines().count() == 1, "{program} {env:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_encryption_key_than_the_databases_exits_2() {
    let cluster = Cluster::build().workers(0).start().await;
    let url = cluster.env()["DATABASE_URL"].clone();
    let wrong = common::seal::SealKey::generate();
    for program in ["dbackup-api", "dbackup-worker"] {
        let output = start(
            program,
            &[("DATABASE_URL", &url), ("DBACKUP_ENCRYPTION_KEY", &wrong), ("DBACKUP_LISTEN", "127.0.0.1:0")],
        );
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains("DBACKUP_ENCRYPTION_KEY"), "{said}");
        assert!(!said.contains(&wrong));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_processes_start_at_once_on_an_empty_database() {
    let database = unique("empty");
    sql("postgres", &format!("create database {database}")).await;
    let env: BTreeMap<String, String> = [
        ("DATABASE_URL", postgres_url(&database)),
        ("DBACKUP_ENCRYPTION_KEY", common::seal::SealKey::generate()),
        ("DBACKUP_LOG_FORMAT", "json".to_owned()),
    ]
    .map(|(k, v)| (k.to_owned(), v))
    .into();
    let mut apis: Vec<Process> =
        (0..5).map(|_| Process::start("dbackup-api", &["--listen", "127.0.0.1:0"], &env, &[])).collect();
    let mut workers: Vec<Process> = (0..5).map(|_| Process::start("dbackup-worker", &[], &env, &[])).collect();
    for api in &mut apis {
        api.wait_for_field("the API listens", "address").await;
    }
    for worker in &mut workers {
        worker.wait_for_field("the worker claims executions", "worker").await;
    }
}
