//! The OpenAPI document, generated from the handlers, and the reference page, from files in this binary.

mod bodies;

use std::sync::{Arc, LazyLock};

use axum::{
    Json,
    extract::Path,
    http::{HeaderValue, header},
    response::{IntoResponse, Redirect, Response},
};
use serde_json::{Value, json};
use utoipa::{
    Modify, OpenApi,
    openapi::{
        Content, Object, Ref, RefOr, Required, Response as Answer, ResponseBuilder, Type,
        path::{Operation, ParameterBuilder, ParameterIn},
        security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};

use crate::{
    auth::Access,
    error::ApiError,
    rate_limit::LimitClass,
    router::{Route, table},
    routes::{
        api_keys, audit, cluster, destinations, downloads, events, executions, freshness, health, jobs, restores, runs,
        sessions, settings, setup, sources, users, webhooks,
    },
};

pub use bodies::{
    Alive, Data, Done, Failure, Health, Identified, KeyWithSecret, Polled, RunsBody, SetUpNeeded, SignedInBody,
    Triggered, WebhookWithSecret,
};

#[derive(OpenApi)]
#[openapi(
    info(title = "DBackup", description = "Trigger database backups, poll them until Success or Failed, and read their logs. Ids are opaque; wherever the id of a source, destination or job is taken, its slug is too. Times are UTC, sizes bytes, durations milliseconds."),
    paths(
        health::livez,
        health::readyz,
        health::health,
        freshness::backups,
        jobs::list,
        jobs::create,
        jobs::get,
        jobs::update,
        jobs::delete,
        executions::trigger,
        executions::list,
        executions::get,
        executions::cancel,
        executions::retry,
        downloads::download,
        restores::create,
        runs::create,
        events::one,
        events::all,
        sources::engines,
        sources::list,
        sources::create,
        sources::get,
        sources::update,
        sources::delete,
        sources::test,
        destinations::kinds,
        destinations::list,
        destinations::create,
        destinations::get,
        destinations::update,
        destinations::delete,
        destinations::test,
        settings::get,
        settings::change,
        webhooks::list,
        webhooks::create,
        webhooks::get,
        webhooks::update,
        webhooks::delete,
        webhooks::rotate,
        webhooks::test,
        api_keys::list,
        api_keys::create,
        api_keys::get,
        api_keys::update,
        api_keys::delete,
        api_keys::rotate,
        setup::needed,
        setup::set_up,
        sessions::get,
        sessions::sign_in,
        sessions::sign_out,
        sessions::refresh,
        sessions::change_password,
        sessions::list,
        sessions::revoke,
        users::list,
        users::create,
        users::get,
        users::update,
        users::delete,
        audit::list,
        cluster::get,
        cluster::cordon,
        cluster::uncordon
    ),
    components(schemas(Failure)),
    modifiers(&FromTheTable)
)]
struct Document;

/// What the route table knows of every operation: who may use it, and how it may fail.
struct FromTheTable;

impl Modify for FromTheTable {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        document.info.version = env!("CARGO_PKG_VERSION").to_owned();
        let components = document.components.get_or_insert_default();
        let bearer =
            HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("dbm_…").description(Some("an API key"));
        components.add_security_scheme("apiKey", SecurityScheme::Http(bearer.build()));
        let cookie = ApiKeyValue::with_description(
            crate::auth::token::SESSION_COOKIE,
            "a session; changes must come from the same origin",
        );
        components.add_security_scheme("session", SecurityScheme::ApiKey(ApiKey::Cookie(cookie)));
        for route in table() {
            let operation = document.paths.paths.get_mut(route.path).and_then(|item| operation_of(item, &route));
            if let Some(operation) = operation {
                complete(operation, &route);
            }
        }
    }
}

fn operation_of<'a>(item: &'a mut utoipa::openapi::PathItem, route: &Route) -> Option<&'a mut Operation> {
    match route.method.as_str() {
        "GET" => item.get.as_mut(),
        "POST" => item.post.as_mut(),
        "PUT" => item.put.as_mut(),
        "PATCH" => item.patch.as_mut(),
        "DELETE" => item.delete.as_mut(),
        _ => None,
    }
}

/// `getJobsId` of `GET /api/jobs/{id}`: unique, since the route is.
fn operation_id(route: &Route) -> String {
    let words = route
        .path
        .trim_start_matches("/api")
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty());
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    route.method.as_str().to_lowercase() + &words.map(capital).collect::<String>()
}

fn complete(operation: &mut Operation, route: &Route) {
    operation.operation_id = Some(operation_id(route));
    let mut failures =
        vec![("400", "something in the request is malformed"), ("500", "a bug; the log has it under the requestId")];
    if route.limit != LimitClass::Free {
        failures.push(("429", "more requests than the limit, or a full queue: see Retry-After"));
    }
    failures.push(("503", "the database does not answer, or no worker: a retry is right"));
    match route.access {
        Access::Open => {
            operation.security = Some(vec![SecurityRequirement::default()]);
            if route.limit == LimitClass::SignIn || route.path.ends_with("/refresh") {
                failures.push(("401", "refused"));
                failures.push(("403", "from a page of another origin, or not the token"));
            }
        }
        access => {
            let either = ["apiKey", "session"].map(|name| SecurityRequirement::new::<_, [&str; 0], &str>(name, []));
            operation.security = Some(either.into());
            failures.push(("401", "no key or session, or one that does not count"));
            failures.push(("403", "the permission is missing"));
            if let Access::Needs(permission) = access {
                let text = operation.description.take().unwrap_or_default();
                let permission = format!("Permission: `{}`.", permission.as_str());
                operation.description = Some(format!("{}\n\n{permission}", text.trim()).trim().to_owned());
            }
        }
    }
    if route.path.contains('{') {
        let id = ParameterBuilder::new()
            .name("id")
            .parameter_in(ParameterIn::Path)
            .required(Required::True)
            .description(Some("id, or slug where the thing has one (of a worker its name)"))
            .schema(Some(Object::with_type(Type::String)));
        operation.parameters.get_or_insert_default().insert(0, id.build().into());
        failures.push(("404", "there is no such thing, or the key may not see it"));
    }
    if route.path == "/api/runs" {
        failures.push(("404", "there is no such job"));
    }
    if route.method != axum::http::Method::GET {
        failures.push(("409", "it is in use, taken, or in another state"));
        failures.push(("413", "the body is larger than a megabyte"));
        failures.push(("422", "a field is well formed but cannot be"));
    }
    for (status, text) in failures {
        operation.responses.responses.entry(status.to_owned()).or_insert_with(|| RefOr::T(failure(text)));
    }
}

fn failure(text: &str) -> Answer {
    let schema = Ref::from_schema_name("Failure");
    ResponseBuilder::new().description(text).content("application/json", Content::new(Some(schema))).build()
}

static JSON: LazyLock<Value> = LazyLock::new(|| json!(Document::openapi()));

/// The document.
pub fn document() -> &'static Value {
    &JSON
}

/// `/api/openapi.json`.
pub async fn json() -> Json<&'static Value> {
    Json(document())
}

/// `/api/docs`: to the page.
pub async fn docs() -> Redirect {
    Redirect::permanent("/api/docs/")
}

/// The page itself.
pub async fn docs_page() -> Result<Response, ApiError> {
    file("")
}

/// What the page loads; nothing comes from elsewhere.
pub async fn docs_file(Path(path): Path<String>) -> Result<Response, ApiError> {
    file(&path)
}

fn file(path: &str) -> Result<Response, ApiError> {
    static CONFIG: LazyLock<Arc<utoipa_swagger_ui::Config<'static>>> =
        LazyLock::new(|| Arc::new(utoipa_swagger_ui::Config::from("/api/openapi.json")));
    let found = utoipa_swagger_ui::serve(path, CONFIG.clone()).ok().flatten();
    let found = found.ok_or_else(|| ApiError::not_found("File", "file_not_found"))?;
    let mut response = found.bytes.into_owned().into_response();
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&found.content_type) {
        headers.insert(header::CONTENT_TYPE, value);
    }
    // The page styles its elements one by one, and shows pictures that are part of its styles.
    let policy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; \
                  frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    Ok(response)
}
