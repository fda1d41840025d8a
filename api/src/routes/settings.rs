//! `/api/settings`.

use axum::{Extension, Json, extract::State};
use common::{
    audit::Event,
    connection::FieldProblem,
    queue::Notice,
    setting::{self, ChangeError, Refused, Settings},
};
use serde_json::{Map, Value, json};

use super::data;
use crate::{auth::Caller, error::ApiError, extract::Body, openapi::Data, state::AppState};

/// The settings in force.
#[utoipa::path(get, path = "/api/settings", tag = "settings", responses((status = 200, body = Data<Settings>)))]
pub async fn get(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    Ok(data(&state.ask(async |conn| setting::read(conn).await).await?))
}

/// Changes some (RFC 7396). A higher limit acts at once: the workers are woken.
#[utoipa::path(patch, path = "/api/settings", tag = "settings", request_body = Settings, responses((status = 200, body = Data<Settings>)))]
pub async fn change(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Body(change): Body<Map<String, Value>>,
) -> Result<Json<Value>, ApiError> {
    let changed = async |conn: &mut sqlx::PgConnection| match setting::change(conn, &change).await {
        // No setting is a secret, so the log tells what they became.
        Ok(settings) => {
            Ok((Ok(settings), Some(Event::new("settings.update", "settings", "settings").with(json!(change)))))
        }
        Err(ChangeError::Refused(refused)) => Ok((Err(refused), None)),
        Err(ChangeError::Database(error)) => Err(error),
    };
    let settings = state.change(&caller, changed).await?.map_err(|refused| match refused {
        Refused::Malformed((field, message)) => ApiError::malformed(field, message),
        Refused::Invalid(problems) => {
            ApiError::invalid(problems.into_iter().map(|(field, message)| FieldProblem::new(field, message)).collect())
        }
    })?;
    state.wakeups.tell(Notice::Work);
    Ok(data(&settings))
}
