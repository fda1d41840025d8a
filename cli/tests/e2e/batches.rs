//! Claims and finishes of several runs in one round trip, beside the same one by one.

use std::time::Duration;

use chrono::Utc;
use common::{
    artifact::NewArtifact,
    execution::{
        Stage,
        claim::{self, Claim, Token},
        expire::expire,
        finish::{Ending, Failure, Finished, Published, finish},
        lease::{self, Progress},
    },
    id::{DestinationId, JobId},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::harness::{Cluster, SOON, claimant, postgres_url, sql, until};

/// Longer than the test, whose cluster would take the runs back.
const LONG: Duration = Duration::from_secs(600);

/// A queue as it may come: serial jobs with many runs, sources with and without limits, restores, priorities, runs that
/// wait for a back-off or are too late, pools of others, and some that run already.
async fn fill(conn: &mut PgConnection, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut sql = "delete from execution_leases; delete from executions; delete from sources;".to_owned();
    for source in 1..=4 {
        let mut limit = || match random.random_range(0..3) {
            0 => "null".to_owned(),
            most => most.to_string(),
        };
        sql += &format!(
            "insert into sources (id, slug, name, engine, pool, config, max_concurrent_runs, max_concurrent_restores)
             values ('00000000-0000-0000-0001-{source:012}', 's{source}', 's{source}', '{}', 'default', '{{}}', {}, {});",
            if source == 4 { "mysql" } else { "postgres" },
            limit(),
            limit()
        );
    }
    for n in 1..=random.random_range(1..40) {
        let job = random.random_range(1..=8);
        sql += &format!(
            "insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, type, priority, max_attempts, trigger_kind,
                                     run_at, start_by)
             values ('00000000-0000-0000-0003-{n:012}', '00000000-0000-0000-0002-{job:012}', 'j', 'j', '00000000-0000-0000-0001-{:012}',
                     '{}', {}, '{}', {}, 3, 'Api', clock_timestamp() + interval '{} s', {});",
            job % 4 + 1,
            if random.random_ratio(1, 10) { "elsewhere" } else { "default" },
            job % 3 != 0,
            if random.random_ratio(1, 5) { "Restore" } else { "Backup" },
            random.random_range(-1..=1),
            if random.random_ratio(1, 10) { 600 } else { -1 },
            if random.random_ratio(1, 10) { "clock_timestamp() - interval '1 s'" } else { "null" }
        );
    }
    sql += &format!("update queue_gate set max_concurrency = {}, paused = false;", random.random_range(1..30));
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.expect("fills");
}

/// By what workers of this version claim.
const NOW: &str = "claim_executions_v7";

/// What a function gives, and takes it back.
async fn picks(conn: &mut PgConnection, function: &str, want: i32) -> Vec<(String, i32)> {
    let mut tx = conn.begin().await.expect("begins");
    let reach = if function == NOW { "'{}', " } else { "" };
    let call = format!(
        "select execution_id::text, slot from {function}(gen_random_uuid(), 'test', '{{default}}', '{{postgres}}', {reach}600000, {want}) order by slot"
    );
    let picks = sqlx::query_as(AssertSqlSafe(call)).fetch_all(&mut *tx).await.expect("claims");
    tx.rollback().await.expect("rolls back");
    picks
}

/// The function of the version before, as its migration made it.
fn as_it_was() -> String {
    let migration = include_str!("../../../migrations/0007_cluster.sql");
    let begin = migration.find("create function claim_executions_v3(").expect("is made there");
    let end = begin + migration[begin..].find("\n$$;").expect("ends") + 4;
    migration[begin..end].replace("claim_executions_v3(", "claim_executions_v3_as_it_was(")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_picked_as_it_was_one_by_one_in_the_version_before() {
    let cluster = Cluster::build().workers(0).start().await;
    let mut conn = PgConnection::connect(&postgres_url(&cluster.database)).await.expect("connects");
    // Another worker has the tools for mysql: it is left to that one.
    sqlx::raw_sql(
        "insert into workers (id, name, version, host, pools, concurrency, engines, gone_after_ms)
         values (gen_random_uuid(), 'other', '0', 'test', '{default}', 4, '{mysql}', 600000)",
    )
    .execute(&mut conn)
    .await
    .expect("inserts");
    let (mut some, mut passed_over, mut left) = (0, 0, 0);
    sqlx::raw_sql(AssertSqlSafe(as_it_was())).execute(&mut conn).await.expect("makes");
    for seed in 0..60 {
        fill(&mut conn, seed).await;
        // Some run already.
        claim::claim(&mut conn, &claimant(), LONG, (seed % 4) as usize).await.expect("claims");
        for want in [1, 3, 16] {
            let before = picks(&mut conn, "claim_executions_v3_as_it_was", want).await;
            let now = picks(&mut conn, NOW, want).await;
            assert_eq!(now, before, "seed {seed}, {want} wanted");
            // A worker of a version before would take a restore for a backup: it gets none.
            let mut ids = vec!["null".to_owned()];
            for function in ["claim_executions_v3", "claim_executions_v4"] {
                ids.extend(picks(&mut conn, function, want).await.into_iter().map(|(id, _)| format!("'{id}'")));
            }
            let restores =
                format!("select count(*) from executions where type = 'Restore' and id in ({})", ids.join(", "));
            assert_eq!(cluster.count(&restores).await, 0, "seed {seed}");
            left += usize::from(before.iter().any(|(id, _)| !ids.contains(&format!("'{id}'"))));
            some += usize::from(now.len() > 1);
            passed_over += usize::from(now.len() > 1 && now.len() < want as usize);
        }
    }
    assert!(some > 50 && passed_over > 20 && left > 20, "too few batches: {some}, {passed_over}, {left}");
}

fn progress(token: Token) -> Progress {
    Progress { token, stage: Stage::Dumping, percent: 1, bytes: 0, bytes_per_second: None }
}

fn failure() -> Failure {
    Failure { error: "it failed".to_owned(), code: "dump_failed", outcome: None, stage: Stage::Dumping }
}

fn published(paths: &[&str]) -> Ending {
    let destination = DestinationId::new();
    let artifact = |path: &&str| NewArtifact {
        destination,
        database: None,
        path: (*path).to_owned(),
        size_bytes: 7,
        sha256: "00".to_owned(),
        plain: None,
        recipients: Vec::new(),
    };
    Ending::Success(Box::new(Published {
        job: JobId::new(),
        size_bytes: 7,
        path: paths[0].to_owned(),
        checksum: "sha256:00".to_owned(),
        snapshot_at: Utc::now(),
        artifacts: paths.iter().map(artifact).collect(),
    }))
}

/// So many runs that are claimed.
async fn claimed(cluster: &Cluster, conn: &mut PgConnection, count: usize) -> Vec<Claim> {
    let insert = format!(
        "insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, max_attempts, trigger_kind)
         select gen_random_uuid(), gen_random_uuid(), 'j', 'j', gen_random_uuid(), 'default', true, 2, 'Api' from generate_series(1, {count})"
    );
    sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut *conn).await.expect("inserts");
    sqlx::query("update queue_gate set max_concurrency = 100").execute(&cluster.pool).await.expect("updates");
    let claims = claim::claim(conn, &claimant(), LONG, count).await.expect("claims");
    assert_eq!(claims.len(), count);
    claims
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_that_fall_together_are_recorded_each_by_its_own_claim() {
    let cluster = Cluster::build().workers(0).start().await;
    let mut conn = PgConnection::connect(&postgres_url(&cluster.database)).await.expect("connects");
    let claims = claimed(&cluster, &mut conn, 6).await;
    let endings = [
        published(&["a", "a.manifest"]),
        Ending::Failed(failure()),
        Ending::Retry(failure(), Duration::from_secs(60)),
        Ending::Released,
        published(&["b"]),
        published(&["c"]),
    ];
    // The last of them was ended before, and the one before it was taken back.
    finish(&mut conn, &[(claims[5], &endings[5])]).await.expect("finishes");
    let taken = "update executions set last_token = nextval('fencing_token_seq') where id = $1";
    sqlx::query(taken).bind(claims[4].execution.0).execute(&mut conn).await.expect("updates");
    let ends: Vec<_> = claims.iter().copied().zip(&endings).collect();
    let finished = finish(&mut conn, &ends).await.expect("finishes");
    use Finished::{Ended, Requeued, Zombie};
    assert_eq!(finished, [Ended, Ended, Requeued, Requeued, Zombie, Ended]);

    let state = "select coalesce(status || ' ' || failures || ' ' || coalesce(path, '-') || ' ' || coalesce(error_code, '-') || ' '
                        || (select count(*) from artifacts a where a.execution_id = e.id) || ' '
                        || (select count(*) from execution_leases l where l.execution_id = e.id) || ' '
                        || (run_at > clock_timestamp()))
                   from executions e join unnest($1::uuid[]) with ordinality as w (id, n) on w.id = e.id order by n";
    let ids: Vec<uuid::Uuid> = claims.iter().map(|claim| claim.execution.0).collect();
    let states: Vec<String> = sqlx::query_scalar(state).bind(ids).fetch_all(&mut conn).await.expect("rows");
    assert_eq!(
        states,
        [
            "Success 0 a - 2 0 false",
            "Failed 1 - dump_failed 0 0 false",
            "Pending 1 - dump_failed 0 0 true",
            "Pending 0 - - 0 0 false",
            "Running 0 - - 0 1 false",
            "Success 0 c - 1 0 false",
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finish_of_several_runs_and_their_heartbeat_do_not_wait_for_each_other_for_ever() {
    let cluster = Cluster::build().workers(0).start().await;
    let url = postgres_url(&cluster.database);
    let mut finishing = PgConnection::connect(&url).await.expect("connects");
    let mut beating = PgConnection::connect(&url).await.expect("connects");
    for round in 0..40 {
        let mut claims = claimed(&cluster, &mut finishing, 16).await;
        // Each comes in an order of its own.
        let progress: Vec<Progress> = claims.iter().rev().map(|c| progress(c.token)).collect();
        claims.rotate_left(round % 16);
        let released = Ending::Failed(failure());
        let ends: Vec<_> = claims.iter().map(|claim| (*claim, &released)).collect();
        let (finished, beat) =
            tokio::join!(finish(&mut finishing, &ends), lease::heartbeat(&mut beating, LONG, &progress));
        beat.expect("no deadlock");
        assert_eq!(finished.expect("no deadlock"), [Finished::Ended; 16]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_ends_expires_and_rescues_runs_does_not_walk_what_waits_though_the_statistics_know_of_none() {
    let cluster = Cluster::build().workers(0).start().await;
    // By its name: a session of the pool that asks for it would find itself by its text.
    let url = format!("{}?application_name=verbs", postgres_url(&cluster.database));
    let queue = "insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, max_attempts, trigger_kind, status,
                                         attempt, last_token, started_at, ended_at)
                 select gen_random_uuid(), gen_random_uuid(), 'j', 'j', gen_random_uuid(), 'default', true, 2, 'Api',";
    sql(&cluster.database, "alter table executions set (autovacuum_enabled = off)").await;
    sql(&cluster.database, &format!("{queue} 'Success', 1, 0, now(), now() from generate_series(1, 30000)")).await;
    sql(&cluster.database, "vacuum analyze executions").await;
    sql(&cluster.database, &format!("{queue} 'Pending', 0, null, null, null from generate_series(1, 5000)")).await;
    sql(&cluster.database, "update queue_gate set max_concurrency = 8").await;
    let mut conn = PgConnection::connect(&url).await.expect("connects");
    let claims = claim::claim(&mut conn, &claimant(), LONG, 3).await.expect("claims");
    let expired = "update execution_leases set expires_at = clock_timestamp() - interval '1 s' where token = $1";
    sqlx::query(expired).bind(claims[1].token.0).execute(&mut conn).await.expect("updates");
    conn.close().await.expect("closes");

    let fetched = async || {
        until("every session has told what it read", SOON, || async {
            let others =
                "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'verbs'";
            (cluster.count(others).await == 0).then_some(())
        })
        .await;
        cluster.count("select idx_tup_fetch + seq_tup_read from pg_stat_user_tables where relname = 'executions'").await
    };
    let before = fetched().await;
    let mut conn = PgConnection::connect(&url).await.expect("connects");
    assert_eq!(expire(&mut conn).await.expect("looks"), vec![]);
    let seen: Vec<_> = lease::all(&mut conn).await.expect("leases");
    let seen: Vec<_> = seen.into_iter().filter(|sight| sight.token == claims[1].token).collect();
    assert_eq!(lease::rescue(&mut conn, &seen, LONG).await.expect("rescues").len(), 1);
    let failed = Ending::Failed(failure());
    assert_eq!(finish(&mut conn, &[(claims[0], &failed)]).await.expect("finishes"), [Finished::Ended]);
    conn.close().await.expect("closes");
    let read = fetched().await - before;
    assert!(read < 500, "{read} rows of executions were read");
}
