//! The attempts of a run that took more than one, or did not succeed. Written with the end of each, by whoever records
//! it: see [`super::finish`] and [`super::lease::rescue`].

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;

use crate::id::ExecutionId;

/// An attempt that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PastAttempt {
    /// Which claim of the run, from 1.
    pub attempt: i32,
    /// The worker that claimed it.
    pub worker: String,
    /// When it was claimed.
    #[serde(serialize_with = "crate::time::millis")]
    pub started_at: DateTime<Utc>,
    /// When its end was recorded; of a lost worker, when the run was taken back.
    #[serde(serialize_with = "crate::time::millis")]
    pub ended_at: DateTime<Utc>,
    /// Success, Failed, Released (its worker stopped and gave it back), Cancelled, TimedOut or WorkerLost.
    pub outcome: String,
    /// Where the bytes were.
    pub stage: String,
    /// What a person needs to act on.
    pub error: Option<String>,
    /// A stable word for programs.
    pub error_code: Option<String>,
}

/// Attempts of several executions, each with its execution, in order.
pub async fn find_all(
    conn: &mut PgConnection,
    ids: &[ExecutionId],
) -> Result<Vec<(ExecutionId, PastAttempt)>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select execution_id as "execution_id!: ExecutionId", attempt as "attempt!", worker as "worker!",
                  started_at as "started_at!", ended_at as "ended_at!", outcome as "outcome!", stage as "stage!", error, error_code
             from execution_attempts where execution_id = any ($1) order by execution_id, attempt"#,
        ids as _
    )
    .fetch_all(conn)
    .await?;
    let past = rows.into_iter().map(|r| {
        let attempt = PastAttempt {
            attempt: r.attempt,
            worker: r.worker,
            started_at: r.started_at,
            ended_at: r.ended_at,
            outcome: r.outcome,
            stage: r.stage,
            error: r.error,
            error_code: r.error_code,
        };
        (r.execution_id, attempt)
    });
    Ok(past.collect())
}
