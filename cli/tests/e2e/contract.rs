//! The main path: the contract's own script, and backups that the public tools restore.

use std::{
    path::{Path, PathBuf},
    process::Output,
};

use serde_json::json;

use crate::{
    harness::{
        Cluster, SOON, files,
        source::{MariadbSource, PostgresSource, mariadb, shell},
    },
    samples,
};

async fn run_script(cluster: &Cluster, job: &str) -> Output {
    let key = cluster.key(&["jobs:execute", "history:read"]).await;
    let script = samples::bash(cluster.url(0), &key, job);
    samples::run(script).await
}

fn stored(root: &Path, execution: &serde_json::Value) -> PathBuf {
    root.join(execution["path"].as_str().expect("a path"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contracts_script_backs_up_postgres_and_the_public_tools_restore_every_row() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(30_000).await;
    let (destination, root) = cluster.local_destination().await;
    let job = cluster
        .job(&cluster.source("postgres", source.config()).await, &[&destination], json!({ "name": "Daily backup" }))
        .await;

    let output = run_script(&cluster, &job).await;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("Backup completed successfully!"), "{said}");

    let list = cluster.ok("GET", &format!("/api/executions?jobId={job}"), None).await;
    let execution = &list[0];
    assert_eq!(
        (execution["status"].as_str(), execution["progress"].as_i64(), execution["stage"].as_str()),
        (Some("Success"), Some(100), Some("Completed"))
    );
    let file = stored(&root, execution);
    assert_eq!(std::fs::metadata(&file).expect("the backup").len(), execution["size"].as_u64().expect("a size"));
    let sum = shell(&format!("sha256sum '{}'", file.display()));
    assert_eq!(
        format!("sha256:{}", String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap_or_default()),
        execution["checksum"].as_str().expect("a checksum")
    );
    source.assert_same(&source.restore(&file).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contracts_script_backs_up_mariadb_and_the_public_tools_restore_everything() {
    let cluster = Cluster::start().await;
    let source = MariadbSource::with_rows(20_000);
    let (destination, root) = cluster.local_destination().await;
    let job = cluster
        .job(
            &cluster.source("mariadb", source.config()).await,
            &[&destination],
            json!({ "name": "Daily MySQL Backup" }),
        )
        .await;

    let output = run_script(&cluster, &job).await;
    assert!(output.status.success(), "{output:?}");
    let list = cluster.ok("GET", "/api/executions", None).await;
    source.assert_same(&source.restore(&stored(&root, &list[0])));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_databases_become_one_object_each_and_a_manifest_in_every_destination() {
    let cluster = Cluster::start().await;
    let (one, two) = (PostgresSource::with_rows(500).await, PostgresSource::with_rows(700).await);
    // One role that may read both.
    crate::harness::sql(&two.database, &format!("grant pg_read_all_data to {}", one.role)).await;
    let mut config = one.config();
    config["databases"] = json!([one.database, two.database]);
    let source = cluster.source("postgres", config).await;
    let ((first, first_root), (second, second_root)) =
        (cluster.local_destination().await, cluster.local_destination().await);
    let job = cluster.job(&source, &[&first, &second], json!({ "slug": "two" })).await;

    let execution = cluster.backup(&job).await;
    assert_eq!(files(&first_root), files(&second_root));
    assert_eq!(files(&first_root).len(), 3, "{:?}", files(&first_root));
    assert_eq!(execution["artifacts"].as_array().map(Vec::len), Some(6), "{execution:#}");
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(stored(&first_root, &execution)).expect("the manifest")).expect("JSON");
    let objects = manifest["objects"].as_array().expect("objects");
    let total: u64 = objects.iter().map(|o| o["storedBytes"].as_u64().expect("a size")).sum();
    assert_eq!(Some(total), execution["size"].as_u64());
    for (object, source) in objects.iter().zip([&one, &two]) {
        assert_eq!(object["database"], source.database);
        let file = second_root.join("two").join(object["file"].as_str().expect("a file"));
        source.assert_same(&source.restore(&file).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_one_of_several_databases_fails_nothing_of_the_others_is_visible() {
    let cluster = Cluster::start().await;
    let (readable, closed) = (PostgresSource::with_rows(500).await, PostgresSource::with_rows(10).await);
    let mut config = readable.config();
    config["databases"] = json!([readable.database, closed.database]);
    let (destination, root) = cluster.local_destination().await;
    let job = cluster.job(&cluster.source("postgres", config).await, &[&destination], json!({})).await;
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!(
        (ended["status"].as_str(), ended["errorCode"].as_str(), ended["artifacts"].as_array().map(Vec::len)),
        (Some("Failed"), Some("source_denied"), Some(0)),
        "{ended:#}"
    );
    assert!(ended["error"].as_str().is_some_and(|e| e.contains(&closed.database)), "{ended:#}");
    assert_eq!(files(&root), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_of_mysql_and_one_behind_a_socket_are_dumped_with_the_tools_that_are_there() {
    let cluster = Cluster::start().await;
    let source = MariadbSource::with_rows(100);
    let socket = mariadb("mysql", "select @@socket");
    let mut behind_socket = source.config();
    behind_socket["socket"] = json!(socket.trim());
    for field in ["host", "port"] {
        behind_socket.as_object_mut().expect("an object").remove(field);
    }
    let (destination, root) = cluster.local_destination().await;
    for (engine, config) in [("mysql", source.config()), ("mariadb", behind_socket)] {
        let job = cluster.job(&cluster.source(engine, config).await, &[&destination], json!({})).await;
        source.assert_same(&source.restore(&stored(&root, &cluster.backup(&job).await)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gzip_and_uncompressed_backups_restore_with_their_own_tools() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(2_000).await;
    let source_id = cluster.source("postgres", source.config()).await;
    let (destination, root) = cluster.local_destination().await;
    for (compression, unpack, suffix) in [("gzip", "gzip -dc", ".dump.gz"), ("none", "cat", ".dump")] {
        let job = cluster.job(&source_id, &[&destination], json!({ "compression": compression })).await;
        let file = stored(&root, &cluster.backup(&job).await);
        assert!(file.to_string_lossy().ends_with(suffix), "{}", file.display());
        source.assert_same(&source.restore_by(unpack, &file).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_without_tables_is_a_success() {
    let cluster = Cluster::start().await;
    let (destination, root) = cluster.local_destination().await;
    let empty = PostgresSource::empty().await;
    let job = cluster.job(&cluster.source("postgres", empty.config()).await, &[&destination], json!({})).await;
    let file = stored(&root, &cluster.backup(&job).await);
    shell(&format!("zstd -dc '{0}' > '{0}.plain' && pg_restore --list '{0}.plain'", file.display()));

    let empty = MariadbSource::empty();
    let job = cluster.job(&cluster.source("mariadb", empty.config()).await, &[&destination], json!({})).await;
    let restored = empty.restore(&stored(&root, &cluster.backup(&job).await));
    assert_eq!(mariadb(&restored, "show tables"), "");
}
