//! `/api/runs`: many jobs by one request.

use axum::{Extension, extract::State, http::HeaderMap, response::Response};
use common::{
    connection::FieldProblem,
    execution::{
        enqueue::Enqueued,
        group::{self, GroupEnqueued, MAX_MEMBERS},
    },
    id::Reference,
    job,
    label::Labels,
    queue::Notice,
};
use serde::Deserialize;

use super::{
    accepted::{Accepted, How, accepted_of, enqueue_span, idempotency, key_reused, told},
    executions::RunBody,
};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{RawBody, parse},
    openapi::{RunsBody, Triggered},
    state::AppState,
};

/// Which jobs to run; the other fields are those of one run.
#[derive(Debug, Deserialize)]
struct Which {
    jobs: Option<Vec<String>>,
    selector: Option<Labels>,
}

/// Triggers all of the jobs or none of them, in one transaction and one unit of the rate limit.
#[utoipa::path(post, path = "/api/runs", tag = "executions", params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters; the same key and body make one run in 24 hours")), request_body = RunsBody, responses((status = 200, body = Triggered)))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    RawBody(raw): RawBody,
) -> Result<Response, ApiError> {
    let mut fields: serde_json::Map<String, serde_json::Value> = parse(&raw)?;
    let which = ["jobs", "selector"].into_iter().filter_map(|name| Some((name.to_owned(), fields.remove(name)?)));
    let which: Which = parse(&serde_json::to_vec(&which.collect::<serde_json::Map<_, _>>()).unwrap_or_default())?;
    let body: RunBody = parse(&serde_json::to_vec(&fields).unwrap_or_default())?;
    body.check()?;
    let jobs = jobs_of(&state, &caller, which).await?;
    let idempotency = idempotency(&headers, &caller, &raw)?;
    let mut span = enqueue_span(&caller);
    span.set("messaging.batch.message_count", i64::try_from(jobs.len()).unwrap_or(i64::MAX));
    let requests: Vec<_> = jobs.iter().map(|job| body.request(job.clone(), &caller, None, &span)).collect();
    let made = state.ask(async |conn| group::enqueue(conn, &requests, idempotency.as_ref()).await).await;
    let accepted = told(&mut span, made.and_then(accepted_group))?;
    drop(span);
    if accepted.how == How::New {
        tracing::info!(group = %accepted.id, members = jobs.len(), caller = caller.name(), "triggered");
        state.wakeups.tell(Notice::Work);
    }
    accepted.answer(&state, &caller, body.wait_until()).await
}

fn accepted_group(made: GroupEnqueued) -> Result<Accepted, ApiError> {
    match made {
        GroupEnqueued::Made(id) => Ok(Accepted { id, how: How::New }),
        GroupEnqueued::Replayed(id) => Ok(Accepted { id, how: How::Replayed }),
        GroupEnqueued::KeyReused => Err(key_reused()),
        GroupEnqueued::Refused(refused) => Err(refusal(refused)),
    }
}

async fn jobs_of(state: &AppState, caller: &Caller, which: Which) -> Result<Vec<Reference>, ApiError> {
    let (field, none) = match which.jobs {
        Some(_) => ("jobs", "name at least one job"),
        None => ("selector", "no job that this key may run has these labels: nothing would run"),
    };
    let jobs = match (which.jobs, which.selector) {
        (Some(jobs), None) => jobs.into_iter().map(Reference::new).collect::<Vec<_>>(),
        (None, Some(labels)) if !labels.is_empty() => {
            let most = i64::try_from(MAX_MEMBERS).unwrap_or(i64::MAX) + 1;
            let filter = job::Filter { labels, only: caller.only(), limit: Some(most), ..Default::default() };
            let found = state.ask(async |conn| job::list(conn, &filter).await).await?;
            found.rows.into_iter().map(|job| Reference::new(job.id.to_string())).collect()
        }
        _ => {
            let text = "give either 'jobs' (ids or slugs) or 'selector' (labels, at least one)";
            return Err(ApiError::invalid_field("jobs", text));
        }
    };
    match jobs.len() {
        0 => Err(ApiError::invalid_field(field, none)),
        n if n > MAX_MEMBERS => {
            Err(ApiError::invalid_field(field, format!("{n} jobs are meant, but at most {MAX_MEMBERS} may be")))
        }
        _ => Ok(jobs),
    }
}

/// The whole request is refused as its first member would be, and each refused member is named.
fn refusal(refused: Vec<(usize, Enqueued)>) -> ApiError {
    let mut fields = Vec::new();
    let mut first = None;
    for (position, outcome) in refused {
        if let Err(error) = accepted_of(outcome) {
            fields.push(FieldProblem::new(format!("jobs.{position}"), error.text()));
            first.get_or_insert(error);
        }
    }
    let first = first.unwrap_or_else(|| ApiError::not_found("Job", "job_not_found"));
    first.with_fields(fields)
}
