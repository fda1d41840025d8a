//! Extractors whose refusals have the envelope.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request},
    http::{StatusCode, request::Parts},
};
use chrono::{DateTime, Utc};
use common::time;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::error::ApiError;

/// A JSON body. The content type is not looked at: `curl -d` sends another, and there is only JSON here. An empty
/// body counts as `{}`.
pub struct Body<T>(pub T);

/// The body as it came, for its hash.
pub struct RawBody(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Bytes::from_request(request, state).await {
            Ok(bytes) => Ok(Self(bytes)),
            Err(error) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body is too large"))
            }
            Err(error) => Err(ApiError::malformed("body", error.body_text())),
        }
    }
}

/// No text of the database holds one.
const NUL: &str = "must not hold a NUL character";

/// Where a body holds a NUL character, which JSON can only write as an escape. Of a name of a field, what it is in.
fn nul(body: &[u8]) -> Option<String> {
    memchr::memmem::find(body, br"\u0000")?;
    // What is no JSON is told so by who reads it.
    nul_in(&serde_json::from_slice(body).ok()?).map(|path| match path.is_empty() {
        true => "body".to_owned(),
        false => path.join("."),
    })
}

fn nul_in(value: &Value) -> Option<Vec<String>> {
    let below = |name: String, value| {
        nul_in(value).map(|mut path| {
            path.insert(0, name);
            path
        })
    };
    match value {
        Value::String(text) => text.contains('\0').then(Vec::new),
        Value::Array(all) => all.iter().enumerate().find_map(|(at, value)| below(at.to_string(), value)),
        Value::Object(fields) => fields.iter().find_map(|(name, value)| match name.contains('\0') {
            true => Some(Vec::new()),
            false => below(name.clone(), value),
        }),
        _ => None,
    }
}

/// Reads JSON, naming the field that does not fit.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let bytes = if bytes.iter().all(u8::is_ascii_whitespace) { b"{}" } else { bytes };
    if let Some(field) = nul(bytes) {
        return Err(ApiError::malformed(field, NUL));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = Some(error.path().to_string()).filter(|path| path != "." && path != "?");
        let message = error.into_inner().to_string();
        // What is missing has no place of its own to be named by.
        let missing = message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
        let names: Vec<&str> = path.as_deref().into_iter().chain(missing).collect();
        let field = if names.is_empty() { "body".to_owned() } else { names.join(".") };
        ApiError::malformed(field, if missing.is_some() { "is required".to_owned() } else { message })
    })?;
    deserializer.end().map_err(|error| ApiError::malformed("body", error.to_string()))?;
    Ok(value)
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let RawBody(bytes) = RawBody::from_request(request, state).await?;
        parse(&bytes).map(Self)
    }
}

/// A query string.
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        if parts.uri.query().is_some_and(|query| query.contains("%00")) {
            return Err(ApiError::malformed("query", NUL));
        }
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|error| ApiError::malformed("query", error.body_text()))
    }
}

/// The segment of a path that names a thing.
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = axum::extract::Path::<String>::from_request_parts(parts, state).await;
        // Bytes that are not UTF-8 name nothing.
        Ok(Self(path.map(|p| p.0).unwrap_or_default()))
    }
}

/// `limit`, `cursor`, `name` and `label` of a list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct ListQuery {
    limit: Option<i64>,
    cursor: Option<String>,
    /// Part of a name.
    pub name: Option<String>,
    label: Option<String>,
    /// Only with this source.
    pub source_id: Option<String>,
}

/// Most rows on a page.
pub const MAX_LIMIT: i64 = 1000;

/// A limit that a client gave.
pub fn limit(limit: Option<i64>) -> Result<Option<i64>, ApiError> {
    match limit {
        Some(n) if !(1..=MAX_LIMIT).contains(&n) => {
            Err(ApiError::malformed("limit", format!("must be between 1 and {MAX_LIMIT}")))
        }
        limit => Ok(limit),
    }
}

/// A time that a client gave. PostgreSQL knows fewer years than the text can name.
pub fn time(field: &str, time: Option<DateTime<Utc>>) -> Result<Option<DateTime<Utc>>, ApiError> {
    match time {
        Some(time) if !time::is_storable(&time) => Err(ApiError::malformed(field, time::STORABLE)),
        time => Ok(time),
    }
}

/// A cursor that an earlier page gave.
pub fn cursor<T: std::str::FromStr>(cursor: Option<&str>) -> Result<Option<T>, ApiError> {
    cursor
        .map(|text| text.parse().map_err(|_| ApiError::malformed("cursor", "is not one that a list gave")))
        .transpose()
}

impl ListQuery {
    /// See [`limit`].
    pub fn limit(&self) -> Result<Option<i64>, ApiError> {
        limit(self.limit)
    }

    /// See [`cursor`].
    pub fn cursor(&self) -> Result<Option<uuid::Uuid>, ApiError> {
        cursor(self.cursor.as_deref())
    }

    /// `label=name=value`, or `label=name:value`.
    pub fn labels(&self) -> Result<common::label::Labels, ApiError> {
        let Some(label) = &self.label else { return Ok(Default::default()) };
        let (name, value) =
            label.split_once(['=', ':']).ok_or_else(|| ApiError::malformed("label", "must be name=value"))?;
        Ok([(name.to_owned(), value.to_owned())].into())
    }
}
