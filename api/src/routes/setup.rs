//! `/api/setup`: the first administrator, once.

use axum::{
    Extension, Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use common::{
    audit::Event,
    permission::PermissionSet,
    user::{self, SetUp, User, UserDraft},
};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Check, data,
    users::{check_display_name, check_name, check_password, hashed},
};
use crate::{
    context::Visitor,
    error::ApiError,
    extract::Body,
    openapi::{Data, SetUpNeeded},
    state::AppState,
};

/// The first administrator.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "token": "from the log of the start", "name": "ada", "password": "correct horse battery" }))]
pub struct SetUpBody {
    #[schema(value_type = String)]
    token: SecretString,
    name: String,
    #[serde(default)]
    display_name: String,
    #[schema(value_type = String)]
    password: SecretString,
}

fn done_already() -> ApiError {
    ApiError::conflict("already_set_up", "there is an administrator already: sign in, or ask one for a user")
}

/// Whether the first administrator is still to be made.
#[utoipa::path(get, path = "/api/setup", tag = "people", responses((status = 200, body = Data<SetUpNeeded>)))]
pub async fn needed(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let anybody = state.ask(async |conn| user::anybody(conn).await).await?;
    Ok(data(&json!({ "needed": !anybody })))
}

/// Makes the first administrator, with the one-time token from the log of the start.
#[utoipa::path(post, path = "/api/setup", tag = "people", request_body = SetUpBody, responses((status = 201, body = Data<User>)))]
pub async fn set_up(
    State(state): State<AppState>,
    Extension(visitor): Extension<Visitor>,
    Body(body): Body<SetUpBody>,
) -> Result<Response, ApiError> {
    let mut check = Check::default();
    check_name(&body.name, &mut check);
    check_display_name(&body.display_name, &mut check);
    check_password(&body.password, &mut check);
    check.done()?;
    let anybody = state.ask(async |conn| user::anybody(conn).await).await?;
    if anybody {
        return Err(done_already());
    }
    let draft = UserDraft {
        name: body.name,
        display_name: body.display_name,
        password: Some(hashed(&state, body.password).await?),
        permissions: PermissionSet::parse(&["*"]).unwrap_or_default(),
        enabled: true,
    };
    let actor = visitor.actor("Anonymous", None, &draft.name);
    let set_up = async |conn: &mut sqlx::PgConnection| {
        let set_up = user::set_up(conn, &state.key, &body.token, &draft).await?;
        let event = match &set_up {
            SetUp::Done(user) => Some(Event::new("user.set-up", user.id, &user.name)),
            SetUp::AlreadyDone | SetUp::WrongToken => None,
        };
        Ok((set_up, event))
    };
    match state.change_by(&actor, set_up).await? {
        SetUp::Done(user) => Ok((StatusCode::CREATED, data(&user)).into_response()),
        SetUp::AlreadyDone => Err(done_already()),
        SetUp::WrongToken => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "setup_token_wrong",
            "not the set-up token: it is in the log of the API's start",
        )),
    }
}
