//! Handlers, a file for each noun.

mod accepted;
pub mod api_keys;
pub mod audit;
pub mod cluster;
pub mod destinations;
pub mod downloads;
pub mod events;
pub mod executions;
pub mod freshness;
pub mod health;
pub mod jobs;
pub mod restores;
pub mod runs;
pub mod sessions;
pub mod settings;
pub mod setup;
pub mod sources;
pub mod users;
pub mod webhooks;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use common::{
    connection::{FieldProblem, SplitConfig},
    connection_test::{self, Answer, Target, TestResult},
    encryption::Encryption,
    label::{self, Labels},
    page::Page,
    queue::{Notice, heard},
    slug,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::time::{Duration, Instant};

use crate::{error::ApiError, state::AppState};

/// `{"success":true,"data":…}`.
fn data<T: Serialize>(value: &T) -> Json<Value> {
    Json(json!({ "success": true, "data": value }))
}

/// 201 with the new thing.
fn created<T: Serialize>(value: &T) -> Response {
    (StatusCode::CREATED, data(value)).into_response()
}

/// A page, with the address of the next in `Link`. `bare` gives the array alone.
fn page<T: Serialize>(page: &Page<T>, uri: &Uri, bare: bool) -> Response {
    let body = if bare { Json(json!(page.rows)) } else { data(&page.rows) };
    linked(body.into_response(), page.next.as_deref(), uri)
}

/// An answer that names the page after it.
fn linked(mut response: Response, next: Option<&str>, uri: &Uri) -> Response {
    if let Some(next) = next {
        let kept =
            uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("cursor="));
        let query: Vec<&str> = kept.collect();
        let link = format!("<{}?{}&cursor={next}>; rel=\"next\"", uri.path(), query.join("&"));
        if let Ok(value) = HeaderValue::from_str(&link) {
            response.headers_mut().insert(header::LINK, value);
        }
    }
    response
}

/// Tells an absent field (`None`) from one that is `null` (`Some(None)`).
fn present<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

/// Names of the fields that a client sent, for the audit log; values may be secret.
fn fields_of(raw: &[u8]) -> Value {
    let sent: Map<String, Value> = serde_json::from_slice(raw).unwrap_or_default();
    json!({ "fields": sent.keys().collect::<Vec<_>>() })
}

/// Checks that bodies of several nouns share.
#[derive(Default)]
struct Check(Vec<FieldProblem>);

impl Check {
    fn refuse(&mut self, field: &str, message: &str) {
        self.0.push(FieldProblem::new(field, message));
    }

    fn name(&mut self, name: &str) {
        if name.trim().is_empty() || name.chars().count() > 200 || name.contains('\0') {
            self.refuse("name", "is required: 1 to 200 characters");
        }
    }

    fn slug(&mut self, text: Option<&String>) {
        if text.is_some_and(|text| !slug::is_valid(text)) {
            self.refuse(
                "slug",
                "must be 1 to 64 of a-z, 0-9 and hyphen, begin and end with a letter or digit, and not be a UUID",
            );
        }
    }

    fn labels(&mut self, labels: &Labels) {
        if let Some(problem) = label::problem(labels) {
            self.refuse("labels", &problem);
        }
    }

    /// To whom; `None` where that is refused.
    fn encryption(&mut self, encryption: Encryption) -> Option<Encryption> {
        match encryption.checked() {
            Ok(checked) => Some(checked),
            Err(problems) => {
                for (field, problem) in problems {
                    self.refuse(&format!("encryption.{field}"), problem);
                }
                None
            }
        }
    }

    fn pool(&mut self, pool: &str) {
        if pool.is_empty()
            || pool.len() > 64
            || !pool.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        {
            self.refuse("pool", "must be 1 to 64 letters, digits, hyphens or underscores");
        }
    }

    /// How long an answer may wait for the end of an execution.
    fn wait(&mut self, seconds: Option<u64>) {
        if seconds.is_some_and(|seconds| seconds > executions::MOST_WAIT) {
            self.refuse("wait", "must be at most 60 seconds");
        }
    }

    fn done(self) -> Result<(), ApiError> {
        if self.0.is_empty() { Ok(()) } else { Err(ApiError::invalid(self.0)) }
    }
}

/// What a client sent as `config`.
fn sent_config(config: Option<Value>) -> Result<Map<String, Value>, ApiError> {
    match config {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(_) => Err(ApiError::malformed("config", "must be an object")),
    }
}

fn merged(
    shape: common::connection::Shape,
    stored: SplitConfig,
    sent: Map<String, Value>,
) -> Result<SplitConfig, ApiError> {
    shape.merge(stored, sent).map_err(ApiError::invalid)
}

/// A question that no worker took within this time has no worker.
const TAKEN_WITHIN: Duration = Duration::from_secs(5);
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

/// Has a worker of the pool carry out a test.
async fn connection_test(state: &AppState, target: Target, pool: &str) -> Result<Json<Value>, ApiError> {
    // Registered before the question, or a quick answer is missed.
    let mut notices = state.wakeups.subscribe();
    let asked = Instant::now();
    let id = state.ask(async |conn| connection_test::ask(conn, target, pool).await).await?;
    state.wakeups.tell(Notice::Test);
    let result = loop {
        let answer = state.ask(async |conn| connection_test::answer(conn, id).await).await?;
        match answer {
            Answer::Done(result) => break Ok(result),
            Answer::Waiting if asked.elapsed() > TAKEN_WITHIN => break Err(no_worker(pool)),
            Answer::Taken if asked.elapsed() > ANSWERED_WITHIN => {
                break Err(ApiError::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "no_answer",
                    "the worker that took the test did not answer; try again",
                )
                .retry_after(5));
            }
            Answer::Waiting | Answer::Taken => {
                heard(&mut notices, Duration::from_millis(250), |notice| *notice == Notice::Test).await;
            }
        }
    };
    let _ = state.ask(async |conn| connection_test::withdraw(conn, id).await).await;
    result.map(|result: TestResult| data(&result))
}

fn no_worker(pool: &str) -> ApiError {
    ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "no_worker",
        format!("no worker of the pool '{pool}' took the test: start one with DBACKUP_POOLS={pool}"),
    )
    .retry_after(5)
}
