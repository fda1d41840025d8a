//! Settings that change at run time. The concurrency limit and the pause are columns of the gate, because the
//! row that holds them is also the lock under which they are obeyed.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::PgConnection;

use crate::telemetry::TraceContext;

/// All settings, as clients see them.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Settings {
    /// Runs at once over all workers, 0 to 1000.
    pub max_concurrent_jobs: i32,
    /// Nothing new is claimed while true.
    pub paused: bool,
    /// Executions of one job that may wait.
    pub max_pending_per_job: i64,
    /// Executions that may wait in all.
    pub max_pending: i64,
    /// Days for which the log of an ended execution is kept.
    pub keep_logs_days: i32,
    /// Days for which an ended execution without a backup is kept; one with a backup stays.
    pub keep_executions_days: i32,
    /// Requests that a client may make.
    pub rate_limit: RateLimits,
    /// Where people see the trace of an execution: a URL that holds `{traceId}`. It becomes `traceUrl` of executions.
    #[schema(example = "https://jaeger.example.com/trace/{traceId}")]
    pub trace_url_template: Option<String>,
}

/// Limits of requests for each client address.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RateLimits {
    /// GET and HEAD.
    pub read: RateLimit,
    /// POST, PUT, PATCH and DELETE.
    pub write: RateLimit,
    /// Sign-ins.
    pub sign_in: RateLimit,
}

/// So many requests in any window of this length.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq, Hash, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimit {
    /// Requests, 1 to 1000000.
    pub limit: u32,
    /// Length of the window in seconds, 1 to 3600.
    #[serde(default = "minute")]
    pub window_seconds: u32,
}

fn minute() -> u32 {
    60
}

impl RateLimit {
    /// So many in a minute.
    pub fn a_minute(limit: u32) -> Self {
        Self { limit, window_seconds: 60 }
    }

    /// Length of the window.
    pub fn window(&self) -> Duration {
        Duration::from_secs(self.window_seconds.into())
    }
}

impl Default for RateLimits {
    fn default() -> Self {
        Self { read: RateLimit::a_minute(100), write: RateLimit::a_minute(20), sign_in: RateLimit::a_minute(5) }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_concurrent_jobs: 4,
            paused: false,
            max_pending_per_job: 100,
            max_pending: 10_000,
            keep_logs_days: 90,
            keep_executions_days: 365,
            rate_limit: RateLimits::default(),
            trace_url_template: None,
        }
    }
}

/// Settings that are columns of the gate; the others are rows of `settings`.
const OF_THE_GATE: [&str; 2] = ["maxConcurrentJobs", "paused"];

/// A field of a change that cannot be: its name, and what is allowed.
pub type Problem = (String, String);

/// Why a change is refused.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not of the type that the field has, or no field at all.
    Malformed(Problem),
    /// Of the right type, but these cannot be.
    Invalid(Vec<Problem>),
}

impl Settings {
    /// These settings after a change (RFC 7396: what is absent stays, `null` brings back the default).
    pub fn changed(&self, change: &Map<String, Value>) -> Result<Self, Refused> {
        let mut merged = serde_json::to_value(self).unwrap_or_default();
        merge(&mut merged, &Value::Object(change.clone()));
        let settings: Self = serde_path_to_error::deserialize(merged)
            .map_err(|error| Refused::Malformed((error.path().to_string(), error.into_inner().to_string())))?;
        let problems = settings.problems();
        if problems.is_empty() { Ok(settings) } else { Err(Refused::Invalid(problems)) }
    }

    /// With the rows of `settings` as one object. One that this version does not understand counts as absent.
    pub(crate) fn with_stored(self, stored: Option<Value>) -> Self {
        let Some(Value::Object(stored)) = stored else { return self };
        // One by one only where not all are understood: this is done for every group of triggers.
        self.changed(&stored).unwrap_or_else(|_| {
            stored.into_iter().fold(self, |settings, (name, value)| {
                let one = Map::from_iter([(name, value)]);
                settings.changed(&one).unwrap_or(settings)
            })
        })
    }

    fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut check = |name: &str, value: i64, least: i64, most: i64| {
            if !(least..=most).contains(&value) {
                problems.push((name.to_owned(), format!("must be between {least} and {most}")));
            }
        };
        check("maxConcurrentJobs", self.max_concurrent_jobs.into(), 0, 1_000);
        check("maxPendingPerJob", self.max_pending_per_job, 1, 1_000_000);
        check("maxPending", self.max_pending, 1, 1_000_000);
        check("keepLogsDays", self.keep_logs_days.into(), 1, 36_500);
        check("keepExecutionsDays", self.keep_executions_days.into(), 1, 36_500);
        let limits = &self.rate_limit;
        for (name, limit) in [("read", limits.read), ("write", limits.write), ("signIn", limits.sign_in)] {
            check(&format!("rateLimit.{name}.limit"), limit.limit.into(), 1, 1_000_000);
            check(&format!("rateLimit.{name}.windowSeconds"), limit.window_seconds.into(), 1, 3_600);
        }
        if self.trace_url_template.as_ref().is_some_and(|template| !is_trace_url_template(template)) {
            let allowed = format!(
                "must be null or a URL that begins with http:// or https://, holds {TRACE_ID} and no password, at most {MOST_URL} characters"
            );
            problems.push(("traceUrlTemplate".to_owned(), allowed));
        }
        problems
    }
}

/// What stands for the trace's id in `traceUrlTemplate`.
const TRACE_ID: &str = "{traceId}";
/// Characters of a template, at most.
const MOST_URL: usize = 2_000;

fn is_trace_url_template(template: &str) -> bool {
    let some_id = "a".repeat(32);
    let url = url::Url::parse(&template.replace(TRACE_ID, &some_id));
    let fits = |url: &url::Url| {
        let named = url.host_str().is_some_and(|host| !host.contains(&some_id));
        matches!(url.scheme(), "http" | "https") && named && url.username().is_empty() && url.password().is_none()
    };
    template.contains(TRACE_ID) && template.chars().count() <= MOST_URL && url.as_ref().is_ok_and(fits)
}

/// Where people see a trace.
pub fn trace_url(template: Option<&str>, trace: &TraceContext) -> Option<String> {
    Some(template?.replace(TRACE_ID, trace.trace_id()?))
}

fn merge(target: &mut Value, change: &Value) {
    let Value::Object(change) = change else {
        *target = change.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (name, value) in change {
        match value {
            Value::Null => {
                target.remove(name);
            }
            value => merge(target.entry(name.clone()).or_insert(Value::Null), value),
        }
    }
}

/// The settings in force.
pub async fn read(conn: &mut PgConnection) -> Result<Settings, sqlx::Error> {
    let row = sqlx::query!(
        r#"select g.max_concurrency, g.paused, (select jsonb_object_agg(name, value) from settings) as stored from queue_gate g"#
    )
    .fetch_one(conn)
    .await?;
    let gate = Settings { max_concurrent_jobs: row.max_concurrency, paused: row.paused, ..Settings::default() };
    Ok(gate.with_stored(row.stored))
}

/// Takes the lock under which claims are decided, to the end of the transaction: what is changed under it holds for every
/// claim after the commit. It comes before every other lock.
pub async fn lock_gate(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!("select only_row from queue_gate for update").fetch_one(conn).await?;
    Ok(())
}

/// Why settings were not changed.
#[derive(Debug)]
pub enum ChangeError {
    /// It cannot be.
    Refused(Refused),
    /// The database failed.
    Database(sqlx::Error),
}

impl From<sqlx::Error> for ChangeError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Applies a change and gives the settings after it. A lower concurrency limit acts on the next claim; what runs
/// already is left to end. To be called in a transaction.
pub async fn change(conn: &mut PgConnection, change: &Map<String, Value>) -> Result<Settings, ChangeError> {
    // Two changes at once must not undo each other.
    lock_gate(conn).await?;
    let settings = read(conn).await?.changed(change).map_err(ChangeError::Refused)?;
    sqlx::query!(
        "update queue_gate set max_concurrency = $1, paused = $2",
        settings.max_concurrent_jobs,
        settings.paused
    )
    .execute(&mut *conn)
    .await?;
    let (all, defaults) = (object_of(&settings), object_of(&Settings::default()));
    for (name, value) in
        all.iter().filter(|(name, _)| change.contains_key(*name) && !OF_THE_GATE.contains(&name.as_str()))
    {
        if defaults.get(name) == Some(value) {
            sqlx::query!("delete from settings where name = $1", name).execute(&mut *conn).await?;
        } else {
            sqlx::query!(
                "insert into settings (name, value) values ($1, $2) on conflict (name) do update set value = excluded.value",
                name,
                value
            )
            .execute(&mut *conn)
            .await?;
        }
    }
    Ok(settings)
}

fn object_of(settings: &Settings) -> Map<String, Value> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn change(settings: &Settings, change: Value) -> Result<Settings, Refused> {
        settings.changed(change.as_object().expect("an object"))
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name_and_null_brings_back_the_default() {
        let settings = Settings::default();
        let some =
            change(&settings, json!({ "rateLimit": { "read": { "limit": 7 } }, "maxPending": 3 })).expect("fits");
        assert_eq!((some.rate_limit.read, some.max_pending), (RateLimit::a_minute(7), 3));
        assert_eq!(some.rate_limit.write, settings.rate_limit.write);
        let back = change(&some, json!({ "rateLimit": { "read": null }, "maxPending": null })).expect("fits");
        assert_eq!(back, settings);
    }

    #[test]
    fn a_change_that_cannot_be_names_its_field() {
        for (bad, field) in [
            (json!({ "maxConcurrentJobs": 1001 }), "maxConcurrentJobs"),
            (json!({ "maxConcurrentJobs": -1 }), "maxConcurrentJobs"),
            (json!({ "maxPending": 0 }), "maxPending"),
            (json!({ "rateLimit": { "write": { "limit": 0 } } }), "rateLimit.write.limit"),
            (json!({ "rateLimit": { "signIn": { "windowSeconds": 3601 } } }), "rateLimit.signIn.windowSeconds"),
            (json!({ "traceUrlTemplate": "" }), "traceUrlTemplate"),
            (json!({ "traceUrlTemplate": "https://traces.example/trace/" }), "traceUrlTemplate"),
            (json!({ "traceUrlTemplate": "javascript:alert('{traceId}')" }), "traceUrlTemplate"),
            (json!({ "traceUrlTemplate": "https://{traceId}/" }), "traceUrlTemplate"),
            (json!({ "traceUrlTemplate": "https://me:secret@traces.example/{traceId}" }), "traceUrlTemplate"),
        ] {
            let refused = change(&Settings::default(), bad.clone()).expect_err("is refused");
            assert!(matches!(&refused, Refused::Invalid(problems) if problems[0].0 == field), "{bad}: {refused:?}");
        }
        for (bad, field) in [
            (json!({ "paused": "yes" }), "paused"),
            (json!({ "rateLimit": 5 }), "rateLimit"),
            (json!({ "rateLimit": { "read": { "limit": "9" } } }), "rateLimit.read.limit"),
            (json!({ "maxPendings": 5 }), "maxPendings"),
            (json!({ "traceUrlTemplate": 5 }), "traceUrlTemplate"),
        ] {
            let refused = change(&Settings::default(), bad.clone()).expect_err("is refused");
            assert!(matches!(&refused, Refused::Malformed((name, _)) if name == field), "{bad}: {refused:?}");
        }
    }

    #[test]
    fn a_trace_has_a_url_where_the_setting_has_a_template() {
        let trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
        let trace = TraceContext { traceparent: Some(format!("00-{trace_id}-00f067aa0ba902b7-01")), tracestate: None };
        let template = "https://traces.example/explore?id={traceId}#{traceId}";
        let settings = change(&Settings::default(), json!({ "traceUrlTemplate": template })).expect("fits");
        let template = settings.trace_url_template.as_deref();
        let url = format!("https://traces.example/explore?id={trace_id}#{trace_id}");
        assert_eq!(trace_url(template, &trace), Some(url));
        assert_eq!(trace_url(template, &TraceContext::default()), None);
        assert_eq!(trace_url(None, &trace), None);
    }
}
