//! `/api/jobs`.

use axum::{Extension, Json, extract::State, http::Uri, response::Response};
use common::{
    audit::Event,
    destination,
    encryption::Encryption,
    id::{DestinationId, Reference, SourceId},
    job::{self, Compression, Created, Deleted, Filter, Job, JobDraft, Overlap},
    label::Labels,
    schedule, source,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Check, created, data, fields_of, page, present};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Body, ListQuery, Query, RawBody, Segment, parse},
    openapi::{Data, Done},
    state::AppState,
};

/// A job as a client sends it; PUT takes any subset.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "name": "Shop daily", "sourceId": "shop", "destinationIds": ["local"], "schedule": "0 3 * * *", "timezone": "Europe/Berlin", "compression": "zstd", "overlap": "queue" }))]
pub struct JobBody {
    name: Option<String>,
    slug: Option<String>,
    source_id: Option<String>,
    destination_ids: Option<Vec<String>>,
    compression: Option<Compression>,
    /// Cron expression of minute, hour, day of month, month and day of week, or a nickname such as @daily; null for
    /// none.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, example = "0 3 * * *")]
    schedule: Option<Option<String>>,
    /// IANA name of the time zone whose wall clock the schedule means; UTC when left out.
    #[schema(example = "Europe/Berlin")]
    timezone: Option<String>,
    /// Governs the schedule alone: a trigger runs a paused job too.
    enabled: Option<bool>,
    overlap: Option<Overlap>,
    max_attempts: Option<i32>,
    timeout_seconds: Option<i32>,
    /// A good backup is expected this often, whatever triggers it: see `GET /api/health/backups`. Null for none but that
    /// of the schedule.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i32>, minimum = 60, maximum = 31622400, example = 90000)]
    expect_every_seconds: Option<Option<i32>>,
    labels: Option<Labels>,
    /// To whom every backup is encrypted with age; null for nobody: whoever reads the destination reads the backups.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<Encryption>)]
    encryption: Option<Option<Encryption>>,
    #[schema(ignore)]
    retention: Option<Value>,
}

/// Copies that a job makes, at most.
const MOST_DESTINATIONS: usize = 16;
const DESTINATIONS: &str = "must name between 1 and 16 destinations";

impl JobBody {
    /// Fields of the API that this version refuses rather than to accept and ignore.
    fn not_yet(&self, check: &mut Check) {
        if self.retention.is_some() {
            check.refuse("retention", "is not available in this version: leave it out or null");
        }
    }

    fn draft(
        self,
        old: Option<Job>,
        source: Option<SourceId>,
        destinations: Option<Vec<DestinationId>>,
    ) -> Result<JobDraft, ApiError> {
        let mut check = Check::default();
        self.not_yet(&mut check);
        let old = old.as_ref();
        let encryption = match self.encryption {
            Some(Some(encryption)) => check.encryption(encryption),
            Some(None) => None,
            None => old.and_then(|o| o.encryption.clone()),
        };
        // Only what is sent: a version before took any number, and what it stored must not block another change.
        let expects = self.expect_every_seconds.flatten();
        let source_id =
            source.or(old.map(|o| o.source_id)).ok_or_else(|| ApiError::malformed("sourceId", "is required"))?;
        let draft = JobDraft {
            name: self.name.or(old.map(|o| o.name.clone())).unwrap_or_default(),
            slug: self.slug,
            source_id,
            destination_ids: destinations.or(old.map(|o| o.destination_ids.clone())).unwrap_or_default(),
            compression: self.compression.or(old.map(|o| o.compression)).unwrap_or_default(),
            encryption,
            schedule: self.schedule.unwrap_or(old.and_then(|o| o.schedule.clone())),
            timezone: self.timezone.or(old.map(|o| o.timezone.clone())).unwrap_or_else(|| "UTC".to_owned()),
            enabled: self.enabled.or(old.map(|o| o.enabled)).unwrap_or(true),
            overlap: self.overlap.or(old.map(|o| o.overlap)).unwrap_or_default(),
            max_attempts: self.max_attempts.or(old.map(|o| o.max_attempts)).unwrap_or(3),
            timeout_seconds: self.timeout_seconds.or(old.map(|o| o.timeout_seconds)).unwrap_or(21_600),
            expect_every_seconds: self.expect_every_seconds.unwrap_or(old.and_then(|o| o.expect_every_seconds)),
            labels: self.labels.or(old.map(|o| o.labels.clone())).unwrap_or_default(),
        };
        check.name(&draft.name);
        check.slug(draft.slug.as_ref());
        check.labels(&draft.labels);
        for problem in schedule::problems(draft.schedule.as_deref(), &draft.timezone) {
            check.refuse(&problem.field, &problem.message);
        }
        if draft.destination_ids.is_empty() {
            check.refuse("destinationIds", DESTINATIONS);
        }
        if !(1..=20).contains(&draft.max_attempts) {
            check.refuse("maxAttempts", "must be between 1 and 20");
        }
        if !(1..=2_592_000).contains(&draft.timeout_seconds) {
            check.refuse("timeoutSeconds", "must be between 1 and 2592000 (30 days)");
        }
        if expects.is_some_and(|n| !(60..=31_622_400).contains(&n)) {
            check.refuse("expectEverySeconds", "must be between 60 and 31622400 (366 days), or null");
        }
        check.done()?;
        Ok(draft)
    }

    /// Ids of the source and destinations, which a client may also name by slug.
    async fn resolve(&self, state: &AppState) -> Result<(Option<SourceId>, Option<Vec<DestinationId>>), ApiError> {
        let mut check = Check::default();
        let mut source_id = None;
        if let Some(text) = &self.source_id {
            let reference = Reference::new(text);
            source_id = state.ask(async |conn| source::find(conn, &reference).await).await?.map(|s| s.id);
            if source_id.is_none() {
                check.refuse("sourceId", "there is no such source");
            }
        }
        let mut destinations = None;
        if let Some(texts) = &self.destination_ids {
            if texts.len() > MOST_DESTINATIONS {
                return Err(ApiError::invalid_field("destinationIds", DESTINATIONS));
            }
            let mut ids: Vec<DestinationId> = Vec::new();
            for (at, text) in texts.iter().enumerate() {
                let reference = Reference::new(text);
                match state.ask(async |conn| destination::find(conn, &reference).await).await? {
                    Some(found) if ids.contains(&found.id) => {
                        check.refuse(&format!("destinationIds[{at}]"), "is listed twice")
                    }
                    Some(found) => ids.push(found.id),
                    None => check.refuse(&format!("destinationIds[{at}]"), "there is no such destination"),
                }
            }
            destinations = Some(ids);
        }
        check.done()?;
        Ok((source_id, destinations))
    }
}

fn not_found() -> ApiError {
    ApiError::not_found("Job", "job_not_found")
}

/// A job that the caller may see.
pub async fn find(state: &AppState, caller: &Caller, segment: String) -> Result<Job, ApiError> {
    let reference = Reference::new(segment);
    let found = state.ask(async |conn| job::find(conn, &reference).await).await?;
    found.filter(|job| caller.sees(job.id)).ok_or_else(not_found)
}

/// Jobs as a bare array: what clients of this API expect.
#[utoipa::path(get, path = "/api/jobs", tag = "jobs", params(ListQuery), responses((status = 200, body = Vec<Job>, headers(("Link" = Option<String>, description = "the next page, when there is one")))))]
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let mut source_id = None;
    if let Some(text) = &query.source_id {
        let reference = Reference::new(text);
        let found = state.ask(async |conn| source::find(conn, &reference).await).await?;
        source_id = Some(found.map_or(SourceId::new(), |s| s.id));
    }
    let filter = Filter {
        labels: query.labels()?,
        source_id,
        only: caller.only(),
        limit: query.limit()?,
        cursor: query.cursor()?,
        name: query.name,
    };
    let rows = state.ask(async |conn| job::list(conn, &filter).await).await?;
    Ok(page(&rows, &uri, true))
}

/// Makes a job.
#[utoipa::path(post, path = "/api/jobs", tag = "jobs", request_body = JobBody, responses((status = 201, body = Data<Job>)))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<JobBody>,
) -> Result<Response, ApiError> {
    if caller.only().is_some() {
        return Err(ApiError::job_scoped("it would not see the new one"));
    }
    let (source, destinations) = body.resolve(&state).await?;
    let draft = body.draft(None, source, destinations)?;
    let create = async |conn: &mut sqlx::PgConnection| {
        let created = job::create(conn, &draft).await?;
        let event = match &created {
            Created::Job(job) => Some(Event::new("job.create", job.id, &job.name)),
            Created::SlugTaken => None,
        };
        Ok((created, event))
    };
    match state.change(&caller, create).await? {
        Created::Job(job) => Ok(created(&*job)),
        Created::SlugTaken => Err(ApiError::conflict("slug_taken", "another job has this slug: choose another")),
    }
}

/// One job.
#[utoipa::path(get, path = "/api/jobs/{id}", tag = "jobs", responses((status = 200, body = Data<Job>)))]
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    Ok(data(&find(&state, &caller, id).await?))
}

/// Changes some fields.
#[utoipa::path(put, path = "/api/jobs/{id}", tag = "jobs", request_body = JobBody, responses((status = 200, body = Data<Job>)))]
pub async fn update(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    RawBody(raw): RawBody,
) -> Result<Json<Value>, ApiError> {
    loop {
        let body: JobBody = parse(&raw)?;
        let old = find(&state, &caller, id.clone()).await?;
        let read = (old.id, old.updated_at);
        let (source, destinations) = body.resolve(&state).await?;
        if caller.only().is_some() && leads_elsewhere(&old, source, destinations.as_deref()) {
            return Err(ApiError::job_scoped("it may not give a job another source or other destinations"));
        }
        let draft = body.draft(Some(old), source, destinations)?;
        let updated = state
            .change(&caller, async |conn| {
                let updated = job::update(conn, read, &draft).await?;
                let event = updated.as_ref().map(|u| Event::new("job.update", u.id, &u.name).with(fields_of(&raw)));
                Ok((updated, event))
            })
            .await?;
        if let Some(updated) = updated {
            return Ok(data(&updated));
        }
    }
}

/// Whether a change has a job read or write what it did not before.
fn leads_elsewhere(old: &Job, source: Option<SourceId>, destinations: Option<&[DestinationId]>) -> bool {
    source.is_some_and(|source| source != old.source_id)
        || destinations.is_some_and(|all| all.iter().any(|one| !old.destination_ids.contains(one)))
}

/// Deletes a job; its artifacts and history stay.
#[utoipa::path(delete, path = "/api/jobs/{id}", tag = "jobs", responses((status = 200, body = Done)))]
pub async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let old = find(&state, &caller, id).await?;
    let delete = async |conn: &mut sqlx::PgConnection| {
        let deleted = job::delete(conn, old.id).await?;
        let gone = deleted == Deleted::Done;
        Ok((deleted, gone.then(|| Event::new("job.delete", old.id, &old.name))))
    };
    match state.change(&caller, delete).await? {
        Deleted::Done => Ok(Json(json!({ "success": true }))),
        Deleted::NotFound => Err(not_found()),
        Deleted::Active => {
            Err(ApiError::conflict("in_use", "a run of this job is waiting or running: cancel it or wait for its end"))
        }
    }
}
