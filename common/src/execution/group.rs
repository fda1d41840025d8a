//! Groups: runs that one request triggered together. A group has no row in `executions`; its state follows from its
//! members, so that nothing has to keep the two in step.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{Connection, PgConnection, types::Json};

use super::{
    Execution, Outcome, Stage, Status, Trigger,
    enqueue::{Desk, Enqueued, TriggerRequest},
    find_all,
    idempotency::{self, Idempotency, Keys},
};
use crate::{
    id::{ExecutionId, JobId},
    label::Labels,
    setting,
    telemetry::TraceContext,
};

/// Most jobs in a group.
pub const MAX_MEMBERS: usize = 1_000;
/// Stands for "all of them" where an idempotency key names one job.
const NO_JOB: JobId = JobId(uuid::Uuid::nil());

/// What became of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupEnqueued {
    /// All of its runs wait, or exist already.
    Made(ExecutionId),
    /// The same request was answered before.
    Replayed(ExecutionId),
    /// The idempotency key was used with another body.
    KeyReused,
    /// These members were refused, by position, and so nothing was made.
    Refused(Vec<(usize, Enqueued)>),
}

/// Triggers all or none, in one transaction.
pub async fn enqueue(
    conn: &mut PgConnection,
    requests: &[TriggerRequest],
    idempotency: Option<&Idempotency>,
) -> Result<GroupEnqueued, sqlx::Error> {
    let mut tx = conn.begin().await?;
    if let Some(idempotency) = idempotency {
        // Two of the same request may arrive at two processes at once: the second waits here for the first.
        sqlx::query!(
            "select pg_advisory_xact_lock(hashtextextended($1 || $2, 0))",
            idempotency.api_key.to_string(),
            idempotency.key
        )
        .execute(&mut *tx)
        .await?;
        if let Some(used) = idempotency::used(&mut tx, idempotency, NO_JOB).await? {
            return Ok(used.map_or(GroupEnqueued::KeyReused, GroupEnqueued::Replayed));
        }
    }
    let mut desk = Desk::open(&mut tx, requests).await?;
    let (mut members, mut refused) = (Vec::new(), Vec::new());
    for (position, request) in requests.iter().enumerate() {
        match desk.decide(request) {
            Enqueued::Queued(id) | Enqueued::Reused(id) | Enqueued::Replayed(id) => members.push(id),
            outcome => refused.push((position, outcome)),
        }
    }
    if !refused.is_empty() {
        return Ok(GroupEnqueued::Refused(refused));
    }
    desk.inserts.run(&mut tx).await?;
    let id = ExecutionId::new();
    insert(&mut tx, id, &requests[0], &members).await?;
    if let Some(idempotency) = idempotency {
        Keys::one(idempotency, NO_JOB, id).store(&mut tx).await?;
    }
    tx.commit().await?;
    Ok(GroupEnqueued::Made(id))
}

async fn insert(
    conn: &mut PgConnection,
    id: ExecutionId,
    request: &TriggerRequest,
    members: &[ExecutionId],
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "insert into execution_groups (id, trigger_kind, trigger_label, labels, traceparent) values ($1, $2, $3, $4, $5)",
        id as _,
        request.kind,
        request.actor.name,
        Json(&request.labels) as _,
        request.trace.traceparent,
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "insert into execution_group_members (group_id, position, execution_id)
         select $1, m.position, m.id from unnest($2::uuid[]) with ordinality as m (id, position)",
        id as _,
        members as _,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A member, as the group shows it.
#[derive(Clone, Debug, Serialize, PartialEq, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Its execution.
    pub execution_id: ExecutionId,
    /// Its job.
    pub job_id: JobId,
    /// The job's name at the trigger.
    pub job_name: String,
    /// See [`Status`].
    pub status: Status,
    /// See [`Outcome`].
    pub outcome: Option<Outcome>,
    /// Percent.
    pub progress: Option<i16>,
    /// Why it failed.
    pub error: Option<String>,
}

struct GroupRow {
    id: ExecutionId,
    trigger_kind: String,
    trigger_label: Option<String>,
    labels: Json<Labels>,
    traceparent: Option<String>,
    trace_url_template: Option<String>,
    created_at: DateTime<Utc>,
}

/// Those of `ids` that are groups, each as an execution of type `Group`.
pub async fn find_groups(conn: &mut PgConnection, ids: &[ExecutionId]) -> Result<Vec<Execution>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select group_id as "group_id: ExecutionId", execution_id as "execution_id: ExecutionId"
             from execution_group_members where group_id = any ($1) order by group_id, position"#,
        ids as _
    )
    .fetch_all(&mut *conn)
    .await?;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let wanted: Vec<ExecutionId> = rows.iter().map(|r| r.execution_id).collect();
    let executions: BTreeMap<ExecutionId, Execution> =
        find_all(&mut *conn, &wanted).await?.into_iter().map(|e| (e.id, e)).collect();
    // The groups last: a failure is forgotten together with its group. A group that is still there had all of its
    // members a moment ago; one that was read first might have lost its failures since.
    let groups = sqlx::query_as!(
        GroupRow,
        r#"select id as "id: ExecutionId", trigger_kind, trigger_label, labels as "labels: Json<Labels>", traceparent, created_at,
                  (select value #>> '{}' from settings where name = 'traceUrlTemplate') as trace_url_template
             from execution_groups where id = any ($1)"#,
        ids as _
    )
    .fetch_all(conn)
    .await?;
    Ok(groups
        .into_iter()
        .map(|group| {
            let of_group = rows.iter().filter(|r| r.group_id == group.id);
            let members: Vec<&Execution> = of_group.filter_map(|r| executions.get(&r.execution_id)).collect();
            summary(group, &members)
        })
        .collect())
}

/// The contract's shape for a group: Pending until a member starts, over when every member is, Failed when one is.
fn summary(group: GroupRow, members: &[&Execution]) -> Execution {
    let count = |wanted: fn(Status) -> bool| members.iter().filter(|m| wanted(m.status)).count();
    let (all, over, failed) = (members.len(), count(Status::is_over), count(|s| s == Status::Failed));
    let status = match () {
        () if over == all && failed > 0 => Status::Failed,
        () if over == all => Status::Success,
        () if over == 0 && count(|s| s == Status::Running) == 0 => Status::Pending,
        () => Status::Running,
    };
    let ended_at = members.iter().filter_map(|m| m.ended_at).max().filter(|_| status.is_over());
    let started_at = members.iter().filter_map(|m| m.started_at).min();
    let percent = |m: &&Execution| if m.status.is_over() { 100 } else { i64::from(m.progress.unwrap_or(0)) };
    let mean = members.iter().map(percent).sum::<i64>() / i64::try_from(all.max(1)).unwrap_or(1);
    let failures: Vec<String> = members
        .iter()
        .filter(|m| m.status == Status::Failed)
        .map(|m| format!("{}: {}", m.job_name, m.error.as_deref().unwrap_or("failed")))
        .collect();
    let stage = match status {
        Status::Pending => Stage::Queued.as_str().to_owned(),
        Status::Running => members
            .iter()
            .find(|m| m.status == Status::Running)
            .map_or(Stage::Queued.as_str().to_owned(), |m| m.stage.clone()),
        Status::Success | Status::Failed => Stage::Completed.as_str().to_owned(),
    };
    let trace = TraceContext { traceparent: group.traceparent, tracestate: None };
    Execution {
        id: group.id,
        // A group has no job of its own; the contract wants a string.
        job_id: JobId(group.id.0),
        job_name: format!("{all} jobs"),
        kind: "Group".to_owned(),
        status,
        outcome: None,
        progress: match status {
            Status::Pending | Status::Failed => None,
            Status::Running => Some(i16::try_from(mean.min(99)).unwrap_or(99)),
            Status::Success => Some(100),
        },
        stage,
        queued_at: group.created_at,
        started_at,
        ended_at,
        duration: ended_at.map(|end| (end - started_at.unwrap_or(group.created_at)).num_milliseconds()),
        size: (status == Status::Success).then(|| members.iter().filter_map(|m| m.size).sum()),
        path: None,
        checksum: None,
        snapshot_at: members.iter().filter_map(|m| m.snapshot_at).min().filter(|_| status == Status::Success),
        error: (status == Status::Failed).then(|| format!("{failed} of {all} runs failed: {}", failures.join("; "))),
        error_code: (status == Status::Failed).then(|| "member_failed".to_owned()),
        attempt: 1,
        trigger: Trigger { kind: group.trigger_kind, label: group.trigger_label },
        priority: 0,
        labels: group.labels.0,
        trace_url: setting::trace_url(group.trace_url_template.as_deref(), &trace),
        trace_id: trace.trace_id().map(str::to_owned),
        members: Some(
            members
                .iter()
                .map(|m| Member {
                    execution_id: m.id,
                    job_id: m.job_id,
                    job_name: m.job_name.clone(),
                    status: m.status,
                    outcome: m.outcome,
                    progress: m.progress,
                    error: m.error.clone(),
                })
                .collect(),
        ),
        bytes: None,
        bytes_per_second: None,
        attempts: Vec::new(),
        restore: None,
        waiting_for: None,
        // Of a group that waits, what its first member waits for.
        waiting: members.iter().find_map(|m| m.waiting.clone()).filter(|_| status == Status::Pending),
        tried: false,
        seq: 0,
    }
}
