//! Rotation of the encryption key: everything that is sealed is sealed anew, in one transaction.
//!
//! Meanwhile every process must hold both keys: it opens with either and seals with the first. So a cluster goes through
//! three rolling restarts: both keys with the old one first, both with the new one first, then (after [`reseal`]) the
//! new one alone.

use sqlx::{Connection, PgConnection};

use crate::{
    audit::{self, Actor, Event},
    destination,
    execution::restore::identity_context,
    id::{DestinationId, ExecutionId, SourceId, WebhookId},
    seal::{CANARY_CONTEXT, SealKey},
    session::SIGNING_CONTEXT,
    source,
    user::SETUP_CONTEXT,
    webhook,
};

/// Why nothing was sealed anew.
#[derive(Debug, thiserror::Error)]
pub enum ResealError {
    /// A value opens with neither key.
    #[error("the secret of {0} opens neither with DBACKUP_ENCRYPTION_KEY nor with DBACKUP_OTHER_ENCRYPTION_KEY")]
    DoesNotOpen(String),
    /// The database failed.
    #[error("the database failed")]
    Database(#[from] sqlx::Error),
}

/// Seals with the first key whatever is sealed with the other; gives how many values that were.
pub async fn reseal(conn: &mut PgConnection, key: &SealKey, actor: &Actor) -> Result<u64, ResealError> {
    let mut tx = conn.begin().await?;
    // The canary first, and last to be let go: two rotations at once follow each other.
    let canary = sqlx::query_scalar!("select sealed from encryption_canary for update").fetch_one(&mut *tx).await?;
    let mut count = 0;
    if let Some(sealed) = renewed(key, CANARY_CONTEXT, &canary, || "the canary".to_owned())? {
        sqlx::query!("update encryption_canary set sealed = $1", sealed).execute(&mut *tx).await?;
        count += 1;
    }
    count += sources(&mut tx, key).await? + destinations(&mut tx, key).await?;
    count += sign_ins(&mut tx, key).await? + identities(&mut tx, key).await? + webhooks(&mut tx, key).await?;
    if count > 0 {
        let event =
            Event::new("encryption_key.rotate", "encryption-key", "").with(serde_json::json!({ "values": count }));
        audit::record(&mut tx, actor, &[event]).await?;
    }
    tx.commit().await?;
    Ok(count)
}

/// The same secret sealed with the first key; `None` when it is already.
fn renewed(
    key: &SealKey,
    context: &str,
    sealed: &[u8],
    name: impl FnOnce() -> String,
) -> Result<Option<Vec<u8>>, ResealError> {
    if key.is_sealed_with_first(context, sealed) {
        return Ok(None);
    }
    let plain = key.open(context, sealed).map_err(|_| ResealError::DoesNotOpen(name()))?;
    Ok(Some(key.seal(context, &plain)))
}

async fn sources(conn: &mut PgConnection, key: &SealKey) -> Result<u64, ResealError> {
    let rows = sqlx::query!(
        r#"select id as "id: SourceId", slug, sealed_secrets as "sealed!" from sources
            where sealed_secrets is not null order by id for update"#
    )
    .fetch_all(&mut *conn)
    .await?;
    let mut count = 0;
    for row in rows {
        if let Some(sealed) = renewed(key, &source::context(row.id), &row.sealed, || format!("source '{}'", row.slug))?
        {
            sqlx::query!("update sources set sealed_secrets = $2 where id = $1", row.id as _, sealed)
                .execute(&mut *conn)
                .await?;
            count += 1;
        }
    }
    Ok(count)
}

async fn destinations(conn: &mut PgConnection, key: &SealKey) -> Result<u64, ResealError> {
    let rows = sqlx::query!(
        r#"select id as "id: DestinationId", slug, sealed_secrets as "sealed!" from destinations
            where sealed_secrets is not null order by id for update"#
    )
    .fetch_all(&mut *conn)
    .await?;
    let mut count = 0;
    for row in rows {
        let name = || format!("destination '{}'", row.slug);
        if let Some(sealed) = renewed(key, &destination::context(row.id), &row.sealed, name)? {
            sqlx::query!("update destinations set sealed_secrets = $2 where id = $1", row.id as _, sealed)
                .execute(&mut *conn)
                .await?;
            count += 1;
        }
    }
    Ok(count)
}

/// The keys that sign sessions, and the token of the first start.
async fn sign_ins(conn: &mut PgConnection, key: &SealKey) -> Result<u64, ResealError> {
    let mut count = 0;
    let keys = sqlx::query!("select id, sealed from signing_keys order by id for update").fetch_all(&mut *conn).await?;
    for row in keys {
        if let Some(sealed) = renewed(key, SIGNING_CONTEXT, &row.sealed, || "a signing key".to_owned())? {
            sqlx::query!("update signing_keys set sealed = $2 where id = $1", row.id, sealed)
                .execute(&mut *conn)
                .await?;
            count += 1;
        }
    }
    let token = sqlx::query_scalar!("select sealed from setup_token for update").fetch_optional(&mut *conn).await?;
    if let Some(token) = token
        && let Some(sealed) = renewed(key, SETUP_CONTEXT, &token, || "the set-up token".to_owned())?
    {
        sqlx::query!("update setup_token set sealed = $1", sealed).execute(&mut *conn).await?;
        count += 1;
    }
    Ok(count)
}

/// What opens the backups of restores that have not ended.
async fn identities(conn: &mut PgConnection, key: &SealKey) -> Result<u64, ResealError> {
    let rows = sqlx::query!(
        r#"select execution_id as "id: ExecutionId", sealed_identity as "sealed!" from restores
            where sealed_identity is not null order by execution_id for update"#
    )
    .fetch_all(&mut *conn)
    .await?;
    let mut count = 0;
    for row in rows {
        let name = || format!("restore {}", row.id);
        if let Some(sealed) = renewed(key, &identity_context(row.id), &row.sealed, name)? {
            sqlx::query!("update restores set sealed_identity = $2 where execution_id = $1", row.id as _, sealed)
                .execute(&mut *conn)
                .await?;
            count += 1;
        }
    }
    Ok(count)
}

async fn webhooks(conn: &mut PgConnection, key: &SealKey) -> Result<u64, ResealError> {
    let rows = sqlx::query!(r#"select id as "id: WebhookId", name, sealed from webhooks order by id for update"#)
        .fetch_all(&mut *conn)
        .await?;
    let mut count = 0;
    for row in rows {
        if let Some(sealed) =
            renewed(key, &webhook::context(row.id), &row.sealed, || format!("webhook '{}'", row.name))?
        {
            sqlx::query!("update webhooks set sealed = $2 where id = $1", row.id as _, sealed)
                .execute(&mut *conn)
                .await?;
            count += 1;
        }
    }
    Ok(count)
}
