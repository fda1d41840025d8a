//! `/api/webhooks`. A webhook hears of the runs of all jobs, so it is made by callers who see all of them alone.

use axum::{
    Extension, Json,
    extract::State,
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use common::{
    audit::Event,
    id::WebhookId,
    label::Labels,
    permission::Permission,
    queue::{Notice, heard},
    webhook::{
        self, Address, Filter, Webhook, WebhookDraft, WebhookEvent,
        delivery::{self, Tested},
    },
};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use super::{Check, data, fields_of, page};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Body, ListQuery, Query, RawBody, Segment, parse},
    openapi::{Data, Done, WebhookWithSecret},
    state::AppState,
};

/// A webhook as a client sends it; PUT takes any subset.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "name": "On call", "url": "https://hooks.example.com/backups", "events": ["failed"], "labels": { "env": "prod" } }))]
pub struct WebhookBody {
    name: Option<String>,
    /// Where it is told, by POST. Kept sealed: only its scheme and host are shown.
    #[schema(value_type = Option<String>)]
    url: Option<SecretString>,
    /// Which ends of runs; failed alone when left out.
    events: Option<Vec<WebhookEvent>>,
    /// Labels that an execution must have; none for all.
    labels: Option<Labels>,
    enabled: Option<bool>,
}

impl WebhookBody {
    fn draft(&self, old: Option<&Webhook>) -> Result<WebhookDraft, ApiError> {
        let mut events =
            self.events.clone().or(old.map(|o| o.events.clone())).unwrap_or_else(|| vec![WebhookEvent::Failed]);
        events.sort_by_key(|event| event.as_str());
        events.dedup();
        let draft = WebhookDraft {
            name: self.name.clone().or(old.map(|o| o.name.clone())).unwrap_or_default(),
            events,
            labels: self.labels.clone().or(old.map(|o| o.labels.clone())).unwrap_or_default(),
            enabled: self.enabled.or(old.map(|o| o.enabled)).unwrap_or(true),
        };
        let mut check = Check::default();
        check.name(&draft.name);
        check.labels(&draft.labels);
        if draft.events.is_empty() {
            check.refuse("events", "must list one of failed, cancelled and succeeded at least");
        }
        if let Some(Err(problem)) = self.hint() {
            check.refuse("url", problem);
        } else if old.is_none() && self.url.is_none() {
            check.refuse("url", "is required");
        }
        check.done()?;
        Ok(draft)
    }

    fn hint(&self) -> Option<Result<String, &'static str>> {
        self.url.as_ref().map(|url| webhook::url_hint(url.expose_secret()))
    }

    fn address(&self) -> Option<(Address, String)> {
        let hint = self.hint()?.ok()?;
        Some((Address::new(self.url.clone()?), hint))
    }
}

/// Nobody hears of what they may not see.
fn allowed(caller: &Caller) -> Result<(), ApiError> {
    caller.demand(Permission::HistoryRead)?;
    match caller.only() {
        None => Ok(()),
        Some(_) => Err(ApiError::job_scoped("a webhook hears of all")),
    }
}

fn not_found() -> ApiError {
    ApiError::not_found("Webhook", "webhook_not_found")
}

/// One by its id.
pub async fn find(state: &AppState, id: &str) -> Result<Webhook, ApiError> {
    let id: WebhookId = id.parse().map_err(|_| not_found())?;
    state.ask(async |conn| webhook::find(conn, id).await).await?.ok_or_else(not_found)
}

/// A webhook with its secret, which is shown this once.
fn with_secret(webhook: &Webhook, address: &Address) -> Value {
    let mut value = json!(webhook);
    value["secret"] = address.secret.expose_secret().into();
    value
}

/// A page of webhooks.
#[utoipa::path(get, path = "/api/webhooks", tag = "webhooks", params(ListQuery), responses((status = 200, body = Data<Vec<Webhook>>)))]
pub async fn list(
    State(state): State<AppState>,
    uri: Uri,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let filter = Filter { id: None, limit: query.limit()?, cursor: query.cursor()?, name: query.name };
    let rows = state.ask(async |conn| webhook::list(conn, &filter).await).await?;
    Ok(page(&rows, &uri, false))
}

/// Makes a webhook; the secret that signs what it is sent is in this answer and nowhere else.
#[utoipa::path(post, path = "/api/webhooks", tag = "webhooks", request_body = WebhookBody, responses((status = 201, body = Data<WebhookWithSecret>)))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<WebhookBody>,
) -> Result<Response, ApiError> {
    let draft = body.draft(None)?;
    allowed(&caller)?;
    let (address, hint) = body.address().ok_or_else(|| ApiError::invalid_field("url", "is required"))?;
    let made = state
        .change(&caller, async |conn| {
            let made = webhook::create(conn, &state.key, &draft, &address, &hint).await?;
            let event = Event::new("webhook.create", made.id, &made.name).with(json!({ "url": hint }));
            Ok((made, Some(event)))
        })
        .await?;
    Ok((StatusCode::CREATED, data(&with_secret(&made, &address))).into_response())
}

/// One webhook.
#[utoipa::path(get, path = "/api/webhooks/{id}", tag = "webhooks", responses((status = 200, body = Data<Webhook>)))]
pub async fn get(State(state): State<AppState>, Segment(id): Segment) -> Result<Json<Value>, ApiError> {
    Ok(data(&find(&state, &id).await?))
}

/// Changes some fields. Switched off, it is not told what it was not told yet either.
#[utoipa::path(put, path = "/api/webhooks/{id}", tag = "webhooks", request_body = WebhookBody, responses((status = 200, body = Data<Webhook>)))]
pub async fn update(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    RawBody(raw): RawBody,
) -> Result<Json<Value>, ApiError> {
    loop {
        let body: WebhookBody = parse(&raw)?;
        let old = find(&state, &id).await?;
        allowed(&caller)?;
        let draft = body.draft(Some(&old))?;
        // Only then: one that does not open any more can still be switched off.
        let changed = match body.address() {
            Some((new, hint)) => Some((Address { secret: address(&state, &old).await?.secret, ..new }, hint)),
            None => None,
        };
        let updated = state
            .change(&caller, async |conn| {
                let address = changed.as_ref().map(|(address, hint)| (address, hint.as_str()));
                let updated = webhook::update(conn, &state.key, (old.id, old.updated_at), &draft, address).await?;
                let event = updated.as_ref().map(|u| Event::new("webhook.update", u.id, &u.name).with(fields_of(&raw)));
                Ok((updated, event))
            })
            .await?;
        if let Some(updated) = updated {
            return Ok(data(&updated));
        }
    }
}

/// What is stored of one's address.
async fn address(state: &AppState, old: &Webhook) -> Result<Address, ApiError> {
    let sealed = state.ask(async |conn| webhook::sealed(conn, old.id).await).await?.ok_or_else(not_found)?;
    Address::open(&state.key, old.id, &sealed).map_err(|error| {
        tracing::error!(webhook = %old.id, %error, "a webhook does not open");
        ApiError::conflict(
            "secret_unreadable",
            "the stored address does not open with this encryption key: delete the webhook and make it anew",
        )
    })
}

/// Gives a webhook a new secret; the old one signs nothing any more.
#[utoipa::path(post, path = "/api/webhooks/{id}/rotate", tag = "webhooks", responses((status = 200, body = Data<WebhookWithSecret>)))]
pub async fn rotate(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    loop {
        let old = find(&state, &id).await?;
        allowed(&caller)?;
        let new = Address::new(address(&state, &old).await?.url);
        let draft = WebhookDraft::from(&old);
        let updated = state
            .change(&caller, async |conn| {
                let read = (old.id, old.updated_at);
                let updated = webhook::update(conn, &state.key, read, &draft, Some((&new, &old.url))).await?;
                let event = updated.as_ref().map(|u| Event::new("webhook.rotate", u.id, &u.name));
                Ok((updated, event))
            })
            .await?;
        if let Some(updated) = updated {
            return Ok(data(&with_secret(&updated, &new)));
        }
    }
}

/// What became of a test of a webhook.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WebhookTest {
    /// Whether the address took the message.
    ok: bool,
    /// Why not.
    error: Option<String>,
}

/// A test that nobody has carried out within this time has no worker.
const TESTED_WITHIN: Duration = Duration::from_secs(20);

/// Has a worker tell the webhook of an event `test`, once.
#[utoipa::path(post, path = "/api/webhooks/{id}/test", tag = "webhooks", responses((status = 200, body = Data<WebhookTest>)))]
pub async fn test(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let webhook = find(&state, &id).await?;
    allowed(&caller)?;
    // Registered before the question, or a quick answer is missed.
    let mut notices = state.wakeups.subscribe();
    let asked = Instant::now();
    let test = state.ask(async |conn| delivery::ask_test(conn, webhook.id).await).await?.ok_or_else(not_found)?;
    state.wakeups.tell(Notice::Test);
    let result = loop {
        match state.ask(async |conn| delivery::tested(conn, test).await).await? {
            Tested::Done(result) => break Ok(result),
            Tested::Waiting if asked.elapsed() > TESTED_WITHIN => {
                break Err(ApiError::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "no_worker",
                    "no worker carried out the test: start one with the same database and encryption key",
                )
                .retry_after(5));
            }
            Tested::Waiting => {
                heard(&mut notices, Duration::from_millis(250), |notice| *notice == Notice::Test).await;
            }
        }
    };
    let _ = state.ask(async |conn| delivery::withdraw(conn, test).await).await;
    let result = result?;
    Ok(data(&WebhookTest { ok: result.is_ok(), error: result.err() }))
}

/// Deletes a webhook, with what it was not told yet.
#[utoipa::path(delete, path = "/api/webhooks/{id}", tag = "webhooks", responses((status = 200, body = Done)))]
pub async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let old = find(&state, &id).await?;
    let deleted = state
        .change(&caller, async |conn| {
            let deleted = webhook::delete(conn, old.id).await?;
            Ok((deleted, deleted.then(|| Event::new("webhook.delete", old.id, &old.name))))
        })
        .await?;
    if deleted { Ok(Json(json!({ "success": true }))) } else { Err(not_found()) }
}
