//! What becomes of a trigger, of whatever kind: its key of idempotency, its span, its answer.

use axum::{
    Json,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use common::{
    execution::{enqueue::Enqueued, idempotency::Idempotency},
    id::ExecutionId,
    telemetry::{
        Span,
        span::{SpanKind, flush_soon},
    },
};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use crate::{auth::Caller, error::ApiError, state::AppState, waiting};

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The `Idempotency-Key` of a request.
pub fn idempotency(headers: &HeaderMap, caller: &Caller, body: &[u8]) -> Result<Option<Idempotency>, ApiError> {
    let Some(value) = headers.get(&IDEMPOTENCY_KEY) else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| (1..=255).contains(&key.len()));
    let key =
        key.ok_or_else(|| ApiError::malformed("Idempotency-Key", "must have 1 to 255 printable ASCII characters"))?;
    Ok(Some(Idempotency { api_key: caller.id(), key: key.to_owned(), body_hash: Sha256::digest(body).to_vec() }))
}

/// The span from whose end on a run waits: that of whoever claims it continues this one.
pub fn enqueue_span(caller: &Caller) -> Span {
    let mut span = Span::child(caller.span(), SpanKind::Producer, "enqueue");
    span.reserve(5);
    span.set("messaging.system", "dbackup");
    span.set("messaging.operation.type", "send");
    span.set("messaging.operation.name", "enqueue");
    span
}

/// Notes in the span of a trigger what became of it.
pub fn told(span: &mut Span, accepted: Result<Accepted, ApiError>) -> Result<Accepted, ApiError> {
    match &accepted {
        Ok(accepted) => {
            span.set("messaging.message.id", accepted.id.to_string());
            match accepted.how {
                How::New => {}
                How::Reused => span.set("dbackup.reused", true),
                How::Replayed => span.set("dbackup.replayed", true),
            }
        }
        Err(error) => span.fail(error.code(), error.text().to_owned()),
    }
    accepted
}

/// A trigger that has an execution.
pub struct Accepted {
    /// The execution, or the group.
    pub id: ExecutionId,
    /// Where it comes from.
    pub how: How,
}

/// Where the execution of a trigger comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// This trigger made it.
    New,
    /// It exists already and serves: `maxAgeSeconds`.
    Reused,
    /// This is the answer to an earlier request with the same `Idempotency-Key`.
    Replayed,
}

/// What a refused trigger is told.
pub fn accepted_of(enqueued: Enqueued) -> Result<Accepted, ApiError> {
    match enqueued {
        Enqueued::Queued(id) => Ok(Accepted { id, how: How::New }),
        Enqueued::Reused(id) => Ok(Accepted { id, how: How::Reused }),
        Enqueued::Replayed(id) => Ok(Accepted { id, how: How::Replayed }),
        Enqueued::KeyReused => Err(key_reused()),
        Enqueued::JobNotFound => Err(ApiError::not_found("Job", "job_not_found")),
        Enqueued::Active(id) => {
            Err(ApiError::conflict("already_active", "a run of this job is active and its overlap is 'reject'")
                .with_execution(id))
        }
        Enqueued::JobQueueFull(cap) => Err(queue_full(&format!("{cap} runs of this job wait already"))),
        Enqueued::QueueFull(cap) => Err(queue_full(&format!("{cap} runs wait already"))),
    }
}

/// 422 of an `Idempotency-Key` that came with another body before.
pub fn key_reused() -> ApiError {
    ApiError::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "idempotency_key_reused",
        "this Idempotency-Key was used with another body: use a new key for a new request",
    )
}

/// 429 of a queue that takes no more.
pub fn queue_full(what: &str) -> ApiError {
    ApiError::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", format!("{what}: try again when some have ended"))
        .retry_after(30)
}

impl Accepted {
    /// The answer, after the end when the client waits for it.
    pub async fn answer(self, state: &AppState, caller: &Caller, wait: Option<Instant>) -> Result<Response, ApiError> {
        let url = format!("/api/executions/{}", self.id);
        let message = match self.how {
            How::Reused => "an existing run serves",
            How::New | How::Replayed => "Job queued successfully",
        };
        let mut body = json!({ "success": true, "executionId": self.id, "message": message, "statusUrl": url });
        if self.how == How::Reused {
            body["reused"] = true.into();
        }
        if let Some(until) = wait {
            // The span of the request is open until then; the rest need not be.
            flush_soon();
            // Acknowledged already: what goes wrong with the waiting must not look like a failed trigger.
            if let Ok(seen) = waiting::until_over(state, caller, self.id, until).await {
                body["data"] = seen.data.clone();
            }
        }
        let mut response = Json(body).into_response();
        let headers = response.headers_mut();
        if let Ok(url) = HeaderValue::from_str(&url) {
            headers.insert(header::LOCATION, url);
        }
        if self.how == How::Replayed {
            headers.insert(&IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
        }
        Ok(response)
    }
}
