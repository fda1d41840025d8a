//! Connections that are lent: what the one before did with a connection is nothing to the next.

use std::time::{Duration, Instant};

use common::db::{Db, DbError};
use serde_json::json;
use sqlx::{Connection, PgConnection};

use crate::harness::{
    Cluster, SOON,
    pgbouncer::PgBouncer,
    postgres_port, postgres_url,
    proxy::{Mode, Proxy},
    source::PostgresSource,
    until,
};

const LIMIT: Duration = Duration::from_secs(2);

async fn backend(db: &Db) -> Result<i32, DbError> {
    db.within(LIMIT, async |conn| sqlx::query_scalar("select pg_backend_pid()").fetch_one(conn).await).await
}

fn pool_of(cluster: &Cluster, proxy: Option<&Proxy>) -> Db {
    let url = match proxy {
        Some(proxy) => cluster.database_url_at(proxy.port),
        None => postgres_url(&cluster.database),
    };
    Db::new(&url.into(), "test", 1).expect("a URL")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_lent_again_and_one_whose_question_was_not_answered_is_not() {
    let cluster = Cluster::build().workers(0).start().await;
    let db = pool_of(&cluster, None);
    let first = backend(&db).await.expect("answers");
    assert_eq!(backend(&db).await.expect("answers"), first);
    let sleep = async |conn: &mut PgConnection| sqlx::query("select pg_sleep(20)").execute(conn).await;
    let late = db.within(Duration::from_millis(200), sleep).await;
    assert!(matches!(late, Err(DbError::Timeout(_))), "{late:?}");
    assert_ne!(backend(&db).await.expect("answers"), first, "it waits for an answer that belongs to somebody else");
    let failed = db.within(LIMIT, async |conn| sqlx::query("select 1 / 0").execute(conn).await).await;
    assert!(matches!(failed, Err(DbError::Sql(_))), "{failed:?}");
    assert_eq!(backend(&db).await.map(|_| ()).map_err(|e| e.to_string()), Ok(()), "after a failure");
    let lent = db.connections();
    assert_eq!((lent.in_use, lent.idle, lent.most), (0, 1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_came_to_nothing_lets_its_locks_go_at_once() {
    let cluster = Cluster::build().workers(0).start().await;
    let db = pool_of(&cluster, None);
    for fails in [false, true] {
        let given_up = db
            .within(LIMIT, async |conn| {
                let mut tx = conn.begin().await?;
                sqlx::query("select from queue_gate for update").execute(&mut *tx).await?;
                if fails { Err(sqlx::Error::RowNotFound) } else { Ok(()) }
            })
            .await;
        assert_eq!(given_up.is_err(), fails);
        let begin = Instant::now();
        sqlx::query("select from queue_gate for update").execute(&cluster.pool).await.expect("locks");
        // Not only when the next question comes, nor when PostgreSQL gives an idle transaction up after 5 s.
        assert!(begin.elapsed() < Duration::from_secs(2), "held for {:?}", begin.elapsed());
        backend(&db).await.expect("answers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_is_answered_before_a_proxy_gives_it_up_however_the_database_is_away() {
    let database = Proxy::start(postgres_port()).await;
    let cluster = Cluster::build().workers(0).database_at(database.port).start().await;
    let ready = async |api: &String| cluster.http.get(format!("{api}/readyz")).send().await.expect("answers").status();
    for away in [Mode::Hold, Mode::Cut] {
        for (_, api) in &cluster.apis {
            until("it is ready", SOON, || async { (ready(api).await == 200).then_some(()) }).await;
        }
        database.set(away);
        // The first one may have a connection that was made before.
        for probe in 1..=3 {
            for (_, api) in &cluster.apis {
                let begin = Instant::now();
                assert_eq!(ready(api).await, 503);
                // `timeout check` of .compose/haproxy.cfg: when all processes are late, it says that none is there.
                assert!(begin.elapsed() < Duration::from_secs(3), "{away:?}, probe {probe}: {:?}", begin.elapsed());
            }
        }
        database.set(Mode::Pass);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_behind_pgbouncer_in_session_mode_runs_waits_and_hears() {
    let bouncer = PgBouncer::start(100).await;
    // What is not heard of is seen after a minute only.
    let cluster = Cluster::build().database_at(bouncer.port).env("DBACKUP_POLL_MS", 60_000).start().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(100).await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    cluster.backup(&job).await;
    let (status, answer) = cluster.request("POST", &format!("/api/jobs/{job}/run"), Some(json!({ "wait": 20 }))).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("Success")), "{answer}");
    // The sessions have what keeps a dead peer from holding anything.
    let db = Db::new(&cluster.database_url_at(bouncer.port).into(), "test", 1).expect("a URL");
    let show = sqlx::query_scalar::<_, String>("show idle_in_transaction_session_timeout");
    let shown = db.within(LIMIT, async |conn| show.fetch_one(conn).await).await;
    assert_eq!(shown.expect("answers"), "5s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_vanishes_or_restarts_is_asked_anew_by_a_connection_of_its_own() {
    let cluster = Cluster::build().workers(0).start().await;
    let proxy = Proxy::start(postgres_port()).await;
    let db = pool_of(&cluster, Some(&proxy)).apart();
    let first = backend(&db).await.expect("answers");
    // Not a packet comes back any more, and none says so.
    proxy.lose_clients();
    assert!(matches!(backend(&db).await, Err(DbError::Timeout(_))));
    let second = backend(&db).await.expect("a new connection answers");
    assert_ne!(second, first);
    proxy.set(Mode::Cut);
    assert!(backend(&db).await.is_err());
    proxy.set(Mode::Pass);
    until("it is back", SOON, || async { backend(&db).await.ok() }).await;
}
