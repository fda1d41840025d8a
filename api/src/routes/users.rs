//! `/api/users`. As with keys, nobody grants what they do not hold, nor takes over somebody who holds more.

use axum::{
    Extension, Json,
    extract::State,
    http::{StatusCode, Uri},
    response::Response,
};
use common::{
    audit::Event,
    connection::FieldProblem,
    id::UserId,
    password::{self, Hashed},
    permission::PermissionSet,
    user::{self, Changed, Filter, User, UserDraft},
};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Check, created, data, fields_of, page};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Body, ListQuery, Query, RawBody, Segment, parse},
    openapi::{Data, Done},
    state::AppState,
};

/// A person as a client sends them; PUT takes any subset.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "name": "ada", "displayName": "Ada", "password": "correct horse battery", "permissions": ["jobs:read", "history:read"] }))]
pub struct UserBody {
    name: Option<String>,
    display_name: Option<String>,
    #[schema(value_type = Option<String>)]
    password: Option<SecretString>,
    permissions: Option<Vec<String>>,
    enabled: Option<bool>,
}

/// What one signs in with.
pub(super) fn check_name(name: &str, check: &mut Check) {
    if !user::is_valid_name(name) {
        check.refuse("name", "must be 1 to 100 small letters, digits or any of . - _ @ +");
    }
}

/// A name for people.
pub(super) fn check_display_name(name: &str, check: &mut Check) {
    if name.chars().count() > 200 || name.chars().any(char::is_control) {
        check.refuse("displayName", "must have at most 200 characters and no control character");
    }
}

/// A new password.
pub(super) fn check_password(password: &SecretString, check: &mut Check) {
    if let Some(problem) = password::problem(password) {
        check.refuse("password", &problem);
    }
}

/// Hashes away from the threads that serve requests, and not too many at once.
pub async fn hashed(state: &AppState, password: SecretString) -> Result<Hashed, ApiError> {
    let _turn = state.hashing.acquire().await;
    tokio::task::spawn_blocking(move || password::hash(&password)).await.map_err(|_| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "the password could not be hashed")
    })
}

impl UserBody {
    async fn draft(self, state: &AppState, old: Option<&User>) -> Result<UserDraft, ApiError> {
        let mut check = Check::default();
        let name = self.name.or(old.map(|o| o.name.clone())).unwrap_or_default();
        check_name(&name, &mut check);
        let display_name = self.display_name.or(old.map(|o| o.display_name.clone())).unwrap_or_default();
        check_display_name(&display_name, &mut check);
        match &self.password {
            Some(password) => check_password(password, &mut check),
            None if old.is_none() => check.refuse("password", "is required"),
            None => {}
        }
        let permissions = match (&self.permissions, old) {
            (Some(names), _) => PermissionSet::parse(names).unwrap_or_else(|problem| {
                check.refuse("permissions", &problem);
                PermissionSet::default()
            }),
            (None, old) => old.map(User::permission_set).unwrap_or_default(),
        };
        check.done()?;
        let password = match self.password {
            Some(password) => Some(hashed(state, password).await?),
            None => None,
        };
        let enabled = self.enabled.or(old.map(|o| o.enabled)).unwrap_or(true);
        Ok(UserDraft { name, display_name, password, permissions, enabled })
    }
}

/// Refuses what the caller does not hold itself.
fn check_grant(caller: &Caller, permissions: &PermissionSet) -> Result<(), ApiError> {
    let lacking = caller.permissions().lacking(permissions);
    if lacking.is_empty() {
        return Ok(());
    }
    let problem = FieldProblem::new("permissions", format!("you do not hold {} yourself", lacking.join(", ")));
    let error = format!("nobody grants what they do not hold: {}", problem.message);
    Err(ApiError::new(StatusCode::FORBIDDEN, "grant_exceeds", error).with_fields(vec![problem]))
}

/// A key that is bound to jobs, networks or a time must not make somebody who is not.
fn check_unbound(caller: &Caller) -> Result<(), ApiError> {
    if caller.only().is_none() && caller.networks().is_none() && caller.expires_at().is_none() {
        return Ok(());
    }
    let error = "this API key is bound to jobs, networks or a time: a user would not be";
    Err(ApiError::new(StatusCode::FORBIDDEN, "grant_exceeds", error))
}

fn not_found() -> ApiError {
    ApiError::not_found("User", "user_not_found")
}

fn name_taken() -> ApiError {
    ApiError::conflict("name_taken", "another user has this name: choose another")
}

fn last_administrator() -> ApiError {
    ApiError::conflict(
        "last_administrator",
        "nobody could administer the users any more: make another administrator first",
    )
}

async fn find(state: &AppState, id: &str) -> Result<User, ApiError> {
    let id: UserId = id.parse().map_err(|_| not_found())?;
    state.ask(async |conn| user::find(conn, id).await).await?.ok_or_else(not_found)
}

/// A page of users.
#[utoipa::path(get, path = "/api/users", tag = "people", params(ListQuery), responses((status = 200, body = Data<Vec<User>>)))]
pub async fn list(
    State(state): State<AppState>,
    uri: Uri,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let filter = Filter { id: None, limit: query.limit()?, cursor: query.cursor()?, name: query.name };
    let users = state.ask(async |conn| user::list(conn, &filter).await).await?;
    Ok(page(&users, &uri, false))
}

/// Makes a user.
#[utoipa::path(post, path = "/api/users", tag = "people", request_body = UserBody, responses((status = 201, body = Data<User>)))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<UserBody>,
) -> Result<Response, ApiError> {
    check_unbound(&caller)?;
    let draft = body.draft(&state, None).await?;
    check_grant(&caller, &draft.permissions)?;
    let made = state
        .change(&caller, async |conn| {
            let made = user::create(conn, &draft).await?;
            let event = |user: &User| {
                Event::new("user.create", user.id, &user.name).with(json!({ "permissions": user.permissions }))
            };
            let event = made.as_ref().map(event);
            Ok((made, event))
        })
        .await?;
    Ok(created(&made.ok_or_else(name_taken)?))
}

/// One user.
#[utoipa::path(get, path = "/api/users/{id}", tag = "people", responses((status = 200, body = Data<User>)))]
pub async fn get(State(state): State<AppState>, Segment(id): Segment) -> Result<Json<Value>, ApiError> {
    Ok(data(&find(&state, &id).await?))
}

/// Changes some fields. Who may do more than the caller can only be switched off.
#[utoipa::path(put, path = "/api/users/{id}", tag = "people", request_body = UserBody, responses((status = 200, body = Data<User>)))]
pub async fn update(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    RawBody(raw): RawBody,
) -> Result<Json<Value>, ApiError> {
    let sent = fields_of(&raw);
    loop {
        let old = find(&state, &id).await?;
        let body: UserBody = parse(&raw)?;
        let only_off = body.enabled == Some(false) && sent["fields"] == json!(["enabled"]);
        let draft = body.draft(&state, Some(&old)).await?;
        if !only_off {
            check_unbound(&caller)?;
            check_grant(&caller, &old.permission_set())?;
            check_grant(&caller, &draft.permissions)?;
        }
        let update = async |conn: &mut sqlx::PgConnection| {
            let changed = user::update(conn, &old, &draft).await?;
            let done = matches!(changed, Changed::Done(_));
            let event = Event::new("user.update", old.id, &draft.name).with(sent.clone());
            Ok((changed, done.then_some(event)))
        };
        match state.try_change(&caller, update).await {
            Ok(Changed::Done(user)) => return Ok(data(&user)),
            Ok(Changed::Stale) => {}
            Ok(Changed::NotFound) => return Err(not_found()),
            Ok(Changed::LastAdministrator) => return Err(last_administrator()),
            Err(error) if error.constraint() == Some("users_name_unique") => return Err(name_taken()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Deletes a user, and ends their sessions.
#[utoipa::path(delete, path = "/api/users/{id}", tag = "people", responses((status = 200, body = Done)))]
pub async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<Value>, ApiError> {
    let old = find(&state, &id).await?;
    let delete = async |conn: &mut sqlx::PgConnection| {
        let changed = user::delete(conn, old.id).await?;
        let done = matches!(changed, Changed::Done(()));
        Ok((changed, done.then(|| Event::new("user.delete", old.id, &old.name))))
    };
    match state.change(&caller, delete).await? {
        Changed::Done(()) => Ok(Json(json!({ "success": true }))),
        Changed::NotFound | Changed::Stale => Err(not_found()),
        Changed::LastAdministrator => Err(last_administrator()),
    }
}
