//! `/api/destinations`.

use axum::{Extension, Json, extract::State, http::Uri, response::Response};
use common::{
    audit::Event,
    connection::SplitConfig,
    connection_test::{Target, TestResult},
    destination::{self, Destination, DestinationDraft, Filter, Kind},
    form::{self, Form},
    id::Reference,
    label::Labels,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Check, connection_test, created, data, fields_of, merged, page, sent_config};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Body, ListQuery, Query, RawBody, Segment, parse},
    openapi::{Data, Done},
    state::AppState,
};

/// A destination as a client sends it; PUT takes any subset.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "name": "Bucket", "kind": "s3", "config": { "bucket": "backups", "region": "eu-central-1", "accessKeyId": "…", "secretAccessKey": "…" } }))]
pub struct DestinationBody {
    name: Option<String>,
    slug: Option<String>,
    kind: Option<Kind>,
    #[schema(value_type = Option<Object>)]
    config: Option<Value>,
    pool: Option<String>,
    labels: Option<Labels>,
}

impl DestinationBody {
    fn draft(self, stored: Option<(Destination, SplitConfig)>) -> Result<DestinationDraft, ApiError> {
        let (old, config) =
            stored.map_or((None, SplitConfig::default()), |(destination, config)| (Some(destination), config));
        let kind = self
            .kind
            .or(old.as_ref().map(|o| o.kind))
            .ok_or_else(|| ApiError::malformed("kind", "is required: local or s3"))?;
        let draft = DestinationDraft {
            name: self.name.or(old.as_ref().map(|o| o.name.clone())).unwrap_or_default(),
            slug: self.slug,
            kind,
            config: merged(kind.shape(), config, sent_config(self.config)?)?,
            pool: self.pool.or(old.as_ref().map(|o| o.pool.clone())).unwrap_or_else(|| "default".to_owned()),
            labels: self.labels.or(old.map(|o| o.labels)).unwrap_or_default(),
        };
        let mut check = Check::default();
        check.name(&draft.name);
        check.slug(draft.slug.as_ref());
        check.pool(&draft.pool);
        check.labels(&draft.labels);
        check.0.extend(destination::config_problems(draft.kind, &draft.config));
        check.done()?;
        Ok(draft)
    }
}

/// One by its id or slug.
pub async fn find(state: &AppState, segment: String) -> Result<Destination, ApiError> {
    let reference = Reference::new(segment);
    let found = state.ask(async |conn| destination::find(conn, &reference).await).await?;
    found.ok_or_else(|| ApiError::not_found("Destination", "destination_not_found"))
}

/// The kinds that a destination may have, with the fields of their configs: what a form for a destination asks.
#[utoipa::path(get, path = "/api/destination-kinds", tag = "destinations", responses((status = 200, body = Data<Vec<Form>>)))]
pub async fn kinds() -> Json<Value> {
    data(&Kind::ALL.map(form::of_kind))
}

/// A page of destinations.
#[utoipa::path(get, path = "/api/destinations", tag = "destinations", params(ListQuery), responses((status = 200, body = Data<Vec<Destination>>)))]
pub async fn list(
    State(state): State<AppState>,
    uri: Uri,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let filter = Filter { labels: query.labels()?, limit: query.limit()?, cursor: query.cursor()?, name: query.name };
    let rows = state.ask(async |conn| destination::list(conn, &filter).await).await?;
    Ok(page(&rows, &uri, false))
}

/// Makes a destination.
#[utoipa::path(post, path = "/api/destinations", tag = "destinations", request_body = DestinationBody, responses((status = 201, body = Data<Destination>)))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<DestinationBody>,
) -> Result<Response, ApiError> {
    let draft = body.draft(None)?;
    let made = state
        .change(&caller, async |conn| {
            let made = destination::create(conn, &state.key, &draft).await?;
            let event = made.as_ref().map(|m| Event::new("destination.create", m.id, &m.name));
            Ok((made, event))
        })
        .await?;
    let made =
        made.ok_or_else(|| ApiError::conflict("slug_taken", "another destination has this slug: choose another"))?;
    Ok(created(&made))
}

/// One destination.
#[utoipa::path(get, path = "/api/destinations/{id}", tag = "destinations", responses((status = 200, body = Data<Destination>)))]
pub async fn get(State(state): State<AppState>, Segment(id): Segment) -> Result<Json<Value>, ApiError> {
    Ok(data(&find(&state, id).await?))
}

/// Changes some fields.
#[utoipa::path(put, path = "/api/destinations/{id}", tag = "destinations", request_body = DestinationBody, responses((status = 200, body = Data<Destination>)))]
pub async fn update(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    RawBody(raw): RawBody,
) -> Result<Json<Value>, ApiError> {
    loop {
        let body: DestinationBody = parse(&raw)?;
        let old = find(&state, id.clone()).await?;
        let read = (old.id, old.updated_at);
        let config = old.open_config(&state.key).map_err(|error| {
            tracing::error!(%error, destination = %old.id, "stored secrets do not open");
            ApiError::conflict(
                "secret_unreadable",
                "the stored secrets do not open with this encryption key: delete the destination and make it anew",
            )
        })?;
        let draft = body.draft(Some((old, config)))?;
        let updated = state
            .change(&caller, async |conn| {
                let updated = destination::update(conn, &state.key, read, &draft).await?;
                let event =
                    updated.as_ref().map(|u| Event::new("destination.update", u.id, &u.name).with(fields_of(&raw)));
                Ok((updated, event))
            })
            .await?;
        if let Some(updated) = updated {
            return Ok(data(&updated));
        }
    }
}

/// Deletes a destination that no job uses.
#[utoipa::path(delete, path = "/api/destinations/{id}", tag = "destinations", responses((status = 200, body = Done)))]
pub async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let old = find(&state, id).await?;
    let deleted = state
        .try_change(&caller, async |conn| {
            let deleted = destination::delete(conn, old.id).await?;
            Ok((deleted, deleted.then(|| Event::new("destination.delete", old.id, &old.name))))
        })
        .await;
    match deleted {
        Err(error) if error.constraint() == Some("job_destinations_destination_exists") => {
            Err(ApiError::conflict("in_use", "a job uses this destination: delete the job first"))
        }
        Err(error) => Err(error.into()),
        Ok(false) => Err(ApiError::not_found("Destination", "destination_not_found")),
        Ok(true) => Ok(Json(json!({ "success": true }))),
    }
}

/// Has a worker write to it; the first time this leaves the marker of a local store.
#[utoipa::path(post, path = "/api/destinations/{id}/test", tag = "destinations", responses((status = 200, body = Data<TestResult>)))]
pub async fn test(State(state): State<AppState>, Segment(id): Segment) -> Result<Json<Value>, ApiError> {
    let destination = find(&state, id).await?;
    connection_test(&state, Target::Destination(destination.id), &destination.pool).await
}
