//! Triggering a job, and everything about its executions.

use axum::{
    Extension, Json,
    extract::State,
    http::{HeaderMap, Uri, header},
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use common::{
    audit::Event,
    execution::{
        self, Execution, Filter, Outcome, Status,
        cancel::{self, Cancelled},
        enqueue::TriggerRequest,
        idempotency::Idempotency,
        log,
    },
    id::{ExecutionId, Reference},
    job,
    label::Labels,
    queue::Notice,
    telemetry::{Span, TraceContext},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use super::{
    Check,
    accepted::{Accepted, How, accepted_of, enqueue_span, idempotency, told},
    page,
};
use crate::{
    auth::{Caller, HoldUntil},
    error::ApiError,
    extract::{Query, RawBody, Segment, cursor, limit, parse, time},
    openapi::{Data, Done, Polled, Triggered},
    rate_limit::Decision,
    state::AppState,
    waiting,
};

/// Body of a trigger; all of it is optional.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "priority": 5, "labels": { "release": "42" }, "wait": 60 }))]
pub struct RunBody {
    #[serde(default)]
    lock: bool,
    lock_days: Option<i32>,
    priority: Option<i16>,
    #[serde(default)]
    labels: Labels,
    wait: Option<u64>,
    max_age_seconds: Option<i32>,
    start_within_seconds: Option<i32>,
}

/// Longest wait that a client may ask for, in seconds.
pub const MOST_WAIT: u64 = 60;
/// Longest age and longest start that a client may ask for: a year, in seconds.
const YEAR: i32 = 31_536_000;

impl RunBody {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<(), ApiError> {
        let mut check = Check::default();
        check.labels(&self.labels);
        if self.priority.is_some_and(|p| !(-10..=10).contains(&p)) {
            check.refuse("priority", "must be between -10 and 10");
        }
        if self.lock_days.is_some_and(|days| !(1..=36_500).contains(&days)) {
            check.refuse("lockDays", "must be between 1 and 36500");
        }
        check.wait(self.wait);
        if self.max_age_seconds.is_some_and(|age| !(0..=YEAR).contains(&age)) {
            check.refuse("maxAgeSeconds", "must be between 0 and 31536000");
        }
        if self.start_within_seconds.is_some_and(|within| !(1..=YEAR).contains(&within)) {
            check.refuse("startWithinSeconds", "must be between 1 and 31536000");
        }
        check.done()
    }

    /// The trigger of one job, whose run continues `enqueue`.
    pub fn request(
        &self,
        job: Reference,
        caller: &Caller,
        idempotency: Option<Idempotency>,
        enqueue: &Span,
    ) -> TriggerRequest {
        TriggerRequest {
            job,
            only: caller.only(),
            kind: caller.trigger_kind(),
            actor: caller.actor(),
            priority: self.priority.unwrap_or(0),
            labels: self.labels.clone(),
            locked: self.lock || self.lock_days.is_some(),
            lock_days: self.lock_days,
            max_age_seconds: self.max_age_seconds,
            start_within_seconds: self.start_within_seconds,
            trace: TraceContext::of(enqueue.context()),
            scheduled_for: None,
            idempotency,
        }
    }

    /// Until when the answer waits for the end.
    pub fn wait_until(&self) -> Option<Instant> {
        wait_until(self.wait)
    }
}

/// Until when an answer waits for the end.
pub fn wait_until(wait: Option<u64>) -> Option<Instant> {
    wait.filter(|wait| *wait > 0).map(|wait| Instant::now() + Duration::from_secs(wait))
}

/// Triggers a job.
#[utoipa::path(post, path = "/api/jobs/{id}/run", tag = "executions", params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters; the same key and body make one run in 24 hours")), request_body = Option<RunBody>, responses((status = 200, body = Triggered)))]
pub async fn trigger(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(job): Segment,
    headers: HeaderMap,
    RawBody(raw): RawBody,
) -> Result<Response, ApiError> {
    let body: RunBody = parse(&raw)?;
    body.check()?;
    let idempotency = idempotency(&headers, &caller, &raw)?;
    let mut span = enqueue_span(&caller);
    let request = body.request(Reference::new(job), &caller, idempotency, &span);
    let accepted = told(&mut span, state.enqueuer.ask(request).await.and_then(accepted_of))?;
    drop(span);
    if let Accepted { id, how: How::New } = accepted {
        tracing::info!(execution = %id, caller = caller.name(), "triggered");
    }
    accepted.answer(&state, &caller, body.wait_until()).await
}

/// 404 of an execution, also of one that the caller may not see.
pub fn not_found() -> ApiError {
    ApiError::not_found("Execution", "execution_not_found")
}

/// A malformed id is as unknown as an unknown one.
pub fn execution_id(text: &str) -> Result<ExecutionId, ApiError> {
    text.parse().map_err(|_| not_found())
}

/// An execution that the caller may see.
pub async fn find(state: &AppState, caller: &Caller, id: &str) -> Result<Execution, ApiError> {
    let id = execution_id(id)?;
    let found = state.ask(async |conn| execution::find(conn, id).await).await?;
    found.filter(|e| caller.sees_execution(e)).ok_or_else(not_found)
}

/// Query of a poll.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct PollQuery {
    include_logs: Option<String>,
    logs_after: Option<String>,
    wait: Option<String>,
}

impl PollQuery {
    fn wants_logs(&self) -> Result<bool, ApiError> {
        match self.include_logs.as_deref() {
            None | Some("false" | "0" | "") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(_) => Err(ApiError::malformed("includeLogs", "must be true or false")),
        }
    }

    fn logs_after(&self) -> Result<Option<i64>, ApiError> {
        cursor(self.logs_after.as_deref()).map_err(|_| ApiError::malformed("logsAfter", "is not a logsCursor"))
    }

    fn wait(&self) -> Result<Duration, ApiError> {
        let wait = self.wait.as_deref().map_or(Ok(0), str::parse);
        let wait = wait.ok().filter(|wait| *wait <= MOST_WAIT);
        wait.map(Duration::from_secs)
            .ok_or_else(|| ApiError::malformed("wait", "must be a number of seconds, at most 60"))
    }
}

/// The state of an execution: what the contract's scripts poll.
#[utoipa::path(get, path = "/api/executions/{id}", tag = "executions", params(PollQuery), responses((status = 200, body = Polled)))]
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    Query(query): Query<PollQuery>,
    Extension(HoldUntil(hold_until)): Extension<HoldUntil>,
    decision: Option<Extension<Decision>>,
) -> Result<Response, ApiError> {
    let (wants_logs, after, wait) = (query.wants_logs()?, query.logs_after()?, query.wait()?);
    let id = execution_id(&id)?;
    let pace = decision.map_or(Duration::ZERO, |Extension(decision)| waiting::pace(&decision));
    // A client that asked to wait is answered then; one that only polls a lot, before its hold is over.
    let until = (Instant::now() + wait).max((Instant::now() + pace).min(hold_until));
    let seen = waiting::for_poll(&state, &caller, id, until, hold_until).await?;
    let pending = seen.data["status"] == Status::Pending.as_str();
    if !(pending || wants_logs || after.is_some() || seen.data.get("stale").is_some()) {
        return Ok(([(header::CONTENT_TYPE, "application/json")], seen.answer.clone()).into_response());
    }
    let mut body = seen.data.clone();
    if pending {
        if body["type"] != "Group" {
            body["queuePosition"] = json!(state.reasons.queue().await.and_then(|queue| queue.position(id)));
        }
        state.reasons.tell_in(&mut body, seen.waiting.as_ref()).await;
    }
    let mut stale = body.as_object_mut().and_then(|body| body.remove("stale")).is_some();
    if wants_logs || after.is_some() {
        // With the database away there are no lines to tell; a reader goes on from where it was.
        let lines = match state.ask(async |conn| log::read(conn, id, after).await).await {
            Err(error) if error.is_away() => {
                stale = true;
                Vec::new()
            }
            lines => lines?,
        };
        body["logsCursor"] = lines.last().map(|l| l.seq).or(after).unwrap_or(0).to_string().into();
        body["logs"] = json!(lines);
    }
    let mut answer = json!({ "success": true, "data": body });
    if stale {
        answer["stale"] = true.into();
    }
    Ok(Json(answer).into_response())
}

/// Query of the list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
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
#[utoipa::path(get, path = "/api/executions", tag = "executions", params(ExecutionsQuery), responses((status = 200, body = Data<Vec<Execution>>)))]
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
        not_outcome: None,
        from: time("from", query.from)?,
        to: time("to", query.to)?,
        limit: Some(limit(query.limit)?.unwrap_or(DEFAULT_LIMIT)),
        cursor: cursor(query.cursor.as_deref())?,
    };
    let mut executions = state.ask(async |conn| execution::list(conn, &filter).await).await?;
    state.reasons.tell(&mut executions.rows).await;
    Ok(page(&executions, &uri, false))
}

/// Asks an execution, or every member of a group, to stop.
#[utoipa::path(post, path = "/api/executions/{id}/cancel", tag = "executions", responses((status = 200, body = Done)))]
pub async fn cancel(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let execution = find(&state, &caller, &id).await?;
    let members = execution.members.as_ref().map(|members| members.iter().map(|m| m.execution_id).collect());
    let ids: Vec<ExecutionId> = members.unwrap_or_else(|| vec![execution.id]);
    let change = async |conn: &mut sqlx::PgConnection| {
        let mut done = Vec::new();
        for id in &ids {
            done.push((*id, cancel::cancel(conn, *id, caller.name()).await?));
        }
        let stopped = done.iter().any(|(_, done)| matches!(done, Cancelled::Ended | Cancelled::Requested));
        let event = Event::new("execution.cancel", execution.id, &execution.job_name);
        Ok((done, stopped.then_some(event)))
    };
    let done = state.change(&caller, change).await?;
    let of = |wanted: Cancelled| done.iter().filter(|(_, done)| *done == wanted).map(|(id, _)| *id).collect::<Vec<_>>();
    let (ended, requested) = (of(Cancelled::Ended), of(Cancelled::Requested));
    if ended.is_empty() && requested.is_empty() {
        return match done.first() {
            Some((_, Cancelled::TooLate(status))) => Err(ApiError::conflict(
                "already_ended",
                format!("the execution has ended already ({})", status.as_str()),
            )),
            _ => Err(not_found()),
        };
    }
    state.wakeups.tell(Notice::Changed(ended));
    state.wakeups.tell(Notice::Cancel(requested));
    // The trace of the run, beside that of this request.
    let trace_id = execution.trace_id.as_deref();
    tracing::info!(execution = %execution.id, trace_id, caller = caller.name(), "cancel requested");
    Ok(Json(json!({ "success": true, "message": "cancel requested" })))
}

/// Runs the job of an execution that has ended once more, with the same labels and priority; of a restore, restores once
/// more, for which storage:restore is needed too.
#[utoipa::path(post, path = "/api/executions/{id}/retry", tag = "executions", params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters; the same key and body make one run in 24 hours")), responses((status = 200, body = Triggered)))]
pub async fn retry(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    headers: HeaderMap,
    RawBody(raw): RawBody,
) -> Result<Response, ApiError> {
    let old = find(&state, &caller, &id).await?;
    if old.members.is_some() {
        return Err(ApiError::conflict("is_group", "this is a group: retry its members, or trigger a new group"));
    }
    if !old.status.is_over() {
        return Err(ApiError::conflict("not_ended", "the execution has not ended: wait for its end, or cancel it")
            .with_execution(old.id));
    }
    if old.is_restore() {
        return super::restores::again(&state, &caller, &old, &headers, &raw).await;
    }
    let body = RunBody { priority: Some(old.priority), labels: old.labels, ..RunBody::default() };
    let idempotency = idempotency(&headers, &caller, &[id.as_bytes(), &raw].concat())?;
    let mut span = enqueue_span(&caller);
    let request = body.request(Reference::new(old.job_id.to_string()), &caller, idempotency, &span);
    let accepted = told(&mut span, state.enqueuer.ask(request).await.and_then(accepted_of))?;
    drop(span);
    accepted.answer(&state, &caller, None).await
}
