//! `/api/session` and `/api/sessions`: people sign in and out.

use axum::{
    Extension, Json,
    extract::State,
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use common::{
    audit::Event,
    id::{SessionId, UserId},
    password,
    permission::Permission,
    session::{self, Fresh, Renewed, Session},
    user::{self, Changed, UserDraft},
};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Check, data, page,
    users::{check_password, hashed},
};
use crate::{
    auth::{
        Caller, other_origin,
        token::{self, REFRESH_COOKIE, TOKEN_SECONDS},
    },
    context::Visitor,
    error::ApiError,
    extract::{Body, ListQuery, Query, Segment},
    openapi::{Data, Done, Identified, SignedInBody},
    state::AppState,
};

/// A sign-in.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "name": "ada", "password": "correct horse battery" }))]
pub struct SignInBody {
    name: String,
    #[schema(value_type = String)]
    password: SecretString,
}

fn refused() -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "sign_in_refused", "wrong name or password")
}

/// Whether a password is somebody's. Takes as long when there is nobody of that name.
async fn is_right(state: &AppState, stored: Option<user::Credentials>, password: SecretString) -> Option<UserId> {
    let _turn = state.hashing.acquire().await;
    let check = move || {
        let right = password::verify(&password, stored.as_ref().map(|s| &s.password));
        stored.filter(|stored| right && stored.enabled).map(|stored| stored.id)
    };
    tokio::task::spawn_blocking(check).await.ok().flatten()
}

/// Signs in: the session is in two cookies that no script of a page can read.
#[utoipa::path(post, path = "/api/session", tag = "people", request_body = SignInBody, responses((status = 200, body = Data<SignedInBody>)))]
pub async fn sign_in(
    State(state): State<AppState>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
    Body(body): Body<SignInBody>,
) -> Result<Response, ApiError> {
    // A page elsewhere could otherwise sign its reader in as somebody else.
    if (headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site"))
        && !token::is_same_origin(&headers)
    {
        return Err(other_origin());
    }
    let name = body.name.trim().to_lowercase();
    let stored = match user::is_valid_name(&name) {
        true => state.ask(async |conn| user::credentials(conn, &name).await).await?,
        false => None,
    };
    let known = stored.as_ref().map(|stored| stored.id);
    let Some(id) = is_right(&state, stored, body.password).await else {
        // What was typed may be a password in the wrong field: only the name of somebody who exists is written down.
        let actor =
            visitor.actor("Anonymous", known.map(|id| id.0), if known.is_some() { &name } else { "unknown name" });
        let event = Event { action: "session.refuse", target_id: None, target_name: None, details: json!({}) };
        state.change_by(&actor, async |_| Ok(((), Some(event)))).await?;
        return Err(refused());
    };
    let agent = headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let begin = async |conn: &mut sqlx::PgConnection| {
        let fresh = session::begin(conn, id, visitor.address, agent).await?;
        let event = Event::new("session.create", fresh.id, &name);
        Ok((fresh, Some(event)))
    };
    let fresh = state.change_by(&visitor.actor("User", Some(id.0), &name), begin).await?;
    signed_in(&state, fresh, visitor.tls).await
}

async fn signed_in(state: &AppState, fresh: Fresh, tls: bool) -> Result<Response, ApiError> {
    let keys = state.memory.signing_keys(&state.key).await?;
    let token = token::issue(&keys, &state.instance, fresh.user, fresh.id).ok_or_else(|| {
        tracing::error!("no signing key opens with this encryption key");
        ApiError::internal()
    })?;
    let user = state.ask(async |conn| user::find(conn, fresh.user).await).await?.ok_or_else(refused)?;
    let mut response =
        data(&json!({ "user": user, "sessionId": fresh.id, "expiresInSeconds": TOKEN_SECONDS })).into_response();
    token::set_cookies(response.headers_mut(), &token, fresh.refresh.as_ref(), tls);
    Ok(response)
}

/// Renews a session by its refresh cookie, which is replaced.
#[utoipa::path(post, path = "/api/session/refresh", tag = "people", responses((status = 200, body = Data<SignedInBody>)))]
pub async fn refresh(
    State(state): State<AppState>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    if !token::is_same_origin(&headers) {
        return Err(other_origin());
    }
    let over = || ApiError::new(StatusCode::UNAUTHORIZED, "session_over", "the session is over: sign in");
    let presented = token::cookie(&headers, REFRESH_COOKIE).filter(|t| !t.is_empty()).ok_or_else(over)?;
    let presented = SecretString::from(presented);
    let actor = visitor.actor("Anonymous", None, "a refresh token");
    let renew = async |conn: &mut sqlx::PgConnection| {
        let renewed = session::renew(conn, &presented, visitor.address).await?;
        let event = match &renewed {
            Renewed::Fresh(fresh) => Event::new("session.renew", fresh.id, ""),
            Renewed::Stolen(user) => Event::new("session.stolen", user, ""),
            Renewed::Unknown => return Ok((renewed, None)),
        };
        Ok((renewed, Some(event)))
    };
    match state.change_by(&actor, renew).await? {
        Renewed::Fresh(fresh) => signed_in(&state, fresh, visitor.tls).await,
        Renewed::Stolen(user) => {
            tracing::warn!(%user, address = %visitor.address, "a refresh token was used twice: its session is ended");
            Err(over())
        }
        Renewed::Unknown => Err(over()),
    }
}

/// Who the caller is, and what they may do.
#[utoipa::path(get, path = "/api/session", tag = "people", responses((status = 200, body = Data<Identified>)))]
pub async fn get(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Result<Json<Value>, ApiError> {
    let permissions = caller.permissions().names();
    let Some((id, session)) = caller.person() else {
        return Ok(data(&json!({ "apiKeyId": caller.id(), "name": caller.name(), "permissions": permissions })));
    };
    let user = state.ask(async |conn| user::find(conn, id).await).await?;
    Ok(data(&json!({ "user": user, "sessionId": session, "name": caller.name(), "permissions": permissions })))
}

fn person(caller: &Caller) -> Result<(UserId, SessionId), ApiError> {
    let error = "this is for people who are signed in; an API key has no session";
    caller.person().ok_or_else(|| ApiError::new(StatusCode::FORBIDDEN, "not_a_person", error))
}

async fn end(state: &AppState, caller: &Caller, id: SessionId, of: Option<UserId>) -> Result<bool, ApiError> {
    let end = async |conn: &mut sqlx::PgConnection| {
        let ended = session::end(conn, id, of).await?;
        Ok((ended, ended.then(|| Event::new("session.delete", id, caller.name()))))
    };
    state.change(caller, end).await
}

/// Signs out.
#[utoipa::path(delete, path = "/api/session", tag = "people", responses((status = 200, body = Done)))]
pub async fn sign_out(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Extension(visitor): Extension<Visitor>,
) -> Result<Response, ApiError> {
    let (user, session) = person(&caller)?;
    end(&state, &caller, session, Some(user)).await?;
    let mut response = Json(json!({ "success": true })).into_response();
    token::clear_cookies(response.headers_mut(), visitor.tls);
    Ok(response)
}

/// The caller's own sessions; of everybody for whoever may read users.
#[utoipa::path(get, path = "/api/sessions", tag = "people", params(ListQuery), responses((status = 200, body = Data<Vec<Session>>)))]
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let of = match caller.permissions().allows(Permission::UsersRead) {
        true => None,
        false => Some(person(&caller)?.0),
    };
    let (limit, cursor) = (query.limit()?, query.cursor()?);
    let sessions = state.ask(async |conn| session::list(conn, of, limit, cursor).await).await?;
    Ok(page(&sessions, &uri, false))
}

/// Ends a session: one's own, or anybody's for whoever may write users.
#[utoipa::path(delete, path = "/api/sessions/{id}", tag = "people", responses((status = 200, body = Done)))]
pub async fn revoke(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let not_found = || ApiError::not_found("Session", "session_not_found");
    let id: SessionId = id.parse().map_err(|_| not_found())?;
    let of = match caller.permissions().allows(Permission::UsersWrite) {
        true => None,
        false => Some(person(&caller)?.0),
    };
    if end(&state, &caller, id, of).await? { Ok(Json(json!({ "success": true }))) } else { Err(not_found()) }
}

/// A new password for oneself.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "current": "correct horse battery", "password": "a newer password" }))]
pub struct PasswordBody {
    #[schema(value_type = String)]
    current: SecretString,
    #[schema(value_type = String)]
    password: SecretString,
}

/// Changes one's own password, and ends one's sessions everywhere.
#[utoipa::path(post, path = "/api/session/password", tag = "people", request_body = PasswordBody, responses((status = 200, body = Done)))]
pub async fn change_password(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Extension(visitor): Extension<Visitor>,
    Body(body): Body<PasswordBody>,
) -> Result<Response, ApiError> {
    let (id, _) = person(&caller)?;
    let mut check = Check::default();
    check_password(&body.password, &mut check);
    check.done()?;
    let stored = state.ask(async |conn| user::credentials(conn, caller.name()).await).await?;
    if is_right(&state, stored, body.current).await != Some(id) {
        return Err(ApiError::invalid_field("current", "is not your password"));
    }
    let password = hashed(&state, body.password).await?;
    let change = async |conn: &mut sqlx::PgConnection| {
        let Some(old) = user::find(conn, id).await? else { return Ok((false, None)) };
        let draft = UserDraft { password: Some(password), ..UserDraft::from(&old) };
        let changed = matches!(user::update(conn, &old, &draft).await?, Changed::Done(_));
        let event = Event::new("user.update", id, &draft.name).with(json!({ "fields": ["password"] }));
        Ok((changed, changed.then_some(event)))
    };
    if !state.change(&caller, change).await? {
        return Err(refused());
    }
    let mut response = Json(json!({ "success": true, "message": "sign in with the new password" })).into_response();
    token::clear_cookies(response.headers_mut(), visitor.tls);
    Ok(response)
}
