//! The verbs of the queue, called as a worker calls them, at moments that a process could not be stopped at. Time is
//! moved by updating a row.

mod leases;
mod limits;

use common::execution::{
    Stage,
    claim::{self, Claim},
    finish::{Ending, Failure, Finished, finish},
    idempotency::forget_old_keys,
};
use serde_json::json;
use sqlx::PgConnection;

use crate::harness::{Cluster, LEASE, claimant, source::PostgresSource};

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

async fn end_one(conn: &mut PgConnection, claim: Claim, ending: &Ending) -> Result<Finished, sqlx::Error> {
    Ok(finish(conn, &[(claim, ending)]).await?.remove(0))
}

fn failure() -> Failure {
    Failure { error: "the network".to_owned(), code: "network", outcome: None, stage: Stage::Dumping }
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
