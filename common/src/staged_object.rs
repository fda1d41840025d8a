//! Staged objects: every name that an attempt is going to write, recorded before its first byte. After a crash
//! the sweeper removes what was not published, from this record alone: it never lists a store, so that a shared
//! bucket loses nothing. A database that was restored from a dump, or has taken over from another, does not know what was
//! published after that moment, so what came with it is left alone: see [`Litter::restored`].

use sqlx::{Connection, PgConnection};

use crate::{
    execution::claim::{Claim, Token},
    id::{DestinationId, ExecutionId},
    telemetry::TraceContext,
};

/// Records a name before it is written; `false` when the claim is no longer ours. Of a statement that was sent again because
/// its answer was lost, the first may still arrive while the claim is being ended: it waits for that at the execution's row,
/// and then finds that it is too late. Else the name of what was published would be swept.
pub async fn record(
    conn: &mut PgConnection,
    claim: Claim,
    destination: DestinationId,
    path: &str,
    upload_id: Option<&str>,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query!(
        "insert into staged_objects (id, execution_id, token, destination_id, path, upload_id)
         select $1, l.execution_id, l.token, $3, $4, $5
           from execution_leases l join executions e on e.id = l.execution_id
          where l.token = $2 and e.last_token = $2 and e.status = 'Running'
            for key share of e",
        uuid::Uuid::now_v7(),
        claim.token as _,
        destination as _,
        path,
        upload_id,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Forgets the names of these claims: they are published, or cleaned away.
pub async fn forget(conn: &mut PgConnection, tokens: &[Token]) -> Result<(), sqlx::Error> {
    sqlx::query!("delete from staged_objects where token = any ($1)", tokens as _).execute(conn).await?;
    Ok(())
}

/// Notes that the names of a claim were removed by who wrote them. In an object store, which may take what was on its way
/// then, that was the first of two sweeps; a file is gone.
pub async fn discarded(conn: &mut PgConnection, token: Token) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    sqlx::query!("delete from staged_objects s using destinations d where s.token = $1 and d.id = s.destination_id and d.kind = 'local'", token as _)
        .execute(&mut *tx)
        .await?;
    sqlx::query!(
        "update staged_objects set swept_at = clock_timestamp(), written_by = pg_current_xact_id(), timeline = wal_timeline() where token = $1",
        token as _
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}

/// A name that nobody will publish any more.
#[derive(Clone, Debug)]
pub struct Litter {
    /// Row of the record.
    pub id: uuid::Uuid,
    /// Whose it was.
    pub execution: ExecutionId,
    /// Where it lies.
    pub destination: DestinationId,
    /// Relative to the destination's root.
    pub path: String,
    /// Multipart upload of an object store.
    pub upload_id: Option<String>,
    /// It was removed before; after this time the record goes.
    pub swept_before: bool,
    /// The record came here with a dump of this database, from a primary that is gone, or from before a recovery to a point in
    /// time: what it names may be a backup by now. (A row's `xmin` is the transaction that wrote it, which each of ours names
    /// in `written_by`; a standby that was promoted and a database that was recovered write on a timeline of their own.)
    pub restored: bool,
    /// Trace of the execution.
    pub traceparent: Option<String>,
}

impl Litter {
    /// Trace of the execution.
    pub fn trace_id(&self) -> Option<String> {
        let trace = TraceContext { traceparent: self.traceparent.clone(), tracestate: None };
        trace.trace_id().map(str::to_owned)
    }
}

/// Some names of dead claims in the worker's pools that are due for a sweep: at once, and once more a minute later in
/// case a stopped process woke up and wrote. Any of them: those that cannot be removed must not keep out the others.
pub async fn due(conn: &mut PgConnection, pools: &[String]) -> Result<Vec<Litter>, sqlx::Error> {
    sqlx::query_as!(
        Litter,
        r#"select s.id, s.execution_id as "execution: ExecutionId", s.destination_id as "destination: DestinationId", s.path, s.upload_id,
                  s.swept_at is not null as "swept_before!",
                  s.xmin::text::bigint <> (s.written_by::text::bigint & 4294967295)
                  or s.timeline is distinct from (select wal_timeline()) as "restored!", e.traceparent
             from staged_objects s join executions e on e.id = s.execution_id
            where e.pool = any ($1)
              and not exists (select 1 from execution_leases l where l.token = s.token)
              and (s.swept_at is null or s.swept_at < clock_timestamp() - interval '1 minute')
            order by random()
            limit 200"#,
        pools
    )
    .fetch_all(conn)
    .await
}

/// Notes that a name was removed; the second time its record goes, as does one that is left alone.
pub async fn swept(conn: &mut PgConnection, litter: &Litter) -> Result<(), sqlx::Error> {
    if litter.swept_before || litter.restored {
        sqlx::query!("delete from staged_objects where id = $1", litter.id).execute(conn).await?;
    } else {
        sqlx::query!(
            "update staged_objects set swept_at = clock_timestamp(), written_by = pg_current_xact_id() where id = $1",
            litter.id
        )
        .execute(conn)
        .await?;
    }
    Ok(())
}
