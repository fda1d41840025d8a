//! Triggering a job, and everything about its executions.

use axum::{
    Extension, Json,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use common::{
    artifact,
    execution::{
        self, Execution, Filter, Outcome, Status,
        cancel::{self, Cancelled},
        enqueue::{Enqueued, Idempotency, TriggerRequest},
        log,
    },
    id::{ExecutionId, Reference},
    job,
    label::Labels,
    queue::Notice,
    telemetry::TraceContext,
};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tracing::Span;

use super::{Check, data, page};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Query, RawBody, Segment, cursor, limit, parse},
    state::AppState,
};

/// Body of a trigger; all of it is optional.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RunBody {
    #[serde(default)]
    lock: bool,
    lock_days: Option<i32>,
    priority: Option<i16>,
    #[serde(default)]
    labels: Labels,
}

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

fn idempotency(headers: &HeaderMap, caller: &Caller, body: &[u8]) -> Result<Option<Idempotency>, ApiError> {
    let Some(value) = headers.get(&IDEMPOTENCY_KEY) else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| (1..=255).contains(&key.len()));
    let key =
        key.ok_or_else(|| ApiError::malformed("Idempotency-Key", "must have 1 to 255 printable ASCII characters"))?;
    Ok(Some(Idempotency { api_key: caller.key().id, key: key.to_owned(), body_hash: Sha256::digest(body).to_vec() }))
}

/// Triggers a job.
pub async fn trigger(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(job): Segment,
    headers: HeaderMap,
    RawBody(raw): RawBody,
) -> Result<Response, ApiError> {
    let body: RunBody = parse(&raw)?;
    let mut check = Check::default();
    check.labels(&body.labels);
    if body.priority.is_some_and(|p| !(-10..=10).contains(&p)) {
        check.refuse("priority", "must be between -10 and 10");
    }
    if body.lock_days.is_some_and(|days| days < 1) {
        check.refuse("lockDays", "must be at least 1");
    }
    check.done()?;
    let request = TriggerRequest {
        job: Reference::new(job),
        only: caller.only(),
        kind: "Api",
        label: Some(caller.name().to_owned()),
        priority: body.priority.unwrap_or(0),
        labels: body.labels,
        locked: body.lock || body.lock_days.is_some(),
        lock_days: body.lock_days,
        trace: TraceContext::of(&Span::current()),
        idempotency: idempotency(&headers, &caller, &raw)?,
    };
    match state.enqueuer.enqueue(request).await? {
        Enqueued::Queued(id) => {
            tracing::info!(execution = %id, caller = caller.name(), "triggered");
            Ok(accepted(id, false))
        }
        Enqueued::Replayed(id) => Ok(accepted(id, true)),
        Enqueued::KeyReused => Err(ApiError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency_key_reused",
            "this Idempotency-Key was used with another body: use a new key for a new request",
        )),
        Enqueued::JobNotFound => Err(ApiError::not_found("Job", "job_not_found")),
        Enqueued::Active(id) => {
            Err(ApiError::conflict("already_active", "a run of this job is active and its overlap is 'reject'")
                .with_execution(id))
        }
        Enqueued::JobQueueFull(cap) => Err(queue_full(&format!("{cap} runs of this job wait already"))),
        Enqueued::QueueFull(cap) => Err(queue_full(&format!("{cap} runs wait already"))),
    }
}

fn queue_full(what: &str) -> ApiError {
    ApiError::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", format!("{what}: try again when some have ended"))
        .retry_after(30)
}

fn accepted(id: ExecutionId, replayed: bool) -> Response {
    let url = format!("/api/executions/{id}");
    let body = json!({ "success": true, "executionId": id, "message": "Job queued successfully", "statusUrl": url });
    let mut response = Json(body).into_response();
    let headers = response.headers_mut();
    if let Ok(url) = HeaderValue::from_str(&url) {
        headers.insert(header::LOCATION, url);
    }
    if replayed {
        headers.insert(&IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
    response
}

fn not_found() -> ApiError {
    ApiError::not_found("Execution", "execution_not_found")
}

/// A malformed id is as unknown as an unknown one.
async fn find(state: &AppState, caller: &Caller, id: &str) -> Result<Execution, ApiError> {
    let id: ExecutionId = id.parse().map_err(|_| not_found())?;
    let found = state.ask(async |conn| execution::find(conn, id).await).await?;
    found.filter(|e| caller.sees(e.job_id)).ok_or_else(not_found)
}

/// Query of a poll.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PollQuery {
    include_logs: Option<String>,
    logs_after: Option<String>,
}

/// The state of an execution: what the contract's scripts poll.
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    Query(query): Query<PollQuery>,
) -> Result<Json<Value>, ApiError> {
    let wants_logs = match query.include_logs.as_deref() {
        None | Some("false" | "0" | "") => false,
        Some("true" | "1") => true,
        Some(_) => return Err(ApiError::malformed("includeLogs", "must be true or false")),
    };
    let after: Option<i64> =
        cursor(query.logs_after.as_deref()).map_err(|_| ApiError::malformed("logsAfter", "is not a logsCursor"))?;
    let execution = find(&state, &caller, &id).await?;
    let id = execution.id;
    let artifacts = state.ask(async |conn| artifact::of_execution(conn, id).await).await?;
    let mut body = json!(execution);
    body["artifacts"] = json!(artifacts);
    if wants_logs || after.is_some() {
        let lines = state.ask(async |conn| log::read(conn, id, after).await).await?;
        body["logsCursor"] = lines.last().map(|l| l.seq).or(after).unwrap_or(0).to_string().into();
        body["logs"] = json!(lines);
    }
    Ok(data(&body))
}

/// Query of the list.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecutionsQuery {
    job_id: Option<String>,
    status: Option<Status>,
    outcome: Option<Outcome>,
    from: Option<DateTime<Utc>>,
    to: Option<DateTime<Utc>>,
    limit: Option<i64>,
    cursor: Option<String>,
}

/// Rows on a page of executions when the client does not say.
const DEFAULT_LIMIT: i64 = 50;

/// A page of executions, newest first.
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
    Query(query): Query<ExecutionsQuery>,
) -> Result<Response, ApiError> {
    let mut job_id = None;
    if let Some(text) = query.job_id {
        // A deleted job has no slug any more, but its history can still be asked for by id.
        let reference = Reference::new(text);
        let found = state.ask(async |conn| job::find(conn, &reference).await).await?.map(|j| j.id);
        job_id = Some(found.or(reference.id().map(common::id::JobId)).unwrap_or_else(common::id::JobId::new));
    }
    let filter = Filter {
        job_id,
        only: caller.only(),
        status: query.status,
        outcome: query.outcome,
        from: query.from,
        to: query.to,
        limit: Some(limit(query.limit)?.unwrap_or(DEFAULT_LIMIT)),
        cursor: cursor(query.cursor.as_deref())?,
    };
    let rows = state.ask(async |conn| execution::list(conn, &filter).await).await?;
    Ok(page(&rows, &uri, false))
}

/// Asks an execution to stop.
pub async fn cancel(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let id = find(&state, &caller, &id).await?.id;
    match state.ask(async |conn| cancel::cancel(conn, id, caller.name()).await).await? {
        Cancelled::NotFound => return Err(not_found()),
        Cancelled::TooLate(status) => {
            return Err(ApiError::conflict(
                "already_ended",
                format!("the execution has ended already ({})", status.as_str()),
            ));
        }
        Cancelled::Ended => state.wakeups.tell(Notice::Changed(vec![id])),
        Cancelled::Requested => state.wakeups.tell(Notice::Cancel(vec![id])),
    }
    tracing::info!(execution = %id, caller = caller.name(), "cancel requested");
    Ok(Json(json!({ "success": true, "message": "cancel requested" })))
}
