//! Access Management: API keys, people, their sessions, and the audit log.

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use chrono::{DateTime, TimeDelta, Utc};
use common::{
    api_key::{self, KeyInfo},
    audit::{Entry, Filter},
    db,
    id::{SessionId, UserId},
    job,
    permission::{Permission, PermissionSet},
    session::{self, Session},
    user::{self, User},
};
use serde::Deserialize;

use super::{
    FormPage, Frame,
    form::{Choosable, Form, Input, InputType, Section},
    html,
    view::{asset, dash, filtered, icon, when, when_or_dash, with_query},
};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Query, Segment, cursor},
    routes::audit,
    state::AppState,
};

/// Entries of the audit log on a page.
const PAGE: i64 = 100;

#[derive(Template)]
#[template(path = "keys.html")]
struct KeysPage {
    frame: Frame,
    keys: Vec<KeyInfo>,
    now: DateTime<Utc>,
}

/// The table of keys.
pub async fn keys(State(state): State<AppState>, frame: Frame) -> Result<Response, ApiError> {
    let ask = async |conn: &mut sqlx::PgConnection| {
        Ok((api_key::list(conn, &api_key::Filter::default()).await?.rows, db::now(conn).await?))
    };
    let (keys, now) = state.ask(ask).await?;
    html(&KeysPage { frame, keys, now })
}

impl KeysPage {
    fn expired(&self, key: &KeyInfo) -> bool {
        key.expires_at.is_some_and(|at| at <= self.now)
    }

    /// Whether its reader holds all that it may do: only then may they switch it on, or give it a new secret.
    fn covers(&self, key: &KeyInfo) -> bool {
        PermissionSet::parse(&key.permissions).is_ok_and(|permissions| self.frame.covers(&permissions))
    }

    fn scope(&self, key: &KeyInfo) -> String {
        match key.job_ids.as_ref().map(Vec::len) {
            None => "all jobs".to_owned(),
            Some(1) => "one job".to_owned(),
            Some(n) => format!("{n} jobs"),
        }
    }
}

/// Permissions that a caller may give, grouped by what they are about. Nobody grants what they do not hold.
fn permissions(caller: &Caller, held: &PermissionSet) -> Input {
    let mut about = "";
    let mut options = Vec::new();
    for permission in Permission::ALL.iter().filter(|permission| caller.permissions().allows(**permission)) {
        let (noun, verb) = permission.as_str().split_once(':').unwrap_or((permission.as_str(), ""));
        let mut option = Choosable::new(permission.as_str(), format!("{noun}:{verb}"), held.allows(*permission));
        if noun != about {
            option.group = title(noun);
            about = noun;
        }
        options.push(option);
    }
    Input::new(InputType::Many, "permissions", "Permissions").required().options(options)
}

/// `api-keys` as people write it.
fn title(noun: &str) -> String {
    let mut text = noun.replace('-', " ").replace("api", "API");
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}

/// Query of a new key.
#[derive(Deserialize)]
pub struct MakeQuery {
    #[serde(default)]
    permissions: String,
}

/// The form of a new key.
pub async fn make_key(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<MakeQuery>,
    frame: Frame,
) -> Result<Response, ApiError> {
    let filter = job::Filter { only: caller.only(), ..Default::default() };
    let sees_jobs = frame.may(Permission::JobsRead);
    let ask = async |conn: &mut sqlx::PgConnection| {
        let jobs = if sees_jobs { job::list(conn, &filter).await?.rows } else { Vec::new() };
        Ok((jobs, db::now(conn).await?))
    };
    let (jobs, now) = state.ask(ask).await?;
    let wanted: Vec<&str> = query.permissions.split(',').filter(|name| !name.is_empty()).collect();
    let held = PermissionSet::parse(&wanted).unwrap_or_default();
    let mut expiry = vec![Choosable::new("", "Never", true)];
    for (days, label) in [(30, "In 30 days"), (90, "In 90 days"), (365, "In a year")] {
        let at = (now + TimeDelta::days(days)).format("%Y-%m-%dT%H:%M:%SZ");
        expiry.push(Choosable::new(at, label, false));
    }
    let jobs: Vec<Choosable> = jobs.iter().map(|job| Choosable::new(job.id, &job.name, false)).collect();
    let mut scope = Vec::new();
    if !jobs.is_empty() {
        scope
            .push(Input::new(InputType::Many, "jobIds", "Only these jobs").help("none ticked: all jobs").options(jobs));
    }
    scope.push(
        Input::new(InputType::List, "networks", "Only from these networks")
            .placeholder("10.0.0.0/8")
            .help("one on each line; empty: from everywhere"),
    );
    let form = Form {
        api: "POST /api/api-keys".to_owned(),
        then: "show-key".to_owned(),
        said: "",
        changes: false,
        sections: vec![
            Section::new(
                "",
                vec![
                    Input::new(InputType::Text, "name", "Name")
                        .required()
                        .placeholder("ci")
                        .help("the label of what it triggers"),
                    Input::new(InputType::Choice, "expiresAt", "Expires").options(expiry),
                    permissions(&caller, &held),
                ],
            ),
            Section::folded("Bind it to jobs and networks", scope),
        ],
        submit: "Make the key",
        cancel: "/access/api-keys".into(),
    };
    let lead = "A program signs in with a key. Its secret is shown once, when it is made.";
    html(&FormPage { frame, title: "New API key".to_owned(), lead, form })
}

#[derive(Template)]
#[template(path = "users.html")]
struct UsersPage {
    frame: Frame,
    users: Vec<User>,
}

impl UsersPage {
    /// Whether its reader may do all that a user may: else they may only switch the user off.
    fn covers(&self, user: &User) -> bool {
        self.frame.covers(&user.permission_set())
    }
}

/// The table of people.
pub async fn users(State(state): State<AppState>, frame: Frame) -> Result<Response, ApiError> {
    let users = state.ask(async |conn| user::list(conn, &user::Filter::default()).await).await?.rows;
    html(&UsersPage { frame, users })
}

fn user_form(caller: &Caller, user: Option<&User>) -> Form {
    let held = user.map(User::permission_set).unwrap_or_default();
    let password = Input::new(InputType::Secret, "password", "Password").autocomplete("new-password");
    let password = match user {
        Some(_) => password.help("empty: it stays. A new one ends their sessions"),
        None => password.required().help("at least 10 characters"),
    };
    Form {
        api: user.map_or("POST /api/users".to_owned(), |user| format!("PUT /api/users/{}", user.id)),
        then: "/access/users".to_owned(),
        said: "The user is saved.",
        changes: user.is_some(),
        sections: vec![Section::new(
            "",
            vec![
                Input::new(InputType::Text, "name", "Name")
                    .required()
                    .help("one word in small letters, to sign in with")
                    .value(user.map_or("", |user| user.name.as_str())),
                Input::new(InputType::Text, "displayName", "Name for people")
                    .value(user.map_or("", |user| user.display_name.as_str())),
                password,
                permissions(caller, &held),
            ],
        )],
        submit: "Save",
        cancel: "/access/users".into(),
    }
}

/// The form of a new user.
pub async fn make_user(Extension(caller): Extension<Caller>, frame: Frame) -> Result<Response, ApiError> {
    let form = user_form(&caller, None);
    html(&FormPage { frame, title: "New user".to_owned(), lead: "", form })
}

/// The form of a user who exists.
pub async fn edit_user(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    frame: Frame,
) -> Result<Response, ApiError> {
    let not_found = || ApiError::not_found("User", "user_not_found");
    let id: UserId = id.parse().map_err(|_| not_found())?;
    let found = state.ask(async |conn| user::find(conn, id).await).await?.ok_or_else(not_found)?;
    let form = user_form(&caller, Some(&found));
    html(&FormPage { frame, title: format!("Edit {}", found.name), lead: "", form })
}

#[derive(Template)]
#[template(path = "sessions.html")]
struct SessionsPage {
    frame: Frame,
    sessions: Vec<Session>,
    mine: Option<SessionId>,
}

impl SessionsPage {
    fn is_mine(&self, session: &Session) -> bool {
        self.mine == Some(session.id)
    }

    /// One's own, or anybody's for whoever may write users; the one that shows the page ends by signing out.
    fn may_end(&self, session: &Session) -> bool {
        let mine = self.sessions.iter().find(|session| self.is_mine(session)).map(|session| session.user_id);
        !self.is_mine(session) && (self.frame.may(Permission::UsersWrite) || mine == Some(session.user_id))
    }
}

/// Who is signed in: oneself, or everybody for whoever may read users.
pub async fn sessions(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    frame: Frame,
) -> Result<Response, ApiError> {
    let (user, mine) = caller.person().unzip();
    let of = if frame.may(Permission::UsersRead) { None } else { Some(user.unwrap_or_else(UserId::new)) };
    let sessions = state.ask(async |conn| session::list(conn, of, Some(500), None).await).await?.rows;
    html(&SessionsPage { frame, sessions, mine })
}

#[derive(Template)]
#[template(path = "audit.html")]
struct AuditPage {
    frame: Frame,
    entries: Vec<Entry>,
    action: String,
    next: Option<String>,
}

/// Whether an entry tells more.
fn has_details(entry: &Entry) -> bool {
    entry.details.as_object().is_some_and(|details| !details.is_empty())
}

/// Query of the audit log.
#[derive(Deserialize)]
pub struct AuditQuery {
    #[serde(default)]
    action: String,
    cursor: Option<String>,
}

/// The audit log, newest first.
pub async fn audit_log(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<AuditQuery>,
    frame: Frame,
) -> Result<Response, ApiError> {
    let action = query.action.trim().to_owned();
    let filter = Filter {
        action: (!action.is_empty()).then(|| action.clone()),
        limit: Some(PAGE),
        cursor: cursor(query.cursor.as_deref())?,
        ..Default::default()
    };
    let found = audit::read(&state, &caller, &filter).await?;
    let here = filtered("/access/audit-log", &[("action", &action)]);
    let next = found.next.map(|next| with_query(&here, "cursor", &next));
    html(&AuditPage { frame, entries: found.rows, action, next })
}
