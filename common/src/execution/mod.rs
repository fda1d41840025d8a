//! Executions: one run of a job each, from the trigger to the result. The verbs are in the order of a run:
//! [`enqueue`], [`claim`], [`lease`], [`log`], [`finish`], and [`cancel`]; reading is here.
//!
//! ```text
//!            claim            finish
//! Pending ─────────► Running ───────► Success
//!    ▲                 │  │
//!    └─ retry, rescue, ┘  └─────────► Failed (outcome says more: Cancelled, TimedOut, WorkerLost, Expired)
//!       release
//! ```

pub mod attempts;
pub mod cancel;
pub mod claim;
pub mod enqueue;
pub mod expire;
pub mod finish;
pub mod group;
pub mod history;
pub mod idempotency;
mod inserts;
pub mod lease;
mod list;
pub mod log;
pub(crate) mod pin;
pub mod remembered;
pub mod restore;
pub mod room;
pub mod summary;
pub mod ticker;
pub mod waiting;

pub use list::{Filter, list, recent};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, types::Json};

use crate::{
    id::{ExecutionId, JobId, SourceId},
    label::Labels,
    setting,
    telemetry::TraceContext,
};

/// The four states of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema)]
#[sqlx(type_name = "text")]
pub enum Status {
    /// Waits for a slot.
    Pending,
    /// A worker holds its lease.
    Running,
    /// Published, or restored.
    Success,
    /// Over without a backup; the error says why.
    Failed,
}

impl Status {
    /// The name as clients write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Pending => "Pending",
            Status::Running => "Running",
            Status::Success => "Success",
            Status::Failed => "Failed",
        }
    }

    /// Whether nothing will change any more.
    pub fn is_over(self) -> bool {
        matches!(self, Status::Success | Status::Failed)
    }
}

/// What is finer than the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema)]
#[sqlx(type_name = "text")]
pub enum Outcome {
    /// Somebody asked.
    Cancelled,
    /// Longer than the job allows.
    TimedOut,
    /// Its workers were lost too often.
    WorkerLost,
    /// Not started in time.
    Expired,
    /// An optional destination failed.
    Partial,
}

impl Outcome {
    /// The name as clients write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Cancelled => "Cancelled",
            Outcome::TimedOut => "TimedOut",
            Outcome::WorkerLost => "WorkerLost",
            Outcome::Expired => "Expired",
            Outcome::Partial => "Partial",
        }
    }
}

/// Where the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Stage {
    /// Waits for a slot.
    Queued,
    /// Looks at the source and the destinations.
    Initializing,
    /// The dump tool writes.
    Dumping,
    /// The last bytes go out.
    Uploading,
    /// Sizes and checksums are compared.
    Verifying,
    /// A backup goes back into its database.
    Restoring,
    /// Over.
    Completed,
}

impl Stage {
    /// The name as clients read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Queued => "Queued",
            Stage::Initializing => "Initializing",
            Stage::Dumping => "Dumping",
            Stage::Uploading => "Uploading",
            Stage::Verifying => "Verifying",
            Stage::Restoring => "Restoring",
            Stage::Completed => "Completed",
        }
    }
}

/// What triggered a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Trigger {
    /// Api, Manual, Schedule or Restore.
    #[serde(rename = "type")]
    pub kind: String,
    /// Who: the name of the key.
    pub label: Option<String>,
}

/// An execution as it is polled.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Execution {
    /// Its id.
    pub id: ExecutionId,
    /// The job it ran.
    pub job_id: JobId,
    /// The job's name at the trigger.
    pub job_name: String,
    /// Backup or Restore.
    #[serde(rename = "type")]
    pub kind: String,
    /// See [`Status`].
    pub status: Status,
    /// See [`Outcome`].
    pub outcome: Option<Outcome>,
    /// Percent; null while Pending, at most 99 until Success.
    pub progress: Option<i16>,
    /// See [`Stage`].
    pub stage: String,
    /// Bytes read so far while it runs: of the dump, or of the stored backup, which a restore reads twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// How fast it reads while it runs, of late.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<i64>,
    /// When it was triggered.
    #[serde(serialize_with = "crate::time::millis")]
    pub queued_at: DateTime<Utc>,
    /// When it was first claimed.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub ended_at: Option<DateTime<Utc>>,
    /// Milliseconds from the first claim (or, never claimed, from the trigger) to the end.
    pub duration: Option<i64>,
    /// Stored bytes of one copy.
    pub size: Option<i64>,
    /// Where the backup lies in its first destination.
    pub path: Option<String>,
    /// `sha256:<hex>` of what lies there.
    pub checksum: Option<String>,
    /// The time whose data the backup holds.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub snapshot_at: Option<DateTime<Utc>>,
    /// What a person needs to act on.
    pub error: Option<String>,
    /// A stable word for programs.
    pub error_code: Option<String>,
    /// Claims so far.
    pub attempt: i32,
    /// Who triggered it.
    pub trigger: Trigger,
    /// Order in the queue: higher first.
    pub priority: i16,
    /// Labels given at the trigger.
    pub labels: Labels,
    /// Trace of the request that triggered it.
    pub trace_id: Option<String>,
    /// Where people see that trace, by the setting `traceUrlTemplate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_url: Option<String>,
    /// The runs of a group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub members: Option<Vec<group::Member>>,
    /// The attempts that are over, of a run that did not succeed at once; only of one execution, not in lists.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<attempts::PastAttempt>,
    /// What a restore brings back, where to and how; only of one execution, not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<Box<restore::Order>>,
    /// What holds it back while it is Pending, from a look at most a second old; of a group, what its first run waits for. Null or absent when
    /// it is about to be claimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<waiting::WaitingFor>,
    /// While Pending: what decides how long it waits.
    #[serde(skip)]
    pub waiting: Option<Box<waiting::Waiting>>,
    /// Whether an attempt of it ended without success.
    #[serde(skip)]
    pub tried: bool,
    /// Order of arrival; the cursor of lists.
    #[serde(skip)]
    pub seq: i64,
}

struct Row {
    id: ExecutionId,
    seq: i64,
    job_id: JobId,
    job_name: String,
    kind: String,
    status: Status,
    outcome: Option<Outcome>,
    progress: Option<i16>,
    bytes: Option<i64>,
    bytes_per_second: Option<i64>,
    stage: Option<String>,
    queued_at: DateTime<Utc>,
    started_at: Option<DateTime<Utc>>,
    ended_at: Option<DateTime<Utc>>,
    size_bytes: Option<i64>,
    path: Option<String>,
    checksum: Option<String>,
    snapshot_at: Option<DateTime<Utc>>,
    error: Option<String>,
    error_code: Option<String>,
    attempt: i32,
    trigger_kind: String,
    trigger_label: Option<String>,
    priority: i16,
    labels: Json<Labels>,
    traceparent: Option<String>,
    trace_url_template: Option<String>,
    source_id: SourceId,
    pool: String,
    serial: bool,
    run_at: DateTime<Utc>,
    tried: bool,
}

impl Row {
    fn waiting(&self) -> Option<Box<waiting::Waiting>> {
        (self.status == Status::Pending).then(|| {
            Box::new(waiting::Waiting {
                id: self.id,
                job_id: self.job_id,
                kind: self.kind.clone(),
                source_id: self.source_id,
                pool: self.pool.clone(),
                serial: self.serial,
                run_at: self.run_at,
                attempt: self.attempt,
            })
        })
    }
}

impl Execution {
    /// Whether it brings a backup back, and is none itself.
    pub fn is_restore(&self) -> bool {
        self.kind == "Restore"
    }
}

impl From<Row> for Execution {
    fn from(row: Row) -> Self {
        let waiting = row.waiting();
        let trace = TraceContext { traceparent: row.traceparent, tracestate: None };
        let duration = row.ended_at.map(|end| (end - row.started_at.unwrap_or(row.queued_at)).num_milliseconds());
        let (progress, stage) = match row.status {
            Status::Pending => (None, Stage::Queued.as_str().to_owned()),
            // The lease goes first when a run ends, and a poll may fall between.
            Status::Running => {
                (Some(row.progress.unwrap_or(0)), row.stage.unwrap_or_else(|| Stage::Initializing.as_str().to_owned()))
            }
            Status::Success => (Some(100), Stage::Completed.as_str().to_owned()),
            Status::Failed => (None, row.stage.unwrap_or_else(|| Stage::Queued.as_str().to_owned())),
        };
        Execution {
            id: row.id,
            job_id: row.job_id,
            job_name: row.job_name,
            kind: row.kind,
            status: row.status,
            outcome: row.outcome,
            progress,
            stage,
            bytes: row.bytes,
            bytes_per_second: row.bytes_per_second,
            queued_at: row.queued_at,
            started_at: row.started_at,
            ended_at: row.ended_at,
            duration,
            size: row.size_bytes,
            path: row.path,
            checksum: row.checksum,
            snapshot_at: row.snapshot_at,
            // A retry that waits keeps the last error for people; the contract's error is of the end.
            error: row.error.filter(|_| row.status == Status::Failed),
            error_code: row.error_code.filter(|_| row.status == Status::Failed),
            attempt: row.attempt,
            trigger: Trigger { kind: row.trigger_kind, label: row.trigger_label },
            priority: row.priority,
            labels: row.labels.0,
            trace_url: setting::trace_url(row.trace_url_template.as_deref(), &trace),
            trace_id: trace.trace_id().map(str::to_owned),
            members: None,
            attempts: Vec::new(),
            restore: None,
            waiting_for: None,
            waiting,
            tried: row.tried,
            seq: row.seq,
        }
    }
}

/// One execution, or a group.
pub async fn find(conn: &mut PgConnection, id: ExecutionId) -> Result<Option<Execution>, sqlx::Error> {
    if let Some(execution) = find_all(conn, &[id]).await?.pop() {
        return Ok(Some(execution));
    }
    Ok(group::find_groups(conn, &[id]).await?.pop())
}

/// Those of `ids` that are executions and have ended.
pub async fn ended_of(conn: &mut PgConnection, ids: &[uuid::Uuid]) -> Result<Vec<uuid::Uuid>, sqlx::Error> {
    sqlx::query_scalar!("select id from executions where id = any ($1) and ended_at is not null", ids)
        .fetch_all(conn)
        .await
}

/// Those of `ids` that are executions, in one statement. (The driver reads from the plan which columns may be null, and
/// the plan of an array differs from that of one id: hence the marks.)
pub async fn find_all(conn: &mut PgConnection, ids: &[ExecutionId]) -> Result<Vec<Execution>, sqlx::Error> {
    let mut executions = rows_of(conn, ids).await?;
    let tried: Vec<_> = executions.iter().filter(|e| e.tried).map(|e| e.id).collect();
    if !tried.is_empty() {
        for (id, attempt) in attempts::find_all(conn, &tried).await? {
            if let Some(execution) = executions.iter_mut().find(|execution| execution.id == id) {
                execution.attempts.push(attempt);
            }
        }
    }
    let restores: Vec<_> = executions.iter().filter(|e| e.is_restore()).map(|e| e.id).collect();
    if !restores.is_empty() {
        for (id, order) in restore::find_all(conn, &restores).await? {
            if let Some(execution) = executions.iter_mut().find(|execution| execution.id == id) {
                execution.restore = Some(Box::new(order));
            }
        }
    }
    Ok(executions)
}

async fn rows_of(conn: &mut PgConnection, ids: &[ExecutionId]) -> Result<Vec<Execution>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select e.id as "id!: ExecutionId", e.seq as "seq!", e.job_id as "job_id!: JobId", e.job_name as "job_name!", e.type as "kind!",
                  e.status as "status!: Status",
                  e.outcome as "outcome: Outcome", l.progress as "progress?", l.bytes as "bytes?", l.bytes_per_second as "bytes_per_second?", coalesce(l.stage, e.stage) as stage, e.queued_at as "queued_at!",
                  e.started_at,
                  e.ended_at, e.size_bytes, e.path, e.checksum, e.snapshot_at, e.error, e.error_code, e.attempt as "attempt!",
                  e.trigger_kind as "trigger_kind!", e.trigger_label, e.priority as "priority!", e.labels as "labels!: Json<Labels>",
                  e.traceparent, (select value #>> '{}' from settings where name = 'traceUrlTemplate') as trace_url_template,
                  e.source_id as "source_id!: SourceId", e.pool as "pool!", e.serial as "serial!", e.run_at as "run_at!",
                  e.previous_token is not null as "tried!"
             from executions e left join execution_leases l on l.execution_id = e.id
            where e.id = any ($1)"#,
        ids as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Execution::from).collect())
}
