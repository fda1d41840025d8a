//! Dumps that go wrong: Failed, nothing visible, never a false Success.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::harness::{
    Builder, Cluster, SOON, files,
    process::is_alive,
    proxy::{Mode, Proxy},
    source::{MariadbSource, PostgresSource},
    until,
};

/// A folder of tools in which `pg_dump` is a script and psql the real one.
pub fn tools(folder: &Path, pg_dump: &str) -> PathBuf {
    let bin = folder.join("bin");
    std::fs::create_dir_all(&bin).expect("a folder");
    write_script(
        &bin.join("pg_dump"),
        &format!(
            "#!/bin/bash\nif [ \"$1\" = --version ]; then echo 'pg_dump (PostgreSQL) 99.1'; exit; fi\n{pg_dump}\n"
        ),
    );
    write_script(&bin.join("psql"), "#!/bin/bash\nexec psql \"$@\"\n");
    bin
}

/// A program.
pub fn write_script(path: &Path, text: &str) {
    std::fs::write(path, text).expect("writes");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("makes it executable");
}

/// A cluster whose pg_dump is `script`, and the folder of its tools.
pub async fn cluster_with(script: &str, cluster: Builder) -> (Cluster, PathBuf) {
    let folder = std::env::temp_dir().join(crate::harness::unique("tools"));
    let bin = tools(&folder, script);
    (cluster.env("DBACKUP_POSTGRES_BIN", bin.display()).start().await, folder)
}

/// Runs a job whose pg_dump is `script`; gives the execution and what lies in the destination.
async fn run_with(script: &str) -> (Value, Vec<PathBuf>, Cluster) {
    let (cluster, folder) = cluster_with(script, Cluster::build()).await;
    let source = PostgresSource::with_rows(10).await;
    let (destination, root) = cluster.local_destination().await;
    let job = cluster.job(&cluster.source("postgres", source.config()).await, &[&destination], json!({})).await;
    let execution = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    std::fs::remove_dir_all(folder).expect("removes");
    (execution, files(&root), cluster)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_writes_three_megabytes_and_exits_1_is_a_failure_and_leaves_nothing() {
    let (execution, left, _cluster) = run_with("echo 'PGDMP'; head -c 3000000 /dev/urandom; echo 'pg_dump: error: the disk of the server is on fire' >&2; exit 1").await;
    assert_eq!(execution["status"], "Failed", "{execution:#}");
    let error = execution["error"].as_str().expect("an error");
    assert!(error.contains("status 1") && error.contains("on fire"), "{error}");
    assert_eq!(left, Vec::<PathBuf>::new());
    let log = execution["logs"].to_string();
    assert!(log.contains("on fire"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_is_killed_in_mid_stream_is_a_failure_and_leaves_nothing() {
    let (execution, left, _cluster) = run_with("echo 'PGDMP'; head -c 3000000 /dev/urandom; kill -9 $$").await;
    assert_eq!(execution["status"], "Failed", "{execution:#}");
    assert!(execution["error"].as_str().is_some_and(|e| e.contains("signal 9")), "{execution:#}");
    assert_eq!(left, Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_reports_success_for_half_a_dump_is_a_failure() {
    let (execution, left, _cluster) = run_with("head -c 300000 /dev/zero; exit 0").await;
    assert_eq!(
        (execution["status"].as_str(), execution["errorCode"].as_str()),
        (Some("Failed"), Some("dump_incomplete")),
        "{execution:#}"
    );
    assert_eq!(left, Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_tool_fails_with_what_to_install_and_where_it_was_looked_for() {
    let folder = std::env::temp_dir().join(crate::harness::unique("tools"));
    let bin = tools(&folder, "exit 7");
    let cluster = Cluster::build()
        .env("DBACKUP_POSTGRES_BIN", bin.display())
        .env("DBACKUP_MARIADB_BIN", bin.display())
        .start()
        .await;
    let (destination, root) = cluster.local_destination().await;
    let postgres = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let mariadb = cluster.source("mariadb", MariadbSource::with_rows(1).config()).await;
    for (source, tool, package) in [
        (&postgres, "pg_dump", "postgresql-client"),
        (&postgres, "psql", "postgresql-client"),
        (&mariadb, "mariadb-dump", "mariadb-client"),
    ] {
        let _ = std::fs::remove_file(bin.join(tool));
        let job = cluster.job(source, &[&destination], json!({ "maxAttempts": 3 })).await;
        let execution = cluster.ended(&cluster.trigger(&job).await, SOON).await;
        assert_eq!(
            (execution["errorCode"].as_str(), execution["attempt"].as_i64()),
            (Some("tool_missing"), Some(1)),
            "{tool}: {execution:#}"
        );
        let error = execution["error"].as_str().expect("an error");
        for part in [format!("no {tool} "), format!("install {package}"), bin.display().to_string()] {
            assert!(error.contains(&part), "{part}: {error}");
        }
    }
    assert_eq!(files(&root), Vec::<PathBuf>::new());
    std::fs::remove_dir_all(folder).expect("removes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_older_than_the_server_fails_with_what_to_install() {
    let folder = std::env::temp_dir().join(crate::harness::unique("tools"));
    let bin = tools(&folder, "exit 7");
    write_script(&bin.join("pg_dump"), "#!/bin/bash\necho 'pg_dump (PostgreSQL) 9.6.24'\n");
    let cluster = Cluster::build().env("DBACKUP_POSTGRES_BIN", bin.display()).start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let execution =
        cluster.ended(&cluster.trigger(&cluster.job(&source, &[&destination], json!({})).await).await, SOON).await;
    assert_eq!(execution["errorCode"], "client_too_old", "{execution:#}");
    assert!(execution["error"].as_str().is_some_and(|e| e.contains("install postgresql-client-")), "{execution:#}");
    std::fs::remove_dir_all(folder).expect("removes");
}

#[tokio::test(flavor = "multi_thread")]
async fn mysqls_own_tool_is_kept_from_writing_the_history_of_the_server_into_the_dump() {
    let folder = std::env::temp_dir().join(crate::harness::unique("tools"));
    let bin = tools(&folder, "exit 7");
    let own =
        "  *' --version '*) echo 'mysqldump  Ver 8.0.36 for Linux on x86_64 (MySQL Community Server - GPL)'; exit ;;";
    let ours = "  *' --version '*) echo 'mysqldump from 11.4.2-MariaDB, client 10.19'; exit ;;";
    // MariaDB's knows no such option, as the real one of the tests would say.
    for (version, wanted) in [(own, true), (ours, false)] {
        let script =
            format!("#!/bin/bash\ncase \" $* \" in\n{version}\nesac\necho \"$@\" >{}/said\nexit 7\n", folder.display());
        write_script(&bin.join("mysqldump"), &script);
        // MariaDB's client in its place, without the option that only MySQL's knows.
        let client = format!(
            "#!/bin/bash\ngrep -v ssl-mode \"${{1#*=}}\" >{0}/options\nexec mariadb --defaults-file={0}/options \"${{@:2}}\"\n",
            folder.display()
        );
        write_script(&bin.join("mysql"), &client);
        let cluster = Cluster::build().env("DBACKUP_MARIADB_BIN", bin.display()).start().await;
        let (destination, _) = cluster.local_destination().await;
        let source = cluster.source("mysql", MariadbSource::with_rows(1).config()).await;
        let job = cluster.job(&source, &[&destination], json!({ "maxAttempts": 1 })).await;
        let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
        let said = std::fs::read_to_string(folder.join("said")).unwrap_or_else(|e| panic!("{e}: {ended:#}"));
        assert_eq!(said.contains("--set-gtid-purged=OFF"), wanted, "{said}");
    }
    std::fs::remove_dir_all(folder).expect("removes");
}

/// A run whose dump is held by a proxy after its first megabyte.
async fn held_dump(cluster: &Cluster) -> (Proxy, String, PathBuf) {
    let source = PostgresSource::with_rows(60_000).await;
    let proxy = Proxy::start(source.port).await;
    let (destination, root) = cluster.local_destination().await;
    let job =
        cluster.job(&cluster.source("postgres", source.config_at(proxy.port)).await, &[&destination], json!({})).await;
    proxy.set(Mode::HoldAfter(1_000_000));
    let id = cluster.trigger(&job).await;
    proxy.passes(1_000_000).await;
    (proxy, id, root)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_drops_the_connection_is_a_failure_and_leaves_nothing() {
    let cluster = Cluster::start().await;
    let (proxy, id, root) = held_dump(&cluster).await;
    let parts = files(&root);
    assert!(
        parts.iter().all(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'))),
        "visible before it is whole: {parts:?}"
    );
    proxy.set(Mode::Cut);
    let execution = cluster.ended(&id, SOON).await;
    assert_eq!(
        (execution["status"].as_str(), execution["errorCode"].as_str()),
        (Some("Failed"), Some("source_unreachable")),
        "{execution:#}"
    );
    assert_eq!(files(&root), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mariadb_that_drops_the_connection_is_a_failure_and_leaves_nothing() {
    let cluster = Cluster::start().await;
    let source = MariadbSource::with_rows(60_000);
    let proxy = Proxy::start(crate::harness::mariadb_port()).await;
    let mut config = source.config();
    config["port"] = json!(proxy.port);
    let (destination, root) = cluster.local_destination().await;
    let job = cluster.job(&cluster.source("mariadb", config).await, &[&destination], json!({})).await;
    proxy.set(Mode::HoldAfter(1_000_000));
    let id = cluster.trigger(&job).await;
    proxy.passes(1_000_000).await;
    proxy.set(Mode::Cut);
    let execution = cluster.ended(&id, SOON).await;
    assert_eq!(
        (execution["status"].as_str(), execution["errorCode"].as_str()),
        (Some("Failed"), Some("source_unreachable")),
        "{execution:#}"
    );
    assert_eq!(files(&root), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_pg_dump_killed_in_mid_stream_is_a_failure_and_leaves_nothing() {
    let cluster = Cluster::start().await;
    let (_proxy, id, root) = held_dump(&cluster).await;
    let children: Vec<_> = cluster.workers.iter().flat_map(|w| w.children()).collect();
    assert_eq!(children.len(), 1, "one dump runs");
    kill(children[0], Signal::SIGKILL).expect("it runs");
    let execution = cluster.ended(&id, SOON).await;
    assert_eq!(execution["status"], "Failed", "{execution:#}");
    assert_eq!(files(&root), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_and_the_progress_of_a_run_are_readable_while_it_runs() {
    let cluster = Cluster::start().await;
    let (proxy, id, _root) = held_dump(&cluster).await;
    let execution = until("log, stage and progress show", SOON, || async {
        let execution = cluster.execution(&id).await;
        let dumping =
            execution["stage"] == "Dumping" && execution["progress"].as_i64().is_some_and(|p| (1..=99).contains(&p));
        // Some of what has come through the proxy; then it stands, and so does the rate.
        let moves = execution["bytes"].as_u64() >= Some(50_000) && execution["bytesPerSecond"].is_u64();
        (dumping && moves && execution["logs"].to_string().contains("dumping '")).then_some(execution)
    })
    .await;
    assert_eq!(
        (execution["status"].as_str(), &execution["endedAt"], &execution["duration"]),
        (Some("Running"), &Value::Null, &Value::Null)
    );
    let cursor = execution["logsCursor"].as_str().expect("a cursor").to_owned();
    proxy.set(Mode::Pass);
    let ended = cluster.in_status(&id, "Success", SOON).await;
    assert!(ended.get("bytes").is_none() && ended.get("bytesPerSecond").is_none(), "{ended:#}");
    let later = cluster.ok("GET", &format!("/api/executions/{id}?logsAfter={cursor}"), None).await;
    let lines = later["logs"].as_array().expect("lines");
    assert!(!lines.is_empty() && !later["logs"].to_string().contains("dumping '"), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_stops_a_running_dump_and_leaves_nothing_and_a_pending_one_never_starts() {
    let cluster = Cluster::build().limit(1).start().await;
    let (_proxy, running, root) = held_dump(&cluster).await;
    let job = cluster.execution(&running).await["jobId"].as_str().expect("an id").to_owned();
    let pending = cluster.trigger(&job).await;
    let child = cluster.workers.iter().flat_map(|w| w.children()).next().expect("the dump");

    cluster.ok("POST", &format!("/api/executions/{pending}/cancel"), None).await;
    let ended = cluster.execution(&pending).await;
    assert_eq!(
        (ended["status"].as_str(), ended["outcome"].as_str(), &ended["startedAt"]),
        (Some("Failed"), Some("Cancelled"), &Value::Null),
        "{ended:#}"
    );

    cluster.ok("POST", &format!("/api/executions/{running}/cancel"), None).await;
    let ended = cluster.ended(&running, SOON).await;
    assert_eq!((ended["status"].as_str(), ended["outcome"].as_str()), (Some("Failed"), Some("Cancelled")), "{ended:#}");
    assert!(ended["error"].as_str().is_some_and(|e| e.contains("cancelled")), "{ended:#}");
    assert!(!is_alive(child), "the dump tool outlived the cancel");
    assert_eq!(files(&root), Vec::<PathBuf>::new());
    assert_eq!(cluster.count("select count(*) from execution_leases").await, 0);
    let (status, answer) = cluster.request("POST", &format!("/api/executions/{running}/cancel"), None).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("already_ended")), "{answer}");
}

/// Cancels at one of the API processes and demands that within two seconds of its answer nothing is left of the run.
async fn cancelled_within_two_seconds(cluster: &Cluster, api: usize, running: &str, root: &Path) {
    let child = cluster.workers.iter().flat_map(|w| w.children()).next().expect("the dump");
    let url = format!("{}/api/executions/{running}/cancel", cluster.url(api));
    let answer = cluster.http.post(url).bearer_auth(&cluster.admin_key).send().await.expect("answers");
    assert_eq!(answer.status(), 200);
    let ended = until("the run is over", Duration::from_secs(2), || async {
        let execution = cluster.execution(running).await;
        (execution["status"] != "Running").then_some(execution)
    })
    .await;
    assert_eq!((ended["status"].as_str(), ended["outcome"].as_str()), (Some("Failed"), Some("Cancelled")), "{ended:#}");
    assert!(!is_alive(child), "the dump tool outlived the cancel");
    assert_eq!(cluster.workers.iter().flat_map(|w| w.children()).count(), 0, "a child process is left");
    assert_eq!(files(root), Vec::<PathBuf>::new(), "something was published, or left");
    assert_eq!(cluster.count("select count(*) from artifacts").await, 0);
    assert_eq!(cluster.count("select count(*) from execution_leases").await, 0, "the slot is not free");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_at_either_process_ends_a_running_dump_within_two_seconds() {
    // With the protocol's real times a heartbeat that brings the cancel would come too late.
    let cluster = Cluster::build().real_times().limit(1).start().await;
    for api in 0..2 {
        let (_proxy, running, root) = held_dump(&cluster).await;
        cancelled_within_two_seconds(&cluster, api, &running, &root).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_does_not_mind_sigterm_is_gone_within_two_seconds_of_a_cancel_too() {
    let folder = std::env::temp_dir().join(crate::harness::unique("tools"));
    let bin = tools(&folder, "trap '' TERM; echo PGDMP; while :; do sleep 0.1; done");
    let cluster = Cluster::build().real_times().limit(1).env("DBACKUP_POSTGRES_BIN", bin.display()).start().await;
    let source = PostgresSource::with_rows(10).await;
    let (destination, root) = cluster.local_destination().await;
    let job = cluster.job(&cluster.source("postgres", source.config()).await, &[&destination], json!({})).await;
    let running = cluster.trigger(&job).await;
    until("the tool runs", SOON, || async { (cluster.execution(&running).await["stage"] == "Dumping").then_some(()) })
        .await;
    cancelled_within_two_seconds(&cluster, 0, &running, &root).await;
    std::fs::remove_dir_all(folder).expect("removes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_whose_notice_is_lost_comes_with_the_heartbeat() {
    let cluster = Cluster::build().limit(1).start().await;
    let (_proxy, running, root) = held_dump(&cluster).await;
    sqlx::query("update executions set cancel_requested_at = clock_timestamp()")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    let ended = cluster.ended(&running, SOON).await;
    assert_eq!(ended["outcome"], "Cancelled", "{ended:#}");
    assert_eq!(files(&root), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_longer_than_its_job_allows_is_stopped() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(60_000).await;
    let proxy = Proxy::start(source.port).await;
    let (destination, root) = cluster.local_destination().await;
    let job = cluster
        .job(
            &cluster.source("postgres", source.config_at(proxy.port)).await,
            &[&destination],
            json!({ "timeoutSeconds": 2, "maxAttempts": 3 }),
        )
        .await;
    proxy.set(Mode::HoldAfter(1_000_000));
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!((ended["outcome"].as_str(), ended["attempt"].as_i64()), (Some("TimedOut"), Some(1)), "{ended:#}");
    assert_eq!(files(&root), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_ends_though_its_tool_has_left_a_process_behind_that_holds_its_standard_error() {
    let left_behind = "setsid sleep 300 >/dev/null & echo $! > \"$(dirname \"$0\")/left\"; echo 'it is broken' >&2";
    for (script, cancel) in [(format!("{left_behind}; exit 1"), false), (format!("{left_behind}; sleep 300"), true)] {
        let (cluster, folder) = cluster_with(&script, Cluster::build()).await;
        let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
        let (destination, _) = cluster.local_destination().await;
        let run = cluster.trigger(&cluster.job(&source, &[&destination], json!({})).await).await;
        let pid = until("it runs", SOON, || async {
            std::fs::read_to_string(folder.join("bin/left")).ok()?.trim().parse().ok().map(Pid::from_raw)
        })
        .await;
        if cancel {
            cluster.ok("POST", &format!("/api/executions/{run}/cancel"), None).await;
        }
        let ended = cluster.ended(&run, SOON).await;
        assert!(is_alive(pid), "it was not left behind");
        kill(pid, Signal::SIGKILL).expect("ends it");
        let said = if cancel { "cancelled" } else { "it is broken" };
        assert!(ended["error"].as_str().is_some_and(|error| error.contains(said)), "{ended:#}");
        std::fs::remove_dir_all(folder).expect("removes");
    }
}
