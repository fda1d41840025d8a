//! Pins: a run backs up the source that its job had at the trigger. When the job is given another one meanwhile, the run keeps
//! the rest of what the job was, too: its new destinations and recipients are not meant for the old source.

use sqlx::PgConnection;

use crate::{
    encryption::Encryption,
    id::{DestinationId, ExecutionId, JobId, SourceId},
};

/// Keeps for the runs of a job that have not ended what it is now, if it is about to get another source. To be called under
/// the job's lock.
pub(crate) async fn keep(conn: &mut PgConnection, job: JobId, source: SourceId) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "insert into execution_pins (execution_id, destination_ids, recipients)
         select e.id, array(select d.destination_id from job_destinations d where d.job_id = j.id order by d.position), j.recipients
           from jobs j join executions e on e.job_id = j.id and e.source_id = j.source_id
          where j.id = $1 and j.source_id <> $2 and e.status in ('Pending', 'Running') and e.type = 'Backup'
         on conflict (execution_id) do update set destination_ids = excluded.destination_ids, recipients = excluded.recipients",
        job as _,
        source as _,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What the job of a run was when it had the run's source; `None` where nothing was kept.
pub(super) async fn find(
    conn: &mut PgConnection,
    execution: ExecutionId,
) -> Result<Option<(Vec<DestinationId>, Option<Encryption>)>, sqlx::Error> {
    let row = sqlx::query!(
        r#"select destination_ids as "destination_ids: Vec<DestinationId>", recipients from execution_pins where execution_id = $1"#,
        execution as _
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.destination_ids, Encryption::of(row.recipients))))
}
