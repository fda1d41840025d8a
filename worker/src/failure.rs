//! Failures of a run, sorted by whether another try can help.

use common::{
    db::DbError,
    execution::{Outcome, Stage, finish::Failure},
    store::StoreError,
};

use crate::lease::Stop;
pub use common::store::Class;

/// A failure of a store, told of its destination.
pub trait At {
    /// Names the destination.
    fn at(self, destination: &str) -> RunError;
}

impl At for StoreError {
    fn at(self, destination: &str) -> RunError {
        RunError {
            message: format!("destination '{destination}': {}", self.message),
            code: self.code,
            class: self.class,
        }
    }
}

/// Why a run failed: what was done to what, what the other side said, what to do.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct RunError {
    /// For people.
    pub message: String,
    /// For programs.
    pub code: &'static str,
    /// Whether to try again.
    pub class: Class,
}

impl RunError {
    /// A failure that another try may mend.
    pub fn retry(code: &'static str, message: impl Into<String>) -> Self {
        Self { message: message.into(), code, class: Class::Retry }
    }

    /// A failure that only a person mends.
    pub fn give_up(code: &'static str, message: impl Into<String>) -> Self {
        Self { message: message.into(), code, class: Class::GiveUp }
    }

    /// As it is recorded.
    pub fn into_failure(self, stage: Stage) -> Failure {
        Failure { error: self.message, code: self.code, outcome: None, stage }
    }
}

impl From<DbError> for RunError {
    fn from(error: DbError) -> Self {
        tracing::warn!(error = %common::error::Chain(&error), "the service's database failed a run");
        RunError::retry("database_away", format!("DBackup's own database failed: {error}"))
    }
}

/// How an attempt that was stopped from outside is recorded; `None` where nothing may be recorded.
pub fn of_stop(stop: Stop, stage: Stage, timeout_seconds: i32) -> Option<Failure> {
    let failure = |error: String, code, outcome| Some(Failure { error, code, outcome: Some(outcome), stage });
    match stop {
        Stop::Cancelled => failure("cancelled on request".to_owned(), "cancelled", Outcome::Cancelled),
        Stop::TimedOut => failure(
            format!(
                "not done within the job's timeoutSeconds ({timeout_seconds}) while {}",
                stage.as_str().to_lowercase()
            ),
            "timed_out",
            Outcome::TimedOut,
        ),
        Stop::Lost | Stop::Released => None,
    }
}
