//! `/api/sources`.

use axum::{Extension, Json, extract::State, http::Uri, response::Response};
use common::{
    audit::Event,
    connection::SplitConfig,
    connection_test::{Target, TestResult},
    form::{self, Form},
    id::Reference,
    label::Labels,
    queue::Notice,
    source::{self, Engine, Filter, SHAPE, Source, SourceDraft},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Check, connection_test, created, data, fields_of, merged, page, present, sent_config};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Body, ListQuery, Query, RawBody, Segment, parse},
    openapi::{Data, Done},
    state::AppState,
};

/// A source as a client sends it; PUT takes any subset.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "name": "Shop", "engine": "postgres", "config": { "host": "db.example.com", "username": "backup", "password": "…", "databases": ["shop"] } }))]
pub struct SourceBody {
    name: Option<String>,
    slug: Option<String>,
    engine: Option<Engine>,
    #[schema(value_type = Option<Object>)]
    config: Option<Value>,
    pool: Option<String>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i32>)]
    max_concurrent_runs: Option<Option<i32>>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i32>)]
    max_concurrent_restores: Option<Option<i32>>,
    labels: Option<Labels>,
}

impl SourceBody {
    fn draft(self, stored: Option<(Source, SplitConfig)>) -> Result<SourceDraft, ApiError> {
        let (old, config) = stored.map_or((None, SplitConfig::default()), |(source, config)| (Some(source), config));
        let engine = self
            .engine
            .or(old.as_ref().map(|o| o.engine))
            .ok_or_else(|| ApiError::malformed("engine", "is required: postgres, mysql or mariadb"))?;
        let draft = SourceDraft {
            name: self.name.or(old.as_ref().map(|o| o.name.clone())).unwrap_or_default(),
            slug: self.slug,
            engine,
            config: merged(SHAPE, config, sent_config(self.config)?)?,
            pool: self.pool.or(old.as_ref().map(|o| o.pool.clone())).unwrap_or_else(|| "default".to_owned()),
            max_concurrent_runs: self.max_concurrent_runs.unwrap_or(old.as_ref().and_then(|o| o.max_concurrent_runs)),
            max_concurrent_restores: self
                .max_concurrent_restores
                .unwrap_or(old.as_ref().and_then(|o| o.max_concurrent_restores)),
            labels: self.labels.or(old.map(|o| o.labels)).unwrap_or_default(),
        };
        let mut check = Check::default();
        check.name(&draft.name);
        check.slug(draft.slug.as_ref());
        check.pool(&draft.pool);
        check.labels(&draft.labels);
        for (field, most) in
            [("maxConcurrentRuns", draft.max_concurrent_runs), ("maxConcurrentRestores", draft.max_concurrent_restores)]
        {
            if most.is_some_and(|n| n < 1) {
                check.refuse(field, "must be at least 1, or null for no limit");
            }
        }
        check.0.extend(source::config_problems(&draft.config));
        check.done()?;
        Ok(draft)
    }
}

/// One by its id or slug.
pub async fn find(state: &AppState, segment: String) -> Result<Source, ApiError> {
    let reference = Reference::new(segment);
    let found = state.ask(async |conn| source::find(conn, &reference).await).await?;
    found.ok_or_else(|| ApiError::not_found("Source", "source_not_found"))
}

/// The engines that a source may have, with the fields of their configs: what a form for a source asks.
#[utoipa::path(get, path = "/api/engines", tag = "sources", responses((status = 200, body = Data<Vec<Form>>)))]
pub async fn engines() -> Json<Value> {
    data(&Engine::ALL.map(form::of_engine))
}

/// A page of sources.
#[utoipa::path(get, path = "/api/sources", tag = "sources", params(ListQuery), responses((status = 200, body = Data<Vec<Source>>)))]
pub async fn list(
    State(state): State<AppState>,
    uri: Uri,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let filter = Filter { labels: query.labels()?, limit: query.limit()?, cursor: query.cursor()?, name: query.name };
    let rows = state.ask(async |conn| source::list(conn, &filter).await).await?;
    Ok(page(&rows, &uri, false))
}

/// Makes a source.
#[utoipa::path(post, path = "/api/sources", tag = "sources", request_body = SourceBody, responses((status = 201, body = Data<Source>)))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<SourceBody>,
) -> Result<Response, ApiError> {
    let draft = body.draft(None)?;
    let made = state
        .change(&caller, async |conn| {
            let made = source::create(conn, &state.key, &draft).await?;
            let event = made.as_ref().map(|m| Event::new("source.create", m.id, &m.name));
            Ok((made, event))
        })
        .await?;
    let made = made.ok_or_else(|| ApiError::conflict("slug_taken", "another source has this slug: choose another"))?;
    Ok(created(&made))
}

/// One source.
#[utoipa::path(get, path = "/api/sources/{id}", tag = "sources", responses((status = 200, body = Data<Source>)))]
pub async fn get(State(state): State<AppState>, Segment(id): Segment) -> Result<Json<Value>, ApiError> {
    Ok(data(&find(&state, id).await?))
}

/// Changes some fields.
#[utoipa::path(put, path = "/api/sources/{id}", tag = "sources", request_body = SourceBody, responses((status = 200, body = Data<Source>)))]
pub async fn update(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    RawBody(raw): RawBody,
) -> Result<Json<Value>, ApiError> {
    loop {
        let body: SourceBody = parse(&raw)?;
        let old = find(&state, id.clone()).await?;
        let read = (old.id, old.updated_at);
        let config = old.open_config(&state.key).map_err(|error| {
            tracing::error!(%error, source = %old.id, "stored secrets do not open");
            ApiError::conflict(
                "secret_unreadable",
                "the stored secrets do not open with this encryption key: delete the source and make it anew",
            )
        })?;
        let draft = body.draft(Some((old, config)))?;
        let updated = state
            .change(&caller, async |conn| {
                let updated = source::update(conn, &state.key, read, &draft).await?;
                let event = updated.as_ref().map(|u| Event::new("source.update", u.id, &u.name).with(fields_of(&raw)));
                Ok((updated, event))
            })
            .await?;
        if let Some(updated) = updated {
            // A higher limit acts at once.
            state.wakeups.tell(Notice::Work);
            return Ok(data(&updated));
        }
    }
}

/// Deletes a source that no job uses.
#[utoipa::path(delete, path = "/api/sources/{id}", tag = "sources", responses((status = 200, body = Done)))]
pub async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let old = find(&state, id).await?;
    let deleted = state
        .try_change(&caller, async |conn| {
            let deleted = source::delete(conn, old.id).await?;
            Ok((deleted, deleted.then(|| Event::new("source.delete", old.id, &old.name))))
        })
        .await;
    match deleted {
        Err(error) if error.constraint() == Some("jobs_source_exists") => {
            Err(ApiError::conflict("in_use", "a job uses this source: delete the job first"))
        }
        Err(error) => Err(error.into()),
        Ok(false) => Err(ApiError::not_found("Source", "source_not_found")),
        Ok(true) => Ok(Json(json!({ "success": true }))),
    }
}

/// Has a worker sign in and look at every database.
#[utoipa::path(post, path = "/api/sources/{id}/test", tag = "sources", responses((status = 200, body = Data<TestResult>)))]
pub async fn test(State(state): State<AppState>, Segment(id): Segment) -> Result<Json<Value>, ApiError> {
    let source = find(&state, id).await?;
    connection_test(&state, Target::Source(source.id), &source.pool).await
}
