//! Much history: it is forgotten in time, and costs nothing while it is there.

use common::{
    execution::{
        group::find_groups,
        history::{self, Batch},
    },
    id::ExecutionId,
};
use serde_json::json;

use crate::harness::{
    Cluster, SOON,
    history::assert_nothing_walks,
    source::{PostgresSource, job_without_workers},
    until,
};

/// Failed executions that ended so many days ago, each with two lines of log and a word in its path by which it is known.
async fn ended(cluster: &Cluster, days: u32, word: &str, count: u32) {
    let restore = word.starts_with("restored");
    let (status, kind) = match word {
        "backup" => ("Success", "Backup"),
        _ if restore => ("Success", "Restore"),
        _ => ("Failed", "Backup"),
    };
    let statement = format!(
        "with made as (
             insert into executions (id, type, job_id, job_name, job_slug, source_id, pool, serial, status, attempt, max_attempts,
                                     last_token, trigger_kind, queued_at, started_at, ended_at, path, error)
             select (lpad(to_hex((extract(epoch from t.at) * 1000)::bigint), 12, '0') || substr(md5(random()::text), 1, 20))::uuid, '{kind}',
                    gen_random_uuid(), 'past', 'past', gen_random_uuid(), 'default', true, '{status}', 1, 3, 0,
                    'Api', t.at, t.at, t.at, '{word}', 'it failed'
               from generate_series(1, {count}), (select clock_timestamp() - interval '{days} days' as at) t
             returning id, job_id, ended_at
         ), staged as (
             insert into staged_objects (id, execution_id, token, destination_id, path)
             select gen_random_uuid(), id, 0, gen_random_uuid(), 'litter' from made where '{word}' = 'litter'
         ), restored as (
             insert into restores (execution_id, backup_id, overwrite, keep_owners)
             select id, gen_random_uuid(), false, false from made where {restore}
         ), published as (
             insert into artifacts (id, execution_id, job_id, destination_id, path, size_bytes, sha256)
             select gen_random_uuid(), id, job_id, gen_random_uuid(), 'x', 1, 'x' from made where '{word}' = 'backup'
         )
         insert into execution_logs (execution_id, at, level, stage, message)
         select id, ended_at, 'info', 'Dumping', 'a line' from made, generate_series(1, 2)"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&cluster.pool).await.expect("inserts");
}

/// How many of them are left, and how many of their lines.
async fn left(cluster: &Cluster, word: &str) -> (i64, i64) {
    let of = format!("from executions e where e.path = '{word}'");
    let lines = format!("select count(*) from execution_logs where execution_id in (select id {of})");
    (cluster.count(&format!("select count(*) {of}")).await, cluster.count(&lines).await)
}

async fn comes_to(cluster: &Cluster, word: &str, wanted: (i64, i64)) {
    until(&format!("'{word}' comes to {wanted:?}"), SOON, || async {
        (left(cluster, word).await == wanted).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_logs_restores_and_runs_without_a_backup_are_forgotten_and_those_with_a_backup_never() {
    let mut cluster = Cluster::build().workers(0).start().await;
    for (days, word, count) in [
        (400, "old", 1_203),
        (400, "backup", 300),
        (400, "litter", 1),
        (100, "middle", 2),
        (10, "young", 2),
        (400, "restored", 3),
        (10, "restored lately", 2),
    ] {
        ended(&cluster, days, word, count).await;
    }
    // Nothing of it is in a store, so the sweeper must not find it either.
    sqlx::query("update staged_objects set swept_at = clock_timestamp()")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    cluster.add_worker(&[]).await;
    cluster.add_worker(&[]).await;
    for (word, wanted) in [
        ("old", (0, 0)),
        ("backup", (300, 0)),
        ("litter", (1, 0)),
        ("middle", (2, 0)),
        ("young", (2, 4)),
        ("restored", (0, 0)),
        ("restored lately", (2, 4)),
    ] {
        comes_to(&cluster, word, wanted).await;
    }
    assert_eq!(cluster.count("select count(*) from artifacts").await, 300);

    cluster.ok("PATCH", "/api/settings", Some(json!({ "keepExecutionsDays": 50 }))).await;
    comes_to(&cluster, "middle", (0, 0)).await;
    assert_eq!(left(&cluster, "young").await, (2, 4));
    cluster.ok("PATCH", "/api/settings", Some(json!({ "keepLogsDays": 5 }))).await;
    comes_to(&cluster, "young", (2, 0)).await;
    assert_eq!(left(&cluster, "restored lately").await.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_group_does_not_become_a_success_when_its_failures_are_forgotten() {
    let cluster = Cluster::start().await;
    let (good, bad) = (
        PostgresSource::with_rows(1).await.config(),
        json!({ "host": "127.0.0.1", "port": 1, "username": "x", "databases": ["x"] }),
    );
    let (destination, _) = cluster.local_destination().await;
    let mut jobs = Vec::new();
    for config in [good, bad] {
        let source = cluster.source("postgres", config).await;
        jobs.push(cluster.job(&source, &[&destination], json!({ "maxAttempts": 1 })).await);
    }
    let (status, answer) = cluster.request("POST", "/api/runs", Some(json!({ "jobs": jobs }))).await;
    assert_eq!(status, 200, "{answer}");
    let group = answer["executionId"].as_str().expect("an id");
    assert_eq!(cluster.ended(group, SOON).await["status"], "Failed");
    sqlx::query("update executions set ended_at = ended_at - interval '400 days' where status = 'Failed'")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    let path = format!("/api/executions/{group}");
    until("its failure is forgotten", SOON, || async {
        let (status, answer) = cluster.request("GET", &path, None).await;
        assert!(status == 404 || answer["data"]["status"] == "Failed", "{answer}");
        (cluster.count("select count(*) from executions").await == 1 && status == 404).then_some(())
    })
    .await;
    assert_eq!(cluster.count("select count(*) from execution_groups").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_forgotten_while_it_is_read_is_gone_and_no_success() {
    let cluster = Cluster::build().workers(0).start().await;
    let mut jobs = Vec::new();
    for _ in 0..2 {
        jobs.push(job_without_workers(&cluster, json!({})).await);
    }
    let (status, answer) = cluster.request("POST", "/api/runs", Some(json!({ "jobs": jobs }))).await;
    assert_eq!(status, 200, "{answer}");
    let group: [ExecutionId; 1] = [answer["executionId"].as_str().expect("an id").parse().expect("an id")];
    let end = "with first as (select id from executions order by id limit 1)
               update executions e
                  set attempt = 1, started_at = now(), ended_at = now() - interval '400 days',
                      status = case when first.id is null then 'Success' else 'Failed' end,
                      error = case when first.id is null then null else 'it failed' end
                 from executions m left join first on first.id = m.id
                where e.id = m.id";
    sqlx::query(end).execute(&cluster.pool).await.expect("updates");

    // The reader has to wait in its midst, at the executions, until they are forgotten.
    let mut forgetting = cluster.pool.begin().await.expect("begins");
    sqlx::query("lock table executions").execute(&mut *forgetting).await.expect("locks");
    let mut conn = cluster.pool.acquire().await.expect("connects");
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *conn).await.expect("answers");
    let forget = async {
        until("the reader waits", SOON, || async {
            let waiting = format!("select count(*) from pg_locks where pid = {pid} and not granted");
            (cluster.count(&waiting).await == 1).then_some(())
        })
        .await;
        assert_eq!(history::forget_executions(&mut forgetting, 365).await.expect("forgets"), Batch::Last);
        forgetting.commit().await.expect("commits");
    };
    let (read, ()) = tokio::join!(find_groups(&mut conn, &group), forget);
    let read = read.expect("reads");
    assert!(read.is_empty(), "{read:?}");
    assert_eq!(cluster.count("select count(*) from executions").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_small_and_only_one_process_at_a_time_forgets_logs() {
    let cluster = Cluster::build().workers(0).start().await;
    ended(&cluster, 400, "old", 1_000).await;
    let mut one = cluster.pool.begin().await.expect("begins");
    let mut other = cluster.pool.begin().await.expect("begins");
    assert_eq!(history::forget_logs(&mut one, 90).await.expect("forgets"), Batch::Full);
    assert_eq!(history::forget_logs(&mut other, 90).await.expect("forgets"), Batch::Last, "two at a time");
    one.commit().await.expect("commits");
    assert_eq!(left(&cluster, "old").await, (1_000, 1_600));
    assert_eq!(history::forget_executions(&mut other, 365).await.expect("forgets"), Batch::Full);
    other.commit().await.expect("commits");
    assert_eq!(left(&cluster, "old").await.0, 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_client_or_a_worker_does_walks_the_history() {
    assert_nothing_walks(60_000, 12_000).await;
}
