//! `/api/settings`.

use axum::{Json, extract::State};
use common::{
    connection::FieldProblem,
    queue::Notice,
    setting::{self, SettingsChange},
};
use serde_json::Value;

use super::data;
use crate::{error::ApiError, extract::Body, state::AppState};

/// The settings in force.
pub async fn get(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    Ok(data(&state.ask(async |conn| setting::read(conn).await).await?))
}

/// Changes some (RFC 7396). A higher limit acts at once: the workers are woken.
pub async fn change(
    State(state): State<AppState>,
    Body(change): Body<SettingsChange>,
) -> Result<Json<Value>, ApiError> {
    let problems = change.problems();
    if !problems.is_empty() {
        return Err(ApiError::invalid(
            problems.into_iter().map(|(field, message)| FieldProblem::new(field, message)).collect(),
        ));
    }
    let settings = state
        .ask(async |conn| {
            setting::change(conn, &change).await?;
            setting::read(conn).await
        })
        .await?;
    state.wakeups.tell(Notice::Work);
    Ok(data(&settings))
}
