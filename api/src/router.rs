//! The one table of routes: method, path, handler, permission, class of rate limit.

use std::time::Duration;

use axum::{
    Extension, Router,
    extract::{DefaultBodyLimit, State},
    http::{Method, StatusCode},
    middleware::from_fn_with_state,
    response::IntoResponse,
    routing::{MethodRouter, delete, get, patch, post, put},
};
use common::permission::Permission;
use tower_http::{catch_panic::CatchPanicLayer, limit::RequestBodyLimitLayer, timeout::TimeoutLayer};

use crate::{
    auth::{self, Gate, HOLD},
    context::{self, ClientAddress},
    error::ApiError,
    rate_limit::LimitClass,
    routes::{api_keys, audit, destinations, events, executions, health, jobs, runs, settings, sources},
    state::AppState,
};

/// Largest body.
const MAX_BODY_BYTES: usize = 1 << 20;
/// Longest time of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// [`REQUEST_TIMEOUT`].
    Short,
    /// It waits for an execution: what it may be held, what it may wait, and what it then takes.
    Waits,
    /// It streams until its client leaves.
    Streams,
}

impl Patience {
    fn limit(self) -> Option<Duration> {
        match self {
            Patience::Short => Some(REQUEST_TIMEOUT),
            Patience::Waits => Some(HOLD + Duration::from_secs(60) + REQUEST_TIMEOUT),
            Patience::Streams => None,
        }
    }
}

/// One route.
pub struct Route {
    /// Its method.
    pub method: Method,
    /// Its path, as axum writes it.
    pub path: &'static str,
    /// What its caller must hold; `None` is open to everybody.
    pub permission: Option<Permission>,
    /// What it counts against.
    pub limit: LimitClass,
    patience: Patience,
    handler: MethodRouter<AppState>,
}

impl Route {
    fn waits(self) -> Self {
        Self { patience: Patience::Waits, ..self }
    }

    fn streams(self) -> Self {
        Self { patience: Patience::Streams, ..self }
    }
}

/// All routes.
#[rustfmt::skip]
pub fn table() -> Vec<Route> {
    use LimitClass::{Free, Poll, Read, Write};
    use Permission::{ApiKeysRead, ApiKeysWrite, AuditRead, DestinationsRead, DestinationsWrite, HistoryRead, JobsExecute, JobsRead, JobsWrite, SettingsRead, SettingsWrite, SourcesRead, SourcesWrite};
    let row = |method, path, permission, limit, handler| Route { method, path, permission, limit, patience: Patience::Short, handler };
    vec![
        row(Method::GET,    "/livez",                       None,                    Free,  get(health::livez)),
        row(Method::GET,    "/readyz",                      None,                    Free,  get(health::readyz)),
        row(Method::GET,    "/api/health",                  None,                    Read,  get(health::health)),
        row(Method::GET,    "/api/jobs",                    Some(JobsRead),          Read,  get(jobs::list)),
        row(Method::POST,   "/api/jobs",                    Some(JobsWrite),         Write, post(jobs::create)),
        row(Method::GET,    "/api/jobs/{id}",               Some(JobsRead),          Read,  get(jobs::get)),
        row(Method::PUT,    "/api/jobs/{id}",               Some(JobsWrite),         Write, put(jobs::update)),
        row(Method::DELETE, "/api/jobs/{id}",               Some(JobsWrite),         Write, delete(jobs::delete)),
        row(Method::POST,   "/api/jobs/{id}/run",           Some(JobsExecute),       Write, post(executions::trigger)).waits(),
        row(Method::POST,   "/api/runs",                    Some(JobsExecute),       Write, post(runs::create)).waits(),
        row(Method::GET,    "/api/executions",              Some(HistoryRead),       Read,  get(executions::list)),
        row(Method::GET,    "/api/executions/{id}",         Some(HistoryRead),       Poll,  get(executions::get)).waits(),
        row(Method::GET,    "/api/executions/{id}/events",  Some(HistoryRead),       Read,  get(events::one)).streams(),
        row(Method::GET,    "/api/events",                  Some(HistoryRead),       Read,  get(events::all)).streams(),
        row(Method::POST,   "/api/executions/{id}/cancel",  Some(JobsExecute),       Write, post(executions::cancel)),
        row(Method::POST,   "/api/executions/{id}/retry",   Some(JobsExecute),       Write, post(executions::retry)),
        row(Method::GET,    "/api/sources",                 Some(SourcesRead),       Read,  get(sources::list)),
        row(Method::POST,   "/api/sources",                 Some(SourcesWrite),      Write, post(sources::create)),
        row(Method::GET,    "/api/sources/{id}",            Some(SourcesRead),       Read,  get(sources::get)),
        row(Method::PUT,    "/api/sources/{id}",            Some(SourcesWrite),      Write, put(sources::update)),
        row(Method::DELETE, "/api/sources/{id}",            Some(SourcesWrite),      Write, delete(sources::delete)),
        row(Method::POST,   "/api/sources/{id}/test",       Some(SourcesWrite),      Write, post(sources::test)),
        row(Method::GET,    "/api/destinations",            Some(DestinationsRead),  Read,  get(destinations::list)),
        row(Method::POST,   "/api/destinations",            Some(DestinationsWrite), Write, post(destinations::create)),
        row(Method::GET,    "/api/destinations/{id}",       Some(DestinationsRead),  Read,  get(destinations::get)),
        row(Method::PUT,    "/api/destinations/{id}",       Some(DestinationsWrite), Write, put(destinations::update)),
        row(Method::DELETE, "/api/destinations/{id}",       Some(DestinationsWrite), Write, delete(destinations::delete)),
        row(Method::POST,   "/api/destinations/{id}/test",  Some(DestinationsWrite), Write, post(destinations::test)),
        row(Method::GET,    "/api/settings",                Some(SettingsRead),      Read,  get(settings::get)),
        row(Method::PATCH,  "/api/settings",                Some(SettingsWrite),     Write, patch(settings::change)),
        row(Method::GET,    "/api/api-keys",                Some(ApiKeysRead),       Read,  get(api_keys::list)),
        row(Method::POST,   "/api/api-keys",                Some(ApiKeysWrite),      Write, post(api_keys::create)),
        row(Method::GET,    "/api/api-keys/{id}",           Some(ApiKeysRead),       Read,  get(api_keys::get)),
        row(Method::PUT,    "/api/api-keys/{id}",           Some(ApiKeysWrite),      Write, put(api_keys::update)),
        row(Method::DELETE, "/api/api-keys/{id}",           Some(ApiKeysWrite),      Write, delete(api_keys::delete)),
        row(Method::POST,   "/api/api-keys/{id}/rotate",    Some(ApiKeysWrite),      Write, post(api_keys::rotate)),
        row(Method::GET,    "/api/audit",                   Some(AuditRead),         Read,  get(audit::list)),
    ]
}

/// The service, with everything around it.
pub fn router(state: AppState) -> Router {
    let mut router = Router::new();
    for route in table() {
        let gate = Gate { state: state.clone(), permission: route.permission, limit: route.limit };
        let handler = route.handler.layer(from_fn_with_state(gate, auth::admit));
        let handler = match route.patience.limit() {
            Some(limit) => handler.layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, limit)),
            None => handler,
        };
        router = router.route(route.path, handler);
    }
    router
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        // Refuses by the announced length, before a byte of the body is read.
        .layer(RequestBodyLimitLayer::new(MAX_BODY_BYTES))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(state.clone(), context::surround))
        .with_state(state)
}

async fn unknown_route(state: State<AppState>, address: Extension<ClientAddress>, method: Method) -> ApiError {
    let error = ApiError::new(StatusCode::NOT_FOUND, "route_not_found", "there is no such route");
    stray(&state, &address, &method).await.err().unwrap_or(error)
}

async fn wrong_method(state: State<AppState>, address: Extension<ClientAddress>, method: Method) -> ApiError {
    let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path has no such method");
    stray(&state, &address, &method).await.err().unwrap_or(error)
}

async fn stray(state: &AppState, address: &ClientAddress, method: &Method) -> Result<(), ApiError> {
    let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    auth::limit_stray(state, if reads { LimitClass::Read } else { LimitClass::Write }, address.0).await
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> axum::response::Response {
    let text =
        panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    tracing::error!(panic = text.unwrap_or_default(), "a handler panicked");
    StatusCode::INTERNAL_SERVER_ERROR.into_response()
}
