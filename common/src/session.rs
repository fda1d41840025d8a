//! Sessions: who is signed in where. What a request carries is a short-lived signed token with the session's id; whether
//! the session still counts, and what its person may do, is asked of the database.

use std::{net::IpAddr, time::Duration};

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::{
    id::{SessionId, UserId},
    page::{Page, fetch_limit},
    permission::PermissionSet,
    seal::SealKey,
};

/// A session ends after this time, however often it is renewed.
pub const LIFETIME: Duration = Duration::from_secs(30 * 86_400);
/// Two windows of one browser may renew at the same moment: for so long the token before is no theft.
const RACE: &str = "10 seconds";

fn hash(token: &SecretString) -> Vec<u8> {
    Sha256::digest(token.expose_secret()).to_vec()
}

fn new_token() -> SecretString {
    hex::encode(rand::random::<[u8; 32]>()).into()
}

/// A session that has just begun or been renewed.
#[derive(Debug)]
pub struct Fresh {
    /// Its id.
    pub id: SessionId,
    /// Whose.
    pub user: UserId,
    /// The new refresh token; `None` when another window of the browser has got it a moment ago.
    pub refresh: Option<SecretString>,
}

/// Begins a session.
pub async fn begin(
    conn: &mut PgConnection,
    user: UserId,
    address: IpAddr,
    user_agent: &str,
) -> Result<Fresh, sqlx::Error> {
    let (id, refresh) = (SessionId::new(), new_token());
    sqlx::query!(
        "with signed as (update users set last_sign_in_at = clock_timestamp() where id = $2)
         insert into sessions (id, user_id, refresh_hash, expires_at, address, user_agent)
         values ($1, $2, $3, clock_timestamp() + $4::float8 * interval '1 second', $5, $6)",
        id as _,
        user as _,
        hash(&refresh),
        LIFETIME.as_secs_f64(),
        address.to_string(),
        user_agent.chars().take(300).collect::<String>(),
    )
    .execute(conn)
    .await?;
    Ok(Fresh { id, user, refresh: Some(refresh) })
}

/// What became of a renewal.
#[derive(Debug)]
pub enum Renewed {
    /// Goes on.
    Fresh(Fresh),
    /// No such token, or its session is over.
    Unknown,
    /// The token was used before: it is in two hands, so the session is over.
    Stolen(UserId),
}

/// Renews a session by its refresh token, which is then replaced.
pub async fn renew(conn: &mut PgConnection, token: &SecretString, address: IpAddr) -> Result<Renewed, sqlx::Error> {
    let presented = hash(token);
    let row = sqlx::query!(
        r#"select s.id as "id: SessionId", s.user_id as "user_id: UserId", s.refresh_hash = $1 as "current!",
                  s.previous_refresh_hash is not distinct from $1 and s.renewed_at > clock_timestamp() - $2::text::interval
                      as "just_now!"
             from sessions s join users u on u.id = s.user_id
            where (s.refresh_hash = $1 or s.previous_refresh_hash = $1
                   or s.id = (select t.session_id from spent_refresh_tokens t where t.hash = $1))
              and s.expires_at > clock_timestamp() and u.enabled
              for update of s"#,
        presented,
        RACE,
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Ok(Renewed::Unknown) };
    if !row.current && !row.just_now {
        end(conn, row.id, None).await?;
        return Ok(Renewed::Stolen(row.user_id));
    }
    if !row.current {
        return Ok(Renewed::Fresh(Fresh { id: row.id, user: row.user_id, refresh: None }));
    }
    let refresh = new_token();
    sqlx::query!(
        "with spent as (
             insert into spent_refresh_tokens (hash, session_id)
             select previous_refresh_hash, id from sessions where id = $1 and previous_refresh_hash is not null
         )
         update sessions set previous_refresh_hash = refresh_hash, refresh_hash = $2, renewed_at = clock_timestamp(), address = $3
          where id = $1",
        row.id as _,
        hash(&refresh),
        address.to_string(),
    )
    .execute(conn)
    .await?;
    Ok(Renewed::Fresh(Fresh { id: row.id, user: row.user_id, refresh: Some(refresh) }))
}

/// Ends a session, when it is this person's where one is named; `false` when there was none.
pub async fn end(conn: &mut PgConnection, id: SessionId, of: Option<UserId>) -> Result<bool, sqlx::Error> {
    let done =
        sqlx::query!("delete from sessions where id = $1 and ($2::uuid is null or user_id = $2)", id as _, of as _)
            .execute(conn)
            .await?;
    Ok(done.rows_affected() == 1)
}

/// Forgets sessions that are over, a batch at a time. Asked first: a delete tells every process to ask anew, also when
/// it deletes nothing.
pub async fn forget_old(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let old = sqlx::query_scalar!(
        r#"select id as "id: SessionId" from sessions where expires_at < now() order by expires_at limit 1000"#
    )
    .fetch_all(&mut *conn)
    .await?;
    if !old.is_empty() {
        sqlx::query!("delete from sessions where id = any ($1)", &old[..] as _).execute(conn).await?;
    }
    Ok(())
}

/// A person who is signed in.
#[derive(Clone, Debug)]
pub struct SignedIn {
    /// Who.
    pub user: UserId,
    /// Their name.
    pub name: String,
    /// What they may do now.
    pub permissions: PermissionSet,
}

/// A look-up of a session, with the epoch of that moment and for how long it holds.
#[derive(Clone, Debug)]
pub struct LookedUp {
    /// `None`: it is over.
    pub signed_in: Option<SignedIn>,
    /// See [`crate::api_key::LookedUp::epoch`].
    pub epoch: i64,
    /// Until its end.
    pub good_for: Option<Duration>,
}

/// Looks a session up.
pub async fn look_up(conn: &mut PgConnection, id: SessionId) -> Result<LookedUp, sqlx::Error> {
    let row = sqlx::query!(
        r#"select e.epoch, u.id as "user?: UserId", u.name as "name?", u.permissions as "permissions?",
                  extract(epoch from s.expires_at - clock_timestamp())::float8 as good_for_seconds
             from auth_epoch e
             left join (sessions s join users u on u.id = s.user_id and u.enabled)
               on s.id = $1 and s.expires_at > clock_timestamp()"#,
        id as _
    )
    .fetch_one(conn)
    .await?;
    let signed_in = row.user.zip(row.name).map(|(user, name)| SignedIn {
        user,
        name,
        permissions: PermissionSet::of_stored(row.permissions.unwrap_or_default()),
    });
    let good_for = row.good_for_seconds.map(|s| Duration::from_secs_f64(s.clamp(0.0, 1e9)));
    Ok(LookedUp { signed_in, epoch: row.epoch, good_for })
}

/// A session as it is listed.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// Its id.
    pub id: SessionId,
    /// Whose.
    pub user_id: UserId,
    /// Their name.
    pub user_name: String,
    /// When they signed in.
    #[serde(serialize_with = "crate::time::millis")]
    pub created_at: DateTime<Utc>,
    /// When it was last renewed.
    #[serde(serialize_with = "crate::time::millis")]
    pub renewed_at: DateTime<Utc>,
    /// When it ends.
    #[serde(serialize_with = "crate::time::millis")]
    pub expires_at: DateTime<Utc>,
    /// Address of the client at the last renewal.
    pub address: String,
    /// What the browser says of itself.
    pub user_agent: String,
}

/// A page of sessions, oldest first: of one person, or of all.
pub async fn list(
    conn: &mut PgConnection,
    of: Option<UserId>,
    limit: Option<i64>,
    cursor: Option<uuid::Uuid>,
) -> Result<Page<Session>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Session,
        r#"select s.id as "id: SessionId", s.user_id as "user_id: UserId", u.name as user_name, s.created_at, s.renewed_at, s.expires_at,
                  s.address, s.user_agent
             from sessions s join users u on u.id = s.user_id
            where s.expires_at > clock_timestamp() and ($1::uuid is null or s.user_id = $1) and ($2::uuid is null or s.id > $2)
            order by s.id limit $3"#,
        of as _,
        cursor,
        fetch_limit(limit),
    )
    .fetch_all(conn)
    .await?;
    Ok(Page::cut(rows, limit, |session| session.id.to_string()))
}

/// A key that signs tokens.
pub struct SigningKey {
    /// The `kid` of its tokens.
    pub id: uuid::Uuid,
    /// 32 random bytes.
    pub secret: SecretString,
    /// Whether it signs, or only verifies.
    pub signs: bool,
}

pub(crate) const SIGNING_CONTEXT: &str = "signing-key";

/// The keys in force, the newest first. A key signs for 30 days; a new one is made in time, and an old one forgotten
/// a day after, when the last of its tokens (15 minutes) is long over. `rotate` makes a new one at once.
pub async fn signing_keys(
    conn: &mut PgConnection,
    key: &SealKey,
    rotate: bool,
) -> Result<Vec<SigningKey>, sqlx::Error> {
    // Asked first: the statements that change the table tell every process to ask anew, also when they change no row.
    let stale = sqlx::query!(
        r#"select not exists (select from signing_keys where created_at > clock_timestamp() - interval '30 days') as "wanted!",
                  exists (select from signing_keys where created_at < clock_timestamp() - interval '31 days') as "old!""#
    )
    .fetch_one(&mut *conn)
    .await?;
    if stale.wanted || rotate {
        let secret = hex::encode(rand::random::<[u8; 32]>());
        let sealed = key.seal(SIGNING_CONTEXT, secret.as_bytes());
        sqlx::query!("insert into signing_keys (id, sealed) values ($1, $2)", uuid::Uuid::now_v7(), sealed)
            .execute(&mut *conn)
            .await?;
    }
    if stale.old {
        sqlx::query!("delete from signing_keys where created_at < clock_timestamp() - interval '31 days'")
            .execute(&mut *conn)
            .await?;
    }
    let rows =
        sqlx::query!("select id, sealed from signing_keys order by created_at desc, id desc").fetch_all(conn).await?;
    let opened = rows.into_iter().filter_map(|row| {
        let secret = key.open(SIGNING_CONTEXT, &row.sealed).ok().and_then(|plain| String::from_utf8(plain).ok())?;
        Some((row.id, SecretString::from(secret)))
    });
    Ok(opened.enumerate().map(|(n, (id, secret))| SigningKey { id, secret, signs: n == 0 }).collect())
}
