//! How people come in: the set-up of the first administrator, and the sign-in.

use askama::Template;
use axum::{
    extract::State,
    response::{IntoResponse, Redirect, Response},
};
use common::{permission::Permission, user};

use super::{
    Frame,
    form::{Form, Input, InputType, Section},
    html,
    view::{asset, icon},
};
use crate::{error::ApiError, state::AppState};

#[derive(Template)]
#[template(path = "entrance.html")]
struct EntrancePage {
    frame: Frame,
    title: &'static str,
    lead: &'static str,
    form: Form,
}

async fn is_set_up(state: &AppState) -> Result<bool, ApiError> {
    state.ask(async |conn| user::anybody(conn).await).await
}

fn name() -> Input {
    Input::new(InputType::Text, "name", "Name").required().autocomplete("username")
}

/// `/setup`: while there is nobody.
pub async fn set_up(State(state): State<AppState>, frame: Frame) -> Result<Response, ApiError> {
    if is_set_up(&state).await? {
        return Ok(Redirect::to("/sign-in").into_response());
    }
    let password = Input::new(InputType::Secret, "password", "Password").required().autocomplete("new-password");
    let inputs = vec![
        Input::new(InputType::Secret, "token", "Set-up token").required().help("it is in the log of the API's start"),
        name().help("one word in small letters, to sign in with"),
        Input::new(InputType::Text, "displayName", "Name for people").autocomplete("name"),
        password.help("at least 10 characters"),
    ];
    let form = Form {
        api: "POST /api/setup".to_owned(),
        then: "sign-in".to_owned(),
        said: "Welcome. Four steps lead to the first backup.",
        changes: false,
        sections: vec![Section::new("", inputs)],
        submit: "Make the administrator",
        cancel: "".into(),
    };
    let lead = "This instance has nobody yet. Whoever has the one-time token from its log becomes the administrator.";
    html(&EntrancePage { frame, title: "Set up DBackup", lead, form })
}

/// `/sign-in`.
pub async fn sign_in(State(state): State<AppState>, frame: Frame) -> Result<Response, ApiError> {
    if !is_set_up(&state).await? {
        return Ok(Redirect::to("/setup").into_response());
    }
    let password = Input::new(InputType::Secret, "password", "Password").required().autocomplete("current-password");
    let form = Form {
        api: "POST /api/session".to_owned(),
        then: "next".to_owned(),
        said: "",
        changes: false,
        sections: vec![Section::new("", vec![name(), password])],
        submit: "Sign in",
        cancel: "".into(),
    };
    html(&EntrancePage { frame, title: "Sign in", lead: "", form })
}
