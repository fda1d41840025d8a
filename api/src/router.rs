//! The one table of routes: method, path, handler, permission, class of rate limit.

use std::time::Duration;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::{Method, StatusCode},
    middleware::{from_fn, from_fn_with_state},
    response::IntoResponse,
    routing::{MethodRouter, delete, get, patch, post, put},
};
use common::permission::Permission;
use tower_http::{catch_panic::CatchPanicLayer, limit::RequestBodyLimitLayer, timeout::TimeoutLayer};

use crate::{
    auth, context,
    error::ApiError,
    routes::{destinations, executions, health, jobs, settings, sources},
    state::AppState,
};

/// Largest body.
const MAX_BODY_BYTES: usize = 1 << 20;
/// Longest time of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Which limit a request counts against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitClass {
    /// GET and HEAD.
    Read,
    /// POST, PUT, PATCH and DELETE.
    Write,
    /// Probes: outside the limits.
    Free,
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
    handler: MethodRouter<AppState>,
}

/// All routes.
#[rustfmt::skip]
pub fn table() -> Vec<Route> {
    use LimitClass::{Free, Read, Write};
    use Permission::{DestinationsRead, DestinationsWrite, HistoryRead, JobsExecute, JobsRead, JobsWrite, SettingsRead, SettingsWrite, SourcesRead, SourcesWrite};
    let row = |method, path, permission, limit, handler| Route { method, path, permission, limit, handler };
    vec![
        row(Method::GET,    "/livez",                       None,                    Free,  get(health::livez)),
        row(Method::GET,    "/readyz",                      None,                    Free,  get(health::readyz)),
        row(Method::GET,    "/api/health",                  None,                    Free,  get(health::health)),
        row(Method::GET,    "/api/jobs",                    Some(JobsRead),          Read,  get(jobs::list)),
        row(Method::POST,   "/api/jobs",                    Some(JobsWrite),         Write, post(jobs::create)),
        row(Method::GET,    "/api/jobs/{id}",               Some(JobsRead),          Read,  get(jobs::get)),
        row(Method::PUT,    "/api/jobs/{id}",               Some(JobsWrite),         Write, put(jobs::update)),
        row(Method::DELETE, "/api/jobs/{id}",               Some(JobsWrite),         Write, delete(jobs::delete)),
        row(Method::POST,   "/api/jobs/{id}/run",           Some(JobsExecute),       Write, post(executions::trigger)),
        row(Method::GET,    "/api/executions",              Some(HistoryRead),       Read,  get(executions::list)),
        row(Method::GET,    "/api/executions/{id}",         Some(HistoryRead),       Read,  get(executions::get)),
        row(Method::POST,   "/api/executions/{id}/cancel",  Some(JobsExecute),       Write, post(executions::cancel)),
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
    ]
}

/// The service, with everything around it.
pub fn router(state: AppState) -> Router {
    let mut router = Router::new();
    for route in table() {
        let handler = match route.permission {
            Some(permission) => route.handler.layer(from_fn_with_state((state.clone(), permission), auth::authorize)),
            None => route.handler,
        };
        router = router.route(route.path, handler);
    }
    router
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        // Refuses by the announced length, before a byte of the body is read.
        .layer(RequestBodyLimitLayer::new(MAX_BODY_BYTES))
        .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, REQUEST_TIMEOUT))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(context::surround))
        .with_state(state)
}

async fn unknown_route() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "route_not_found", "there is no such route")
}

async fn wrong_method() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path has no such method")
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> axum::response::Response {
    let text =
        panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    tracing::error!(panic = text.unwrap_or_default(), "a handler panicked");
    StatusCode::INTERNAL_SERVER_ERROR.into_response()
}
