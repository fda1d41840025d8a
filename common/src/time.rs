//! Times as clients read them: UTC with milliseconds, `2025-01-15T10:30:00.000Z`.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serializer;

/// The text of a time.
pub fn as_text(time: &DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// For a field of type `DateTime<Utc>`.
pub fn millis<S: Serializer>(time: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&as_text(time))
}

/// For a field of type `Option<DateTime<Utc>>`.
pub fn millis_or_null<S: Serializer>(time: &Option<DateTime<Utc>>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => millis(time, serializer),
        None => serializer.serialize_none(),
    }
}
