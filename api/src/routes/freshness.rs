//! `/api/health/backups`.

use axum::{
    Extension, Json,
    extract::State,
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use common::{
    freshness::{self, JobFreshness, State as Freshness, Uncovered},
    page::Page,
    permission::Permission,
};
use serde::{Deserialize, Serialize};

use super::linked;
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Query, cursor, limit},
    state::AppState,
};

/// `state`, `fail`, and what every list takes.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct FreshnessQuery {
    limit: Option<i64>,
    cursor: Option<String>,
    /// Only jobs in these states, separated by commas: `fresh`, `overdue`, `never_succeeded`, `paused`.
    #[param(example = "overdue,never_succeeded")]
    state: Option<String>,
    /// Answer 503 when something is so, for a monitor that looks at the status alone: `true` for all that makes the
    /// status `degraded`, or some of `overdue`, `never_succeeded`, `paused`, `uncovered`, separated by commas.
    #[param(example = "true")]
    fail: Option<String>,
}

/// Jobs in each state.
#[derive(Debug, Default, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
struct Counts {
    fresh: usize,
    overdue: usize,
    never_succeeded: usize,
    paused: usize,
}

/// How fresh the backups are.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupsHealth {
    success: bool,
    /// `degraded` when a job is overdue, or has no good backup although one was expected, or a database is uncovered.
    #[schema(example = "healthy")]
    status: &'static str,
    /// Jobs, oldest first.
    data: Vec<JobFreshness>,
    /// Of all jobs that the caller sees, whatever the page.
    counts: Counts,
    /// Databases that no job backs up, by source; null for a caller without `sources:read`, or bound to some jobs.
    uncovered: Option<Vec<Uncovered>>,
}

const UNCOVERED: &str = "uncovered";
const PAUSED: &str = "paused";

/// Whether the backups that ought to be there are there: every job with the age of its newest good backup, and the
/// databases that no job backs up.
#[utoipa::path(get, path = "/api/health/backups", tag = "health", params(FreshnessQuery), responses((status = 200, body = BackupsHealth, headers(("Link" = Option<String>, description = "the next page, when there is one")))))]
pub async fn backups(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
    Query(query): Query<FreshnessQuery>,
) -> Result<Response, ApiError> {
    let (only, fail) = (states(query.state.as_deref())?, failures(query.fail.as_deref())?);
    let (limit, after) = (limit(query.limit)?, cursor::<uuid::Uuid>(query.cursor.as_deref())?);
    let scope = caller.only();
    let sees_sources = scope.is_none() && caller.permissions().allows(Permission::SourcesRead);
    let ask = async |conn: &mut sqlx::PgConnection| {
        let jobs = freshness::jobs(conn, scope.as_deref()).await?;
        let uncovered = if sees_sources { Some(freshness::uncovered(conn).await?) } else { None };
        Ok((jobs, uncovered))
    };
    let (mut jobs, uncovered) = state.ask(ask).await?;
    let problems = problems(&jobs, uncovered.as_deref());
    let failing: Vec<&str> =
        problems.iter().filter(|(kind, _)| fail.contains(kind)).map(|(_, text)| text.as_str()).collect();
    if !failing.is_empty() {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "backups_degraded", failing.join("; ")));
    }
    let counts = count(&jobs);
    let degraded = problems.iter().any(|(kind, _)| *kind != PAUSED);
    jobs.retain(|job| after.is_none_or(|after| job.job_id.0 > after));
    jobs.retain(|job| only.is_empty() || only.contains(&job.state));
    let page = Page::cut(jobs, limit, |job| job.job_id.to_string());
    let status = if degraded { "degraded" } else { "healthy" };
    let body = BackupsHealth { success: true, status, data: page.rows, counts, uncovered };
    Ok(linked(Json(body).into_response(), page.next.as_deref(), &uri))
}

fn words(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.into_iter().flat_map(|text| text.split(',')).map(str::trim)
}

fn states(text: Option<&str>) -> Result<Vec<Freshness>, ApiError> {
    let find = |word: &str| Freshness::ALL.into_iter().find(|state| state.as_str() == word);
    let states: Option<Vec<_>> = words(text).map(find).collect();
    states.ok_or_else(|| ApiError::malformed("state", "must be some of fresh, overdue, never_succeeded, paused"))
}

fn failures(text: Option<&str>) -> Result<Vec<&'static str>, ApiError> {
    const KINDS: [&str; 4] = [Freshness::Overdue.as_str(), Freshness::NeverSucceeded.as_str(), UNCOVERED, PAUSED];
    match text {
        Some("true") => return Ok(KINDS[..3].to_vec()),
        Some("false") => return Ok(Vec::new()),
        _ => {}
    }
    let kinds: Option<Vec<_>> = words(text).map(|word| KINDS.into_iter().find(|kind| *kind == word)).collect();
    let allowed = "must be true, or some of overdue, never_succeeded, paused, uncovered";
    kinds.ok_or_else(|| ApiError::malformed("fail", allowed))
}

fn count(jobs: &[JobFreshness]) -> Counts {
    let in_state = |state| jobs.iter().filter(|job| job.state == state).count();
    Counts {
        fresh: in_state(Freshness::Fresh),
        overdue: in_state(Freshness::Overdue),
        never_succeeded: in_state(Freshness::NeverSucceeded),
        paused: in_state(Freshness::Paused),
    }
}

/// What somebody may want to hear of, by kind, with a line that says whom it is about.
fn problems(jobs: &[JobFreshness], uncovered: Option<&[Uncovered]>) -> Vec<(&'static str, String)> {
    let in_state = |state: Freshness, what: &str| {
        let jobs = jobs.iter().filter(|job| job.state == state && (!job.healthy || state == Freshness::Paused));
        let slugs: Vec<&str> = jobs.map(|job| job.slug.as_str()).collect();
        (!slugs.is_empty()).then(|| (state.as_str(), format!("{what}: {}", listed(&slugs))))
    };
    let mut problems: Vec<_> = [
        in_state(Freshness::Overdue, "overdue"),
        in_state(Freshness::NeverSucceeded, "without a good backup"),
        in_state(Freshness::Paused, "paused"),
    ]
    .into_iter()
    .flatten()
    .collect();
    let sources: Vec<&str> = uncovered.unwrap_or_default().iter().map(|gap| gap.source_slug.as_str()).collect();
    if !sources.is_empty() {
        problems.push((UNCOVERED, format!("databases that no job backs up, of: {}", listed(&sources))));
    }
    problems
}

/// The first few: a line is for people.
fn listed(names: &[&str]) -> String {
    const MOST: usize = 5;
    let more = names.len().saturating_sub(MOST);
    let first = names[..names.len().min(MOST)].join(", ");
    if more > 0 { format!("{first} and {more} more") } else { first }
}
