//! Times as clients read them: UTC with milliseconds, `2025-01-15T10:30:00.000Z`; and as the database takes them.

use std::time::Duration;

use chrono::{DateTime, Datelike, SecondsFormat, Utc};
use serde::Serializer;

/// What a time must be to be stored, and found by.
pub const STORABLE: &str = "must be a time of the years 0 to 9999";

/// Whether it is one that people write: PostgreSQL goes less far back than the type does, and so fails on the others.
pub fn is_storable(time: &DateTime<Utc>) -> bool {
    (0..10_000).contains(&time.year())
}

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

/// Whole milliseconds, as the database takes them; the longest that it can where there are more.
pub fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
