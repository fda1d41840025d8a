//! Log lines of executions: rows, written in batches while a run goes on, readable at once.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;

use super::{Stage, claim::Token};
use crate::id::ExecutionId;

/// How grave a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// For developers.
    Debug,
    /// What happens.
    Info,
    /// What went well.
    Success,
    /// What somebody should look at.
    Warning,
    /// Why it failed.
    Error,
}

impl Level {
    /// The name as clients read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Success => "success",
            Level::Warning => "warning",
            Level::Error => "error",
        }
    }
}

/// A line to be written.
#[derive(Clone, Debug)]
pub struct NewLine {
    /// The worker's clock.
    pub at: DateTime<Utc>,
    /// See [`Level`].
    pub level: Level,
    /// Where the bytes were.
    pub stage: Stage,
    /// One sentence.
    pub message: String,
    /// Longer text.
    pub details: Option<String>,
    /// The span in which it was told, in hex.
    pub span_id: String,
}

/// A line as clients read it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Line {
    /// The worker's clock.
    #[serde(serialize_with = "crate::time::millis")]
    pub timestamp: DateTime<Utc>,
    /// debug, info, success, warning or error.
    pub level: String,
    /// Where the bytes were.
    pub stage: String,
    /// One sentence.
    pub message: String,
    /// Longer text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<String>,
    /// The span of the execution's trace in which it was told.
    #[serde(rename = "spanId", skip_serializing_if = "Option::is_none")]
    pub span_id: Option<String>,
    /// Order and cursor.
    #[serde(skip)]
    pub seq: i64,
}

/// Appends lines of a run; `false` when the claim is no longer ours, and nothing was written.
pub async fn append(conn: &mut PgConnection, token: Token, lines: &[NewLine]) -> Result<bool, sqlx::Error> {
    let at: Vec<DateTime<Utc>> = lines.iter().map(|l| l.at).collect();
    let level: Vec<String> = lines.iter().map(|l| l.level.as_str().to_owned()).collect();
    let stage: Vec<String> = lines.iter().map(|l| l.stage.as_str().to_owned()).collect();
    // PostgreSQL's text holds no NUL; a tool's output may.
    let clean = |text: &str| text.replace('\0', "\u{fffd}");
    let message: Vec<String> = lines.iter().map(|l| clean(&l.message)).collect();
    let details: Vec<Option<String>> = lines.iter().map(|l| l.details.as_deref().map(clean)).collect();
    let span_id: Vec<String> = lines.iter().map(|l| l.span_id.clone()).collect();
    let done = sqlx::query!(
        "insert into execution_logs (execution_id, at, level, stage, message, details, span_id)
         select l.execution_id, n.at, n.level, n.stage, n.message, n.details, n.span_id
           from execution_leases l,
                unnest($2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
                    with ordinality as n (at, level, stage, message, details, span_id, position)
          where l.token = $1
          order by n.position",
        token as _,
        &at,
        &level,
        &stage,
        &message,
        &details as &[Option<String>],
        &span_id,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0 || lines.is_empty())
}

/// Lines of an execution in order, those after `after` when it is given.
pub async fn read(
    conn: &mut PgConnection,
    execution: ExecutionId,
    after: Option<i64>,
) -> Result<Vec<Line>, sqlx::Error> {
    sqlx::query_as!(
        Line,
        "select at as timestamp, level, stage, message, details, span_id, seq from execution_logs
          where execution_id = $1 and seq > $2 order by seq",
        execution as _,
        after.unwrap_or(0),
    )
    .fetch_all(conn)
    .await
}

/// What a reader of a log has seen of it.
#[derive(Clone, Copy, Debug)]
pub struct LogCursor {
    /// Whose log.
    pub execution: ExecutionId,
    /// The last line seen; 0 for none.
    pub after: i64,
}

/// New lines of many logs in one statement, at most [`MOST_NEW_LINES`] of each.
pub async fn read_new(conn: &mut PgConnection, cursors: &[LogCursor]) -> Result<Vec<(ExecutionId, Line)>, sqlx::Error> {
    let ids: Vec<ExecutionId> = cursors.iter().map(|c| c.execution).collect();
    let after: Vec<i64> = cursors.iter().map(|c| c.after).collect();
    let rows = sqlx::query!(
        r#"select c.id as "id!: ExecutionId", l.at, l.level, l.stage, l.message, l.details, l.span_id, l.seq
             from unnest($1::uuid[], $2::bigint[]) as c (id, after)
            cross join lateral (select * from execution_logs l where l.execution_id = c.id and l.seq > c.after
                                 order by l.seq limit $3) l
            order by l.seq"#,
        &ids[..] as _,
        &after,
        MOST_NEW_LINES,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|r| {
            let line = Line {
                timestamp: r.at,
                level: r.level,
                stage: r.stage,
                message: r.message,
                details: r.details,
                span_id: r.span_id,
                seq: r.seq,
            };
            (r.id, line)
        })
        .collect())
}

/// Lines of one log that a look brings.
pub const MOST_NEW_LINES: i64 = 500;
