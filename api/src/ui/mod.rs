//! The web console: pages rendered here from the database, for whoever may see what they show. What a page changes, its
//! script changes by the public API with the same session; so a page grants nothing that the API does not.
//!
//! What is absent on purpose: a build of scripts, anything that is loaded from elsewhere, inline scripts and styles, and
//! polling. A page hears of changes by `/api/events`, and then asks for itself again.

mod access;
mod assets;
mod cluster;
mod connections;
mod entrance;
mod executions;
mod form;
mod jobs;
mod overview;
mod restore;
mod trigger;
mod view;
mod webhooks;

use askama::Template;
use axum::{
    extract::{FromRequestParts, Request},
    http::{HeaderValue, StatusCode, header, request::Parts},
    middleware::Next,
    response::{Html, IntoResponse, Redirect, Response},
    routing::{MethodRouter, get},
};
use common::{
    job::{self, Job},
    permission::{Permission, PermissionSet},
};

use crate::{
    auth::{Access, Caller},
    context::ForPeople,
    error::{ApiError, ErrorBody},
    rate_limit::LimitClass,
    router::Route,
    state::AppState,
};

use form::Form;
pub use view::asset;
use view::icon;

/// Nothing from elsewhere, nothing inline, in no frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// All pages of the console, and their files. An anonymous request for a page that needs somebody is sent to the sign-in.
#[rustfmt::skip]
pub fn pages() -> Vec<Route> {
    use Access::{Identified, Needs, Open};
    use Permission::{ApiKeysRead, ApiKeysWrite, AuditRead, ClusterRead, DestinationsRead, DestinationsWrite, HistoryRead, JobsRead, JobsWrite, SettingsRead, SettingsWrite, SourcesRead, SourcesWrite, StorageRestore, UsersRead, UsersWrite};
    let page = |path, access, handler: MethodRouter<AppState>| Route::page(path, access, LimitClass::Page, handler);
    vec![
        page("/",                          Identified,               get(overview::show)),
        page("/setup",                     Open,                     get(entrance::set_up)),
        page("/sign-in",                   Open,                     get(entrance::sign_in)),
        page("/jobs",                      Needs(JobsRead),          get(jobs::list)),
        page("/jobs/new",                  Needs(JobsWrite),         get(jobs::make)),
        page("/jobs/{id}/edit",            Needs(JobsWrite),         get(jobs::edit)),
        page("/jobs/{id}/trigger",         Needs(JobsRead),          get(trigger::show)),
        page("/executions",                Needs(HistoryRead),       get(executions::list)),
        page("/executions/{id}",           Needs(HistoryRead),       get(executions::show)),
        page("/executions/{id}/restore",   Needs(StorageRestore),    get(restore::make)),
        page("/sources",                   Needs(SourcesRead),       get(connections::sources)),
        page("/sources/new",               Needs(SourcesWrite),      get(connections::make_source)),
        page("/sources/{id}",              Needs(SourcesRead),       get(connections::source)),
        page("/sources/{id}/edit",         Needs(SourcesWrite),      get(connections::edit_source)),
        page("/destinations",              Needs(DestinationsRead),  get(connections::destinations)),
        page("/destinations/new",          Needs(DestinationsWrite), get(connections::make_destination)),
        page("/destinations/{id}",         Needs(DestinationsRead),  get(connections::destination)),
        page("/destinations/{id}/edit",    Needs(DestinationsWrite), get(connections::edit_destination)),
        page("/access/api-keys",           Needs(ApiKeysRead),       get(access::keys)),
        page("/access/api-keys/new",       Needs(ApiKeysWrite),      get(access::make_key)),
        page("/access/users",              Needs(UsersRead),         get(access::users)),
        page("/access/users/new",          Needs(UsersWrite),        get(access::make_user)),
        page("/access/users/{id}/edit",    Needs(UsersWrite),        get(access::edit_user)),
        page("/access/sessions",           Identified,               get(access::sessions)),
        page("/access/audit-log",          Needs(AuditRead),         get(access::audit_log)),
        page("/settings/system",           Needs(SettingsRead),      get(cluster::system)),
        page("/settings/webhooks",         Needs(SettingsRead),      get(webhooks::list)),
        page("/settings/webhooks/new",     Needs(SettingsWrite),     get(webhooks::make)),
        page("/settings/webhooks/{id}/edit", Needs(SettingsWrite),   get(webhooks::edit)),
        page("/settings/cluster",          Needs(ClusterRead),       get(cluster::show)),
        Route::page("/assets/{version}/{*file}", Open, LimitClass::Free, get(assets::file)),
    ]
}

/// The frame around a page: who looks at it, and where they are. Handlers take it from the request.
pub struct Frame {
    path: String,
    caller: Option<Caller>,
}

impl FromRequestParts<AppState> for Frame {
    type Rejection = std::convert::Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, Self::Rejection> {
        Ok(Self { path: parts.uri.path().to_owned(), caller: parts.extensions.get::<Caller>().cloned() })
    }
}

impl Frame {
    /// Whether whoever looks may do something.
    fn may(&self, permission: Permission) -> bool {
        self.caller.as_ref().is_some_and(|caller| caller.permissions().allows(permission))
    }

    /// Whether they may do all of these.
    fn covers(&self, permissions: &PermissionSet) -> bool {
        self.caller.as_ref().is_some_and(|caller| caller.permissions().lacking(permissions).is_empty())
    }

    /// Their name; empty where nobody is signed in.
    fn name(&self) -> &str {
        self.caller.as_ref().map_or("", Caller::name)
    }

    /// Groups of the navigation, without what they may not see.
    fn navigation(&self) -> Vec<view::NavGroup> {
        view::navigation(&self.path, |permission| permission.is_none_or(|permission| self.may(permission)))
    }
}

/// A page as an answer.
fn html(page: &impl Template) -> Result<Response, ApiError> {
    let text = page.render().map_err(|error| {
        tracing::error!(%error, "a page could not be rendered");
        ApiError::internal()
    })?;
    let mut response = Html(text).into_response();
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    Ok(response)
}

/// A page that is a form.
#[derive(Template)]
#[template(path = "form_page.html")]
struct FormPage {
    frame: Frame,
    title: String,
    lead: &'static str,
    form: Form,
}

/// All jobs that the caller may see; none for whoever may read none.
async fn jobs(state: &AppState, caller: &Caller) -> Result<Vec<Job>, ApiError> {
    if !caller.permissions().allows(Permission::JobsRead) {
        return Ok(Vec::new());
    }
    let filter = job::Filter { only: caller.only(), ..Default::default() };
    Ok(state.ask(async |conn| job::list(conn, &filter).await).await?.rows)
}

#[derive(Template)]
#[template(path = "error.html")]
struct ErrorPage<'a> {
    frame: Frame,
    status: StatusCode,
    error: &'a str,
}

/// Makes pages of failures: to the sign-in where nobody is signed in, else what is wrong, for people.
pub async fn present(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let wanted = request.uri().path_and_query().map_or("/", |wanted| wanted.as_str()).to_owned();
    let mut response = next.run(request).await;
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return response;
    }
    if status == StatusCode::UNAUTHORIZED {
        return Redirect::to(&view::with_query("/sign-in", "next", &wanted)).into_response();
    }
    let body = response.extensions_mut().remove::<ErrorBody>();
    let error = body.as_ref().map_or("the request took too long; try again", |body| body.error.as_str());
    let page = ErrorPage { frame: Frame { path, caller: None }, status, error };
    let Ok(mut shown) = html(&page) else { return response };
    *shown.status_mut() = status;
    shown.extensions_mut().insert(ForPeople);
    for name in [header::RETRY_AFTER, header::ALLOW] {
        if let Some(value) = response.headers_mut().remove(&name) {
            shown.headers_mut().insert(name, value);
        }
    }
    shown
}
