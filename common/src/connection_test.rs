//! Tests of sources and destinations. An API process has neither the tools nor the routes nor the mounts, so it
//! leaves the question in a row and a worker of the pool answers it.

use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, types::Json};

use crate::id::{DestinationId, SourceId};

/// What is to be tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Can the worker sign in and see every database?
    Source(SourceId),
    /// Can the worker write, and is the marker there?
    Destination(DestinationId),
}

/// What a worker found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TestResult {
    /// Whether a backup could run.
    pub ok: bool,
    /// What was found, or why not and what to do.
    pub message: String,
    /// Version of the server or store, when it told.
    pub version: Option<String>,
    /// Time it took.
    pub duration_ms: i64,
    /// Which worker.
    pub worker: String,
}

/// Where a question stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// No worker has taken it.
    Waiting,
    /// A worker is at it.
    Taken,
    /// Answered.
    Done(TestResult),
}

/// Leaves a question for the workers of a pool.
pub async fn ask(conn: &mut PgConnection, target: Target, pool: &str) -> Result<uuid::Uuid, sqlx::Error> {
    let id = uuid::Uuid::now_v7();
    let (source, destination) = match target {
        Target::Source(id) => (Some(id), None),
        Target::Destination(id) => (None, Some(id)),
    };
    sqlx::query!(
        "insert into connection_tests (id, source_id, destination_id, pool) values ($1, $2, $3, $4)",
        id,
        source as _,
        destination as _,
        pool
    )
    .execute(conn)
    .await?;
    Ok(id)
}

/// Looks for the answer.
pub async fn answer(conn: &mut PgConnection, id: uuid::Uuid) -> Result<Answer, sqlx::Error> {
    let row = sqlx::query!(
        r#"select taken_at is not null as "taken!", result as "result: Json<TestResult>" from connection_tests where id = $1"#,
        id
    )
    .fetch_optional(conn)
    .await?;
    Ok(match row {
        Some(row) => match row.result {
            Some(result) => Answer::Done(result.0),
            None if row.taken => Answer::Taken,
            None => Answer::Waiting,
        },
        None => Answer::Waiting,
    })
}

/// Withdraws a question; old ones of processes that died go with it.
pub async fn withdraw(conn: &mut PgConnection, id: uuid::Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!("delete from connection_tests where id = $1 or requested_at < now() - interval '10 minutes'", id)
        .execute(conn)
        .await?;
    Ok(())
}

/// Takes the oldest open question of the worker's pools. A question older than its client's patience is left.
pub async fn take(conn: &mut PgConnection, pools: &[String]) -> Result<Option<(uuid::Uuid, Target)>, sqlx::Error> {
    let row = sqlx::query!(
        r#"update connection_tests set taken_at = clock_timestamp()
            where id = (select id from connection_tests
                         where taken_at is null and pool = any ($1) and requested_at > clock_timestamp() - interval '15 seconds'
                         order by requested_at limit 1 for update skip locked)
           returning id, source_id as "source: SourceId", destination_id as "destination: DestinationId""#,
        pools
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.and_then(|row| {
        let target = row.source.map(Target::Source).or(row.destination.map(Target::Destination))?;
        Some((row.id, target))
    }))
}

/// Leaves the answer.
pub async fn reply(conn: &mut PgConnection, id: uuid::Uuid, result: &TestResult) -> Result<(), sqlx::Error> {
    sqlx::query!("update connection_tests set result = $2 where id = $1", id, Json(result) as _).execute(conn).await?;
    Ok(())
}
