//! Pins: a run backs up the source that its job had at the trigger. When the job is given another one meanwhile, the run keeps
//! the rest of what the job was, too: its new destinations and recipients are not meant for the old source. The database keeps
//! it, by the trigger `jobs_pin_runs`.

use sqlx::PgConnection;

use crate::{
    encryption::Encryption,
    id::{DestinationId, ExecutionId},
};

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
