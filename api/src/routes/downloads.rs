//! Downloads of what backups stored, byte for byte: whole, or from where one was broken off.

use std::ops::Range;

use axum::{
    Extension,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use common::{
    artifact::{self, Artifact},
    audit::{self, Event},
    destination,
    execution::Execution,
    id::Reference,
    store::{Bytestream, Class, Shelf, StoreError},
};
use futures::{StreamExt, stream};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::executions::find;
use crate::{auth::Caller, error::ApiError, state::AppState};

/// RFC 9530: what the whole object hashes to, whatever part of it is sent.
const REPR_DIGEST: &str = "repr-digest";

/// Downloads one object of a backup, as it is stored. `Range` takes a part, so that a download can go on where it broke off.
///
/// The answer names its SHA-256 (`Repr-Digest`, `ETag`). A whole download whose bytes turn out to be others than those that
/// were stored is cut off before its end, so that no client takes it for complete.
#[utoipa::path(get, path = "/api/executions/{id}/artifacts/{artifactId}/download", tag = "executions", params(("Range" = Option<String>, Header, description = "bytes=START- or bytes=START-END, of one part"), ("If-Range" = Option<String>, Header, description = "the ETag of the answer before")), responses((status = 200, content_type = "application/octet-stream", body = String), (status = 206, content_type = "application/octet-stream", body = String)))]
pub async fn download(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    method: Method,
    path: Result<Path<(String, String)>, axum::extract::rejection::PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Path((execution, wanted)) = path.map_err(|_| not_found())?;
    let execution = find(&state, &caller, &execution).await?;
    let artifacts = state.ask(async |conn| artifact::of_executions(conn, &[execution.id]).await).await?;
    let artifact = artifacts.into_iter().find(|a| a.id.to_string() == wanted).ok_or_else(not_found)?;
    let size = u64::try_from(artifact.size).unwrap_or(0);
    let etag = format!("\"{}\"", artifact.sha256);
    let range = match part_of(&headers, &etag, size) {
        Wanted::All => 0..size,
        Wanted::Part(range) => range,
        Wanted::Nowhere => {
            let answer = ApiError::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "range_not_satisfiable",
                format!("the object has {size} bytes"),
            );
            return Ok(([(header::CONTENT_RANGE, format!("bytes */{size}"))], answer).into_response());
        }
    };
    let whole = range.end - range.start == size;
    let mut response = match method {
        Method::HEAD => Response::new(Body::empty()),
        _ => sent(&state, &caller, &execution, &artifact, range.clone(), whole).await?,
    };
    if !whole {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    let file = artifact.path.rsplit('/').next().unwrap_or_default().replace(['"', '\\'], "_");
    let kind = if artifact.database.is_none() { "application/json" } else { "application/octet-stream" };
    let digest = BASE64_STANDARD.encode(hex::decode(&artifact.sha256).unwrap_or_default());
    let mut set = |name: header::HeaderName, value: String| {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    };
    set(header::CONTENT_TYPE, kind.to_owned());
    set(header::CONTENT_LENGTH, (range.end - range.start).to_string());
    set(header::CONTENT_DISPOSITION, format!("attachment; filename=\"{file}\""));
    set(header::ACCEPT_RANGES, "bytes".to_owned());
    set(header::ETAG, etag);
    set(header::CACHE_CONTROL, "private, no-store".to_owned());
    set(header::HeaderName::from_static(REPR_DIGEST), format!("sha-256=:{digest}:"));
    if !whole {
        set(header::CONTENT_RANGE, format!("bytes {}-{}/{size}", range.start, range.end - 1));
    }
    Ok(response)
}

/// The body of the answer: it ends early, which every client sees by the announced length, when the caller loses its right.
/// When the process stops it goes on for as long as requests under way may, and is cut then.
async fn sent(
    state: &AppState,
    caller: &Caller,
    execution: &Execution,
    artifact: &Artifact,
    range: Range<u64>,
    whole: bool,
) -> Result<Response, ApiError> {
    let place = state.downloads.clone().try_acquire_owned().map_err(|_| {
        let text = "this process sends as many downloads as it may at once: try again when some have ended";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_downloads", text).retry_after(5)
    })?;
    let bytes = open(state, artifact, range.clone()).await?;
    // Told before the first byte: who has seen a part of a backup has seen it.
    let details = json!({ "path": artifact.path, "from": range.start, "to": range.end });
    let event = Event::new("artifact.download", execution.id, &execution.job_name).with(details);
    state.ask(async |conn| audit::record(conn, &caller.actor(), &[event]).await).await?;
    tracing::info!(execution = %execution.id, path = artifact.path, caller = caller.name(), "an object is downloaded");
    let bytes = if whole { checked(bytes, artifact) } else { bytes };
    let (state, caller) = (state.clone(), caller.clone());
    let over = async move {
        // Held as long as the body lives.
        let _place = place;
        caller.loses_its_right(&state.memory).await;
    };
    Ok(Body::from_stream(bytes.take_until(Box::pin(over))).into_response())
}

fn not_found() -> ApiError {
    ApiError::not_found("Artifact", "artifact_not_found")
}

/// The bytes as they lie in the destination.
async fn open(state: &AppState, artifact: &Artifact, range: Range<u64>) -> Result<Bytestream, ApiError> {
    let reference = Reference::new(artifact.destination_id.to_string());
    let destination = state.ask(async |conn| destination::find(conn, &reference).await).await?;
    let destination = destination.ok_or_else(|| {
        ApiError::conflict(
            "destination_gone",
            "the destination of this object was deleted from DBackup, and with it the way to it",
        )
    })?;
    let access = destination.access(&state.key).map_err(|error| {
        tracing::error!(destination = destination.slug, %error, "a secret could not be opened");
        ApiError::internal()
    })?;
    let unread = |error: StoreError| unread(&error, &destination.slug);
    let shelf = Shelf::open(access, &state.local_paths).await.map_err(unread)?;
    shelf.read(&artifact.path, range).await.map_err(unread)
}

/// 502 where the store refuses for good, 503 where another try may help.
fn unread(error: &StoreError, destination: &str) -> ApiError {
    let text = format!("destination '{destination}': {}", error.message);
    tracing::warn!(destination, error = error.message, "an object could not be read");
    match error.class {
        Class::Retry => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, error.code, text).retry_after(5),
        Class::GiveUp => ApiError::new(StatusCode::BAD_GATEWAY, error.code, text),
    }
}

/// Passes bytes on, the last of them only when all of them are those that were stored.
fn checked(bytes: Bytestream, artifact: &Artifact) -> Bytestream {
    let (path, wanted) = (artifact.path.clone(), artifact.sha256.clone());
    let state = (bytes, Sha256::new(), None, path, wanted);
    stream::try_unfold(state, |(mut bytes, mut hash, mut kept, path, wanted)| async move {
        loop {
            let Some(chunk) = bytes.next().await.transpose()? else {
                let Some(last) = kept.take() else { return Ok(None) };
                if hex::encode(hash.finalize_reset()) != wanted {
                    tracing::error!(
                        path,
                        "a stored object is not what was stored: its SHA-256 differs; its download is cut off"
                    );
                    return Err(StoreError::give_up("object_damaged", "the object is not what was stored"));
                }
                return Ok(Some((last, (bytes, hash, None, path, wanted))));
            };
            hash.update(&chunk);
            if let Some(before) = kept.replace(chunk) {
                return Ok(Some((before, (bytes, hash, kept, path, wanted))));
            }
        }
    })
    .boxed()
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    Part(Range<u64>),
    /// Past the end.
    Nowhere,
}

/// RFC 9110, 14.2: one part of bytes. Another unit, several parts, or an `If-Range` of something else mean all of it.
fn part_of(headers: &HeaderMap, etag: &str, size: u64) -> Wanted {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if text(header::IF_RANGE).is_some_and(|known| known != etag) {
        return Wanted::All;
    }
    let part = text(header::RANGE).and_then(|range| range.strip_prefix("bytes=")).and_then(|part| part.split_once('-'));
    let Some((from, to)) = part else { return Wanted::All };
    let range = match (from.trim().parse::<u64>(), to.trim().parse::<u64>()) {
        (Ok(from), Ok(to)) if from <= to => from..to.saturating_add(1).min(size),
        (Ok(from), Err(_)) if to.trim().is_empty() => from..size,
        (Err(_), Ok(last)) if from.trim().is_empty() => match last {
            0 => return Wanted::Nowhere,
            last => size.saturating_sub(last)..size,
        },
        _ => return Wanted::All,
    };
    if range.start < range.end { Wanted::Part(range) } else { Wanted::Nowhere }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_part_is_taken_as_rfc_9110_has_it_and_whatever_else_is_all() {
        let wanted = |range: &str, if_range: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, range.parse().expect("a value"));
            if let Some(etag) = if_range {
                headers.insert(header::IF_RANGE, etag.parse().expect("a value"));
            }
            part_of(&headers, "\"a\"", 100)
        };
        for (range, expected) in [
            ("bytes=0-9", Wanted::Part(0..10)),
            ("bytes=90-", Wanted::Part(90..100)),
            ("bytes=90-1000", Wanted::Part(90..100)),
            ("bytes=-30", Wanted::Part(70..100)),
            ("bytes=-1000", Wanted::Part(0..100)),
            ("bytes=100-", Wanted::Nowhere),
            ("bytes=-0", Wanted::Nowhere),
            ("bytes=9-3", Wanted::All),
            ("bytes=0-1,5-6", Wanted::All),
            ("lines=0-1", Wanted::All),
        ] {
            assert_eq!(wanted(range, None), expected, "{range}");
        }
        assert_eq!(wanted("bytes=50-", Some("\"a\"")), Wanted::Part(50..100));
        assert_eq!(wanted("bytes=50-", Some("\"b\"")), Wanted::All, "it is another object now");
    }
}
