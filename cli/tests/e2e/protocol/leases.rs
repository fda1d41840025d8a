//! What a lease allows, and how an attempt ends.

use std::time::Duration;

use chrono::Utc;
use common::{
    config::Timing,
    db::Db,
    execution::{
        self, Stage,
        cancel::{self, Cancelled},
        claim::Claim,
        finish::{Ending, Finished, Published},
        lease::{self, Progress, Rescue},
        ticker::Rescuer,
    },
    id::{DestinationId, JobId},
    queue::Wakeups,
    staged_object,
};
use nix::sys::signal::Signal;
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

use super::{claim_one, end_one, failure, with_pending};
use crate::harness::{LEASE, SOON, claimant, postgres_url, until};

/// Between a rescuer's look at the clock and its rescue.
const PATIENCE: Duration = Duration::from_secs(10);

/// As a process that has seen every lease unchanged for long enough.
async fn rescue(conn: &mut PgConnection) -> Result<Vec<Rescue>, sqlx::Error> {
    let seen = lease::all(conn).await?;
    Ok(lease::rescue(conn, &seen, PATIENCE).await?.into_iter().map(|rescued| rescued.rescue).collect())
}

async fn expire(conn: &mut PgConnection) {
    let sql = "update execution_leases set expires_at = clock_timestamp() - interval '1 ms'";
    sqlx::query(sql).execute(conn).await.expect("updates");
}

fn progress(claim: Claim) -> Progress {
    Progress { token: claim.token, stage: Stage::Dumping, percent: 10, bytes: 0, bytes_per_second: None }
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
