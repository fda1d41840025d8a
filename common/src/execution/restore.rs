//! Restores: a backup that goes back into a database. They are executions, queued and claimed like backups, and limited
//! apart from them.

use serde::Serialize;
use sqlx::{Connection, PgConnection};

use super::idempotency::{self, Idempotency, Keys};
use crate::{
    audit::{self, Actor, Event},
    id::{ExecutionId, JobId, Reference, SourceId},
    setting,
    source::{self, Source},
    telemetry::TraceContext,
};

/// Tries of a restore, at most. Only what failed before the target was touched, or left nothing there, is tried again.
const MAX_ATTEMPTS: i32 = 3;
/// Longest time of a restore whose job is gone, in seconds: as a job has it when nothing is said.
pub const DEFAULT_TIMEOUT_SECONDS: i32 = 21_600;

/// What a restore brings back, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    /// The execution that published the backup.
    pub backup_id: ExecutionId,
    /// The source whose server it goes to.
    pub source_id: SourceId,
    /// Which database of the backup; all of them when left out.
    pub database: Option<String>,
    /// Name of the database that it becomes; its own when left out.
    pub into: Option<String>,
    /// Whether the target may hold something: what the backup has replaces it.
    pub overwrite: bool,
    /// Whether owners and grants are restored; without, everything belongs to who restores.
    pub keep_owners: bool,
}

/// A request for a restore.
#[derive(Clone, Debug)]
pub struct RestoreRequest {
    /// Of the execution, if one is made.
    pub id: ExecutionId,
    /// What, where to, and how.
    pub order: Order,
    /// Who.
    pub actor: Actor,
    /// Trace of the request.
    pub trace: TraceContext,
    /// `Idempotency-Key` of the request.
    pub idempotency: Option<Idempotency>,
    /// What opens an encrypted backup, sealed in [`identity_context`].
    pub sealed_identity: Option<Vec<u8>>,
}

/// Ties a sealed identity to its restore.
pub fn identity_context(restore: ExecutionId) -> String {
    format!("restore {restore} identity")
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ordered {
    /// A new execution waits.
    Queued(ExecutionId),
    /// The same request was answered before; this is its execution.
    Replayed(ExecutionId),
    /// The idempotency key was used with another body.
    KeyReused,
    /// No such backup any more, or no such source.
    Gone,
    /// So many restores of its job wait already.
    QueueFull(i64),
}

/// Queues a restore, in a transaction with its audit event. The rows of its job, where that is still there, and of the
/// backup are locked meanwhile: an idempotency key is of the job, and two processes with one make one execution.
pub async fn order(conn: &mut PgConnection, request: &RestoreRequest) -> Result<Ordered, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let order = &request.order;
    sqlx::query_scalar!(
        "select j.id from executions e join jobs j on j.id = e.job_id where e.id = $1 for no key update of j",
        order.backup_id as _
    )
    .fetch_optional(&mut *tx)
    .await?;
    let backup = sqlx::query!(
        r#"select job_id as "job_id: JobId", job_name from executions where id = $1 for no key update"#,
        order.backup_id as _
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(backup) = backup else { return Ok(Ordered::Gone) };
    if let Some(idempotency) = &request.idempotency
        && let Some(used) = idempotency::used(&mut tx, idempotency, backup.job_id).await?
    {
        return Ok(used.map_or(Ordered::KeyReused, Ordered::Replayed));
    }
    let cap = setting::read(&mut tx).await?.max_pending_per_job;
    let waiting = sqlx::query_scalar!(
        r#"select count(*) as "n!" from executions where status = 'Pending' and type = 'Restore' and job_id = $1"#,
        backup.job_id as _
    )
    .fetch_one(&mut *tx)
    .await?;
    if waiting >= cap {
        return Ok(Ordered::QueueFull(cap));
    }
    let id = request.id;
    let made = sqlx::query!(
        "insert into executions (id, type, job_id, job_name, job_slug, source_id, pool, serial, priority, max_attempts,
                                 trigger_kind, trigger_label, labels, locked, traceparent, tracestate)
         select $1, 'Restore', b.job_id, b.job_name, b.job_slug, s.id, s.pool, true, 0, $4, 'Restore', $5, '{}', false, $6, $7
           from executions b, sources s
          where b.id = $2 and s.id = $3",
        id as _,
        order.backup_id as _,
        order.source_id as _,
        MAX_ATTEMPTS,
        request.actor.name,
        request.trace.traceparent,
        request.trace.tracestate,
    )
    .execute(&mut *tx)
    .await?;
    if made.rows_affected() == 0 {
        return Ok(Ordered::Gone);
    }
    sqlx::query!(
        "insert into restores (execution_id, backup_id, database_name, into_name, overwrite, keep_owners, sealed_identity)
         values ($1, $2, $3, $4, $5, $6, $7)",
        id as _,
        order.backup_id as _,
        order.database,
        order.into,
        order.overwrite,
        order.keep_owners,
        request.sealed_identity,
    )
    .execute(&mut *tx)
    .await?;
    if let Some(idempotency) = &request.idempotency {
        Keys::one(idempotency, backup.job_id, id).store(&mut tx).await?;
    }
    let event = Event::new("execution.restore", id, &backup.job_name).with(serde_json::json!(order));
    audit::record(&mut tx, &request.actor, &[event]).await?;
    tx.commit().await?;
    Ok(Ordered::Queued(id))
}

/// What a restore is about; `None` when the execution is none.
pub async fn find(conn: &mut PgConnection, id: ExecutionId) -> Result<Option<Order>, sqlx::Error> {
    Ok(find_all(conn, &[id]).await?.pop().map(|(_, order)| order))
}

/// What restores are about.
pub async fn find_all(conn: &mut PgConnection, ids: &[ExecutionId]) -> Result<Vec<(ExecutionId, Order)>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select r.execution_id as "execution_id!: ExecutionId", r.backup_id as "backup_id!: ExecutionId",
                  e.source_id as "source_id!: SourceId", r.database_name, r.into_name, r.overwrite as "overwrite!",
                  r.keep_owners as "keep_owners!"
             from restores r join executions e on e.id = r.execution_id
            where r.execution_id = any ($1)"#,
        ids as _
    )
    .fetch_all(conn)
    .await?;
    let order = rows.into_iter().map(|r| {
        let order = Order {
            backup_id: r.backup_id,
            source_id: r.source_id,
            database: r.database_name,
            into: r.into_name,
            overwrite: r.overwrite,
            keep_owners: r.keep_owners,
        };
        (r.execution_id, order)
    });
    Ok(order.collect())
}

/// What opens the backup of a restore, sealed; `None` when it needs none, or has ended.
pub async fn sealed_identity(conn: &mut PgConnection, id: ExecutionId) -> Result<Option<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar!("select sealed_identity from restores where execution_id = $1", id as _)
        .fetch_optional(conn)
        .await
        .map(Option::flatten)
}

/// Erases the identities of restores that have ended, however they ended; gives how many those were.
pub async fn erase_identities(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let erased = sqlx::query!(
        "update restores r set sealed_identity = null
           from executions e
          where r.sealed_identity is not null and e.id = r.execution_id and e.status in ('Success', 'Failed')"
    )
    .execute(conn)
    .await?;
    Ok(erased.rows_affected())
}

/// The source that an execution reads, or a restore writes to.
pub async fn source_of(conn: &mut PgConnection, id: ExecutionId) -> Result<Option<SourceId>, sqlx::Error> {
    sqlx::query_scalar!(r#"select source_id as "source_id: SourceId" from executions where id = $1"#, id as _)
        .fetch_optional(conn)
        .await
}

/// That source, unless it was deleted.
pub async fn own_source(conn: &mut PgConnection, id: ExecutionId) -> Result<Option<Source>, sqlx::Error> {
    match source_of(conn, id).await? {
        Some(id) => source::find(conn, &Reference::new(id.to_string())).await,
        None => Ok(None),
    }
}
