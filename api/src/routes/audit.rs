//! `/api/audit`.

use axum::{Extension, extract::State, http::Uri, response::Response};
use chrono::{DateTime, Utc};
use common::{
    audit::{self, Entry, Filter},
    page::Page,
};
use serde::Deserialize;

use super::page;
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Query, cursor, limit, time},
    openapi::Data,
    state::AppState,
};

/// Query of the list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct AuditQuery {
    action: Option<String>,
    target_id: Option<String>,
    actor_id: Option<uuid::Uuid>,
    from: Option<DateTime<Utc>>,
    to: Option<DateTime<Utc>>,
    limit: Option<i64>,
    cursor: Option<String>,
}

/// Entries on a page when the client does not say.
const DEFAULT_LIMIT: i64 = 100;

/// A page of the audit log, newest first.
#[utoipa::path(get, path = "/api/audit", tag = "audit", params(AuditQuery), responses((status = 200, body = Data<Vec<Entry>>)))]
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
    Query(query): Query<AuditQuery>,
) -> Result<Response, ApiError> {
    let filter = Filter {
        action: query.action,
        target_id: query.target_id,
        actor_id: query.actor_id,
        from: time("from", query.from)?,
        to: time("to", query.to)?,
        limit: Some(limit(query.limit)?.unwrap_or(DEFAULT_LIMIT)),
        cursor: cursor(query.cursor.as_deref())?,
    };
    Ok(page(&read(&state, &caller, &filter).await?, &uri, false))
}

/// A page of the audit log, for a caller who may see all that it tells of.
pub async fn read(state: &AppState, caller: &Caller, filter: &Filter) -> Result<Page<Entry>, ApiError> {
    if caller.only().is_some() {
        return Err(ApiError::job_scoped("the audit log tells of all"));
    }
    state.ask(async |conn| audit::list(conn, filter).await).await
}
