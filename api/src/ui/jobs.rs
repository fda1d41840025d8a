//! `/jobs`: what is backed up, and when.

use std::collections::HashMap;

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use common::{
    destination, form,
    id::JobId,
    job::{self, Compression, Filter, Job, Overlap},
    job_summary::{self, JobSummary},
    permission::Permission,
    source,
};
use serde::Deserialize;
use sqlx::PgConnection;

use super::{
    FormPage, Frame,
    form::{Choosable, Form, Input, InputType, Section, labels},
    html,
    view::{Markup, asset, bytes_or_dash, dash, filtered, icon, status_mark, when_or_dash, with_query},
};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Query, Segment, cursor},
    routes::jobs::find,
    state::AppState,
};

/// Jobs on a page.
const PAGE: i64 = 100;

#[derive(Template)]
#[template(path = "jobs.html")]
struct JobsPage {
    frame: Frame,
    rows: Vec<(Job, Option<JobSummary>)>,
    search: String,
    next: Option<String>,
    ready: bool,
}

/// Query of the list.
#[derive(Deserialize)]
pub struct JobsQuery {
    #[serde(default)]
    q: String,
    cursor: Option<String>,
}

/// The table of jobs.
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<JobsQuery>,
    frame: Frame,
) -> Result<Response, ApiError> {
    let search = query.q.trim().to_owned();
    let filter = Filter {
        name: (!search.is_empty()).then(|| search.clone()),
        only: caller.only(),
        limit: Some(PAGE),
        cursor: cursor(query.cursor.as_deref())?,
        ..Filter::default()
    };
    let ask = async |conn: &mut PgConnection| {
        let jobs = job::list(conn, &filter).await?;
        let ids: Vec<JobId> = jobs.rows.iter().map(|job| job.id).collect();
        let summaries = job_summary::of_jobs(conn, &ids).await?;
        let ready = !source::list(conn, &one()).await?.rows.is_empty();
        Ok((jobs, summaries, ready))
    };
    let (jobs, mut summaries, ready): (_, HashMap<JobId, JobSummary>, bool) = state.ask(ask).await?;
    let next = jobs.next.map(|next| with_query(&filtered("/jobs", &[("q", &search)]), "cursor", &next));
    let rows = jobs.rows.into_iter().map(|job| (summaries.remove(&job.id), job)).map(|(summary, job)| (job, summary));
    html(&JobsPage { rows: rows.collect(), frame, search, next, ready })
}

/// Whether there is any.
fn one() -> source::Filter {
    source::Filter { limit: Some(1), ..Default::default() }
}

/// Query of the form.
#[derive(Deserialize)]
pub struct MakeQuery {
    clone: Option<String>,
}

/// The form of a new job, which may begin as a copy of another.
pub async fn make(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<MakeQuery>,
    frame: Frame,
) -> Result<Response, ApiError> {
    let model = match query.clone {
        Some(id) => Some(find(&state, &caller, id).await?),
        None => None,
    };
    let title = model.as_ref().map_or("New job".to_owned(), |model| format!("Copy of {}", model.name));
    let mut form = Form {
        api: "POST /api/jobs".to_owned(),
        then: "/jobs".to_owned(),
        said: "The job is saved. Run it now, or leave it to its schedule.",
        changes: false,
        sections: sections(&state, &frame, model.as_ref()).await?,
        submit: "Save the job",
        cancel: "/jobs".into(),
    };
    if model.is_some() {
        form.sections[0] = Section::new("", vec![name(Some(&title))]);
    }
    html(&FormPage { frame, title, lead: "", form })
}

/// The form of a job that exists.
pub async fn edit(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    frame: Frame,
) -> Result<Response, ApiError> {
    let job = find(&state, &caller, id).await?;
    let form = Form {
        api: format!("PUT /api/jobs/{}", job.id),
        then: "/jobs".to_owned(),
        said: "The job is saved.",
        changes: true,
        sections: sections(&state, &frame, Some(&job)).await?,
        submit: "Save",
        cancel: "/jobs".into(),
    };
    html(&FormPage { frame, title: format!("Edit {}", job.name), lead: "", form })
}

fn name(value: Option<&str>) -> Input {
    Input::new(InputType::Text, "name", "Name").required().placeholder("Shop daily").value(value.unwrap_or_default())
}

async fn sections(state: &AppState, frame: &Frame, job: Option<&Job>) -> Result<Vec<Section>, ApiError> {
    let what = vec![source_input(state, frame, job).await?, destinations_input(state, frame, job).await?];
    Ok(vec![
        Section::new("", vec![name(job.map(|job| job.name.as_str()))]),
        Section::new("What and where to", what),
        Section::new("When", when(job)),
        Section::folded("More", more(job)),
    ])
}

/// The source to choose, or to name for whoever may not see which there are.
async fn source_input(state: &AppState, frame: &Frame, job: Option<&Job>) -> Result<Input, ApiError> {
    if !frame.may(Permission::SourcesRead) {
        let value = job.map(|job| job.source_id.to_string()).unwrap_or_default();
        return Ok(Input::new(InputType::Text, "sourceId", "Source").required().help("its id or slug").value(value));
    }
    let sources = state.ask(async |conn| source::list(conn, &source::Filter::default()).await).await?.rows;
    let options = sources.iter().map(|source| {
        let label = format!("{} ({})", source.name, form::of_engine(source.engine).label);
        Choosable::new(source.id, label, job.is_some_and(|job| job.source_id == source.id))
    });
    let input = Input::new(InputType::Choice, "sourceId", "Source").required().placeholder("There is no source yet.");
    let make = frame.may(Permission::SourcesWrite).then_some(("/sources/new", "Add a source"));
    Ok(input.make(make).options(options.collect()))
}

/// The same of the destinations; the only one that there is needs no choice.
async fn destinations_input(state: &AppState, frame: &Frame, job: Option<&Job>) -> Result<Input, ApiError> {
    let chosen = job.map(|job| job.destination_ids.clone()).unwrap_or_default();
    if !frame.may(Permission::DestinationsRead) {
        let value = chosen.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        let input = Input::new(InputType::List, "destinationIds", "Destinations").required();
        return Ok(input.help("their ids or slugs, one on each line").value(value));
    }
    let ask = async |conn: &mut PgConnection| destination::list(conn, &destination::Filter::default()).await;
    let destinations = state.ask(ask).await?.rows;
    let only = destinations.len() == 1 && job.is_none();
    let options = destinations
        .iter()
        .map(|destination| Choosable::new(destination.id, &destination.name, only || chosen.contains(&destination.id)));
    let input = Input::new(InputType::Many, "destinationIds", "Destinations").help("every backup goes to all of them");
    let make = frame.may(Permission::DestinationsWrite).then_some(("/destinations/new", "Add a destination"));
    Ok(input.placeholder("There is no destination yet.").make(make).options(options.collect()))
}

fn when(job: Option<&Job>) -> Vec<Input> {
    let schedule = job.and_then(|job| job.schedule.clone()).unwrap_or_default();
    vec![
        Input::new(InputType::Text, "schedule", "Schedule")
            .placeholder("30 2 * * *")
            .help("cron: minute, hour, day of month, month, day of week; or @hourly, @daily, @weekly. Empty: only when it is triggered")
            .value(schedule),
        Input::new(InputType::Text, "timezone", "Time zone")
            .placeholder("UTC")
            .help("whose clock the schedule means, such as Europe/Berlin")
            .value(job.map_or("", |job| job.timezone.as_str())),
        Input::new(InputType::Switch, "enabled", "The schedule is on").value(job.is_none_or(|job| job.enabled)),
        Input::new(InputType::Number, "expectEverySeconds", "A good backup is expected every so many seconds")
            .placeholder("86400")
            .help("overdue after that, also without a schedule; 60 to 31622400. Empty: by the schedule")
            .value(job.and_then(|job| job.expect_every_seconds).map_or(String::new(), |seconds| seconds.to_string())),
    ]
}

fn more(job: Option<&Job>) -> Vec<Input> {
    let compression = job.map(|job| job.compression).unwrap_or_default();
    let overlap = job.map(|job| job.overlap).unwrap_or_default();
    let compressions = [(Compression::Zstd, "Zstandard"), (Compression::Gzip, "gzip"), (Compression::None, "None")];
    let overlaps = [
        (Overlap::Queue, "Wait until it has ended"),
        (Overlap::Reject, "Be refused"),
        (Overlap::Allow, "Run beside it"),
    ];
    let recipients = job.and_then(|job| job.encryption.as_ref()).map(|encryption| encryption.recipients.join("\n"));
    let number = |name, label: &str, value: i32| Input::new(InputType::Number, name, label).value(value);
    vec![
        Input::new(InputType::Choice, "compression", "Compression").options(
            compressions.iter().map(|(c, label)| Choosable::new(c.as_str(), label, *c == compression)).collect(),
        ),
        Input::new(InputType::List, "encryption.recipients", "Encrypt to")
            .placeholder("age1…")
            .help("age recipients, one on each line, as age-keygen prints them: the identity of any one opens the backups, and nothing else does. Empty: not encrypted")
            .value(recipients.unwrap_or_default()),
        Input::new(InputType::Choice, "overlap", "A trigger while a run is active shall")
            .options(overlaps.iter().map(|(o, label)| Choosable::new(o.as_str(), label, *o == overlap)).collect()),
        number("maxAttempts", "Attempts", job.map_or(3, |job| job.max_attempts))
            .help("1 to 20; a failed run is tried again"),
        number(
            "timeoutSeconds",
            "Longest time of an attempt, in seconds",
            job.map_or(21_600, |job| job.timeout_seconds),
        ),
        labels(job.map(|job| &job.labels)),
    ]
}

/// The name of the engine of a job's source.
fn engine(summary: &JobSummary) -> &'static str {
    form::of_engine(summary.engine).label
}

/// The cell of the newest run.
fn newest(summary: &Option<JobSummary>) -> Markup {
    let newest = summary.as_ref().and_then(|summary| summary.newest);
    newest.map_or_else(dash, |run| {
        Markup(format!("<a href=\"/executions/{}\">{}</a>", run.id, status_mark(&run.status, &run.outcome)))
    })
}
