//! How many may run, and how many may wait.

use common::execution::{claim, finish::Ending};
use serde_json::json;
use sqlx::PgConnection;

use super::{claim_one, end_one, with_pending};
use crate::harness::{Cluster, LEASE, SOON, claimant, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_takes_at_most_half_of_what_is_free_and_never_more_than_it_has_room_for() {
    let cluster = with_pending(12).await;
    sqlx::query("update queue_gate set max_concurrency = 8").execute(&cluster.pool).await.expect("updates");
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let mut taken = Vec::new();
    for want in [100, 100, 1, 100, 100] {
        taken.push(claim::claim(&mut conn, &claimant(), LEASE, want).await.expect("claims").len());
    }
    assert_eq!(taken, [4, 2, 1, 1, 0], "halves of 8, 4, 2 (room for one), 1, 0");
    assert_eq!(cluster.count("select count(distinct slot) from execution_leases where slot between 1 and 8").await, 8);
}

/// Leases of a type.
async fn held(cluster: &Cluster, kind: &str) -> i64 {
    cluster.count(&format!("select count(*) from execution_leases where type = '{kind}'")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_and_restores_of_a_source_are_limited_apart() {
    let cluster = with_pending(4).await;
    let restores = "insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, max_attempts, trigger_kind, type)
                    select gen_random_uuid(), job_id, job_name, job_slug, source_id, pool, false, 1, 'Restore', 'Restore' from executions";
    sqlx::query(restores).execute(&cluster.pool).await.expect("inserts");
    sqlx::query("update queue_gate set max_concurrency = 100").execute(&cluster.pool).await.expect("updates");
    let source = cluster.text("select id::text from sources").await;
    let path = format!("/api/sources/{source}");
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    // Each step changes one limit only: the other kind must stay as it is.
    for (change, backups, restores) in [
        (json!({ "maxConcurrentRuns": 1, "maxConcurrentRestores": 2 }), 1, 2),
        (json!({ "maxConcurrentRestores": 3 }), 1, 3),
        (json!({ "maxConcurrentRuns": 3 }), 3, 3),
        (json!({ "maxConcurrentRestores": null }), 3, 4),
        (json!({ "maxConcurrentRuns": 1 }), 3, 4),
        (json!({ "maxConcurrentRuns": null }), 4, 4),
    ] {
        let stored = cluster.ok("PUT", &path, Some(change.clone())).await;
        for (field, value) in change.as_object().expect("an object") {
            assert_eq!(&stored[field], value, "{stored:#}");
        }
        while !claim::claim(&mut conn, &claimant(), LEASE, 100).await.expect("claims").is_empty() {}
        let held = (held(&cluster, "Backup").await, held(&cluster, "Restore").await);
        assert_eq!(held, (backups, restores), "after {change}");
    }
    let (status, refused) = cluster.request("PUT", &path, Some(json!({ "maxConcurrentRestores": 0 }))).await;
    assert_eq!((status, &refused["fields"][0]["field"]), (422, &json!("maxConcurrentRestores")), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_does_not_hold_up_the_backup_of_a_job_whose_runs_must_not_overlap() {
    let cluster = with_pending(2).await;
    let change = "update executions set serial = true, type = case seq when (select min(seq) from executions) then 'Restore' else 'Backup' end";
    sqlx::query(change).execute(&cluster.pool).await.expect("updates");
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    claim_one(&mut conn).await;
    claim_one(&mut conn).await;
    assert_eq!((held(&cluster, "Backup").await, held(&cluster, "Restore").await), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_of_the_version_before_and_of_this_one_share_the_limits() {
    let cluster = with_pending(5).await;
    sqlx::query("update queue_gate set max_concurrency = 100").execute(&cluster.pool).await.expect("updates");
    sqlx::query("update sources set max_concurrent_runs = 2").execute(&cluster.pool).await.expect("updates");
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let old = async |conn: &mut PgConnection| {
        let claim = "select count(*) from claim_executions_v2('old', '{default}', 600000, 1)";
        sqlx::query_scalar::<_, i64>(claim).fetch_one(conn).await.expect("claims")
    };
    assert_eq!(old(&mut conn).await, 1);
    claim_one(&mut conn).await;
    assert_eq!(
        (old(&mut conn).await, held(&cluster, "Backup").await),
        (0, 2),
        "the old one counts the new one's lease"
    );
    let more = claim::claim(&mut conn, &claimant(), LEASE, 4).await.expect("answers");
    assert_eq!(more, vec![], "the new one counts the old one's lease");
    let seen = cluster.ok("GET", "/api/cluster", None).await;
    let workers: Vec<&serde_json::Value> =
        seen["slots"].as_array().expect("slots").iter().map(|s| &s["worker"]).collect();
    assert_eq!(workers, [&json!("old"), &json!("test")], "{seen:#}");
}

/// Triggers through each API process in turn until both refuse; gives how many passed.
async fn fill_up(cluster: &Cluster, job: &str) -> usize {
    let (mut passed, mut refused) = (0, 0);
    while refused < 2 {
        assert!(passed <= 100, "nobody refuses");
        let url = format!("{}/api/jobs/{job}/run", cluster.url((passed + refused) % 2));
        let answer = cluster.http.post(url).bearer_auth(&cluster.admin_key).send().await.expect("answers");
        match answer.status().as_u16() {
            200 => (passed, refused) = (passed + 1, 0),
            429 => refused += 1,
            other => panic!("{other}"),
        }
    }
    passed
}

#[tokio::test(flavor = "multi_thread")]
async fn the_caps_hold_though_each_process_remembers_what_it_counted_before_the_other_triggered() {
    for cap in ["maxPendingPerJob", "maxPending"] {
        let cluster = with_pending(1).await;
        let job = cluster.text("select id::text from jobs").await;
        cluster.ok("PATCH", "/api/settings", Some(json!({ cap: 10, "maxConcurrentJobs": 100 }))).await;
        assert_eq!(fill_up(&cluster, &job).await, 9, "{cap}");
        // Room by claims; and runs that come back take it again, though no trigger made them.
        let mut conn = cluster.pool.acquire().await.expect("connects");
        let mut claims = Vec::new();
        while claims.len() < 8 {
            claims.extend(claim::claim(&mut conn, &claimant(), LEASE, 8 - claims.len()).await.expect("claims"));
        }
        for api in [0, 1] {
            let url = format!("{}/api/jobs/{job}/run", cluster.url(api));
            let answer = cluster.http.post(url).bearer_auth(&cluster.admin_key).send().await.expect("answers");
            assert_eq!(answer.status(), 200, "{cap}");
        }
        for claim in claims.drain(..5) {
            end_one(&mut conn, claim, &Ending::Released).await.expect("is given back");
        }
        assert_eq!(fill_up(&cluster, &job).await, 1, "{cap}: 4 wait, and 5 came back");
        assert_eq!(cluster.count("select count(*) from executions where status = 'Pending'").await, 10);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_that_wait_for_the_same_job_both_count_what_the_first_of_them_adds() {
    let cluster = with_pending(0).await;
    let job = cluster.text("select id::text from jobs").await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPendingPerJob": 3 }))).await;
    let trigger = async |api: usize| {
        let url = format!("{}/api/jobs/{job}/run", cluster.url(api));
        let answer = cluster.http.post(url).bearer_auth(&cluster.admin_key).send().await.expect("answers");
        answer.status().as_u16()
    };
    // Now each remembers a count that leaves room for one more.
    assert_eq!([trigger(0).await, trigger(1).await], [200, 200]);
    let mut conn = cluster.pool.acquire().await.expect("connects");
    let mut held = sqlx::Connection::begin(&mut *conn).await.expect("begins");
    sqlx::query("select from jobs for update").execute(&mut *held).await.expect("locks");
    let both = async { tokio::join!(trigger(0), trigger(1)) };
    let release = async {
        let waiting =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        until("both wait for the job", SOON, || async { (cluster.count(waiting).await == 2).then_some(()) }).await;
        held.commit().await.expect("commits");
    };
    let ((first, second), ()) = tokio::join!(both, release);
    assert_eq!([first.min(second), first.max(second)], [200, 429], "one of them fits");
    assert_eq!(cluster.count("select count(*) from executions").await, 3);
}
