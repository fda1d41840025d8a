//! What a list of jobs shows beside them: the source, the newest run and the last backup.

use std::collections::HashMap;

use sqlx::PgConnection;

use crate::{
    execution::{Outcome, Status},
    id::{ExecutionId, JobId, SourceId},
    source::Engine,
};

/// Beside one job.
#[derive(Clone, Debug)]
pub struct JobSummary {
    /// Its source.
    pub source_id: SourceId,
    /// The name of that.
    pub source_name: String,
    /// What speaks there.
    pub engine: Engine,
    /// Its newest run, if it ever had one.
    pub newest: Option<NewestRun>,
    /// Stored bytes of one copy of its last backup.
    pub size_bytes: Option<i64>,
}

/// The newest run of a job, which may wait or run.
#[derive(Clone, Copy, Debug)]
pub struct NewestRun {
    /// Its id.
    pub id: ExecutionId,
    /// Its status.
    pub status: Status,
    /// What is finer than that.
    pub outcome: Option<Outcome>,
}

/// Beside these jobs, in one statement: two steps along the index of each job's runs. (The last backup lies as far back
/// as the runs since then that failed.)
pub async fn of_jobs(conn: &mut PgConnection, jobs: &[JobId]) -> Result<HashMap<JobId, JobSummary>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select j.id as "id!: JobId", s.id as "source_id!: SourceId", s.name as "source_name!", s.engine as "engine!: Engine",
                  n.id as "newest_id?: ExecutionId", n.status as "status?: Status", n.outcome as "outcome?: Outcome",
                  b.size_bytes as "size_bytes?"
             from jobs j join sources s on s.id = j.source_id
             left join lateral (select e.id, e.status, e.outcome from executions e
                                 where e.job_id = j.id and e.type = 'Backup' order by e.seq desc limit 1) n on true
             left join lateral (select e.size_bytes from executions e
                                 where e.job_id = j.id and e.type = 'Backup' and e.status = 'Success' order by e.seq desc limit 1) b on true
            where j.id = any ($1)"#,
        jobs as _
    )
    .fetch_all(conn)
    .await?;
    let summary = rows.into_iter().map(|row| {
        let newest = row.newest_id.zip(row.status);
        let newest = newest.map(|(id, status)| NewestRun { id, status, outcome: row.outcome });
        let (source_id, source_name) = (row.source_id, row.source_name);
        (row.id, JobSummary { source_id, source_name, engine: row.engine, newest, size_bytes: row.size_bytes })
    });
    Ok(summary.collect())
}
