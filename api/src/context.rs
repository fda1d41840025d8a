//! What surrounds every request: its id, its trace, and the envelope of its error.

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use axum::{
    body::Body,
    extract::{ConnectInfo, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version, header, uri::Authority},
    middleware::Next,
    response::Response,
};
use common::{
    audit::Actor,
    metrics::{self, Trace},
    telemetry::{
        Span, TraceContext,
        span::{SpanContext, SpanKind, flush_soon},
    },
};
use tracing::Instrument;

use crate::{
    called::{Called, called},
    client_address::client_address,
    error::{ErrorBody, INTERNAL},
    state::AppState,
};

/// Header with the request's id, the caller's where it is sane.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Header with the trace's id.
pub const TRACE_ID: HeaderName = HeaderName::from_static("x-trace-id");

/// Of an answer that is read by programs: nothing in it may be shown, framed or run by a browser.
const SECURITY_HEADERS: [(HeaderName, &str); 5] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// Marks a failure that is a page already, and no JSON.
#[derive(Clone, Copy, Debug)]
pub struct ForPeople;

/// Where a request comes from. Everything takes it from the request's extensions.
#[derive(Clone, Debug)]
pub struct Visitor {
    /// The address of the client.
    pub address: IpAddr,
    /// Whether the client speaks TLS: a trusted proxy says so.
    pub tls: bool,
    /// The id of the request.
    pub request_id: String,
    /// The span of the request.
    pub span: SpanContext,
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
    let all = |name: &str| headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).collect::<Vec<_>>();
    // As W3C has it: of several parents none counts, and several lists of vendors are one.
    let parent = match all("traceparent")[..] {
        [only] => Some(only.to_owned()),
        _ => None,
    };
    let states = all("tracestate");
    TraceContext { traceparent: parent, tracestate: (!states.is_empty()).then(|| states.join(",")) }
}

/// Attributes of a span of a request, usually.
const ATTRIBUTES: usize = 11;

/// Methods that a span names; others are `_OTHER`.
const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"];

/// The method of a request, if it is one that a span names.
fn known_method(request: &Request) -> Option<&'static str> {
    KNOWN.into_iter().find(|known| *known == request.method().as_str())
}

/// The span of a request, which continues its caller's, by the conventions of OpenTelemetry for HTTP servers. The query is
/// left out: what a client puts there is not ours to spread. `method` is a known one.
fn span_of(
    request: &Request,
    method: Option<&'static str>,
    called: Option<Called>,
    address: IpAddr,
    https: bool,
) -> Span {
    let parent = trace_context(request.headers()).span();
    let mut span = Span::root(&parent, SpanKind::Server, called.map_or(method.unwrap_or("HTTP"), |called| called.span));
    if !span.is_recording() {
        return span;
    }
    span.reserve(ATTRIBUTES);
    span.set("http.request.method", method.unwrap_or("_OTHER"));
    if method.is_none() {
        span.set("http.request.method_original", request.method().as_str().to_owned());
    }
    if let Some(called) = called {
        span.set("http.route", called.route);
    }
    span.set("url.path", request.uri().path().to_owned());
    span.set("url.scheme", if https { "https" } else { "http" });
    span.set("client.address", address.to_string());
    span.set("network.protocol.version", if request.version() == Version::HTTP_10 { "1.0" } else { "1.1" });
    let headers = request.headers();
    if let Some(host) = headers.get(header::HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok()) {
        span.set("server.address", host.host().to_owned());
        if let Some(port) = host.port_u16() {
            span.set("server.port", i64::from(port));
        }
    }
    if let Some(agent) = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()) {
        span.set("user_agent.original", agent.to_owned());
    }
    span
}

/// The middleware around everything else.
pub async fn surround(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let matched = request.extensions().get::<MatchedPath>();
    let known = known_method(&request);
    let called = matched.map(|route| called(known.unwrap_or("HTTP"), route.as_str()));
    let peer =
        request.extensions().get::<ConnectInfo<SocketAddr>>().map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.0.ip());
    let address = client_address(peer, request.headers(), &state.trusted_proxies);
    let https = request.headers().get("x-forwarded-proto").is_some_and(|proto| proto == "https");
    let trusted = state.trusted_proxies.iter().any(|network| network.contains(&peer.to_canonical()));
    let mut span = span_of(&request, known, called, address, https && trusted);
    let trace_id = span.context().trace_id().to_string();
    let route = called.map_or("unknown", |called| called.route);
    let log = tracing::info_span!("request", %method, route, request_id = %id, trace_id, client = %address);
    let context = span.context().clone();
    let visitor = Visitor { address, tls: https && trusted, request_id: id.clone(), span: context };
    request.extensions_mut().insert(visitor);
    let mut response = next.run(request).instrument(log.clone()).await;

    let status = response.status();
    span.set("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        span.fail(status.as_u16().to_string(), "");
    }
    metrics::get().answered(method.as_str(), route, status.as_u16(), began.elapsed(), Trace::of(span.context()));
    if (status.is_client_error() || status.is_server_error()) && response.extensions().get::<ForPeople>().is_none() {
        response = envelope(response, &id);
    }
    let headers = response.headers_mut();
    for (name, value) in [(REQUEST_ID, id.as_str()), (TRACE_ID, &trace_id)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    for (name, value) in SECURITY_HEADERS {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    drop(span);
    // A run that was triggered names this span and others of this process as parents. Were they left to the next batch, a
    // process that is killed before it would leave a trace without its beginning.
    if !method.is_safe() {
        flush_soon();
    }
    log.in_scope(|| {
        let (status, ms) = (status.as_u16(), began.elapsed().as_millis());
        if status >= 500 {
            tracing::warn!(status, ms, "answered");
        } else {
            tracing::debug!(status, ms, "answered");
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
