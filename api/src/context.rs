//! What surrounds every request: its id, its trace, and the envelope of its error.

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use axum::{
    body::Body,
    extract::{ConnectInfo, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::Response,
};
use common::{
    audit::Actor,
    metrics::{self, Trace},
    telemetry::{TraceContext, trace_id},
};
use tracing::Instrument;

use crate::{
    client_address::client_address,
    error::{ErrorBody, INTERNAL},
    state::AppState,
};

/// Header with the request's id, the caller's where it is sane.
pub const REQUEST_ID: &str = "x-request-id";
/// Header with the trace's id.
pub const TRACE_ID: &str = "x-trace-id";

/// Of an answer that is read by programs: nothing in it may be shown, framed or run by a browser.
const SECURITY_HEADERS: [(HeaderName, &str); 5] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// Where a request comes from. Everything takes it from the request's extensions.
#[derive(Clone, Debug)]
pub struct Visitor {
    /// The address of the client.
    pub address: IpAddr,
    /// Whether the client speaks TLS: a trusted proxy says so.
    pub tls: bool,
    /// The id of the request.
    pub request_id: String,
}

impl Visitor {
    /// As the audit log names whoever sent the request.
    pub fn actor(&self, kind: &'static str, id: Option<uuid::Uuid>, name: &str) -> Actor {
        Actor {
            kind,
            id,
            name: name.to_owned(),
            address: Some(self.address),
            request_id: Some(self.request_id.clone()),
        }
    }
}

fn request_id(headers: &HeaderMap) -> String {
    let sane = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:/".contains(&b))
    };
    let given = headers.get(REQUEST_ID).and_then(|v| v.to_str().ok()).filter(sane);
    given.map_or_else(|| uuid::Uuid::now_v7().to_string(), str::to_owned)
}

fn trace_context(headers: &HeaderMap) -> TraceContext {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    TraceContext { traceparent: text("traceparent"), tracestate: text("tracestate") }
}

/// The middleware around everything else.
pub async fn surround(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str).to_owned();
    let peer =
        request.extensions().get::<ConnectInfo<SocketAddr>>().map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.0.ip());
    let address = client_address(peer, request.headers(), &state.trusted_proxies);
    let span = tracing::info_span!(
        "request",
        otel.name = %format!("{method} {route}"), otel.kind = "server",
        http.request.method = %method, http.route = %route, http.response.status_code = tracing::field::Empty,
        request_id = %id, client.address = %address,
    );
    trace_context(request.headers()).adopt(&span);
    let https = request.headers().get("x-forwarded-proto").is_some_and(|proto| proto == "https");
    let trusted = state.trusted_proxies.iter().any(|network| network.contains(&peer.to_canonical()));
    request.extensions_mut().insert(Visitor { address, tls: https && trusted, request_id: id.clone() });
    let mut response = next.run(request).instrument(span.clone()).await;

    let status = response.status();
    span.record("http.response.status_code", status.as_u16());
    metrics::get().answered(method.as_str(), &route, status.as_u16(), began.elapsed(), Trace::of(&span));
    if status.is_client_error() || status.is_server_error() {
        response = envelope(response, &id);
    }
    let headers = response.headers_mut();
    for (name, value) in [(REQUEST_ID, id.as_str()), (TRACE_ID, &trace_id(&span))] {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    for (name, value) in SECURITY_HEADERS {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    span.in_scope(|| {
        let (status, ms) = (status.as_u16(), began.elapsed().as_millis());
        if status >= 500 {
            tracing::warn!(status, ms, %method, route, "answered");
        } else {
            tracing::debug!(status, ms, %method, route, "answered");
        }
    });
    response
}

/// Every failure has the same form, also one that a layer made without a body.
fn envelope(mut response: Response, id: &str) -> Response {
    let status = response.status();
    let body = response.extensions_mut().remove::<ErrorBody>().unwrap_or_else(|| {
        let (code, error) = match status {
            StatusCode::PAYLOAD_TOO_LARGE => ("too_large", "the body is too large"),
            StatusCode::SERVICE_UNAVAILABLE => ("timeout", "the request took too long; try again"),
            StatusCode::METHOD_NOT_ALLOWED => ("method_not_allowed", "this path has no such method"),
            s if s.is_server_error() => INTERNAL,
            _ => ("bad_request", "the request is not understood"),
        };
        ErrorBody { success: false, error: error.to_owned(), code, fields: Vec::new(), execution_id: None }
    });
    let mut json = serde_json::to_value(&body).unwrap_or_default();
    json["requestId"] = id.into();
    let (mut parts, _) = response.into_parts();
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    parts.headers.remove(header::CONTENT_LENGTH);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        parts.headers.entry(header::RETRY_AFTER).or_insert(HeaderValue::from_static("5"));
    }
    Response::from_parts(parts, Body::from(json.to_string()))
}
