//! Lists of executions: a page of all, and what goes on just now.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, types::Json};

use super::{Execution, Outcome, Row, Status, find_all};
use crate::{
    id::{ExecutionId, JobId, SourceId},
    label::Labels,
    page::{Page, fetch_limit},
};

/// Which executions a list shows.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only of this job.
    pub job_id: Option<JobId>,
    /// Only of these jobs, for a caller that is scoped.
    pub only: Option<Vec<JobId>>,
    /// Only in this state.
    pub status: Option<Status>,
    /// Only with this outcome.
    pub outcome: Option<Outcome>,
    /// Not with this outcome.
    pub not_outcome: Option<Outcome>,
    /// Triggered at this time or later.
    pub from: Option<DateTime<Utc>>,
    /// Triggered before this time.
    pub to: Option<DateTime<Utc>>,
    /// Rows on a page.
    pub limit: Option<i64>,
    /// Sequence number of the last row of the page before.
    pub cursor: Option<i64>,
}

/// A page of executions, newest first.
///
/// Which they are is found first, from an index alone: for whole rows PostgreSQL takes the index of all executions for as
/// cheap as that of a status, and walks over everything that waits to find the newest failures.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<Page<Execution>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select e.id as "id: ExecutionId", e.seq, e.job_id as "job_id: JobId", e.job_name, e.type as kind, e.status as "status: Status",
                  e.outcome as "outcome: Outcome", l.progress as "progress?", l.bytes as "bytes?", l.bytes_per_second as "bytes_per_second?", coalesce(l.stage, e.stage) as stage, e.queued_at, e.started_at,
                  e.ended_at, e.size_bytes, e.path, e.checksum, e.snapshot_at, e.error, e.error_code, e.attempt, e.trigger_kind,
                  e.trigger_label, e.priority, e.labels as "labels: Json<Labels>", e.traceparent,
                  (select value #>> '{}' from settings where name = 'traceUrlTemplate') as trace_url_template,
                  e.source_id as "source_id: SourceId", e.pool, e.serial, e.run_at,
                  e.previous_token is not null as "tried!"
             from (select p.seq from executions p
                    where ($1::uuid is null or p.job_id = $1)
                      and ($2::uuid[] is null or p.job_id = any ($2))
                      and ($3::text is null or p.status = $3)
                      and ($4::text is null or p.outcome = $4)
                      and ($9::text is null or p.outcome is distinct from $9)
                      and ($5::timestamptz is null or p.queued_at >= $5)
                      and ($6::timestamptz is null or p.queued_at < $6)
                      and ($7::bigint is null or p.seq < $7)
                    order by p.seq desc
                    limit $8) page
             join executions e on e.seq = page.seq
             left join execution_leases l on l.execution_id = e.id
            order by e.seq desc"#,
        filter.job_id as _,
        filter.only.as_deref() as _,
        filter.status.map(Status::as_str),
        filter.outcome.map(Outcome::as_str),
        filter.from,
        filter.to,
        filter.cursor,
        fetch_limit(filter.limit),
        filter.not_outcome.map(Outcome::as_str),
    )
    .fetch_all(conn)
    .await?;
    Ok(Page::cut(rows.into_iter().map(Execution::from).collect(), filter.limit, |e| e.seq.to_string()))
}

/// Executions that are waiting or running, and those that ended a moment ago: what a live list shows.
pub async fn recent(conn: &mut PgConnection, limit: i64) -> Result<Vec<Execution>, sqlx::Error> {
    let ids = sqlx::query_scalar!(
        r#"select id as "id!: ExecutionId" from (
               (select id from executions where status = 'Pending' order by seq desc limit $1)
               union all
               (select id from executions where status = 'Running' order by seq desc limit $1)
               union all
               (select id from executions where ended_at > now() - interval '10 seconds' and status in ('Success', 'Failed')
                 order by ended_at desc limit $1)
           ) as of_late"#,
        limit
    )
    .fetch_all(&mut *conn)
    .await?;
    find_all(conn, &ids).await
}
