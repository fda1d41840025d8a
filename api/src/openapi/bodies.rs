//! The bodies of answers that no type of the service describes: handlers make them as JSON, and the document needs their form.

use common::{
    api_key::KeyInfo,
    connection::FieldProblem,
    execution::{Execution, log::Line},
    label::Labels,
    user::User,
    webhook::Webhook,
};
use serde_json::Value;
use utoipa::ToSchema;

/// `{"success":true,"data":…}`
#[derive(ToSchema)]
#[allow(dead_code, reason = "a form for the document; handlers make JSON")]
pub struct Data<T: ToSchema> {
    success: bool,
    data: T,
}

/// A success with nothing more to say.
#[derive(ToSchema)]
#[allow(dead_code, reason = "a form for the document")]
pub struct Done {
    success: bool,
    message: Option<String>,
}

/// A probe that passed.
#[derive(ToSchema)]
#[allow(dead_code, reason = "a form for the document")]
pub struct Alive {
    success: bool,
    status: String,
}

/// What people look at.
#[derive(ToSchema)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "a form for the document")]
pub struct Health {
    success: bool,
    #[schema(example = "healthy")]
    status: String,
    version: String,
    database: String,
    /// `redis`, or `process` while each process limits by itself.
    rate_limits: String,
}

/// A trigger that was accepted.
#[derive(ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "success": true, "executionId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d2e", "message": "Job queued successfully",
                           "statusUrl": "/api/executions/01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d2e" }))]
#[allow(dead_code, reason = "a form for the document")]
pub struct Triggered {
    success: bool,
    /// What to poll.
    execution_id: String,
    message: String,
    status_url: String,
    /// An execution that existed already serves (`maxAgeSeconds`).
    reused: Option<bool>,
    /// Its state, when `wait` was given.
    #[schema(value_type = Option<Object>)]
    data: Option<Value>,
}

/// Which jobs to run: `jobs` or `selector`; the other fields are those of one run.
#[derive(ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "jobs": ["shop-prod", "crm-prod"], "labels": { "release": "42" } }))]
#[allow(dead_code, reason = "a form for the document")]
pub struct RunsBody {
    /// Ids or slugs, at most 1000.
    jobs: Option<Vec<String>>,
    /// Labels that the jobs have.
    selector: Option<Labels>,
    lock: Option<bool>,
    #[schema(minimum = 1, maximum = 36500)]
    lock_days: Option<i32>,
    #[schema(minimum = -10, maximum = 10)]
    priority: Option<i16>,
    labels: Option<Labels>,
    #[schema(minimum = 0, maximum = 60)]
    wait: Option<u64>,
    #[schema(minimum = 0, maximum = 31536000)]
    max_age_seconds: Option<i32>,
    #[schema(minimum = 1, maximum = 31536000)]
    start_within_seconds: Option<i32>,
}

/// The state of an execution, as the contract's scripts poll it.
#[derive(ToSchema)]
#[allow(dead_code, reason = "a form for the document")]
pub struct Polled {
    success: bool,
    data: PolledExecution,
    /// The database is away, and this is the last state that the process knows.
    stale: Option<bool>,
}

/// An execution with what only a poll shows.
#[derive(ToSchema)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "a form for the document")]
pub struct PolledExecution {
    #[serde(flatten)]
    execution: Execution,
    artifacts: Vec<common::artifact::Artifact>,
    /// Place in the queue while Pending, up to 1000.
    queue_position: Option<u32>,
    /// With `includeLogs` or `logsAfter`.
    logs: Option<Vec<Line>>,
    /// For the next `logsAfter`.
    logs_cursor: Option<String>,
}

/// A key with its secret, which is shown this once.
#[derive(ToSchema)]
#[allow(dead_code, reason = "a form for the document")]
pub struct KeyWithSecret {
    #[serde(flatten)]
    info: KeyInfo,
    /// The secret.
    #[schema(example = "dbm_…")]
    key: String,
}

/// A webhook with its secret, which is shown this once.
#[derive(ToSchema)]
#[allow(dead_code, reason = "a form for the document")]
pub struct WebhookWithSecret {
    #[serde(flatten)]
    webhook: Webhook,
    /// Signs what it is sent, as Standard Webhooks says.
    #[schema(example = "whsec_…")]
    secret: String,
}

/// Whether the first administrator is still to be made.
#[derive(ToSchema)]
#[allow(dead_code, reason = "a form for the document")]
pub struct SetUpNeeded {
    needed: bool,
}

/// Who the caller is.
#[derive(ToSchema)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "a form for the document")]
pub struct Identified {
    name: String,
    permissions: Vec<String>,
    user: Option<User>,
    session_id: Option<String>,
    api_key_id: Option<String>,
}

/// A session that began or was renewed; its tokens are in two cookies.
#[derive(ToSchema)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "a form for the document")]
pub struct SignedInBody {
    user: User,
    session_id: String,
    expires_in_seconds: u64,
}

/// Every failure has this form.
#[derive(ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "success": false, "error": "Job not found", "code": "job_not_found", "requestId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d2e" }))]
#[allow(dead_code, reason = "a form for the document")]
pub struct Failure {
    success: bool,
    /// For people: what is wrong and what to do.
    error: String,
    /// For programs.
    code: String,
    /// What to mend, field by field.
    fields: Option<Vec<FieldProblem>>,
    /// The run that is in the way.
    execution_id: Option<String>,
    /// As in the log and in X-Request-Id.
    request_id: String,
}
