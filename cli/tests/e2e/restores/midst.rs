//! Restores in their midst: held there, killed, cancelled, limited, and by tools that need a detour.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{empty_database, job, refused, restore, restored, tables};
use crate::{
    bad_dumps::write_script,
    harness::{
        Cluster, SOON, audit, postgres_url,
        source::{PostgresSource, psql},
        unique, until,
    },
};

/// Holds a restore of PostgreSQL in the midst: no table can be made while the transaction is open.
async fn held(database: &str) -> PgConnection {
    let mut conn = PgConnection::connect(&postgres_url(database)).await.expect("connects");
    sqlx::raw_sql("begin; lock table pg_catalog.pg_type in share mode").execute(&mut conn).await.expect("locks");
    conn
}

async fn in_the_midst(cluster: &Cluster, database: &str, before: &[i32]) -> Vec<i32> {
    until("the restore waits for the lock", SOON, || async {
        let query =
            format!("select pid from pg_stat_activity where datname = '{database}' and wait_event_type = 'Lock'");
        let waiting: Vec<i32> =
            sqlx::query_scalar(AssertSqlSafe(query)).fetch_all(&cluster.pool).await.expect("answers");
        waiting.iter().any(|pid| !before.contains(pid)).then_some(waiting)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_whose_worker_is_killed_is_done_by_another_and_one_that_is_cancelled_leaves_nothing() {
    let mut cluster = Cluster::start().await;
    audit::install(&cluster).await;
    let source = PostgresSource::with_rows(20_000).await;
    let (job, _) = job(&cluster, "postgres", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;

    let into = empty_database(&source).await;
    let lock = held(&into).await;
    let id = restore(&cluster, &backup, json!({ "into": into })).await;
    let first = in_the_midst(&cluster, &into, &[]).await;
    until("its stage is told", SOON, || async { (cluster.execution(&id).await["stage"] == "Restoring").then_some(()) })
        .await;
    let worker = cluster.busy_worker();
    cluster.workers[worker].kill().await;
    until("another has it", SOON, || async { (cluster.execution(&id).await["attempt"] == 2).then_some(()) }).await;
    in_the_midst(&cluster, &into, &first).await;
    lock.close().await.expect("lets go");
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!((&ended["status"], &ended["attempt"]), (&json!("Success"), &json!(2)), "{ended:#}");
    source.assert_same(&into).await;

    let into = empty_database(&source).await;
    let lock = held(&into).await;
    let id = restore(&cluster, &backup, json!({ "into": into })).await;
    in_the_midst(&cluster, &into, &[]).await;
    cluster.ok("POST", &format!("/api/executions/{id}/cancel"), None).await;
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!((&ended["status"], &ended["outcome"]), (&json!("Failed"), &json!("Cancelled")), "{ended:#}");
    let told = format!("cancelled on request\nNothing of it was committed to '{into}'.");
    assert_eq!(ended["error"], told, "{ended:#}");
    lock.close().await.expect("lets go");
    assert_eq!(tables(&into), "0");
    assert_eq!(audit::claims_over_the_limit_of_a_source(&cluster).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_damaged_while_it_is_restored_is_not_committed() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(60_000).await;
    let (job, root) = job(&cluster, "postgres", source.config(), json!({ "compression": "none" })).await;
    let backup = cluster.backup(&job).await;
    let into = empty_database(&source).await;
    let lock = held(&into).await;
    let id = restore(&cluster, &backup, json!({ "into": into })).await;
    in_the_midst(&cluster, &into, &[]).await;
    // It was found whole; what is read for the second time is not. More than what is under way is still unread.
    let path = root.join(backup["path"].as_str().expect("a path"));
    let file = std::fs::File::options().read(true).write(true).open(&path).expect("opens");
    let (end, mut byte) = (file.metadata().expect("a file").len() - 1_000, [0]);
    assert!(end > 5 << 20, "too small");
    file.read_exact_at(&mut byte, end).expect("reads");
    file.write_all_at(&[byte[0] ^ 1], end).expect("writes");
    lock.close().await.expect("lets go");
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!((&ended["status"], &ended["errorCode"]), (&json!("Failed"), &json!("backup_damaged")), "{ended:#}");
    let error = ended["error"].as_str().expect("an error");
    assert!(
        error.contains("changed while it was restored") && error.contains("Nothing of it was committed"),
        "{error}"
    );
    assert_eq!(tables(&into), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn restores_into_a_source_are_limited_apart_from_its_backups_and_the_limit_acts_at_once() {
    let cluster = Cluster::build().limit(8).start().await;
    audit::install(&cluster).await;
    let source = PostgresSource::with_rows(1_000).await;
    let held_source = cluster.source("postgres", source.config()).await;
    let path = format!("/api/sources/{held_source}");
    cluster.ok("PUT", &path, Some(json!({ "maxConcurrentRestores": 1, "maxConcurrentRuns": 1 }))).await;
    let (destination, _) = cluster.local_destination().await;
    let (mut backups, mut locks, mut restores) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..2 {
        // Of two jobs: those of one are restored one after the other anyway.
        let job = cluster.job(&held_source, &[&destination], json!({})).await;
        backups.push(cluster.backup(&job).await);
    }
    for backup in &backups {
        let into = empty_database(&source).await;
        locks.push(held(&into).await);
        restores.push((restore(&cluster, backup, json!({ "into": into })).await, into));
    }
    let [(first, into), (second, other)] = &restores[..] else { panic!("two restores") };
    in_the_midst(&cluster, into, &[]).await;
    let waits = until("the second says what it waits for", SOON, || async {
        let waiting = cluster.execution(second).await;
        (waiting["waitingFor"]["reason"] == "source").then_some(waiting)
    })
    .await;
    assert!(waits["waitingFor"].to_string().contains("maxConcurrentRestores"), "{waits:#}");
    // A backup of the same source is not in their way.
    cluster.backup(backups[0]["jobId"].as_str().expect("an id")).await;
    assert_eq!(cluster.execution(second).await["status"], "Pending");
    cluster.ok("PUT", &path, Some(json!({ "maxConcurrentRestores": 2 }))).await;
    in_the_midst(&cluster, other, &[]).await;
    for lock in locks {
        lock.close().await.expect("lets go");
    }
    for id in [first, second] {
        assert_eq!(cluster.ended(id, SOON).await["status"], "Success");
    }
    assert_eq!(audit::claims_over_the_limit_of_a_source(&cluster).await, 0);
}

/// A pg_restore as that of PostgreSQL 17 is to an older server: it sends a setting that such a one refuses.
const NEWER: &str = r#"#!/bin/bash
case " $* " in
  *" --version "*) echo "pg_restore (PostgreSQL) 17.2"; exit ;;
  *" --dbname="*) echo 'pg_restore: error: unrecognized configuration parameter "transaction_timeout"' >&2; exit 1 ;;
esac
set -o pipefail
REAL/pg_restore "$@" | sed '/^SET lock_timeout = 0;$/a SET transaction_timeout = 0;'
"#;

#[tokio::test(flavor = "multi_thread")]
async fn newer_tools_restore_into_an_older_server_all_of_it_or_nothing() {
    let bin = std::env::temp_dir().join(unique("newer"));
    let real = linked_tools(&bin);
    write_script(&bin.join("pg_restore"), &NEWER.replace("REAL", &real.display().to_string()));
    let mut cluster = Cluster::build().env("DBACKUP_POSTGRES_BIN", bin.display()).start().await;
    let source = PostgresSource::with_rows(20_000).await;
    psql(
        &source.database,
        &format!("create view seen as select id from item; alter view seen owner to {}", source.role),
    );
    let (job, _) = job(&cluster, "postgres", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;
    let into = empty_database(&source).await;
    let restore = restored(&cluster, &backup, json!({ "into": into })).await;
    source.assert_same(&into).await;
    assert!(restore["logs"].to_string().contains("by a script through psql"), "{restore:#}");

    // A failure in the midst, of psql.
    psql(
        &source.database,
        "delete from item where id > 10; create table other (id int); create view kept as select i.id from item i, other o",
    );
    refused(&cluster, &backup, json!({ "overwrite": true }), "target_in_use", "Nothing of it was committed").await;
    assert_eq!(psql(&source.database, "select count(*) from item; select count(*) from seen"), "10\n10\n");
    psql(&source.database, "drop view kept");
    restored(&cluster, &backup, json!({ "overwrite": true })).await;
    assert_eq!(psql(&source.database, "select count(*) from item").trim(), "20000");

    // A worker that is killed, and a restore that is cancelled.
    let into = empty_database(&source).await;
    let lock = held(&into).await;
    let id = super::restore(&cluster, &backup, json!({ "into": into })).await;
    let first = in_the_midst(&cluster, &into, &[]).await;
    let worker = cluster.busy_worker();
    cluster.workers[worker].kill().await;
    in_the_midst(&cluster, &into, &first).await;
    cluster.ok("POST", &format!("/api/executions/{id}/cancel"), None).await;
    assert_eq!(cluster.ended(&id, SOON).await["outcome"], "Cancelled");
    lock.close().await.expect("lets go");
    assert_eq!(tables(&into), "0");
    // Its own tool fails: the half of a script must not be committed.
    let half = format!("{}/pg_restore \"$@\" | head -c 900000; exit 1; true", real.display());
    write_script(&bin.join("pg_restore"), &NEWER.replace("REAL/pg_restore \"$@\"", &half));
    refused(&cluster, &backup, json!({ "into": into }), "restore_failed", "exited with status 1").await;
    assert_eq!(tables(&into), "0");
    std::fs::remove_dir_all(bin).expect("removes");
}

/// Makes a folder with the newest tools on this machine but for pg_restore; gives where they really are.
fn linked_tools(bin: &Path) -> PathBuf {
    std::fs::create_dir(bin).expect("a folder");
    let real = newest_tools();
    for tool in ["pg_dump", "psql"] {
        std::os::unix::fs::symlink(real.join(tool), bin.join(tool)).expect("links");
    }
    real
}

/// The folder of the newest tools on this machine.
fn newest_tools() -> PathBuf {
    let majors = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
    let newest = majors.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()).max();
    PathBuf::from(format!("/usr/lib/postgresql/{}/bin", newest.expect("a major")))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_cancelled_while_the_server_makes_the_end_of_it_says_that_it_may_be_there() {
    let bin = std::env::temp_dir().join(unique("tools"));
    let real = linked_tools(&bin);
    // It has sent everything and waits for the answer to its commit; asked to end, it does.
    let script = format!(
        "#!/bin/bash\nif [ \"$1\" = --version ]; then exec {}/pg_restore --version; fi\ntrap 'exit 1' TERM\ncat >/dev/null\ntouch {}/sent\nsleep 300 & wait\n",
        real.display(),
        bin.display()
    );
    write_script(&bin.join("pg_restore"), &script);
    let cluster = Cluster::build().env("DBACKUP_POSTGRES_BIN", bin.display()).start().await;
    let source = PostgresSource::with_rows(10).await;
    let (job, _) = job(&cluster, "postgres", source.config(), json!({})).await;
    let backup = cluster.backup(&job).await;
    let into = empty_database(&source).await;
    let id = restore(&cluster, &backup, json!({ "into": into })).await;
    until("it has sent everything", SOON, || async { bin.join("sent").exists().then_some(()) }).await;
    cluster.ok("POST", &format!("/api/executions/{id}/cancel"), None).await;
    let ended = cluster.ended(&id, SOON).await;
    let error = ended["error"].as_str().expect("an error");
    assert!(error.contains(&format!("the backup may be in '{into}' now")), "{error}");
    std::fs::remove_dir_all(bin).expect("removes");
}
