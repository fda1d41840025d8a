//! `/executions`: what ran, runs and waits.

use std::collections::HashMap;

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use chrono::{DateTime, Utc};
use common::{
    artifact::{self, Artifact},
    destination,
    execution::{self, Execution, Filter, Outcome, Stage, Status, attempts::PastAttempt},
    id::{DestinationId, JobId, Reference},
    permission::Permission,
};
use serde::Deserialize;
use sqlx::PgConnection;

use super::{
    Frame,
    form::Choosable,
    html, jobs,
    view::{
        Markup, asset, bytes, bytes_or_dash, dash, duration, filtered, icon, mark, status, status_mark, when,
        when_or_dash, with_query, with_times,
    },
};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Query, Segment, cursor, time},
    routes::executions::find,
    state::AppState,
};

/// Executions on a page.
const PAGE: i64 = 50;

/// Query of the list; an empty value stands for none, as a form sends it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecutionsQuery {
    #[serde(default)]
    job_id: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    outcome: String,
    #[serde(default)]
    from: String,
    #[serde(default)]
    to: String,
    cursor: Option<String>,
}

/// A moment of the query, as the page's script writes it.
fn instant(name: &'static str, text: &str) -> Result<Option<DateTime<Utc>>, ApiError> {
    let instant = |text: &str| DateTime::parse_from_rfc3339(text).map(|at| at.to_utc());
    let parsed = (!text.is_empty()).then(|| instant(text)).transpose();
    time(name, parsed.map_err(|_| ApiError::malformed(name, "must be a time such as 2026-11-26T00:00:00Z"))?)
}

#[derive(Template)]
#[template(path = "executions.html")]
struct ListPage {
    frame: Frame,
    rows: Vec<Execution>,
    jobs: Vec<Choosable>,
    statuses: Vec<Choosable>,
    outcomes: Vec<Choosable>,
    from: String,
    to: String,
    filtered: bool,
    first: bool,
    next: Option<String>,
}

const STATUSES: [Status; 4] = [Status::Pending, Status::Running, Status::Success, Status::Failed];
const OUTCOMES: [Outcome; 5] =
    [Outcome::Cancelled, Outcome::TimedOut, Outcome::WorkerLost, Outcome::Expired, Outcome::Partial];

/// The list, newest first.
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<ExecutionsQuery>,
    frame: Frame,
) -> Result<Response, ApiError> {
    let jobs = jobs(&state, &caller).await?;
    let reference = Reference::new(query.job_id.clone());
    let named = jobs.iter().find(|job| Some(job.id.0) == reference.id() || job.slug == reference.slug());
    let job_id = named.map(|job| job.id).or(reference.id().map(JobId));
    let filter = Filter {
        job_id: if query.job_id.is_empty() { None } else { Some(job_id.unwrap_or_else(JobId::new)) },
        only: caller.only(),
        status: STATUSES.into_iter().find(|status| status.as_str() == query.status),
        outcome: OUTCOMES.into_iter().find(|outcome| outcome.as_str() == query.outcome),
        not_outcome: None,
        from: instant("from", &query.from)?,
        to: instant("to", &query.to)?,
        limit: Some(PAGE),
        cursor: cursor(query.cursor.as_deref())?,
    };
    let mut found = state.ask(async |conn| execution::list(conn, &filter).await).await?;
    state.reasons.tell(&mut found.rows).await;
    let here = [
        ("jobId", query.job_id.as_str()),
        ("status", &query.status),
        ("outcome", &query.outcome),
        ("from", &query.from),
        ("to", &query.to),
    ];
    let here = filtered("/executions", &here);
    html(&ListPage {
        frame,
        jobs: jobs.iter().map(|job| Choosable::new(job.id, &job.name, job_id == Some(job.id))).collect(),
        statuses: STATUSES.map(|s| Choosable::new(s.as_str(), s.as_str(), filter.status == Some(s))).into(),
        outcomes: OUTCOMES.map(|o| Choosable::new(o.as_str(), o.as_str(), filter.outcome == Some(o))).into(),
        filtered: here != "/executions",
        from: query.from,
        to: query.to,
        first: filter.cursor.is_none(),
        next: found.next.map(|next| with_query(&here, "cursor", &next)),
        rows: found.rows,
    })
}

#[derive(Template)]
#[template(path = "execution.html")]
struct OnePage {
    frame: Frame,
    it: Execution,
    artifacts: Vec<Artifact>,
    stores: HashMap<DestinationId, String>,
}

const STAGES: [Stage; 6] =
    [Stage::Queued, Stage::Initializing, Stage::Dumping, Stage::Uploading, Stage::Verifying, Stage::Completed];
const STAGES_OF_A_RESTORE: [Stage; 5] =
    [Stage::Queued, Stage::Initializing, Stage::Verifying, Stage::Restoring, Stage::Completed];

impl OnePage {
    /// The stages with how each stands: done, now, or to come.
    fn stages(&self) -> Vec<(&'static str, &'static str)> {
        let stages = if self.is_restore() { &STAGES_OF_A_RESTORE[..] } else { &STAGES[..] };
        let at = stages.iter().position(|stage| stage.as_str() == self.it.stage).unwrap_or(0);
        let state = |n: usize| match self.it.status {
            Status::Success => "done",
            Status::Failed if n == at => "failed",
            _ if n < at => "done",
            _ if n == at => "now",
            _ => "to-come",
        };
        stages.iter().enumerate().map(|(n, stage)| (stage.as_str(), state(n))).collect()
    }

    fn is_restore(&self) -> bool {
        self.it.is_restore()
    }

    /// Whether it is a backup that its reader may restore.
    fn restorable(&self) -> bool {
        self.it.status == Status::Success && !self.artifacts.is_empty() && self.frame.may(Permission::StorageRestore)
    }

    /// Whether its reader may run it again.
    fn repeatable(&self) -> bool {
        self.it.members.is_none() && (!self.is_restore() || self.frame.may(Permission::StorageRestore))
    }

    /// The way to a stored file, for who may take it.
    fn download(&self, file: &Artifact) -> Option<String> {
        let may = self.frame.may(Permission::StorageDownload);
        may.then(|| format!("/api/executions/{}/artifacts/{}/download", self.it.id, file.id))
    }

    /// Who can open the stored files, where they are encrypted.
    fn recipients(&self) -> Option<&Vec<String>> {
        self.artifacts.iter().find_map(|file| file.recipients.as_ref())
    }

    fn store(&self, id: &DestinationId) -> String {
        self.stores.get(id).cloned().unwrap_or_else(|| id.to_string())
    }

    /// How much was read so far, and how fast.
    fn moved(&self) -> String {
        let read = self.it.bytes.filter(|bytes| *bytes > 0).map(|read| bytes(&read));
        let rate = self.it.bytes_per_second.map(|rate| format!(", {}/s", bytes(&rate)));
        read.unwrap_or_default() + &rate.unwrap_or_default()
    }

    /// Stored bytes for each second of the run.
    fn rate(&self) -> Option<String> {
        let (size, ms) = (self.it.size?, self.it.duration.filter(|ms| *ms > 0)?);
        Some(format!("{}/s", bytes(&i64::try_from(i128::from(size) * 1000 / i128::from(ms)).ok()?)))
    }
}

/// One of them.
pub async fn show(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    frame: Frame,
) -> Result<Response, ApiError> {
    let mut it = [find(&state, &caller, &id).await?];
    state.reasons.tell(&mut it).await;
    let [it] = it;
    let sees_stores = frame.may(Permission::DestinationsRead);
    let ask = async |conn: &mut PgConnection| {
        let artifacts = artifact::of_executions(conn, &[it.id]).await?;
        let stores = match sees_stores && !artifacts.is_empty() {
            true => destination::list(conn, &destination::Filter::default()).await?.rows,
            false => Vec::new(),
        };
        Ok((artifacts, stores))
    };
    let (artifacts, stores) = state.ask(ask).await?;
    let stores = stores.into_iter().map(|store| (store.id, store.name)).collect();
    html(&OnePage { frame, it, artifacts, stores })
}

/// Whether a stage is the one where the run is, or ended.
fn is_now(state: &str) -> bool {
    matches!(state, "now" | "failed")
}

/// How an attempt ended.
fn attempt_mark(past: &PastAttempt) -> Markup {
    match past.outcome.as_str() {
        "Success" => status_mark(&Status::Success, &None),
        "Released" => mark("waiting", "retry", "Given back"),
        word => status_mark(&Status::Failed, &OUTCOMES.into_iter().find(|outcome| outcome.as_str() == word)),
    }
}

/// How long it takes or took.
fn took(execution: &Execution) -> Markup {
    match (execution.duration, execution.started_at) {
        (Some(ms), _) => Markup(duration(&ms)),
        (None, Some(at)) => since(&at),
        (None, None) => dash(),
    }
}

/// A duration that the page's script keeps growing.
fn since(at: &DateTime<Utc>) -> Markup {
    Markup(format!("<span data-since=\"{}\"></span>", at.to_rfc3339()))
}
