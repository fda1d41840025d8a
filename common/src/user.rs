//! People who sign in.

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use sqlx::PgConnection;

use crate::{
    id::UserId,
    page::{Page, fetch_limit},
    password::Hashed,
    permission::PermissionSet,
    seal::SealKey,
};

/// A person as callers see them.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct User {
    /// Their id.
    pub id: UserId,
    /// What they sign in with.
    pub name: String,
    /// Their name for people.
    pub display_name: String,
    /// What they may do, by name.
    pub permissions: Vec<String>,
    /// Whether they may sign in.
    pub enabled: bool,
    /// When they were made.
    #[serde(serialize_with = "crate::time::millis")]
    pub created_at: DateTime<Utc>,
    /// When they last changed.
    #[serde(serialize_with = "crate::time::millis")]
    pub updated_at: DateTime<Utc>,
    /// When they last signed in.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub last_sign_in_at: Option<DateTime<Utc>>,
}

impl User {
    /// Whether nothing of what a change sets differs.
    fn is_like(&self, other: &Self) -> bool {
        (&self.name, &self.display_name, &self.permissions, self.enabled)
            == (&other.name, &other.display_name, &other.permissions, other.enabled)
    }

    /// Their permissions as a set.
    pub fn permission_set(&self) -> PermissionSet {
        PermissionSet::of_stored(self.permissions.clone())
    }
}

/// A person as they shall be.
#[derive(Clone, Debug)]
pub struct UserDraft {
    /// See [`User::name`]; in small letters.
    pub name: String,
    /// See [`User::display_name`].
    pub display_name: String,
    /// A new password; `None` keeps the old one.
    pub password: Option<Hashed>,
    /// What they may do.
    pub permissions: PermissionSet,
    /// Whether they may sign in.
    pub enabled: bool,
}

impl From<&User> for UserDraft {
    /// A change that changes nothing.
    fn from(user: &User) -> Self {
        Self {
            name: user.name.clone(),
            display_name: user.display_name.clone(),
            password: None,
            permissions: user.permission_set(),
            enabled: user.enabled,
        }
    }
}

/// Whether a name may be signed in with: 1 to 100 of letters, digits and `.-_@+`, in small letters.
pub fn is_valid_name(name: &str) -> bool {
    let fits = |c: char| (c.is_alphanumeric() && !c.is_uppercase()) || ".-_@+".contains(c);
    (1..=100).contains(&name.chars().count()) && name.chars().all(fits) && name == name.to_lowercase()
}

/// Stores a person who has a password; `None` when the name is taken.
pub async fn create(conn: &mut PgConnection, draft: &UserDraft) -> Result<Option<User>, sqlx::Error> {
    let id = UserId::new();
    let done = sqlx::query!(
        "insert into users (id, name, display_name, password_hash, permissions, enabled) values ($1, $2, $3, $4, $5, $6)
         on conflict on constraint users_name_unique do nothing",
        id as _,
        draft.name,
        draft.display_name,
        draft.password.as_ref().map(Hashed::as_str),
        &draft.permissions.names(),
        draft.enabled,
    )
    .execute(&mut *conn)
    .await?;
    if done.rows_affected() == 1 { find(conn, id).await } else { Ok(None) }
}

/// What became of a change.
#[derive(Debug)]
pub enum Changed<T> {
    /// Somebody else has changed them since they were read.
    Stale,
    /// Done.
    Done(T),
    /// There is no such person.
    NotFound,
    /// Nobody could administer the people any more.
    LastAdministrator,
}

/// Changes a person who was read as `old`; to be called in a transaction. A new password, or a person switched off, ends their sessions. Fails on `users_name_unique`.
pub async fn update(conn: &mut PgConnection, old: &User, draft: &UserDraft) -> Result<Changed<User>, sqlx::Error> {
    let id = old.id;
    lock_administrators(conn).await?;
    // Locked before it is compared, so that of two changes at once the second does not undo the first.
    sqlx::query!("select id from users where id = $1 for update", id as _).fetch_optional(&mut *conn).await?;
    match find(conn, id).await? {
        None => return Ok(Changed::NotFound),
        Some(now) if !now.is_like(old) => return Ok(Changed::Stale),
        Some(_) => {}
    }
    let before = has_administrator(conn).await?;
    let done = sqlx::query!(
        "update users
            set name = $2, display_name = $3, password_hash = coalesce($4, password_hash), permissions = $5, enabled = $6,
                updated_at = clock_timestamp()
          where id = $1",
        id as _,
        draft.name,
        draft.display_name,
        draft.password.as_ref().map(Hashed::as_str),
        &draft.permissions.names(),
        draft.enabled,
    )
    .execute(&mut *conn)
    .await?;
    if done.rows_affected() == 0 {
        return Ok(Changed::NotFound);
    }
    if before && !has_administrator(conn).await? {
        return Ok(Changed::LastAdministrator);
    }
    if draft.password.is_some() || !draft.enabled {
        sqlx::query!("delete from sessions where user_id = $1", id as _).execute(&mut *conn).await?;
    }
    Ok(find(conn, id).await?.map_or(Changed::NotFound, Changed::Done))
}

/// Deletes a person, and their sessions.
pub async fn delete(conn: &mut PgConnection, id: UserId) -> Result<Changed<()>, sqlx::Error> {
    lock_administrators(conn).await?;
    let before = has_administrator(conn).await?;
    let done = sqlx::query!("delete from users where id = $1", id as _).execute(&mut *conn).await?;
    match done.rows_affected() {
        0 => Ok(Changed::NotFound),
        _ if before && !has_administrator(conn).await? => Ok(Changed::LastAdministrator),
        _ => Ok(Changed::Done(())),
    }
}

/// Two administrators must not take the right from each other at once.
async fn lock_administrators(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!("select id from users where 'users:write' = any (permissions) order by id for update")
        .fetch_all(conn)
        .await?;
    Ok(())
}

async fn has_administrator(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"select exists (select from users where enabled and 'users:write' = any (permissions)) as "there!""#
    )
    .fetch_one(conn)
    .await
}

/// Which people a list shows.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this one.
    pub id: Option<UserId>,
    /// Part of the name, in any case.
    pub name: Option<String>,
    /// Rows on a page; `None` for all.
    pub limit: Option<i64>,
    /// The last id of the page before.
    pub cursor: Option<uuid::Uuid>,
}

/// A page of people, oldest first.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<Page<User>, sqlx::Error> {
    let rows = sqlx::query_as!(
        User,
        r#"select id as "id: UserId", name, display_name, permissions, enabled, created_at, updated_at, last_sign_in_at
             from users
            where ($1::uuid is null or id = $1)
              and ($2::text is null or position(lower($2) in name || ' ' || lower(display_name)) > 0)
              and ($3::uuid is null or id > $3)
            order by id
            limit $4"#,
        filter.id as _,
        filter.name,
        filter.cursor,
        fetch_limit(filter.limit),
    )
    .fetch_all(conn)
    .await?;
    Ok(Page::cut(rows, filter.limit, |user| user.id.to_string()))
}

/// One person.
pub async fn find(conn: &mut PgConnection, id: UserId) -> Result<Option<User>, sqlx::Error> {
    Ok(list(conn, &Filter { id: Some(id), ..Filter::default() }).await?.rows.pop())
}

/// What a sign-in is checked against.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Who.
    pub id: UserId,
    /// Their password.
    pub password: Hashed,
    /// Whether they may sign in.
    pub enabled: bool,
}

/// The credentials of a name.
pub async fn credentials(conn: &mut PgConnection, name: &str) -> Result<Option<Credentials>, sqlx::Error> {
    let row = sqlx::query!(r#"select id as "id: UserId", password_hash, enabled from users where name = $1"#, name)
        .fetch_optional(conn)
        .await?;
    Ok(row.map(|row| Credentials { id: row.id, password: Hashed::of_stored(row.password_hash), enabled: row.enabled }))
}

/// Whether somebody was made already.
pub async fn anybody(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(r#"select exists (select from users) as "anybody!""#).fetch_one(conn).await
}

pub(crate) const SETUP_CONTEXT: &str = "setup-token";

/// The one-time token with which the first administrator is made, the same for all processes; `None` when there is
/// one already. The first process to ask makes it.
pub async fn setup_token(conn: &mut PgConnection, key: &SealKey) -> Result<Option<SecretString>, sqlx::Error> {
    if anybody(conn).await? {
        return Ok(None);
    }
    let fresh = hex::encode(rand::random::<[u8; 16]>());
    sqlx::query!(
        "insert into setup_token (sealed) values ($1) on conflict do nothing",
        key.seal(SETUP_CONTEXT, fresh.as_bytes())
    )
    .execute(&mut *conn)
    .await?;
    let sealed = sqlx::query_scalar!("select sealed from setup_token").fetch_optional(conn).await?;
    let plain = sealed.and_then(|sealed| key.open(SETUP_CONTEXT, &sealed).ok());
    Ok(plain.and_then(|plain| String::from_utf8(plain).ok()).map(SecretString::from))
}

/// What became of a set-up.
#[derive(Debug)]
pub enum SetUp {
    /// The first administrator.
    Done(User),
    /// There is somebody already.
    AlreadyDone,
    /// Not the token.
    WrongToken,
}

/// Makes the first administrator. To be called in a transaction.
pub async fn set_up(
    conn: &mut PgConnection,
    key: &SealKey,
    token: &SecretString,
    draft: &UserDraft,
) -> Result<SetUp, sqlx::Error> {
    // Locked, so that of two at once the second finds it gone.
    let sealed = sqlx::query_scalar!("select sealed from setup_token for update").fetch_optional(&mut *conn).await?;
    if anybody(conn).await? {
        return Ok(SetUp::AlreadyDone);
    }
    let right = sealed.and_then(|sealed| key.open(SETUP_CONTEXT, &sealed).ok());
    let given = token.expose_secret().as_bytes();
    // The lengths are no secret; the bytes are compared in constant time.
    if right.is_none_or(|right| aws_lc_rs::constant_time::verify_slices_are_equal(&right, given).is_err()) {
        return Ok(SetUp::WrongToken);
    }
    sqlx::query!("delete from setup_token").execute(&mut *conn).await?;
    Ok(create(conn, draft).await?.map_or(SetUp::AlreadyDone, SetUp::Done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_word_in_small_letters() {
        for name in ["ada", "ada.lovelace", "ada@example.com", "björn", "a"] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in ["", "Ada", "a b", "a\n", "a/b", "a'b", &"x".repeat(101)] {
            assert!(!is_valid_name(name), "{name}");
        }
    }
}
