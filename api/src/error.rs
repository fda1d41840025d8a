//! Errors as clients see them. What the log sees is another text; here is the one place that maps to HTTP.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use common::{connection::FieldProblem, db::DbError};
use serde::Serialize;

/// Code and text of what clients are told of a bug.
pub const INTERNAL: (&str, &str) = ("internal_error", "internal error; the log has it under this requestId");
const DATABASE_AWAY: &str = "database_away";

/// An answer that is not a success.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
    retry_after_seconds: Option<u32>,
}

/// The envelope, but for the request id, which [`crate::context`] adds.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorBody {
    /// Always false.
    pub success: bool,
    /// For people: what is wrong and what to do.
    pub error: String,
    /// For programs.
    pub code: &'static str,
    /// What to mend, field by field.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldProblem>,
    /// The run that is in the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<String>,
}

impl ApiError {
    /// An error with a text for people and a code for programs.
    pub fn new(status: StatusCode, code: &'static str, error: impl Into<String>) -> Self {
        let body = ErrorBody { success: false, error: error.into(), code, fields: Vec::new(), execution_id: None };
        Self { status, body, retry_after_seconds: None }
    }

    /// 500: a bug, of which the log tells.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, INTERNAL.0, INTERNAL.1)
    }

    /// 404 of a noun.
    pub fn not_found(noun: &str, code: &'static str) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, format!("{noun} not found"))
    }

    /// 403 of a key that is scoped to some jobs.
    pub fn job_scoped(why: &str) -> Self {
        let text = format!("this API key is scoped to some jobs: {why}");
        Self::new(StatusCode::FORBIDDEN, "job_scoped", text)
    }

    /// 409.
    pub fn conflict(code: &'static str, error: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, error)
    }

    /// 400: the body is not what it should be.
    pub fn malformed(field: impl Into<String>, message: impl Into<String>) -> Self {
        let problem = FieldProblem::new(field, message);
        let mut error =
            Self::new(StatusCode::BAD_REQUEST, "malformed", format!("{}: {}", problem.field, problem.message));
        error.body.fields = vec![problem];
        error
    }

    /// 422: the body is well formed, but these fields cannot be.
    pub fn invalid(fields: Vec<FieldProblem>) -> Self {
        let text: Vec<String> = fields.iter().map(|f| format!("{}: {}", f.field, f.message)).collect();
        let mut error = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", text.join("; "));
        error.body.fields = fields;
        error
    }

    /// 422 of one field.
    pub fn invalid_field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::invalid(vec![FieldProblem::new(field, message)])
    }

    /// Names the run that is in the way.
    pub fn with_execution(mut self, id: impl ToString) -> Self {
        self.body.execution_id = Some(id.to_string());
        self
    }

    /// What people read.
    pub fn text(&self) -> &str {
        &self.body.error
    }

    /// What programs read.
    pub fn code(&self) -> &'static str {
        self.body.code
    }

    /// Whether it says that the database does not answer.
    pub fn is_away(&self) -> bool {
        self.body.code == DATABASE_AWAY
    }

    /// Names what to mend.
    pub fn with_fields(mut self, fields: Vec<FieldProblem>) -> Self {
        self.body.fields = fields;
        self
    }

    /// When a retry is right.
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self.body);
        response
    }
}

impl From<DbError> for ApiError {
    fn from(error: DbError) -> Self {
        match error.constraint() {
            Some(name) => match of_constraint(name) {
                Some(error) => return error,
                None => tracing::error!(
                    constraint = name,
                    error = %common::error::Chain(&error),
                    "a constraint has no answer of its own"
                ),
            },
            None if error.is_passing() => {
                tracing::warn!(error = %common::error::Chain(&error), "the database is away");
                return ApiError::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    DATABASE_AWAY,
                    "the database does not answer; try again",
                )
                .retry_after(2);
            }
            None => tracing::error!(error = %common::error::Chain(&error), "a statement failed"),
        }
        ApiError::internal()
    }
}

/// Constraints are named so that they map to answers.
fn of_constraint(name: &str) -> Option<ApiError> {
    let taken =
        |what: &str| Some(ApiError::conflict("slug_taken", format!("another {what} has this slug: choose another")));
    let field = |field: &str, message: &str| Some(ApiError::invalid_field(field, message));
    match name {
        "sources_slug_unique" => taken("source"),
        "destinations_slug_unique" => taken("destination"),
        "jobs_slug_unique" => taken("job"),
        // One name, two directions: the source of a job is gone, or a source that a job uses is deleted.
        "jobs_source_exists" => field("sourceId", "there is no such source"),
        "job_destinations_destination_exists" => field("destinationIds", "there is no such destination"),
        _ => None,
    }
}
