//! Settings: the system, and the cluster.

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use common::{
    cluster::{Cluster, HeldSlot},
    execution::{self, Execution, Filter, Status},
    permission::Permission,
    setting::{self, RateLimit, Settings},
    worker::{Worker, WorkerState},
};

use super::{
    Frame,
    form::{Form, Input, InputType, Section},
    html,
    view::{asset, duration, icon, when, with_times},
};
use crate::{auth::Caller, error::ApiError, routes::cluster::look, state::AppState};

/// Executions that wait, as the page of the cluster lists them.
const WAITING: i64 = 20;

#[derive(Template)]
#[template(path = "system.html")]
struct SystemPage {
    frame: Frame,
    form: Form,
    settings: Settings,
    limits_in: &'static str,
}

fn limit(name: &str, label: &str, limit: RateLimit) -> [Input; 2] {
    [
        Input::new(InputType::Number, &format!("rateLimit.{name}.limit"), label).required().value(limit.limit),
        Input::new(InputType::Number, &format!("rateLimit.{name}.windowSeconds"), "in so many seconds")
            .required()
            .value(limit.window_seconds),
    ]
}

/// The settings in force.
pub async fn system(State(state): State<AppState>, frame: Frame) -> Result<Response, ApiError> {
    let settings = state.ask(async |conn| setting::read(conn).await).await?;
    let number = |name, label, value: i64| Input::new(InputType::Number, name, label).required().value(value);
    let limits = &settings.rate_limit;
    let limits = [
        limit("read", "GET and HEAD", limits.read),
        limit("write", "POST, PUT, PATCH and DELETE", limits.write),
        limit("signIn", "Sign-ins", limits.sign_in),
    ];
    let form = Form {
        api: "PATCH /api/settings".to_owned(),
        then: "/settings/system".to_owned(),
        said: "Saved. It holds from now on.",
        changes: true,
        sections: vec![
            Section::new(
                "Jobs",
                vec![
                    number("maxConcurrentJobs", "Maximum of concurrent jobs", settings.max_concurrent_jobs.into())
                        .help("over all workers, 0 to 1000; takes effect at once"),
                    Input::new(InputType::Switch, "paused", "Claim nothing new")
                        .value(settings.paused)
                        .help("what runs goes on"),
                    number("maxPendingPerJob", "Runs of one job that may wait", settings.max_pending_per_job),
                    number("maxPending", "Runs that may wait in all", settings.max_pending),
                ],
            ),
            Section::new("Requests of each client address", limits.concat()),
            Section::new(
                "Traces",
                vec![
                    Input::new(InputType::Text, "traceUrlTemplate", "Where people see a trace")
                        .placeholder("https://jaeger.example/trace/{traceId}")
                        .help("runs link to it; {traceId} stands for the id. Empty: no link")
                        .value(settings.trace_url_template.as_deref().unwrap_or_default()),
                ],
            ),
            Section::new(
                "History",
                vec![
                    number("keepLogsDays", "Days to keep the log of a run", settings.keep_logs_days.into()).warning(
                        "Keep logs for fewer days?",
                        "The logs of runs that ended longer ago are deleted for good, within minutes.",
                        "Delete what is older",
                    ),
                    number(
                        "keepExecutionsDays",
                        "Days to keep a run without a backup",
                        settings.keep_executions_days.into(),
                    )
                    .warning(
                        "Keep runs for fewer days?",
                        "Runs without a backup that ended longer ago are deleted for good, within minutes.",
                        "Delete what is older",
                    ),
                ],
            ),
        ],
        submit: "Save",
        cancel: "".into(),
    };
    let limits_in = state.rate_limiter.place();
    html(&SystemPage { frame, form, settings, limits_in })
}

impl SystemPage {
    /// Whether the rate limits are counted over all processes.
    fn is_shared(&self) -> bool {
        self.limits_in == "redis"
    }
}

#[derive(Template)]
#[template(path = "cluster.html")]
struct ClusterPage {
    frame: Frame,
    cluster: Cluster,
    waiting: Vec<Execution>,
}

/// Workers, slots, and why things wait.
pub async fn show(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    frame: Frame,
) -> Result<Response, ApiError> {
    let cluster = look(&state, &caller).await?;
    let mut waiting = Vec::new();
    if frame.may(Permission::HistoryRead) {
        let filter =
            Filter { status: Some(Status::Pending), only: caller.only(), limit: Some(WAITING), ..Default::default() };
        waiting = state.ask(async |conn| execution::list(conn, &filter).await).await?.rows;
        state.reasons.tell(&mut waiting).await;
    }
    html(&ClusterPage { frame, cluster, waiting })
}

/// Whether the lease of a run has run out.
fn ran_out(slot: &HeldSlot) -> bool {
    slot.expires_in_ms < 0
}

/// The state of a worker for people, and its class.
fn state_of(worker: &Worker) -> (&'static str, &'static str) {
    match (worker.state, worker.cordoned) {
        (WorkerState::Gone, _) => ("Gone", "bad"),
        (WorkerState::Stopped, _) => ("Stopped", "waiting"),
        (WorkerState::Draining, _) => ("Draining", "warning"),
        (WorkerState::Active, true) => ("Cordoned", "warning"),
        (WorkerState::Active, false) => ("Active", "good"),
    }
}
