//! `/api/api-keys`. Nobody grants what they do not hold: not by a new key, nor by a change, a rotation or a switch of
//! one that can do more.

use std::time::Duration;

use axum::{
    Extension, Json,
    extract::State,
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use common::{
    api_key::{self, Filter, KeyDraft, KeyInfo, KeyLimits},
    audit::Event,
    connection::FieldProblem,
    id::{ApiKeyId, JobId, Reference},
    job, network,
    permission::PermissionSet,
    time,
};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Check, data, fields_of, page, present};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Body, ListQuery, Query, RawBody, Segment, parse},
    openapi::{Data, Done, KeyWithSecret},
    state::AppState,
};

/// A key as a client sends it; PUT takes any subset.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "name": "ci", "permissions": ["jobs:execute", "history:read"], "jobIds": ["shop-daily"], "expiresAt": "2030-01-01T00:00:00Z" }))]
pub struct KeyBody {
    name: Option<String>,
    permissions: Option<Vec<String>>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<Vec<String>>)]
    job_ids: Option<Option<Vec<String>>>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<Vec<String>>)]
    networks: Option<Option<Vec<String>>>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<LimitsBody>)]
    rate_limit: Option<Option<LimitsBody>>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<DateTime<Utc>>)]
    expires_at: Option<Option<DateTime<Utc>>>,
    enabled: Option<bool>,
}

/// Limits of a key's own.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LimitsBody {
    read: Option<i32>,
    write: Option<i32>,
}

impl KeyBody {
    /// The key as it shall be, with what is left out taken from `old`.
    async fn whole(self, state: &AppState, caller: &Caller, old: Option<&KeyInfo>) -> Result<KeyDraft, ApiError> {
        let mut check = Check::default();
        let mut whole = old.map(KeyDraft::from).unwrap_or_default();
        if let Some(name) = self.name {
            whole.name = name;
        }
        if let Some(names) = self.job_ids {
            whole.jobs = match names {
                Some(names) => Some(jobs_of(state, caller, &names, &mut check).await?),
                None => None,
            };
        }
        if let Some(names) = self.permissions {
            whole.permissions = PermissionSet::parse(&names).unwrap_or_else(|problem| {
                check.refuse("permissions", &problem);
                PermissionSet::default()
            });
        }
        if let Some(networks) = self.networks {
            whole.networks = networks.map(|networks| networks_of(&networks, &mut check));
        }
        if let Some(limits) = self.rate_limit {
            whole.limits = limits.map(|l| KeyLimits { read: l.read, write: l.write }).unwrap_or_default();
        }
        whole.expires_at = self.expires_at.unwrap_or(whole.expires_at);
        whole.enabled = self.enabled.unwrap_or(whole.enabled);
        check_whole(&whole, &mut check);
        check.done()?;
        Ok(whole)
    }
}

fn check_whole(key: &KeyDraft, check: &mut Check) {
    check.name(&key.name);
    if key.expires_at.is_some_and(|at| !time::is_storable(&at)) {
        check.refuse("expiresAt", time::STORABLE);
    }
    if key.name.chars().any(char::is_control) {
        check.refuse("name", "must have no control character");
    }
    if key.permissions.is_empty() && check.0.iter().all(|problem| problem.field != "permissions") {
        check.refuse(
            "permissions",
            "is required: a list such as [\"jobs:execute\", \"history:read\"], or [\"*\"] for all",
        );
    }
    for (field, limit) in [("rateLimit.read", key.limits.read), ("rateLimit.write", key.limits.write)] {
        if limit.is_some_and(|n| !(1..=1_000_000).contains(&n)) {
            check.refuse(field, "must be between 1 and 1000000, or null for the limit per address");
        }
    }
}

async fn jobs_of(
    state: &AppState,
    caller: &Caller,
    names: &[String],
    check: &mut Check,
) -> Result<Vec<JobId>, ApiError> {
    let mut jobs = Vec::new();
    if !(1..=1_000).contains(&names.len()) {
        check.refuse("jobIds", "must name between 1 and 1000 jobs, or be null for all");
        return Ok(jobs);
    }
    for (position, name) in names.iter().enumerate() {
        let reference = Reference::new(name);
        let found = state.ask(async |conn| job::find(conn, &reference).await).await?;
        match found.filter(|job| caller.sees(job.id)) {
            Some(job) => jobs.push(job.id),
            None => check.refuse(&format!("jobIds.{position}"), "there is no such job"),
        }
    }
    Ok(jobs)
}

fn networks_of(networks: &[String], check: &mut Check) -> Vec<IpNet> {
    if !(1..=100).contains(&networks.len()) {
        check.refuse("networks", "must name between 1 and 100 networks, or be null for all");
    }
    let parsed = networks.iter().enumerate().filter_map(|(position, text)| {
        let network = network::parse(text);
        if network.is_none() {
            check.refuse(&format!("networks.{position}"), "must be a network such as 10.0.0.0/8, or an address");
        }
        network
    });
    parsed.collect()
}

/// Refuses what the caller does not hold itself, with the field that goes too far.
fn check_grant(caller: &Caller, key: &KeyDraft) -> Result<(), ApiError> {
    let mut fields = Vec::new();
    let lacking = caller.permissions().lacking(&key.permissions);
    if !lacking.is_empty() {
        fields.push(FieldProblem::new("permissions", format!("you do not hold {} yourself", lacking.join(", "))));
    }
    if caller.only().is_some_and(|mine| key.jobs.as_ref().is_none_or(|jobs| jobs.iter().any(|job| !mine.contains(job))))
    {
        fields.push(FieldProblem::new("jobIds", "must name only jobs that you see yourself"));
    }
    let inside = |network: &IpNet, mine: &[IpNet]| mine.iter().any(|own| own.contains(network));
    if caller
        .networks()
        .is_some_and(|mine| key.networks.as_ref().is_none_or(|n| n.iter().any(|network| !inside(network, mine))))
    {
        fields.push(FieldProblem::new("networks", "must lie inside the networks that you may call from"));
    }
    if caller.expires_at().is_some_and(|mine| key.expires_at.is_none_or(|theirs| theirs > mine)) {
        fields.push(FieldProblem::new("expiresAt", "must not be later than your own"));
    }
    if fields.is_empty() {
        return Ok(());
    }
    let text: Vec<String> = fields.iter().map(|f| format!("{}: {}", f.field, f.message)).collect();
    let error = format!("nobody grants what they do not hold: {}", text.join("; "));
    Err(ApiError::new(StatusCode::FORBIDDEN, "grant_exceeds", error).with_fields(fields))
}

fn not_found() -> ApiError {
    ApiError::not_found("API key", "api_key_not_found")
}

async fn find(state: &AppState, id: &str) -> Result<KeyInfo, ApiError> {
    let id: ApiKeyId = id.parse().map_err(|_| not_found())?;
    state.ask(async |conn| api_key::find(conn, id).await).await?.ok_or_else(not_found)
}

/// A key with its secret, which is shown this once.
fn with_secret(key: &KeyInfo, secret: &str) -> Value {
    let mut value = json!(key);
    value["key"] = secret.into();
    value
}

/// A page of keys; never a secret.
#[utoipa::path(get, path = "/api/api-keys", tag = "api-keys", params(ListQuery), responses((status = 200, body = Data<Vec<KeyInfo>>)))]
pub async fn list(
    State(state): State<AppState>,
    uri: Uri,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let filter = Filter { id: None, limit: query.limit()?, cursor: query.cursor()?, name: query.name };
    let keys = state.ask(async |conn| api_key::list(conn, &filter).await).await?;
    Ok(page(&keys, &uri, false))
}

/// Makes a key; its secret is in this answer and nowhere else.
#[utoipa::path(post, path = "/api/api-keys", tag = "api-keys", request_body = KeyBody, responses((status = 201, body = Data<KeyWithSecret>)))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<KeyBody>,
) -> Result<Response, ApiError> {
    let whole = body.whole(&state, &caller, None).await?;
    check_grant(&caller, &whole)?;
    if !whole.enabled {
        return Err(ApiError::invalid_field("enabled", "a new key is enabled: leave it out"));
    }
    let (key, secret) = state
        .change(&caller, async |conn| {
            let (id, secret) = api_key::create(conn, &whole, Some(caller.name())).await?;
            let key = api_key::find(conn, id).await?.ok_or(sqlx::Error::RowNotFound)?;
            let event = Event::new("api-key.create", id, &whole.name).with(json!({ "permissions": key.permissions }));
            Ok(((key, secret), Some(event)))
        })
        .await?;
    Ok((StatusCode::CREATED, data(&with_secret(&key, secret.expose()))).into_response())
}

/// One key.
#[utoipa::path(get, path = "/api/api-keys/{id}", tag = "api-keys", responses((status = 200, body = Data<KeyInfo>)))]
pub async fn get(State(state): State<AppState>, Segment(id): Segment) -> Result<Json<Value>, ApiError> {
    Ok(data(&find(&state, &id).await?))
}

/// Changes some fields. Switching a key off or taking rights away needs no rights of its own.
#[utoipa::path(put, path = "/api/api-keys/{id}", tag = "api-keys", request_body = KeyBody, responses((status = 200, body = Data<KeyInfo>)))]
pub async fn update(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    RawBody(raw): RawBody,
) -> Result<Json<Value>, ApiError> {
    let sent = fields_of(&raw);
    loop {
        let old = find(&state, &id).await?;
        let body: KeyBody = parse(&raw)?;
        let only_off = body.enabled == Some(false) && sent["fields"] == json!(["enabled"]);
        let whole = body.whole(&state, &caller, Some(&old)).await?;
        if !only_off {
            check_grant(&caller, &whole)?;
        }
        let changed = state
            .change(&caller, async |conn| {
                let changed = api_key::update(conn, &old, &whole).await?;
                let event = Event::new("api-key.update", old.id, &whole.name).with(sent.clone());
                let done = changed.is_some();
                Ok((changed, done.then_some(event)))
            })
            .await?;
        if let Some(key) = changed {
            return Ok(data(&key));
        }
    }
}

/// Body of a rotation.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "graceSeconds": 3600 }))]
pub struct RotateBody {
    #[serde(default)]
    grace_seconds: u64,
}

/// Longest grace of an old secret: 30 days.
const MOST_GRACE: u64 = 2_592_000;

/// Gives a key a new secret; the old one counts for the grace period, or no more.
#[utoipa::path(post, path = "/api/api-keys/{id}/rotate", tag = "api-keys", request_body = Option<RotateBody>, responses((status = 200, body = Data<KeyWithSecret>)))]
pub async fn rotate(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    Body(body): Body<RotateBody>,
) -> Result<Json<Value>, ApiError> {
    loop {
        let old = find(&state, &id).await?;
        check_grant(&caller, &KeyDraft::from(&old))?;
        if body.grace_seconds > MOST_GRACE {
            return Err(ApiError::invalid_field("graceSeconds", "must be at most 2592000 (30 days)"));
        }
        let rotated = state
            .change(&caller, async |conn| {
                let rotated = api_key::rotate(conn, &old, Duration::from_secs(body.grace_seconds)).await?;
                let event =
                    Event::new("api-key.rotate", old.id, &old.name).with(json!({ "graceSeconds": body.grace_seconds }));
                let done = rotated.is_some();
                Ok((rotated, done.then_some(event)))
            })
            .await?;
        if let Some((key, secret)) = rotated {
            return Ok(data(&with_secret(&key, secret.expose())));
        }
    }
}

/// Deletes a key.
#[utoipa::path(delete, path = "/api/api-keys/{id}", tag = "api-keys", responses((status = 200, body = Done)))]
pub async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let old = find(&state, &id).await?;
    let deleted = state
        .change(&caller, async |conn| {
            let deleted = api_key::delete(conn, old.id).await?;
            Ok((deleted, deleted.then(|| Event::new("api-key.delete", old.id, &old.name))))
        })
        .await?;
    if deleted { Ok(Json(json!({ "success": true }))) } else { Err(not_found()) }
}
