//! Restores: what was backed up comes back as it was, or nothing does.

mod midst;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{
    harness::{
        Cluster, SOON, files,
        otlp::Receiver,
        postgres_url,
        s3::S3Server,
        source::{MariadbSource, PostgresSource, mariadb, psql},
        sql, unique, until,
    },
    trace::{one, traced},
};

/// Asks for a restore; gives the execution's id.
pub async fn restore(cluster: &Cluster, backup: &Value, body: Value) -> String {
    let backup = backup["id"].as_str().expect("an id");
    let answer = cluster.ok("POST", &format!("/api/executions/{backup}/restore"), Some(body)).await;
    answer["executionId"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

async fn restored(cluster: &Cluster, backup: &Value, body: Value) -> Value {
    let execution = cluster.ended(&restore(cluster, backup, body).await, SOON).await;
    assert_eq!(execution["status"], "Success", "{execution:#}");
    execution
}

pub async fn refused(cluster: &Cluster, backup: &Value, body: Value, code: &str, says: &str) -> String {
    let execution = cluster.ended(&restore(cluster, backup, body).await, SOON).await;
    assert_eq!((&execution["status"], &execution["errorCode"]), (&json!("Failed"), &json!(code)), "{execution:#}");
    let error = execution["error"].as_str().expect("an error").to_owned();
    assert!(error.contains(says), "{execution:#}");
    error
}

/// An empty database that belongs to a source's role.
pub async fn empty_database(source: &PostgresSource) -> String {
    let name = unique("restored");
    sql("postgres", &format!("create database {name} owner {}", source.role)).await;
    name
}

/// A job on a source; gives its id.
pub async fn job(cluster: &Cluster, engine: &str, config: Value, more: Value) -> (String, PathBuf) {
    let (destination, root) = cluster.local_destination().await;
    let source = cluster.source(engine, config).await;
    (cluster.job(&source, &[&destination], more).await, root)
}

/// Tables of a database, and their rows.
fn tables(database: &str) -> String {
    psql(database, "select count(*) from information_schema.tables where table_schema = 'public'").trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_backup_comes_back_under_another_name_as_it_was() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(60_000).await;
    for compression in ["zstd", "gzip", "none"] {
        let (job, _) = job(&cluster, "postgres", source.config(), json!({ "compression": compression })).await;
        let backup = cluster.backup(&job).await;
        let into = empty_database(&source).await;
        let restore = restored(&cluster, &backup, json!({ "into": into })).await;
        source.assert_same(&into).await;
        assert_eq!(
            (&restore["type"], &restore["trigger"]["type"], &restore["progress"], &restore["stage"], &restore["jobId"]),
            (&json!("Restore"), &json!("Restore"), &json!(100), &json!("Completed"), &backup["jobId"])
        );
        assert_eq!((&restore["size"], &restore["snapshotAt"]), (&backup["size"], &backup["snapshotAt"]), "{restore:#}");
        let order = &restore["restore"];
        assert_eq!(
            (&order["backupId"], &order["database"], &order["into"], &order["overwrite"]),
            (&backup["id"], &json!(source.database), &json!(into), &json!(false)),
            "{restore:#}"
        );
        let log = restore["logs"].to_string();
        assert!(log.contains("as they were stored") && log.contains(&format!("'{into}' is restored")), "{log}");
        // It is no backup: neither in the audit log, nor where backups are counted.
        let said = "select count(*) from audit_log where action = 'execution.restore' and target_id = ";
        assert_eq!(cluster.count(&format!("{said}'{}'", restore["id"].as_str().expect("an id"))).await, 1);
        let reuse = Some(json!({ "maxAgeSeconds": 3600 }));
        let reused = cluster.ok("POST", &format!("/api/jobs/{job}/run"), reuse).await;
        assert_eq!((&reused["executionId"], &reused["reused"]), (&backup["id"], &json!(true)), "{reused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_database_is_made_by_who_may_and_else_the_error_says_what_to_do() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(100).await;
    let (job, _) = job(&cluster, "postgres", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;
    let into = unique("we\\\"ird =name");
    let error = refused(&cluster, &backup, json!({ "into": into }), "database_missing", "CREATEDB").await;
    assert!(!error.contains("to read every table"), "that is for who backs up: {error}");
    sql("postgres", &format!("alter role {} createdb", source.role)).await;
    restored(&cluster, &backup, json!({ "into": into })).await;
    let count = |name: &str| {
        let url = url::Url::parse(&postgres_url("postgres")).expect("a URL");
        let output = std::process::Command::new("psql")
            .args(["-XAtq", "-h", url.host_str().expect("a host"), "-p", &url.port().expect("a port").to_string()])
            .args(["-U", url.username(), "-c", "select count(*) from item"])
            .env("PGPASSWORD", url.password().unwrap_or_default())
            .env("PGDATABASE", name)
            .output()
            .expect("psql runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!(count(&into), "100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_holds_something_is_refused_unless_overwrite_is_said() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(1_000).await;
    let (job, _) = job(&cluster, "postgres", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;
    let whole = psql(&source.database, "select count(*) from item");
    psql(&source.database, "delete from item where id > 10; create table other as select 1 as kept");
    refused(&cluster, &backup, json!({}), "target_not_empty", "overwrite").await;
    assert_eq!(psql(&source.database, "select count(*) from item").trim(), "10", "it was touched");
    restored(&cluster, &backup, json!({ "overwrite": true })).await;
    assert_eq!(psql(&source.database, "select count(*) from item"), whole);
    assert_eq!(psql(&source.database, "select kept from other").trim(), "1", "what the backup does not have stays");

    // One thing of each kind makes a database hold something.
    for thing in [
        "create schema mine",
        "create type mood as enum ('good')",
        "create function f() returns int language sql as 'select 1'",
        "create sequence s",
        "select lo_create(0)",
    ] {
        let into = empty_database(&source).await;
        psql(&into, thing);
        refused(&cluster, &backup, json!({ "into": into }), "target_not_empty", "into").await;
    }
    // An extension that the template brought is nobody's data.
    let into = empty_database(&source).await;
    psql(&into, "create extension if not exists plpgsql; create extension if not exists pg_stat_statements");
    restored(&cluster, &backup, json!({ "into": into })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_postgres_in_the_midst_leaves_nothing_of_it() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(1_000).await;
    psql(
        &source.database,
        &format!("create view seen as select id from item; alter view seen owner to {}", source.role),
    );
    let (job, _) = job(&cluster, "postgres", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;
    // Something outside the backup depends on what it would replace.
    psql(
        &source.database,
        "delete from item where id > 10; create table other (id int); create view kept as select i.id from item i, other o",
    );
    refused(&cluster, &backup, json!({ "overwrite": true }), "target_in_use", "Nothing of it was committed").await;
    assert_eq!(psql(&source.database, "select count(*) from item").trim(), "10");
    // A role that is not there: only with owners and grants.
    psql(&source.database, "drop view kept; drop table other");
    let owner = unique("owner");
    psql(&source.database, &format!("create role {owner}; grant select on item to {owner}"));
    let backup = cluster.backup(backup["jobId"].as_str().expect("an id")).await;
    psql(&source.database, &format!("drop owned by {owner}; drop role {owner}"));
    let into = empty_database(&source).await;
    refused(&cluster, &backup, json!({ "into": into, "keepOwners": true }), "role_missing", "keepOwners").await;
    assert_eq!(tables(&into), "0");
    restored(&cluster, &backup, json!({ "into": into })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mariadb_comes_back_with_views_triggers_routines_and_events() {
    let cluster = Cluster::start().await;
    let source = MariadbSource::with_rows(5_000);
    let (job, _) = job(&cluster, "mariadb", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;
    refused(&cluster, &backup, json!({}), "target_not_empty", "not empty").await;
    let into = unique("restored");
    let error = refused(&cluster, &backup, json!({ "into": into }), "database_missing", "the right CREATE").await;
    assert!(!error.contains("LOCK TABLES"), "that is for who backs up: {error}");
    // The dump names the definer, who is root.
    mariadb("mysql", &format!("grant all on {into}.* to {u}@'%'; grant super on *.* to {u}@'%'", u = source.user));
    let restore = restored(&cluster, &backup, json!({ "into": into })).await;
    source.assert_same(&into);
    assert!(restore["logs"].to_string().contains("was not there and is made"), "{restore:#}");
    mariadb(&source.database, "delete from item where id > 10");
    restored(&cluster, &backup, json!({ "overwrite": true })).await;
    source.assert_same(&into);
    // Half-way: what is there is told, and not tried again.
    mariadb(
        "mysql",
        &format!(
            "create table {into}.blocked (id int); drop table {into}.odd; create view {into}.odd as select 1 as id"
        ),
    );
    let body = json!({ "into": into, "overwrite": true });
    refused(&cluster, &backup, body, "restore_failed", "A part of the backup may be in").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_copy_is_passed_over_and_without_a_whole_one_the_target_is_not_touched() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(20_000).await;
    let held = cluster.source("postgres", source.config()).await;
    let (first, one) = cluster.local_destination().await;
    let (second, other) = cluster.local_destination().await;
    let job = cluster.job(&held, &[&first, &second], json!({})).await;
    let backup = cluster.backup(&job).await;
    let path = backup["path"].as_str().expect("a path");
    let damage = |root: &Path| {
        let file = root.join(path);
        let mut bytes = std::fs::read(&file).expect("a file");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, bytes).expect("writes");
    };
    damage(&one);
    let into = empty_database(&source).await;
    let restore = restored(&cluster, &backup, json!({ "into": into })).await;
    source.assert_same(&into).await;
    let log = restore["logs"].to_string();
    assert!(log.contains("does not serve") && log.contains("SHA-256 differs"), "{log}");

    damage(&other);
    let into = empty_database(&source).await;
    refused(&cluster, &backup, json!({ "into": into }), "backup_damaged", "the target was not touched").await;
    assert_eq!(tables(&into), "0");
    // The manifest too.
    for root in [&one, &other] {
        let manifest =
            files(root).into_iter().find(|f| f.extension().is_some_and(|e| e == "json")).expect("a manifest");
        let text = std::fs::read_to_string(root.join(&manifest)).expect("text").replace("zstd", "none");
        std::fs::write(root.join(&manifest), text).expect("writes");
    }
    refused(&cluster, &backup, json!({ "into": into }), "backup_damaged", "the manifest").await;
    std::fs::remove_file(one.join(".dbackup-store")).expect("removes");
    refused(&cluster, &backup, json!({ "into": into }), "store_missing", "is the mount missing?").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_in_a_bucket_comes_back_also_when_its_job_is_gone() {
    let cluster = Cluster::start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), None).await;
    // More than one request of a read.
    let source = PostgresSource::with_rows(200_000).await;
    let body = json!({ "name": "bucket", "kind": "s3", "config": server.config() });
    let s3 = crate::harness::id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    let held = cluster.source("postgres", source.config()).await;
    let job = cluster.job(&held, &[&s3], json!({ "compression": "none" })).await;
    let backup = cluster.backup(&job).await;
    assert!(backup["size"].as_u64() > Some(17 << 20), "{backup:#}");
    cluster.ok("DELETE", &format!("/api/jobs/{job}"), None).await;
    let into = empty_database(&source).await;
    restored(&cluster, &backup, json!({ "into": into })).await;
    source.assert_same(&into).await;
}

/// Waits until a restore of a database waits for the lock, other than those of `before`; gives who does.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_of_mariadb_under_another_name_leaves_the_database_of_the_dump_alone() {
    let cluster = Cluster::start().await;
    let source = MariadbSource::with_rows(100);
    // Its routine, trigger and event were made under another collation than the database has now.
    mariadb(&source.database, &format!("alter database {} character set latin1 collate latin1_bin", source.database));
    let (job, root) = job(&cluster, "mariadb", source.config(), json!({ "compression": "none" })).await;
    let backup = cluster.backup(&job).await;
    let dump = std::fs::read_to_string(root.join(backup["path"].as_str().expect("a path"))).expect("text");
    assert!(
        dump.contains(&format!("\nALTER DATABASE `{}` CHARACTER SET ", source.database)),
        "there is nothing to see"
    );
    let into = unique("restored");
    mariadb("mysql", &format!("grant all on {into}.* to {u}@'%'; grant super on *.* to {u}@'%'", u = source.user));
    mariadb("mysql", &format!("drop database {}", source.database));
    // On a server that has no such database any more every statement that names it would fail.
    restored(&cluster, &backup, json!({ "into": into })).await;
    assert_eq!(mariadb(&into, "select count(*) from item; call answer()"), "100\n42\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_is_refused_with_the_field_and_a_repeated_request_makes_one_restore() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(10).await;
    let (job, _) = job(&cluster, "postgres", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;
    let path = format!("/api/executions/{}/restore", backup["id"].as_str().expect("an id"));
    let elsewhere = cluster.source("postgres", source.config()).await;
    for (body, status, field) in [
        (json!({ "database": "nobody" }), 422, "database"),
        (json!({ "into": "" }), 422, "into"),
        (json!({ "into": "x".repeat(64) }), 422, "into"),
        (json!({ "into": "Template1" }), 422, "into"),
        (json!({ "into": "mysql" }), 422, "into"),
        (json!({ "sourceId": "nowhere" }), 422, "sourceId"),
        (json!({ "wait": 61 }), 422, "wait"),
        (json!({ "force": true }), 400, "force"),
    ] {
        let (code, answer) = cluster.request("POST", &path, Some(body.clone())).await;
        assert_eq!(code, status, "{body} {answer}");
        assert!(answer.to_string().contains(field), "{body} {answer}");
    }
    let maria = cluster
        .source("mariadb", json!({ "host": "127.0.0.1", "username": "u", "password": "p", "databases": ["x"] }))
        .await;
    let body = json!({ "sourceId": maria, "keepOwners": true });
    let (code, answer) = cluster.request("POST", &path, Some(body)).await;
    assert_eq!((code, &answer["fields"][0]["field"]), (422, &json!("keepOwners")), "{answer}");
    refused(&cluster, &backup, json!({ "sourceId": maria }), "engine_differs", "same engine").await;

    // A failed run and a restore leave no backup.
    let into = empty_database(&source).await;
    let first = restored(&cluster, &backup, json!({ "into": into })).await;
    let of_restore = format!("/api/executions/{}/restore", first["id"].as_str().expect("an id"));
    let (code, answer) = cluster.request("POST", &of_restore, None).await;
    assert_eq!((code, &answer["code"]), (409, &json!("nothing_to_restore")), "{answer}");

    // A key of that job writes into its own source, and into no other.
    let permissions = ["storage:restore", "history:read", "jobs:execute"];
    let job_id = job.parse().expect("an id");
    let scoped = cluster.scoped_key(&permissions, Some(vec![job_id])).await;
    let body = json!({ "sourceId": elsewhere, "into": into, "overwrite": true });
    let (code, answer) = cluster.request_as(&scoped, "POST", &path, Some(body)).await;
    assert_eq!((code, &answer["code"]), (403, &json!("forbidden")), "{answer}");
    let body = json!({ "into": into, "overwrite": true });
    let (code, answer) = cluster.request_as(&scoped, "POST", &path, Some(body)).await;
    assert_eq!((code, &answer["code"]), (403, &json!("forbidden")), "{answer}");
    let stranger = cluster.scoped_key(&permissions, Some(vec![common::id::JobId::new()])).await;
    assert_eq!(cluster.request_as(&stranger, "POST", &path, None).await.0, 404);

    // Once, on whichever API process.
    let send = async |api: usize, body: &Value| {
        let request = cluster.http.post(format!("{}{path}", cluster.url(api))).bearer_auth(&scoped);
        let answer = request.header("Idempotency-Key", "once").json(body).send().await.expect("answers");
        let (status, replayed) = (answer.status().as_u16(), answer.headers().contains_key("idempotency-replayed"));
        (status, replayed, answer.json::<Value>().await.expect("JSON")["executionId"].clone())
    };
    let into = empty_database(&source).await;
    let body = json!({ "into": into });
    let (one, two) = tokio::join!(send(0, &body), send(1, &body));
    assert_eq!((one.0, two.0, &one.2), (200, 200, &two.2));
    assert!(one.1 != two.1, "one of them is the answer of the other: {one:?} {two:?}");
    assert_eq!(send(0, &json!({ "overwrite": true })).await.0, 422);

    // Once more: what it was about.
    let again = one.2.as_str().expect("an id");
    cluster.ended(again, SOON).await;
    let retry = format!("/api/executions/{again}/retry");
    let without = cluster.scoped_key(&["jobs:execute", "history:read"], Some(vec![job_id])).await;
    let (code, answer) = cluster.request_as(&without, "POST", &retry, None).await;
    assert_eq!((code, &answer["code"]), (403, &json!("permission_missing")), "{answer}");
    let (code, answer) = cluster.request_as(&scoped, "POST", &retry, None).await;
    assert_eq!(code, 200, "{answer}");
    let ended = cluster.ended(answer["executionId"].as_str().expect("an id"), SOON).await;
    assert_eq!(
        (&ended["errorCode"], &ended["restore"]["into"]),
        (&json!("target_not_empty"), &json!(into)),
        "{ended:#}"
    );

    // Each job has room for so many that wait, its backups apart.
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPendingPerJob": 1, "paused": true }))).await;
    restore(&cluster, &backup, json!({})).await;
    let (code, answer) = cluster.request("POST", &path, None).await;
    assert_eq!((code, &answer["code"]), (429, &json!("queue_full")), "{answer}");
    cluster.trigger(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_one_trace_and_is_counted_apart_from_backups() {
    let receiver = Receiver::start().await;
    let cluster = traced(&receiver).env("DBACKUP_METRICS_LISTEN", "127.0.0.1:0").start().await;
    let source = PostgresSource::with_rows(1_000).await;
    let (job, _) = job(&cluster, "postgres", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;
    let into = empty_database(&source).await;
    let restore = restored(&cluster, &backup, json!({ "into": into })).await;
    let trace = restore["traceId"].as_str().expect("a trace");
    assert_ne!(restore["traceId"], backup["traceId"]);
    let names = [("enqueue", 1), ("claim", 1), ("inspect", 1), ("verify", 1), ("restore", 1), ("attempt", 1)];
    let spans = receiver.holds(trace, &names, SOON).await;
    let (claim, span) = (one(&spans, "claim"), one(&spans, "restore"));
    assert_eq!(span.parent(), claim.id());
    let size = restore["size"].to_string();
    for (key, value) in [
        ("db.system.name", "postgresql"),
        ("db.namespace", &*into),
        ("dbackup.bytes", &*size),
        ("process.executable.name", "pg_restore"),
        ("process.exit.code", "0"),
    ] {
        assert_eq!(span.get(key).as_deref(), Some(value), "{key}");
    }
    let done = [("engine", "postgres"), ("outcome", "success")];
    until("the worker has counted it", SOON, || async {
        (cluster.told_by_workers("dbackup_restore_duration_seconds_count", &done).await == 1.0).then_some(())
    })
    .await;
    assert_eq!(cluster.told_by_workers("dbackup_run_duration_seconds_count", &done).await, 1.0, "the backup");
    let restored = cluster.told_by_workers("dbackup_restored_bytes_total", &[("engine", "postgres")]).await;
    assert_eq!(Some(restored), restore["size"].as_f64());

    // What the tool said of a failure is an event of its span.
    let owner = unique("owner");
    psql(&source.database, &format!("create role {owner}; grant select on item to {owner}"));
    let backup = cluster.backup(&job).await;
    psql(&source.database, &format!("drop owned by {owner}; drop role {owner}"));
    let into = empty_database(&source).await;
    let id = self::restore(&cluster, &backup, json!({ "into": into, "keepOwners": true })).await;
    let failed = cluster.ended(&id, SOON).await;
    let spans =
        receiver.holds(failed["traceId"].as_str().expect("a trace"), &[("restore", 1), ("attempt", 1)], SOON).await;
    let span = one(&spans, "restore");
    assert_eq!(span.of_event("process.exit", "process.exit.code").as_deref(), Some("1"));
    let said = span.of_event("process.stderr", "dbackup.stderr.tail");
    assert!(said.as_ref().is_some_and(|said| said.contains(&owner)) && span.error().is_some(), "{said:?}");
}
