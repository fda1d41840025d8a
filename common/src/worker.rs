//! Workers as the cluster knows them: each has a row, keeps it fresh by a cheap beat of its own, and may be cordoned.
//!
//! Nothing is decided by these rows but two things of a claim: a cordoned worker gets nothing, and a run is left to
//! those who have the tools for it and reach what it needs. Whether a *run* lives is told by its lease alone.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, types::Json};
use uuid::Uuid;

use crate::{id::WorkerId, setting, source::Engine};

/// A tool of a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(example = json!({ "name": "pg_dump", "version": "pg_dump (PostgreSQL) 17.2", "path": "/usr/lib/postgresql/17/bin/pg_dump" }))]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it says of itself.
    pub version: String,
    /// Where it lies.
    pub path: String,
}

/// Sources, destinations and restores that a worker cannot serve, by their ids, each with what is in the way.
pub type OutOfReach = BTreeMap<Uuid, String>;

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, sqlx::Type, utoipa::ToSchema)]
#[sqlx(type_name = "text")]
pub enum WorkerState {
    /// Claims.
    Active,
    /// Claims nothing more, and ends with its runs.
    Draining,
    /// Has ended, and is shown for its cordon only.
    Stopped,
    /// Was not seen for a lease: dead, or cut off from the database.
    Gone,
}

/// What a worker says of itself.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Its id, of this process and this worker in it alone.
    pub id: WorkerId,
    /// Its name.
    pub name: String,
    /// Version of its program.
    pub version: &'static str,
    /// Its machine.
    pub host: String,
    /// Pools that it reaches.
    pub pools: Vec<String>,
    /// Runs at once in it.
    pub concurrency: usize,
    /// What it can dump.
    pub engines: Vec<Engine>,
    /// With what.
    pub tools: Vec<Tool>,
    /// What it cannot serve and another perhaps can.
    pub out_of_reach: OutOfReach,
    /// Not seen for so long, it counts as gone.
    pub gone_after: Duration,
}

/// What a worker learns when it registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// It may claim nothing.
    pub cordoned: bool,
    /// Others of its name that were seen a moment ago.
    pub namesakes: i64,
}

/// Writes the row of a worker, at its start and whenever what it says changes. The first time it inherits a cordon of
/// its name, so that a cordoned worker which is restarted stays cordoned, and takes the place of those that are over.
pub async fn register(conn: &mut PgConnection, worker: &Registration) -> Result<Registered, sqlx::Error> {
    let mut tx = conn.begin().await?;
    // Whoever cordons takes the gate too: he sees this row, or this sees the cordon.
    setting::lock_gate(&mut tx).await?;
    let cordoned = sqlx::query_scalar!(
        "insert into workers (id, name, version, host, pools, concurrency, engines, tools, gone_after_ms, out_of_reach, cordoned)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, exists (select 1 from workers w where w.name = $2 and w.cordoned))
         on conflict (id) do update set engines = excluded.engines, tools = excluded.tools, out_of_reach = excluded.out_of_reach,
                                        seen_at = excluded.seen_at
         returning cordoned",
        worker.id as _,
        worker.name,
        worker.version,
        worker.host,
        &worker.pools,
        i32::try_from(worker.concurrency).unwrap_or(i32::MAX),
        &names(&worker.engines),
        Json(&worker.tools) as _,
        crate::time::ms(worker.gone_after),
        Json(&worker.out_of_reach) as _,
    )
    .fetch_one(&mut *tx)
    .await?;
    sqlx::query!(
        "delete from workers
          where name = $2 and id <> $1
            and (state = 'Stopped' or seen_at < clock_timestamp() - gone_after_ms * interval '1 millisecond')",
        worker.id as _,
        worker.name
    )
    .execute(&mut *tx)
    .await?;
    let namesakes = sqlx::query_scalar!(
        r#"select count(*) as "count!" from workers where name = $2 and id <> $1"#,
        worker.id as _,
        worker.name
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Registered { cordoned, namesakes })
}

/// Engines as the database writes them.
pub fn names(engines: &[Engine]) -> Vec<String> {
    engines.iter().map(|engine| engine.as_str().to_owned()).collect()
}

/// One beat: tells that the worker lives, and whether it is cordoned; `None` when its row is gone and it must register
/// again. Forgets on the way who was not seen for ten minutes, or for a day if there is a cordon to be remembered; and
/// those whose place this one has taken, which may still have looked alive when it registered.
pub async fn beat(conn: &mut PgConnection, id: WorkerId, draining: bool) -> Result<Option<bool>, sqlx::Error> {
    sqlx::query_scalar!(
        "with forgotten as (
             delete from workers w
              where id <> $1
                and (seen_at < clock_timestamp() - case when cordoned then interval '1 day' else interval '10 minutes' end
                     or seen_at < clock_timestamp() - gone_after_ms * interval '1 millisecond'
                        and exists (select 1 from workers me where me.id = $1 and me.name = w.name and me.cordoned = w.cordoned))
         )
         update workers set seen_at = clock_timestamp(), state = case when $2 then 'Draining' else 'Active' end
          where id = $1 and state <> 'Stopped'
         returning cordoned",
        id as _,
        draining,
    )
    .fetch_optional(conn)
    .await
}

/// The worker has ended. Its row stays for a while: for its cordon, and so that what only it could dump waits for its
/// successor instead of failing in between.
pub async fn leave(conn: &mut PgConnection, id: WorkerId) -> Result<(), sqlx::Error> {
    sqlx::query!("update workers set state = 'Stopped', seen_at = clock_timestamp() where id = $1", id as _)
        .execute(conn)
        .await?;
    Ok(())
}

/// A worker as clients see it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// Its id: another one after each start.
    pub id: WorkerId,
    /// Its name, which others may have too.
    pub name: String,
    /// Version of its program.
    pub version: String,
    /// Its machine or container.
    pub host: String,
    /// Pools whose sources it reaches.
    pub pools: Vec<String>,
    /// What it is doing.
    pub state: WorkerState,
    /// It claims nothing more; what it runs goes on.
    pub cordoned: bool,
    /// Runs in it.
    pub slots: Slots,
    /// What it has the tools to dump.
    pub engines: Vec<String>,
    /// Its tools.
    #[schema(value_type = Vec<Tool>)]
    pub tools: Json<Vec<Tool>>,
    /// Sources and destinations (and restores whose backup is of newer tools) that it cannot serve, by their ids, each with
    /// what is in the way. Their runs are left to other workers of the pool, as long as there is one that can.
    #[schema(value_type = BTreeMap<String, String>)]
    pub out_of_reach: Json<OutOfReach>,
    /// When it started.
    #[serde(serialize_with = "crate::time::millis")]
    pub since: DateTime<Utc>,
    /// Its last beat.
    #[serde(serialize_with = "crate::time::millis")]
    pub last_seen_at: DateTime<Utc>,
}

impl Worker {
    /// Whether it lives.
    fn runs(&self) -> bool {
        matches!(self.state, WorkerState::Active | WorkerState::Draining)
    }
}

/// How many runs a worker has, and may have.
#[derive(Clone, Copy, Debug, Serialize, utoipa::ToSchema)]
#[schema(example = json!({ "used": 1, "total": 4 }))]
pub struct Slots {
    /// Leases that it holds.
    pub used: i64,
    /// Its concurrency.
    pub total: i32,
}

struct Row {
    id: WorkerId,
    name: String,
    version: String,
    host: String,
    pools: Vec<String>,
    state: WorkerState,
    cordoned: bool,
    used: i64,
    concurrency: i32,
    engines: Vec<String>,
    tools: Json<Vec<Tool>>,
    out_of_reach: Json<OutOfReach>,
    since: DateTime<Utc>,
    seen_at: DateTime<Utc>,
}

impl From<Row> for Worker {
    fn from(row: Row) -> Self {
        Worker {
            id: row.id,
            name: row.name,
            version: row.version,
            host: row.host,
            pools: row.pools,
            state: row.state,
            cordoned: row.cordoned,
            slots: Slots { used: row.used, total: row.concurrency },
            engines: row.engines,
            tools: row.tools,
            out_of_reach: row.out_of_reach,
            since: row.since,
            last_seen_at: row.seen_at,
        }
    }
}

/// Every worker, those that are over too, by name. (The table has a row for each: nobody pages through it.)
pub async fn all(conn: &mut PgConnection) -> Result<Vec<Worker>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: WorkerId", name, version, host, pools,
                  case when state <> 'Stopped' and seen_at < clock_timestamp() - gone_after_ms * interval '1 millisecond' then 'Gone'
                       else state end as "state!: WorkerState",
                  cordoned, (select count(*) from execution_leases l where l.worker_id = w.id) as "used!",
                  concurrency, engines, tools as "tools: Json<Vec<Tool>>", out_of_reach as "out_of_reach: Json<OutOfReach>", since, seen_at
             from workers w
            order by name, since"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Worker::from).collect())
}

/// Whether a worker of a machine runs, by its beats: one that was not seen for a lease is gone.
pub async fn runs_on(conn: &mut PgConnection, host: &str) -> Result<bool, sqlx::Error> {
    let workers = all(conn).await?;
    Ok(workers.iter().any(|worker| worker.host == host && worker.runs()))
}

/// What became of a cordon.
#[derive(Debug)]
pub enum Cordoned {
    /// The worker as it is now.
    Done(Box<Worker>),
    /// Nobody has this id or name.
    NotFound,
    /// So many workers that run have this name.
    Ambiguous(usize),
}

/// Cordons the worker of an id or a name, or takes its cordon away. To be called in a transaction: it holds the gate,
/// so that a cordoned worker claims nothing from the commit on.
pub async fn cordon(conn: &mut PgConnection, id_or_name: &str, cordoned: bool) -> Result<Cordoned, sqlx::Error> {
    setting::lock_gate(conn).await?;
    let worker = match pick(all(conn).await?, id_or_name) {
        Ok(worker) => worker,
        Err(none) => return Ok(none),
    };
    // Of those that are over too: the next worker of the name would inherit what is left on one of them.
    sqlx::query!(
        "update workers set cordoned = $3
          where id = $1 or name = $2 and (state = 'Stopped' or seen_at < clock_timestamp() - gone_after_ms * interval '1 millisecond')",
        worker.id as _,
        worker.name,
        cordoned,
    )
    .execute(conn)
    .await?;
    Ok(Cordoned::Done(Box::new(Worker { cordoned, ..worker })))
}

/// The one of this id, or the only one of this name that runs, or the latest that ran.
fn pick(workers: Vec<Worker>, id_or_name: &str) -> Result<Worker, Cordoned> {
    let id = id_or_name.parse().ok();
    let mut found: Vec<Worker> = match workers.iter().find(|worker| Some(worker.id) == id) {
        Some(worker) => vec![worker.clone()],
        None => workers.into_iter().filter(|worker| worker.name == id_or_name).collect(),
    };
    if found.iter().any(Worker::runs) {
        found.retain(Worker::runs);
        if found.len() > 1 {
            return Err(Cordoned::Ambiguous(found.len()));
        }
    }
    found.pop().ok_or(Cordoned::NotFound)
}
