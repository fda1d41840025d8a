//! Keys as their administrators see them: made, listed, changed, rotated, deleted.

use std::{net::IpAddr, time::Duration};

use chrono::{DateTime, Utc};
use ipnet::IpNet;
use serde::Serialize;
use sqlx::PgConnection;

use super::{PlainKey, networks_of_stored};
use crate::{
    id::{ApiKeyId, JobId},
    page::{Page, fetch_limit},
    permission::PermissionSet,
};

/// Requests in a window, in place of the limits per address; `None` leaves those in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct KeyLimits {
    /// GET and HEAD.
    pub read: Option<i32>,
    /// POST, PUT, PATCH and DELETE.
    pub write: Option<i32>,
}

/// A key as it is shown; its secret is not in the database.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyInfo {
    /// Its id.
    pub id: ApiKeyId,
    /// Its name for people.
    pub name: String,
    /// The first characters of its secret.
    pub hint: String,
    /// What it may do, by name.
    pub permissions: Vec<String>,
    /// The only jobs it sees; null for all.
    pub job_ids: Option<Vec<JobId>>,
    /// The only networks (CIDR) it may be used from; null for all.
    pub networks: Option<Vec<String>>,
    /// Limits of its own.
    pub rate_limit: KeyLimits,
    /// Switched off without being deleted when false.
    pub enabled: bool,
    /// Refused from this moment on.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub expires_at: Option<DateTime<Utc>>,
    /// Until when the secret before the last rotation is taken too; null when there is none.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub previous_secret_until: Option<DateTime<Utc>>,
    /// When it was made.
    #[serde(serialize_with = "crate::time::millis")]
    pub created_at: DateTime<Utc>,
    /// Name of the caller who made it; null for the command line.
    pub created_by: Option<String>,
    /// Last use, to the minute.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub last_used_at: Option<DateTime<Utc>>,
    /// Address of the client then.
    pub last_used_address: Option<String>,
}

impl KeyInfo {
    /// Its permissions as a set.
    fn permission_set(&self) -> PermissionSet {
        PermissionSet::of_stored(self.permissions.clone())
    }

    /// Whether nothing of what a change sets differs.
    fn is_like(&self, other: &Self) -> bool {
        (&self.name, &self.permissions, &self.job_ids, &self.networks)
            == (&other.name, &other.permissions, &other.job_ids, &other.networks)
            && (self.rate_limit, self.enabled, self.expires_at) == (other.rate_limit, other.enabled, other.expires_at)
    }
}

/// A whole key to be stored, but for its secret.
#[derive(Clone, Debug)]
pub struct KeyDraft {
    /// Name for people.
    pub name: String,
    /// What it may do.
    pub permissions: PermissionSet,
    /// The only jobs it sees; `None` for all.
    pub jobs: Option<Vec<JobId>>,
    /// The only networks it may be used from; `None` for all.
    pub networks: Option<Vec<IpNet>>,
    /// Limits of its own.
    pub limits: KeyLimits,
    /// Refused from this moment on.
    pub expires_at: Option<DateTime<Utc>>,
    /// Whether it may be used.
    pub enabled: bool,
}

impl Default for KeyDraft {
    /// It may be used, but for nothing yet.
    fn default() -> Self {
        Self {
            name: String::new(),
            permissions: PermissionSet::default(),
            jobs: None,
            networks: None,
            limits: KeyLimits::default(),
            expires_at: None,
            enabled: true,
        }
    }
}

impl From<&KeyInfo> for KeyDraft {
    /// A change that changes nothing.
    fn from(key: &KeyInfo) -> Self {
        Self {
            name: key.name.clone(),
            permissions: key.permission_set(),
            jobs: key.job_ids.clone(),
            networks: key.networks.as_deref().map(networks_of_stored),
            limits: key.rate_limit,
            expires_at: key.expires_at,
            enabled: key.enabled,
        }
    }
}

fn text_of(networks: Option<&[IpNet]>) -> Option<Vec<String>> {
    networks.map(|networks| networks.iter().map(IpNet::to_string).collect())
}

/// Stores a new key, made by the caller of this name, and returns it with the plain text, which is not stored.
pub async fn create(
    conn: &mut PgConnection,
    draft: &KeyDraft,
    created_by: Option<&str>,
) -> Result<(ApiKeyId, PlainKey), sqlx::Error> {
    let (id, plain) = (ApiKeyId::new(), PlainKey::generate());
    let networks = text_of(draft.networks.as_deref());
    sqlx::query!(
        "insert into api_keys (id, name, secret_hash, hint, permissions, job_ids, networks, read_limit, write_limit, expires_at, enabled, created_by)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        id as _,
        draft.name,
        &plain.hash().0[..],
        plain.hint(),
        &draft.permissions.names(),
        draft.jobs.as_deref() as _,
        networks.as_deref(),
        draft.limits.read,
        draft.limits.write,
        draft.expires_at,
        draft.enabled,
        created_by,
    )
    .execute(conn)
    .await?;
    Ok((id, plain))
}

struct Row {
    id: ApiKeyId,
    name: String,
    hint: String,
    permissions: Vec<String>,
    job_ids: Option<Vec<JobId>>,
    networks: Option<Vec<String>>,
    read_limit: Option<i32>,
    write_limit: Option<i32>,
    enabled: bool,
    expires_at: Option<DateTime<Utc>>,
    previous_until: Option<DateTime<Utc>>,
    created_at: DateTime<Utc>,
    created_by: Option<String>,
    last_used_at: Option<DateTime<Utc>>,
    last_used_address: Option<String>,
}

impl From<Row> for KeyInfo {
    fn from(row: Row) -> Self {
        Self {
            id: row.id,
            name: row.name,
            hint: row.hint,
            permissions: row.permissions,
            job_ids: row.job_ids,
            networks: row.networks,
            rate_limit: KeyLimits { read: row.read_limit, write: row.write_limit },
            enabled: row.enabled,
            expires_at: row.expires_at,
            previous_secret_until: row.previous_until,
            created_at: row.created_at,
            created_by: row.created_by,
            last_used_at: row.last_used_at,
            last_used_address: row.last_used_address,
        }
    }
}

/// Which keys a list shows.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this one.
    pub id: Option<ApiKeyId>,
    /// Part of the name, in any case.
    pub name: Option<String>,
    /// Rows on a page; `None` for all.
    pub limit: Option<i64>,
    /// The last id of the page before.
    pub cursor: Option<uuid::Uuid>,
}

/// A page of keys, oldest first.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<Page<KeyInfo>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: ApiKeyId", name, hint, permissions, job_ids as "job_ids: Vec<JobId>", networks, read_limit, write_limit,
                  enabled, expires_at, case when previous_until > clock_timestamp() then previous_until end as previous_until,
                  created_at, created_by, last_used_at, last_used_address
             from api_keys
            where ($1::uuid is null or id = $1)
              and ($2::text is null or position(lower($2) in lower(name)) > 0)
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
    Ok(Page::cut(rows.into_iter().map(KeyInfo::from).collect(), filter.limit, |k| k.id.to_string()))
}

/// One key.
pub async fn find(conn: &mut PgConnection, id: ApiKeyId) -> Result<Option<KeyInfo>, sqlx::Error> {
    let mut page = list(conn, &Filter { id: Some(id), ..Filter::default() }).await?;
    Ok(page.rows.pop())
}

/// Whether a key is as it was read. It is locked before it is compared, so that of two changes at once the second does not
/// undo the first.
async fn is_still(conn: &mut PgConnection, old: &KeyInfo) -> Result<bool, sqlx::Error> {
    sqlx::query!("select id from api_keys where id = $1 for update", old.id as _).fetch_optional(&mut *conn).await?;
    Ok(find(conn, old.id).await?.is_some_and(|now| now.is_like(old)))
}

/// Changes a key that was read as `old`; `None` when it is gone or was changed since: the change must be made anew from
/// what it is now. To be called in a transaction.
pub async fn update(conn: &mut PgConnection, old: &KeyInfo, draft: &KeyDraft) -> Result<Option<KeyInfo>, sqlx::Error> {
    let id = old.id;
    if !is_still(conn, old).await? {
        return Ok(None);
    }
    let networks = text_of(draft.networks.as_deref());
    sqlx::query!(
        "update api_keys
            set name = $2, permissions = $3, job_ids = $4, networks = $5, read_limit = $6, write_limit = $7, expires_at = $8, enabled = $9
          where id = $1",
        id as _,
        draft.name,
        &draft.permissions.names(),
        draft.jobs.as_deref() as _,
        networks.as_deref(),
        draft.limits.read,
        draft.limits.write,
        draft.expires_at,
        draft.enabled,
    )
    .execute(&mut *conn)
    .await?;
    find(conn, id).await
}

/// Gives a key that was read as `old` a new secret; the old one is taken for `grace` more, and one from before it no
/// longer. `None` when the key is gone or was changed since: whoever gets the secret may do what the key may do now. To be
/// called in a transaction.
pub async fn rotate(
    conn: &mut PgConnection,
    old: &KeyInfo,
    grace: Duration,
) -> Result<Option<(KeyInfo, PlainKey)>, sqlx::Error> {
    let id = old.id;
    if !is_still(conn, old).await? {
        return Ok(None);
    }
    let plain = PlainKey::generate();
    sqlx::query!(
        "update api_keys
            set previous_hash = secret_hash, previous_until = clock_timestamp() + $4::bigint * interval '1 millisecond',
                secret_hash = $2, hint = $3
          where id = $1",
        id as _,
        &plain.hash().0[..],
        plain.hint(),
        crate::time::ms(grace),
    )
    .execute(&mut *conn)
    .await?;
    Ok(find(conn, id).await?.map(|key| (key, plain)))
}

/// Deletes a key; `false` when there was none.
pub async fn delete(conn: &mut PgConnection, id: ApiKeyId) -> Result<bool, sqlx::Error> {
    let done = sqlx::query!("delete from api_keys where id = $1", id as _).execute(conn).await?;
    Ok(done.rows_affected() == 1)
}

/// A use of a key, gathered by an API process.
#[derive(Clone, Copy, Debug)]
pub struct Use {
    /// Which key.
    pub key: ApiKeyId,
    /// Address of the client.
    pub address: IpAddr,
}

/// Records last uses, one statement for many keys: the row of a busy key is written once a minute by each process,
/// not once a request.
pub async fn record_uses(conn: &mut PgConnection, uses: &[Use]) -> Result<(), sqlx::Error> {
    let keys: Vec<ApiKeyId> = uses.iter().map(|u| u.key).collect();
    let addresses: Vec<String> = uses.iter().map(|u| u.address.to_string()).collect();
    sqlx::query!(
        "update api_keys k set last_used_at = clock_timestamp(), last_used_address = u.address
           from unnest($1::uuid[], $2::text[]) as u (id, address) where k.id = u.id",
        &keys[..] as _,
        &addresses,
    )
    .execute(conn)
    .await?;
    Ok(())
}
