//! Files of the console, which are part of the program. All of them have one version, a hash of them all, in their
//! address, so that a browser keeps them for ever and a new program's pages ask for new ones.

use std::sync::LazyLock;

use axum::{
    extract::Path,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use rust_embed::RustEmbed;
use sha2::{Digest, Sha256};

use crate::error::ApiError;

#[derive(RustEmbed)]
#[folder = "src/ui/assets"]
struct Files;

/// The version in the addresses of all files.
pub static VERSION: LazyLock<String> = LazyLock::new(|| {
    let mut hasher = Sha256::new();
    for name in Files::iter() {
        hasher.update(name.as_bytes());
        hasher.update(Files::get(&name).map(|file| file.metadata.sha256_hash()).unwrap_or_default());
    }
    hasher.finalize()[..6].iter().map(|byte| format!("{byte:02x}")).collect()
});

fn content_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

/// One file. Of another version than ours (processes of two versions stand behind one address while an upgrade goes on)
/// it is ours, and not to be kept.
pub async fn file(Path((version, name)): Path<(String, String)>, headers: HeaderMap) -> Result<Response, ApiError> {
    let found = Files::get(&name).ok_or_else(|| ApiError::not_found("File", "file_not_found"))?;
    let hash = found.metadata.sha256_hash();
    let tag = format!("\"{}\"", hash[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    let same = headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let mut response = match same {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => found.data.into_owned().into_response(),
    };
    let keep = if version == *VERSION { "public, max-age=31536000, immutable" } else { "no-cache" };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type(&name)));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(keep));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn get(version: &str, name: &str, known: Option<&HeaderValue>) -> Response {
        let headers = known.map(|tag| (header::IF_NONE_MATCH, tag.clone())).into_iter().collect();
        file(Path((version.to_owned(), name.to_owned())), headers).await.into_response()
    }

    #[tokio::test]
    async fn a_file_is_kept_for_ever_under_its_version_and_asked_for_again_under_another() {
        let ours = get(&VERSION, "app.css", None).await;
        assert_eq!(ours.headers()[header::CACHE_CONTROL], "public, max-age=31536000, immutable");
        let other = get("0123456789ab", "app.css", None).await;
        assert_eq!(
            (other.status(), &other.headers()[header::CACHE_CONTROL]),
            (StatusCode::OK, &HeaderValue::from_static("no-cache"))
        );
        let again = get("0123456789ab", "app.css", Some(&other.headers()[header::ETAG])).await;
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        assert_eq!(get(&VERSION, "no-such.css", None).await.status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn no_file_names_another_place_to_load_from() {
        for name in Files::iter() {
            let file = Files::get(&name).expect("a file");
            let text = String::from_utf8(file.data.into_owned()).expect("text");
            // The namespace of SVG is a name, and nothing is loaded from there.
            let text = text.replace("http://www.w3.org/2000/svg", "");
            assert!(!text.contains("http:") && !text.contains("https:"), "{name}");
        }
    }
}
