//! `/`: what runs, waits, failed and comes next; for an instance that has no backup yet, the way to the first.

use std::sync::Arc;

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use common::{
    cluster::Cluster,
    db::ANSWER_TIMEOUT,
    destination,
    execution::{self, Execution, Filter, Outcome, Status, summary::Summary},
    job::{self, Job},
    permission::Permission,
    source,
};
use sqlx::PgConnection;

use super::{
    Frame, html, jobs,
    view::{asset, bytes, duration, icon, status, when, with_times},
};
use crate::{auth::Caller, error::ApiError, routes::cluster::look, state::AppState};

/// Rows of each list.
const ROWS: i64 = 8;
/// How old the counts of the last days may be, in times of what it takes to count: they look at every run of a month.
const SUMMARY_AGE: u32 = 50;

/// One step to the first backup.
struct Step {
    title: &'static str,
    text: &'static str,
    href: &'static str,
    button: &'static str,
    done: bool,
    /// The first that is not done.
    now: bool,
}

#[derive(Template)]
#[template(path = "overview.html")]
struct OverviewPage {
    frame: Frame,
    steps: Vec<Step>,
    cluster: Option<Cluster>,
    summary: Option<Arc<Summary>>,
    /// When there may be a newer summary than this, in milliseconds.
    again: Option<u128>,
    active: Vec<Execution>,
    failed: Vec<Execution>,
    planned: Vec<Job>,
}

/// The overview, of what its reader may see.
pub async fn show(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    frame: Frame,
) -> Result<Response, ApiError> {
    let cluster = match frame.may(Permission::ClusterRead) {
        true => Some(look(&state, &caller).await?),
        false => None,
    };
    let (mut active, mut failed) = (Vec::new(), Vec::new());
    let (mut summary, mut again) = (None, None);
    if frame.may(Permission::HistoryRead) {
        (active, failed) = runs(&state, &caller).await?;
        state.reasons.tell(&mut active).await;
        // It counts over all jobs: not for a key that is bound to some.
        if caller.only().is_none() {
            let take =
                async { state.db.within(ANSWER_TIMEOUT, async |conn| Summary::take(conn).await).await.map(Arc::new) };
            let (counted, newer) = state.summary.at_most(SUMMARY_AGE, take).await?;
            (summary, again) = (Some(counted), newer.map(|left| left.as_millis() + 1));
        }
    }
    let planned = planned(&state, &caller).await?;
    let steps = steps(&state, &frame).await?;
    html(&OverviewPage { frame, steps, cluster, summary, again, active, failed, planned })
}

/// What runs and waits, and what failed last.
async fn runs(state: &AppState, caller: &Caller) -> Result<(Vec<Execution>, Vec<Execution>), ApiError> {
    let of = |status| Filter { status: Some(status), only: caller.only(), limit: Some(ROWS), ..Default::default() };
    let ask = async |conn: &mut PgConnection| {
        let mut active = execution::list(conn, &of(Status::Running)).await?.rows;
        active.extend(execution::list(conn, &of(Status::Pending)).await?.rows);
        // What somebody wanted to end is no failure.
        let failed = Filter { not_outcome: Some(Outcome::Cancelled), ..of(Status::Failed) };
        let failed = execution::list(conn, &failed).await?.rows;
        Ok((active, failed))
    };
    state.ask(ask).await
}

/// Jobs in the order in which their schedules fire next.
async fn planned(state: &AppState, caller: &Caller) -> Result<Vec<Job>, ApiError> {
    let mut jobs = jobs(state, caller).await?;
    jobs.retain(|job| job.next_run_at.is_some());
    jobs.sort_by_key(|job| job.next_run_at);
    jobs.truncate(usize::try_from(ROWS).unwrap_or_default());
    Ok(jobs)
}

/// The way to the first backup; empty once there is one, and for whoever may not go it.
async fn steps(state: &AppState, frame: &Frame) -> Result<Vec<Step>, ApiError> {
    let needed =
        [Permission::SourcesWrite, Permission::DestinationsWrite, Permission::JobsWrite, Permission::JobsExecute];
    if !needed.into_iter().chain([Permission::HistoryRead]).all(|permission| frame.may(permission)) {
        return Ok(Vec::new());
    }
    let ask = async |conn: &mut PgConnection| {
        let one = Some(1);
        let good = Filter { status: Some(Status::Success), limit: one, ..Default::default() };
        let good = !execution::list(conn, &good).await?.rows.is_empty();
        let source = !source::list(conn, &source::Filter { limit: one, ..Default::default() }).await?.rows.is_empty();
        let stores = destination::list(conn, &destination::Filter::default()).await?.rows;
        let store = stores.iter().any(|store| store.ready_at.is_some());
        let job = !job::list(conn, &job::Filter { limit: one, ..Default::default() }).await?.rows.is_empty();
        Ok([source, store, job, good])
    };
    let done = state.ask(ask).await?;
    if done[3] {
        return Ok(Vec::new());
    }
    let steps = [
        ("Add a source", "The database server, and a user that may read it.", "/sources/new", "Add a source"),
        (
            "Add a destination",
            "A folder of the workers, or a bucket. Its test makes it ready.",
            "/destinations/new",
            "Add a destination",
        ),
        ("Make a job", "Which source goes to which destinations, and when.", "/jobs/new", "Make a job"),
        ("Run it", "By the button Run of the job. Its page shows the run live.", "/jobs", "To the jobs"),
    ];
    let first = done.iter().position(|done| !done);
    let step = |(n, (title, text, href, button)): (usize, (&'static str, &'static str, &'static str, &'static str))| {
        Step { title, text, href, button, done: done[n], now: first == Some(n) }
    };
    Ok(steps.into_iter().enumerate().map(step).collect())
}

impl OverviewPage {
    /// Percent of the backups that ended well; `None` where none ended.
    fn success(&self) -> Option<String> {
        let (good, failed) = self.summary.as_ref()?.counts();
        let all = good + failed;
        // Down: a hundred only when none failed.
        (all > 0).then(|| format!("{}.{} %", good * 100 / all, good * 1000 / all % 10))
    }

    /// Bars of the days: their day, height and failed part in hundredths of the busiest.
    fn bars(&self) -> Vec<Bar> {
        let Some(summary) = &self.summary else { return Vec::new() };
        let most = summary.days.iter().map(|day| day.good + day.failed).max().unwrap_or(0).max(1);
        let scaled = |count: i64| if count == 0 { 0 } else { (count * 36 / most).max(2) };
        let bar = |(n, day): (usize, &execution::summary::Day)| Bar {
            x: n * 10,
            good: scaled(day.good),
            failed: scaled(day.failed),
            title: format!("{} (UTC): {} good, {} failed", day.day.format("%Y-%m-%d"), day.good, day.failed),
        };
        summary.days.iter().enumerate().map(bar).collect()
    }
}

/// A day of the chart, 40 high.
struct Bar {
    x: usize,
    good: i64,
    failed: i64,
    title: String,
}
