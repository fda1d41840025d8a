//! What the snapshot of the queue is made of, as the database has it.

use std::collections::HashMap;

use sqlx::PgConnection;

use super::{Claimant, Full};
use crate::id::{DestinationId, ExecutionId, JobId, SourceId, WorkerId};

/// A lease, with what its source allows.
pub(super) struct LeaseRow {
    pub(super) execution_id: ExecutionId,
    pub(super) job_id: JobId,
    pub(super) source_id: SourceId,
    pub(super) kind: String,
    worker_id: Option<WorkerId>,
    most: Option<i32>,
}

/// Every run that is under way.
pub(super) async fn leases(conn: &mut PgConnection) -> Result<Vec<LeaseRow>, sqlx::Error> {
    sqlx::query_as!(
        LeaseRow,
        r#"select l.execution_id as "execution_id: ExecutionId", l.job_id as "job_id: JobId", l.source_id as "source_id: SourceId",
                  l.type as kind, l.worker_id as "worker_id: WorkerId",
                  case l.type when 'Restore' then s.max_concurrent_restores else s.max_concurrent_runs end as most
             from execution_leases l left join sources s on s.id = l.source_id"#
    )
    .fetch_all(conn)
    .await
}

/// Sources that allow no more.
pub(super) fn full(leases: &[LeaseRow]) -> Full {
    let mut used: HashMap<(SourceId, String), (i32, i32)> = HashMap::new();
    for lease in leases {
        if let Some(most) = lease.most {
            used.entry((lease.source_id, lease.kind.clone())).or_insert((0, most)).0 += 1;
        }
    }
    used.into_iter().filter(|(_, (used, most))| used >= most).map(|(source, (_, most))| (source, most)).collect()
}

/// Workers that claim, or would.
pub(super) async fn claimants(conn: &mut PgConnection, leases: &[LeaseRow]) -> Result<Vec<Claimant>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select id as "id: WorkerId", pools, engines, array (select jsonb_object_keys(out_of_reach)::uuid) as "out_of_reach!", concurrency, cordoned
             from workers
            where state = 'Active' and seen_at > clock_timestamp() - gone_after_ms * interval '1 millisecond'"#
    )
    .fetch_all(conn)
    .await?;
    let used = |id: WorkerId| i64::try_from(leases.iter().filter(|l| l.worker_id == Some(id)).count()).unwrap_or(0);
    Ok(rows
        .into_iter()
        .map(|r| Claimant {
            pools: r.pools,
            engines: r.engines,
            out_of_reach: r.out_of_reach,
            cordoned: r.cordoned,
            free: i64::from(r.concurrency) - used(r.id),
        })
        .collect())
}

/// See [`super::QueueSnapshot`].
pub(super) async fn choosy(conn: &mut PgConnection) -> Result<HashMap<SourceId, String>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select s.id as "id: SourceId", s.engine from sources s
            where exists (select 1 from workers w
                           where w.state = 'Active' and s.pool = any (w.pools) and s.engine <> all (w.engines)
                             and w.seen_at > clock_timestamp() - w.gone_after_ms * interval '1 millisecond')"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (r.id, r.engine)).collect())
}

/// Where the backups of the jobs go that have a destination which is out of reach of somebody.
pub(super) async fn stores(conn: &mut PgConnection) -> Result<HashMap<JobId, Vec<DestinationId>>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select job_id as "job_id: JobId", array_agg(destination_id) as "stores!: Vec<DestinationId>"
             from job_destinations d
            where job_id in (select hidden.job_id
                               from workers w, jsonb_object_keys(w.out_of_reach) id join job_destinations hidden on hidden.destination_id = id::uuid
                              where w.state = 'Active')
            group by job_id"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (r.job_id, r.stores)).collect())
}

/// Where the runs go that keep what their job was before it got another source.
pub(super) async fn pinned(conn: &mut PgConnection) -> Result<HashMap<ExecutionId, Vec<DestinationId>>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select e.id as "id: ExecutionId", p.destination_ids as "stores: Vec<DestinationId>"
             from execution_pins p join executions e on e.id = p.execution_id join jobs j on j.id = e.job_id and j.source_id <> e.source_id
            where e.ended_at is null"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (r.id, r.stores)).collect())
}

/// Where the backup of each restore that is not over lies.
pub(super) async fn copies(conn: &mut PgConnection) -> Result<HashMap<ExecutionId, Vec<DestinationId>>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select e.id as "id: ExecutionId", array_agg(distinct d.id) as "copies!: Vec<DestinationId>"
             from restores r join executions e on e.id = r.execution_id join artifacts a on a.execution_id = r.backup_id
                  join destinations d on d.id = a.destination_id
            where e.ended_at is null
            group by e.id"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (r.id, r.copies)).collect())
}
