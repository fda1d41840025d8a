//! `/api/audit`.

use axum::{extract::State, http::Uri, response::Response};
use chrono::{DateTime, Utc};
use common::audit::{self, Entry, Filter};
use serde::Deserialize;

use super::page;
use crate::{
    error::ApiError,
    extract::{Query, cursor, limit},
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
    uri: Uri,
    Query(query): Query<AuditQuery>,
) -> Result<Response, ApiError> {
    let filter = Filter {
        action: query.action,
        target_id: query.target_id,
        actor_id: query.actor_id,
        from: query.from,
        to: query.to,
        limit: Some(limit(query.limit)?.unwrap_or(DEFAULT_LIMIT)),
        cursor: cursor(query.cursor.as_deref())?,
    };
    let entries = state.ask(async |conn| audit::list(conn, &filter).await).await?;
    Ok(page(&entries, &uri, false))
}
