//! The verbs of the queue, called as a worker calls them, at moments that a process could not be stopped at. Time is
//! moved by updating a row.

use std::time::Duration;

use chrono::Utc;
use common::{
    config::Timing,
    db::Db,
    execution::{
        self, Stage,
        cancel::{self, Cancelled},
        claim::{self, Claim},
        finish::{Ending, Failure, Finished, Published, finish},
        idempotency::forget_old_keys,
        lease::{self, Progress, Rescue},
        ticker::Rescuer,
    },
    id::{DestinationId, JobId},
    queue::Wakeups,
    staged_object,
};
use nix::sys::signal::Signal;
use serde_json::json;
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

use crate::harness::{Cluster, LEASE, SOON, claimant, postgres_url, source::PostgresSource, until};

/// Between a rescuer's look at the clock and its rescue.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cluster without workers: the test claims by itself.
async fn with_pending(runs: usize) -> Cluster {
    let cluster = Cluster::build().workers(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let root = cluster.scratch.join("backups");
    let body = json!({ "name": "d", "kind": "local", "config": { "root": root } });
    let destination = crate::harness::id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow", "maxAttempts": 2 })).await;
    for _ in 0..runs {
        cluster.trigger(&job).await;
    }
    cluster
}

async fn claim_one(conn: &mut PgConnection) -> Claim {
    let claims = claim::claim(conn, &claimant(), LEASE, 1).await.expect("claims");
    *claims.first().expect("something to claim")
}

/// As a process that has seen every lease unchanged for long enough.
async fn rescue(conn: &mut PgConnection) -> Result<Vec<Rescue>, sqlx::Error> {
    let seen = lease::all(conn).await?;
    Ok(lease::rescue(conn, &seen, PATIENCE).await?.into_iter().map(|rescued| rescued.rescue).collect())
}

async fn expire(conn: &mut PgConnection) {
    let sql = "update execution_leases set expires_at = clock_timestamp() - interval '1 ms'";
    sqlx::query(sql).execute(conn).await.expect("updates");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_had_to_wait_for_its_connection_counts_as_an_outage_and_takes_nothing() {
    let cluster = with_pending(2).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let (dead, live) = (claim_one(&mut conn).await, claim_one(&mut conn).await);
    // The rescuer of this process is the only one.
    cluster.apis.iter().for_each(|(api, _)| api.signal(Signal::SIGSTOP));
    let db = Db::new(&postgres_url(&cluster.database).into(), "rescuer", 1).expect("a URL");
    let stop = CancellationToken::new();
    let wakeups = Wakeups::start(db.apart(), stop.clone());
    let quick = Duration::from_millis(300);
    let timing = Timing {
        lease: LEASE,
        heartbeat: quick,
        heartbeat_timeout: quick,
        fence: LEASE / 2,
        poll: quick,
        ticker: quick,
    };
    let _rescuer = Rescuer::start(db.clone(), timing, wakeups, stop.clone());
    let beat = async |conn: &mut PgConnection| lease::heartbeat(conn, LEASE, &[progress(live)]).await.expect("beats");
    let is_held = format!("select count(*) from execution_leases where token = {}", dead.token.0);
    until("it has been in contact for a lease, and takes the one that is dead", SOON, || async {
        assert_eq!(beat(&mut *cluster.pool.acquire().await.expect("a connection")).await.len(), 1);
        (cluster.count(&is_held).await == 0).then_some(())
    })
    .await;

    // It sees the lease as it stays from now on: a whole look after the last beat.
    for _ in 0..2 {
        let now = cluster.text("select clock_timestamp()::text").await;
        let looks = format!(
            "select count(*) from pg_stat_activity
              where application_name = 'rescuer' and query like '%start_by < now()%' and query_start > '{now}'"
        );
        until("it looks", SOON, || async { (cluster.count(&looks).await == 1).then_some(()) }).await;
    }

    // Its only connection is lent until the other lease is over, too: it hears nothing of the database.
    let mut gate = cluster.pool.begin().await.expect("begins");
    sqlx::query("select pg_advisory_xact_lock(1)").execute(&mut *gate).await.expect("locks");
    let lent = tokio::spawn({
        let db = db.clone();
        async move { db.within(SOON, async |conn| sqlx::query("select pg_advisory_xact_lock(1)").execute(conn).await).await }
    });
    let waits = "select count(*) from pg_stat_activity where application_name = 'rescuer' and wait_event = 'advisory'";
    until("it is lent", SOON, || async { (cluster.count(waits).await == 1).then_some(()) }).await;
    let seen_to_be_over = format!(
        "select count(*) from execution_leases where token = {} and expires_at < clock_timestamp() - interval '1 s'",
        live.token.0
    );
    until("the lease is over", SOON, || async { (cluster.count(&seen_to_be_over).await == 1).then_some(()) }).await;
    gate.rollback().await.expect("rolls back");
    lent.await.expect("no panic").expect("answers");
    let looked = "select count(*) from pg_stat_activity
                   where application_name = 'rescuer' and state = 'idle' and query like '%start_by < now()%'";
    until("it has looked", SOON, || async { (cluster.count(looked).await == 1).then_some(()) }).await;
    assert_eq!(beat(&mut conn).await.len(), 1, "a run that lives was taken back at the end of an outage");
    stop.cancel();
}

fn progress(claim: Claim) -> Progress {
    Progress { token: claim.token, stage: Stage::Dumping, percent: 10, bytes: 0, bytes_per_second: None }
}

async fn end_one(conn: &mut PgConnection, claim: Claim, ending: &Ending) -> Result<Finished, sqlx::Error> {
    Ok(finish(conn, &[(claim, ending)]).await?.remove(0))
}

fn failure() -> Failure {
    Failure { error: "the network".to_owned(), code: "network", outcome: None, stage: Stage::Dumping }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_revives_a_lease_that_ran_out_and_loses_one_that_was_rescued() {
    let cluster = with_pending(1).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let claim = claim_one(&mut conn).await;
    expire(&mut conn).await;
    let seen = lease::all(&mut conn).await.expect("looks");
    let late = lease::rescue(&mut conn, &seen, Duration::ZERO).await.expect("looks");
    assert_eq!(late, vec![], "rescued by a statement that was long on its way");
    let alive = lease::heartbeat(&mut conn, LEASE, &[progress(claim)]).await.expect("beats");
    assert_eq!(alive.len(), 1, "not revived");
    assert_eq!(rescue(&mut conn).await.expect("looks"), vec![], "a living run was rescued");

    expire(&mut conn).await;
    assert_eq!(rescue(&mut conn).await.expect("looks"), vec![Rescue::Requeued(claim.execution)]);
    let alive = lease::heartbeat(&mut conn, LEASE, &[progress(claim)]).await.expect("beats");
    assert_eq!(alive, vec![], "a rescued lease came back to life");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_token_records_nothing_and_a_repeated_finish_counts_as_done() {
    let cluster = with_pending(1).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let old = claim_one(&mut conn).await;
    expire(&mut conn).await;
    rescue(&mut conn).await.expect("rescues");
    let new = claim_one(&mut conn).await;
    assert!(new.token > old.token && new.execution == old.execution && new.attempt == 2);

    for ending in [Ending::Failed(failure()), Ending::Retry(failure(), Duration::ZERO), Ending::Released] {
        assert_eq!(end_one(&mut conn, old, &ending).await.expect("answers"), Finished::Zombie, "{ending:?}");
    }
    let destination = DestinationId::new();
    assert!(
        !staged_object::record(&mut conn, old, destination, "x", None).await.expect("answers"),
        "a zombie records names"
    );
    assert_eq!(cluster.count("select count(*) from execution_leases").await, 1);

    let ending = Ending::Failed(failure());
    assert_eq!(end_one(&mut conn, new, &ending).await.expect("answers"), Finished::Ended);
    assert_eq!(end_one(&mut conn, new, &ending).await.expect("answers"), Finished::Ended, "the answer was lost");
    assert_eq!(cluster.count("select failures::bigint from executions").await, 1, "counted twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_count_against_the_attempts_and_rescues_and_releases_do_not() {
    let cluster = with_pending(1).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    for _ in 0..3 {
        let claim = claim_one(&mut conn).await;
        assert_eq!(end_one(&mut conn, claim, &Ending::Released).await.expect("answers"), Finished::Requeued);
        claim_one(&mut conn).await;
        expire(&mut conn).await;
        assert_eq!(rescue(&mut conn).await.expect("looks").len(), 1);
    }
    let again = Ending::Retry(failure(), Duration::ZERO);
    let claim = claim_one(&mut conn).await;
    assert_eq!((claim.attempt, end_one(&mut conn, claim, &again).await.expect("answers")), (7, Finished::Requeued));
    // maxAttempts is 2: this failure is the last.
    let claim = claim_one(&mut conn).await;
    assert_eq!(end_one(&mut conn, claim, &again).await.expect("answers"), Finished::Ended);
    assert_eq!(
        cluster
            .count("select count(*) from executions where status = 'Failed' and outcome is null and attempt = 8")
            .await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_attempt_of_a_run_that_did_not_succeed_at_once_is_kept_with_its_end() {
    let cluster = with_pending(2).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let success = |job| {
        Ending::Success(Box::new(Published {
            job,
            size_bytes: 7,
            path: "shop/x".to_owned(),
            checksum: "sha256:00".to_owned(),
            snapshot_at: Utc::now(),
            artifacts: Vec::new(),
        }))
    };
    let released = claim_one(&mut conn).await;
    end_one(&mut conn, released, &Ending::Released).await.expect("answers");
    claim_one(&mut conn).await;
    expire(&mut conn).await;
    rescue(&mut conn).await.expect("looks");
    let failed = claim_one(&mut conn).await;
    end_one(&mut conn, failed, &Ending::Retry(failure(), Duration::ZERO)).await.expect("answers");
    let last = claim_one(&mut conn).await;
    let found = async |conn: &mut PgConnection| {
        let found = execution::find(conn, last.execution).await.expect("answers").expect("it is there");
        let told = found.attempts.iter().map(|a| {
            assert!(a.worker == claimant().name && a.started_at <= a.ended_at, "{a:?}");
            (a.attempt, a.outcome.clone(), a.stage.clone(), a.error.clone())
        });
        told.collect::<Vec<_>>()
    };
    let mut wanted: Vec<_> = [
        (1, "Released", "Initializing", None),
        (2, "WorkerLost", "Initializing", Some(format!("worker {} stopped answering", claimant().name))),
        (3, "Failed", "Dumping", Some("the network".to_owned())),
    ]
    .map(|(n, outcome, stage, error)| (n, outcome.to_owned(), stage.to_owned(), error))
    .into();
    assert_eq!(found(&mut conn).await, wanted, "while it runs for the fourth time");
    let polled = cluster.execution(&last.execution.to_string()).await;
    assert_eq!(polled["attempts"].as_array().map(Vec::len), Some(3), "{polled:#}");
    end_one(&mut conn, last, &success(JobId::new())).await.expect("answers");
    wanted.push((4, "Success".to_owned(), "Completed".to_owned(), None));
    assert_eq!(found(&mut conn).await, wanted);

    let at_once = claim_one(&mut conn).await;
    end_one(&mut conn, at_once, &success(JobId::new())).await.expect("answers");
    let found = execution::find(&mut conn, at_once.execution).await.expect("answers").expect("it is there");
    assert_eq!(found.attempts, vec![], "it cost a row");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_is_closed_whatever_happens_to_its_worker() {
    let cluster = with_pending(3).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    for end in ["rescue", "retry", "release"] {
        let claim = claim_one(&mut conn).await;
        assert_eq!(cancel::cancel(&mut conn, claim.execution, "test").await.expect("answers"), Cancelled::Requested);
        let told = lease::heartbeat(&mut conn, LEASE, &[progress(claim)]).await.expect("beats");
        assert!(told[0].cancel_requested, "the heartbeat does not tell");
        match end {
            "rescue" => {
                expire(&mut conn).await;
                assert_eq!(rescue(&mut conn).await.expect("looks"), vec![Rescue::Closed(claim.execution)]);
            }
            "retry" => {
                let ending = Ending::Retry(failure(), Duration::ZERO);
                assert_eq!(end_one(&mut conn, claim, &ending).await.expect("answers"), Finished::Ended);
            }
            _ => {
                assert_eq!(end_one(&mut conn, claim, &Ending::Released).await.expect("answers"), Finished::Ended)
            }
        }
    }
    assert_eq!(
        cluster.count("select count(*) from executions where status = 'Failed' and outcome = 'Cancelled'").await,
        3
    );
}

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

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_is_forgotten_after_its_day_and_not_before() {
    let cluster = with_pending(0).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    sqlx::raw_sql(
        "insert into idempotency_keys (api_key_id, job_id, key, body_hash, execution_id, created_at)
         select gen_random_uuid(), gen_random_uuid(), 'k', '', gen_random_uuid(), clock_timestamp() - age
           from (values (interval '23 hours'), (interval '25 hours')) v (age)",
    )
    .execute(&mut *conn)
    .await
    .expect("inserts");
    assert_eq!(forget_old_keys(&mut conn).await.expect("deletes"), 1);
    assert_eq!(cluster.count("select count(*) from idempotency_keys").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_table_and_column_of_the_schema_says_what_it_holds() {
    let cluster = with_pending(0).await;
    let silent: Vec<String> = sqlx::query_scalar(
        "select c.relname || coalesce('.' || a.attname, '') from pg_class c
           left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
          where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and c.relname !~ '^_'
            and (col_description(c.oid, a.attnum) is null or obj_description(c.oid) is null)",
    )
    .fetch_all(&cluster.pool)
    .await
    .expect("rows");
    assert_eq!(silent, Vec::<String>::new());
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

#[tokio::test(flavor = "multi_thread")]
async fn a_name_whose_record_arrives_while_its_run_ends_is_not_recorded() {
    let cluster = with_pending(1).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let claim = claim_one(&mut conn).await;
    let destination = sqlx::query_scalar("select id from destinations").fetch_one(&mut *conn).await.expect("a row");
    let record = async |conn: &mut PgConnection| {
        staged_object::record(conn, claim, DestinationId(destination), "job/backup.dump", None).await.expect("answers")
    };
    assert!(record(&mut conn).await, "it runs");
    // What `finish` does, held in the middle.
    let mut ending = cluster.pool.begin().await.expect("begins");
    for query in [
        "select from executions for update",
        "update executions set status = 'Success', ended_at = clock_timestamp(), started_at = clock_timestamp()",
        "delete from execution_leases",
        "delete from staged_objects",
    ] {
        sqlx::query(query).execute(&mut *ending).await.unwrap_or_else(|error| panic!("{query}: {error}"));
    }
    let late = async {
        let mut late = cluster.pool.acquire().await.expect("a connection");
        record(&mut late).await
    };
    let committing = async {
        until("the late one waits", SOON, || async {
            let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%staged_objects%'";
            (cluster.count(waiting).await == 1).then_some(())
        })
        .await;
        ending.commit().await.expect("commits");
    };
    let (recorded, ()) = tokio::join!(late, committing);
    assert!(!recorded && cluster.count("select count(*) from staged_objects").await == 0, "it would be swept");
}
