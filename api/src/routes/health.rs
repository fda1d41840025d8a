//! Probes.

use std::time::Duration;

use axum::{Json, extract::State, http::StatusCode};
use serde_json::{Value, json};

use crate::{
    error::ApiError,
    openapi::{Alive, Health},
    state::AppState,
};

/// The process runs.
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, body = Alive)))]
pub async fn livez() -> Json<Value> {
    Json(json!({ "success": true, "status": "alive" }))
}

/// The process can do its work: its database answers, and it is not stopping.
#[utoipa::path(get, path = "/readyz", tag = "health", responses((status = 200, body = Alive)))]
pub async fn readyz(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    if state.stop.stopping.is_cancelled() {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "this process is stopping"));
    }
    database(&state).await?;
    Ok(Json(json!({ "success": true, "status": "ready" })))
}

/// What people look at.
#[utoipa::path(get, path = "/api/health", tag = "health", responses((status = 200, body = Health)))]
pub async fn health(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    database(&state).await?;
    Ok(Json(
        json!({ "success": true, "status": "healthy", "version": env!("CARGO_PKG_VERSION"), "database": "up", "rateLimits": state.rate_limiter.place() }),
    ))
}

async fn database(state: &AppState) -> Result<(), ApiError> {
    Ok(state.db.ping(Duration::from_secs(2)).await?)
}
