//! Webhooks: addresses that are told of the ends of runs, signed as [Standard Webhooks] asks.
//!
//! What is to be told is noted in the transaction that ends a run, by a trigger of the database, so no way to end a run can
//! forget it. Workers tell it afterwards, at least once, until it was taken or is a day old.
//!
//! [Standard Webhooks]: https://www.standardwebhooks.com

pub mod delivery;

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, types::Json};
use url::Url;

use crate::{
    id::WebhookId,
    label::Labels,
    page::{Page, fetch_limit},
    seal::{SealError, SealKey},
};

/// How a run may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum WebhookEvent {
    /// It ended with Success.
    Succeeded,
    /// It failed, was not started in time, or its worker was lost once too often.
    Failed,
    /// Somebody cancelled it.
    Cancelled,
}

impl WebhookEvent {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Failed, Self::Cancelled, Self::Succeeded];

    /// The name as clients write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A webhook as clients see it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Webhook {
    /// Its id.
    pub id: WebhookId,
    /// Its name for people.
    pub name: String,
    /// Its address, without what may be a secret in it.
    #[schema(example = "https://hooks.example.com/…")]
    pub url: String,
    /// Which ends of runs it is told.
    pub events: Vec<WebhookEvent>,
    /// Labels that an execution must have to be told.
    pub labels: Labels,
    /// False: nothing is told.
    pub enabled: bool,
    /// What it was not told yet.
    pub pending: i64,
    /// When it last took something.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub last_delivered_at: Option<DateTime<Utc>>,
    /// When it last did not.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub last_failed_at: Option<DateTime<Utc>>,
    /// And why.
    pub last_error: Option<String>,
    /// When it was made.
    #[serde(serialize_with = "crate::time::millis")]
    pub created_at: DateTime<Utc>,
    /// When it last was changed.
    #[serde(serialize_with = "crate::time::millis")]
    pub updated_at: DateTime<Utc>,
}

/// What is sealed of a webhook.
#[derive(Serialize, Deserialize)]
struct Sealed {
    url: String,
    secret: String,
}

/// Where to tell, and how to sign.
#[derive(Clone, Debug)]
pub struct Address {
    /// Whole, with what may be a secret in it.
    pub url: SecretString,
    /// `whsec_` and 32 bytes in base64.
    pub secret: SecretString,
}

impl Address {
    /// With a new secret.
    pub fn new(url: SecretString) -> Self {
        let secret = format!("{SECRET_PREFIX}{}", STANDARD.encode(rand::random::<[u8; 32]>()));
        Self { url, secret: secret.into() }
    }

    fn seal(&self, key: &SealKey, id: WebhookId) -> Vec<u8> {
        let sealed =
            Sealed { url: self.url.expose_secret().to_owned(), secret: self.secret.expose_secret().to_owned() };
        key.seal(&context(id), &serde_json::to_vec(&sealed).unwrap_or_default())
    }

    /// Opens what is stored.
    pub fn open(key: &SealKey, id: WebhookId, sealed: &[u8]) -> Result<Self, SealError> {
        let plain = key.open(&context(id), sealed)?;
        let sealed: Sealed = serde_json::from_slice(&plain).map_err(|_| SealError::DoesNotOpen)?;
        Ok(Self { url: sealed.url.into(), secret: sealed.secret.into() })
    }

    /// Host and port, which are no secret.
    pub fn server(&self) -> Option<(String, u16)> {
        let url = Url::parse(self.url.expose_secret()).ok()?;
        Some((url.host_str()?.to_owned(), url.port_or_known_default()?))
    }

    /// The header `webhook-signature` of a message.
    pub fn sign(&self, id: uuid::Uuid, timestamp: i64, body: &str) -> String {
        let secret = self.secret.expose_secret();
        let secret = STANDARD.decode(secret.strip_prefix(SECRET_PREFIX).unwrap_or(secret)).unwrap_or_default();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        let tag = hmac::sign(&key, format!("{id}.{timestamp}.{body}").as_bytes());
        format!("v1,{}", STANDARD.encode(tag))
    }
}

const SECRET_PREFIX: &str = "whsec_";

/// Ties what is sealed to its row.
pub fn context(id: WebhookId) -> String {
    format!("webhook {id}")
}

/// What of an address may be shown; else what is wrong with it.
pub fn url_hint(url: &str) -> Result<String, &'static str> {
    let parsed = Url::parse(url).map_err(|_| "must be a URL such as https://hooks.example.com/backups")?;
    let host = parsed.host_str().filter(|_| matches!(parsed.scheme(), "http" | "https"));
    let host = host.ok_or("must begin with https:// or http:// and name a host")?;
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err("must not hold a user name or a password: put a token into the path or the query");
    }
    if url.len() > 2_000 {
        return Err("must be at most 2000 characters");
    }
    let port = parsed.port().map(|port| format!(":{port}")).unwrap_or_default();
    Ok(format!("{}://{host}{port}/…", parsed.scheme()))
}

/// A whole webhook to be stored, but for its address.
#[derive(Clone, Debug)]
pub struct WebhookDraft {
    /// See [`Webhook::name`].
    pub name: String,
    /// See [`Webhook::events`].
    pub events: Vec<WebhookEvent>,
    /// See [`Webhook::labels`].
    pub labels: Labels,
    /// See [`Webhook::enabled`].
    pub enabled: bool,
}

impl From<&Webhook> for WebhookDraft {
    /// A change that changes nothing.
    fn from(webhook: &Webhook) -> Self {
        Self {
            name: webhook.name.clone(),
            events: webhook.events.clone(),
            labels: webhook.labels.clone(),
            enabled: webhook.enabled,
        }
    }
}

/// Stores a new one.
pub async fn create(
    conn: &mut PgConnection,
    key: &SealKey,
    draft: &WebhookDraft,
    address: &Address,
    hint: &str,
) -> Result<Webhook, sqlx::Error> {
    let id = WebhookId::new();
    sqlx::query!(
        "insert into webhooks (id, name, url_hint, sealed, events, labels, enabled) values ($1, $2, $3, $4, $5, $6, $7)",
        id as _,
        draft.name,
        hint,
        address.seal(key, id),
        &names(&draft.events),
        Json(&draft.labels) as _,
        draft.enabled,
    )
    .execute(&mut *conn)
    .await?;
    find(conn, id).await?.ok_or(sqlx::Error::RowNotFound)
}

fn names(events: &[WebhookEvent]) -> Vec<String> {
    events.iter().map(|event| event.as_str().to_owned()).collect()
}

/// Replaces one that was read as of `updated_at`, and its address where a new one is given; `None` when it is gone or was
/// changed since. Switched off, it is not told what it was not told yet either.
pub async fn update(
    conn: &mut PgConnection,
    key: &SealKey,
    (id, updated_at): (WebhookId, DateTime<Utc>),
    draft: &WebhookDraft,
    address: Option<(&Address, &str)>,
) -> Result<Option<Webhook>, sqlx::Error> {
    let done = sqlx::query!(
        "update webhooks
            set name = $2, events = $3, labels = $4, enabled = $5, url_hint = coalesce($6, url_hint), sealed = coalesce($7, sealed),
                updated_at = clock_timestamp()
          where id = $1 and updated_at = $8",
        id as _,
        draft.name,
        &names(&draft.events),
        Json(&draft.labels) as _,
        draft.enabled,
        address.map(|(_, hint)| hint),
        address.map(|(address, _)| address.seal(key, id)),
        updated_at,
    )
    .execute(&mut *conn)
    .await?;
    if done.rows_affected() == 0 {
        return Ok(None);
    }
    if !draft.enabled {
        sqlx::query!("delete from webhook_deliveries where webhook_id = $1", id as _).execute(&mut *conn).await?;
    }
    find(conn, id).await
}

/// Deletes one; whether it was there.
pub async fn delete(conn: &mut PgConnection, id: WebhookId) -> Result<bool, sqlx::Error> {
    let gone = sqlx::query!("delete from webhooks where id = $1", id as _).execute(conn).await?;
    Ok(gone.rows_affected() == 1)
}

struct Row {
    id: WebhookId,
    name: String,
    url_hint: String,
    events: Vec<String>,
    labels: Json<Labels>,
    enabled: bool,
    pending: i64,
    last_delivered_at: Option<DateTime<Utc>>,
    last_failed_at: Option<DateTime<Utc>>,
    last_error: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl From<Row> for Webhook {
    fn from(row: Row) -> Self {
        let known = |name: &String| WebhookEvent::ALL.into_iter().find(|event| event.as_str() == name);
        Self {
            id: row.id,
            name: row.name,
            url: row.url_hint,
            events: row.events.iter().filter_map(known).collect(),
            labels: row.labels.0,
            enabled: row.enabled,
            pending: row.pending,
            last_delivered_at: row.last_delivered_at,
            last_failed_at: row.last_failed_at,
            last_error: row.last_error,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// Which webhooks a list shows.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this one.
    pub id: Option<WebhookId>,
    /// Part of the name, in any case.
    pub name: Option<String>,
    /// Rows on a page; `None` for all.
    pub limit: Option<i64>,
    /// The last id of the page before.
    pub cursor: Option<uuid::Uuid>,
}

/// One webhook.
pub async fn find(conn: &mut PgConnection, id: WebhookId) -> Result<Option<Webhook>, sqlx::Error> {
    Ok(list(conn, &Filter { id: Some(id), ..Filter::default() }).await?.rows.pop())
}

/// A page of webhooks, oldest first.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<Page<Webhook>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: WebhookId", name, url_hint, events, labels as "labels: Json<Labels>", enabled,
                  (select count(*) from webhook_deliveries d where d.webhook_id = webhooks.id and d.event <> 'test') as "pending!",
                  last_delivered_at, last_failed_at, last_error, created_at, updated_at
             from webhooks
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
    Ok(Page::cut(rows.into_iter().map(Webhook::from).collect(), filter.limit, |w| w.id.to_string()))
}

/// What is sealed of a webhook; `None` when it is gone.
pub async fn sealed(conn: &mut PgConnection, id: WebhookId) -> Result<Option<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar!("select sealed from webhooks where id = $1", id as _).fetch_optional(conn).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_signed_as_the_standard_says() {
        // The example of the specification.
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned();
        let address = Address { url: String::new().into(), secret: secret.into() };
        let key =
            hmac::Key::new(hmac::HMAC_SHA256, &STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("base64"));
        let id = uuid::Uuid::nil();
        let body = r#"{"test": 2432232314}"#;
        let signature = address.sign(id, 1_614_265_330, body);
        let tag = STANDARD.decode(signature.strip_prefix("v1,").expect("a version")).expect("base64");
        let signed = format!("00000000-0000-0000-0000-000000000000.1614265330.{body}");
        assert!(hmac::verify(&key, signed.as_bytes(), &tag).is_ok());
    }

    #[test]
    fn of_an_address_only_scheme_and_host_are_shown_and_no_other_kind_is_taken() {
        assert_eq!(
            url_hint("https://hooks.example.com/T000/B000?token=x").as_deref(),
            Ok("https://hooks.example.com/…")
        );
        assert_eq!(url_hint("http://10.0.0.1:8080").as_deref(), Ok("http://10.0.0.1:8080/…"));
        let long = format!("https://a/{}", "x".repeat(2_000));
        for wrong in ["", "hooks.example.com", "file:///etc/passwd", "https://", "https://u:p@host/", &long] {
            assert!(url_hint(wrong).is_err(), "{wrong}");
        }
    }
}
