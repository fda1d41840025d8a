//! The one table of routes: method, path, handler, permission, class of rate limit.

use std::time::Duration;

use axum::{
    Extension, Router,
    extract::{DefaultBodyLimit, State},
    http::{Method, StatusCode},
    middleware::{from_fn, from_fn_with_state},
    response::IntoResponse,
    routing::{MethodRouter, delete, get, patch, post, put},
};
use common::permission::Permission;
use tower_http::{catch_panic::CatchPanicLayer, limit::RequestBodyLimitLayer, timeout::TimeoutLayer};

use crate::{
    auth::{self, Access, Gate, HOLD},
    context::{self, Visitor},
    error::ApiError,
    openapi,
    rate_limit::LimitClass,
    routes::{
        api_keys, audit, cluster, destinations, downloads, events, executions, freshness, health, jobs, restores, runs,
        sessions, settings, setup, sources, users, webhooks,
    },
    state::AppState,
    ui,
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
    /// Who may use it.
    pub access: Access,
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

    /// A page of the console, or a file of it.
    pub fn page(path: &'static str, access: Access, limit: LimitClass, handler: MethodRouter<AppState>) -> Self {
        Self { method: Method::GET, path, access, limit, patience: Patience::Short, handler }
    }

    /// Its handler, with what stands before it.
    fn guarded(self, state: &AppState) -> MethodRouter<AppState> {
        let gate = Gate { state: state.clone(), access: self.access, limit: self.limit };
        let handler = self.handler.layer(from_fn_with_state(gate, auth::admit));
        match self.patience.limit() {
            Some(limit) => handler.layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, limit)),
            None => handler,
        }
    }
}

/// All routes but the pages of the console: see [`ui::pages`].
#[rustfmt::skip]
pub fn table() -> Vec<Route> {
    use Access::{Identified, Needs, Open};
    use LimitClass::{Free, Poll, Read, SignIn, Write};
    use Permission::{ApiKeysRead, ApiKeysWrite, AuditRead, ClusterRead, DestinationsRead, DestinationsWrite, HistoryRead, JobsExecute, JobsRead, JobsWrite, SettingsRead, SettingsWrite, SourcesRead, SourcesWrite, StorageDownload, StorageRestore, UsersRead, UsersWrite};
    let row = |method, path, access, limit, handler| Route { method, path, access, limit, patience: Patience::Short, handler };
    vec![
        row(Method::GET,    "/livez",                          Open,                      Free,   get(health::livez)),
        row(Method::GET,    "/readyz",                         Open,                      Free,   get(health::readyz)),
        row(Method::GET,    "/api/health",                     Open,                      Read,   get(health::health)),
        row(Method::GET,    "/api/health/backups",             Needs(JobsRead),           Read,   get(freshness::backups)),
        row(Method::GET,    "/api/jobs",                       Needs(JobsRead),           Read,   get(jobs::list)),
        row(Method::POST,   "/api/jobs",                       Needs(JobsWrite),          Write,  post(jobs::create)),
        row(Method::GET,    "/api/jobs/{id}",                  Needs(JobsRead),           Read,   get(jobs::get)),
        row(Method::PUT,    "/api/jobs/{id}",                  Needs(JobsWrite),          Write,  put(jobs::update)),
        row(Method::DELETE, "/api/jobs/{id}",                  Needs(JobsWrite),          Write,  delete(jobs::delete)),
        row(Method::POST,   "/api/jobs/{id}/run",              Needs(JobsExecute),        Write,  post(executions::trigger)).waits(),
        row(Method::POST,   "/api/runs",                       Needs(JobsExecute),        Write,  post(runs::create)).waits(),
        row(Method::GET,    "/api/executions",                 Needs(HistoryRead),        Read,   get(executions::list)),
        row(Method::GET,    "/api/executions/{id}",            Needs(HistoryRead),        Poll,   get(executions::get)).waits(),
        row(Method::GET,    "/api/executions/{id}/events",     Needs(HistoryRead),        Read,   get(events::one)).streams(),
        row(Method::GET,    "/api/events",                     Needs(HistoryRead),        Read,   get(events::all)).streams(),
        row(Method::POST,   "/api/executions/{id}/cancel",     Needs(JobsExecute),        Write,  post(executions::cancel)),
        row(Method::POST,   "/api/executions/{id}/retry",      Needs(JobsExecute),        Write,  post(executions::retry)),
        row(Method::GET,    "/api/executions/{id}/artifacts/{artifactId}/download", Needs(StorageDownload), Read, get(downloads::download)),
        row(Method::POST,   "/api/executions/{id}/restore",    Needs(StorageRestore),     Write,  post(restores::create)).waits(),
        row(Method::GET,    "/api/sources",                    Needs(SourcesRead),        Read,   get(sources::list)),
        row(Method::POST,   "/api/sources",                    Needs(SourcesWrite),       Write,  post(sources::create)),
        row(Method::GET,    "/api/sources/{id}",               Needs(SourcesRead),        Read,   get(sources::get)),
        row(Method::PUT,    "/api/sources/{id}",               Needs(SourcesWrite),       Write,  put(sources::update)),
        row(Method::DELETE, "/api/sources/{id}",               Needs(SourcesWrite),       Write,  delete(sources::delete)),
        row(Method::POST,   "/api/sources/{id}/test",          Needs(SourcesWrite),       Write,  post(sources::test)),
        row(Method::GET,    "/api/destinations",               Needs(DestinationsRead),   Read,   get(destinations::list)),
        row(Method::POST,   "/api/destinations",               Needs(DestinationsWrite),  Write,  post(destinations::create)),
        row(Method::GET,    "/api/destinations/{id}",          Needs(DestinationsRead),   Read,   get(destinations::get)),
        row(Method::PUT,    "/api/destinations/{id}",          Needs(DestinationsWrite),  Write,  put(destinations::update)),
        row(Method::DELETE, "/api/destinations/{id}",          Needs(DestinationsWrite),  Write,  delete(destinations::delete)),
        row(Method::POST,   "/api/destinations/{id}/test",     Needs(DestinationsWrite),  Write,  post(destinations::test)),
        row(Method::GET,    "/api/engines",                    Needs(SourcesRead),        Read,   get(sources::engines)),
        row(Method::GET,    "/api/destination-kinds",          Needs(DestinationsRead),   Read,   get(destinations::kinds)),
        row(Method::GET,    "/api/settings",                   Needs(SettingsRead),       Read,   get(settings::get)),
        row(Method::PATCH,  "/api/settings",                   Needs(SettingsWrite),      Write,  patch(settings::change)),
        row(Method::GET,    "/api/webhooks",                   Needs(SettingsRead),       Read,   get(webhooks::list)),
        row(Method::POST,   "/api/webhooks",                   Needs(SettingsWrite),      Write,  post(webhooks::create)),
        row(Method::GET,    "/api/webhooks/{id}",              Needs(SettingsRead),       Read,   get(webhooks::get)),
        row(Method::PUT,    "/api/webhooks/{id}",              Needs(SettingsWrite),      Write,  put(webhooks::update)),
        row(Method::DELETE, "/api/webhooks/{id}",              Needs(SettingsWrite),      Write,  delete(webhooks::delete)),
        row(Method::POST,   "/api/webhooks/{id}/rotate",       Needs(SettingsWrite),      Write,  post(webhooks::rotate)),
        row(Method::POST,   "/api/webhooks/{id}/test",         Needs(SettingsWrite),      Write,  post(webhooks::test)),
        row(Method::GET,    "/api/api-keys",                   Needs(ApiKeysRead),        Read,   get(api_keys::list)),
        row(Method::POST,   "/api/api-keys",                   Needs(ApiKeysWrite),       Write,  post(api_keys::create)),
        row(Method::GET,    "/api/api-keys/{id}",              Needs(ApiKeysRead),        Read,   get(api_keys::get)),
        row(Method::PUT,    "/api/api-keys/{id}",              Needs(ApiKeysWrite),       Write,  put(api_keys::update)),
        row(Method::DELETE, "/api/api-keys/{id}",              Needs(ApiKeysWrite),       Write,  delete(api_keys::delete)),
        row(Method::POST,   "/api/api-keys/{id}/rotate",       Needs(ApiKeysWrite),       Write,  post(api_keys::rotate)),
        row(Method::GET,    "/api/openapi.json",               Open,                      Read,   get(openapi::json)),
        row(Method::GET,    "/api/docs",                       Open,                      Read,   get(openapi::docs)),
        row(Method::GET,    "/api/docs/",                      Open,                      Read,   get(openapi::docs_page)),
        row(Method::GET,    "/api/docs/{*file}",               Open,                      Read,   get(openapi::docs_file)),
        row(Method::GET,    "/api/setup",                      Open,                      Read,   get(setup::needed)),
        row(Method::POST,   "/api/setup",                      Open,                      SignIn, post(setup::set_up)),
        row(Method::GET,    "/api/session",                    Identified,                Read,   get(sessions::get)),
        row(Method::POST,   "/api/session",                    Open,                      SignIn, post(sessions::sign_in)),
        row(Method::DELETE, "/api/session",                    Identified,                Write,  delete(sessions::sign_out)),
        row(Method::POST,   "/api/session/refresh",            Open,                      Write,  post(sessions::refresh)),
        row(Method::POST,   "/api/session/password",           Identified,                SignIn, post(sessions::change_password)),
        row(Method::GET,    "/api/sessions",                   Identified,                Read,   get(sessions::list)),
        row(Method::DELETE, "/api/sessions/{id}",              Identified,                Write,  delete(sessions::revoke)),
        row(Method::GET,    "/api/users",                      Needs(UsersRead),          Read,   get(users::list)),
        row(Method::POST,   "/api/users",                      Needs(UsersWrite),         Write,  post(users::create)),
        row(Method::GET,    "/api/users/{id}",                 Needs(UsersRead),          Read,   get(users::get)),
        row(Method::PUT,    "/api/users/{id}",                 Needs(UsersWrite),         Write,  put(users::update)),
        row(Method::DELETE, "/api/users/{id}",                 Needs(UsersWrite),         Write,  delete(users::delete)),
        row(Method::GET,    "/api/cluster",                    Needs(ClusterRead),        Read,   get(cluster::get)),
        row(Method::POST,   "/api/cluster/workers/{id}/cordon", Needs(SettingsWrite),     Write,  post(cluster::cordon)),
        row(Method::POST,   "/api/cluster/workers/{id}/uncordon", Needs(SettingsWrite),   Write,  post(cluster::uncordon)),
        row(Method::GET,    "/api/audit",                      Needs(AuditRead),          Read,   get(audit::list)),
    ]
}

/// The service, with everything around it.
pub fn router(state: AppState) -> Router {
    let mut router = Router::new();
    for route in table() {
        router = router.route(route.path, route.guarded(&state));
    }
    for page in ui::pages() {
        router = router.route(page.path, page.guarded(&state).layer(from_fn(ui::present)));
    }
    surrounded(router, state)
}

/// With what surrounds every request, also one that reaches no route.
fn surrounded(router: Router<AppState>, state: AppState) -> Router {
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

async fn unknown_route(state: State<AppState>, visitor: Extension<Visitor>, method: Method) -> ApiError {
    let error = ApiError::new(StatusCode::NOT_FOUND, "route_not_found", "there is no such route");
    stray(&state, &visitor, &method).await.err().unwrap_or(error)
}

async fn wrong_method(state: State<AppState>, visitor: Extension<Visitor>, method: Method) -> ApiError {
    let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path has no such method");
    stray(&state, &visitor, &method).await.err().unwrap_or(error)
}

async fn stray(state: &AppState, visitor: &Visitor, method: &Method) -> Result<(), ApiError> {
    let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    auth::limit_stray(state, if reads { LimitClass::Read } else { LimitClass::Write }, visitor.address).await
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> axum::response::Response {
    let text =
        panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    tracing::error!(panic = text.unwrap_or_default(), "a handler panicked");
    StatusCode::INTERNAL_SERVER_ERROR.into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::{body::to_bytes, extract::Request};
    use common::{config::Timing, db::Db, queue::Wakeups, seal::SealKey};
    use tokio_util::sync::CancellationToken;
    use tower::ServiceExt;

    use super::*;
    use crate::{ApiConfig, server::Stop};

    /// A process whose database is never asked.
    fn state() -> AppState {
        let db = Db::new(&"postgres://nobody@127.0.0.1:1/nothing".into(), "test", 1).expect("a URL");
        let key = Arc::new(SealKey::parse(&SealKey::generate()).expect("a key"));
        let stop = CancellationToken::new();
        let [second, minute] = [Duration::from_secs(1), Duration::from_secs(60)];
        let timing = Timing {
            lease: minute,
            heartbeat: second,
            heartbeat_timeout: second,
            fence: second,
            poll: minute,
            ticker: minute,
        };
        let wakeups = Wakeups::start(db.clone(), stop.clone());
        let config = ApiConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            trusted_proxies: Vec::new(),
            redis: None,
            local_paths: Vec::new(),
            shutdown_delay: Duration::ZERO,
            timing,
        };
        AppState::start(&config, "test".to_owned(), db, key, wakeups, Stop::after(stop, Duration::ZERO))
    }

    #[tokio::test]
    async fn a_panic_is_answered_with_the_envelope_and_tells_the_client_nothing_of_itself() {
        async fn panics() -> &'static str {
            panic!("a secret of the handler")
        }
        let router = surrounded(Router::new().route("/panics", get(panics)), state());
        let request = Request::get("/panics").body(axum::body::Body::empty()).expect("a request");
        let response = router.oneshot(request).await.expect("answers");
        assert_eq!(response.status(), 500);
        let header = response.headers()["x-request-id"].to_str().expect("text").to_owned();
        let body = to_bytes(response.into_body(), 10_000).await.expect("a body");
        let answer: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(
            (answer["code"].as_str(), answer["requestId"].as_str()),
            (Some("internal_error"), Some(header.as_str()))
        );
        assert!(!answer.to_string().contains("secret"), "{answer}");
    }
}
