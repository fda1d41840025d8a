//! The audit log: who changed, triggered or signed in, from where. Written in the transaction of what it tells of,
//! so that neither exists without the other.

use std::net::IpAddr;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;

use crate::page::{Page, fetch_limit};

/// Who acts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// ApiKey, User, Administrator (the command line), Schedule or Anonymous.
    pub kind: &'static str,
    /// The key or the user.
    pub id: Option<uuid::Uuid>,
    /// Its name.
    pub name: String,
    /// Address of the client.
    pub address: Option<IpAddr>,
    /// As in `X-Request-Id`.
    pub request_id: Option<String>,
}

impl Actor {
    /// Somebody at the command line.
    pub fn command_line() -> Self {
        let name =
            std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_else(|_| "command line".into());
        Self { kind: "Administrator", id: None, name, address: None, request_id: None }
    }

    /// The schedule of a job, called by its expression and zone.
    pub fn schedule(expression: &str, timezone: &str) -> Self {
        let name = format!("{expression} {timezone}");
        Self { kind: "Schedule", id: None, name, address: None, request_id: None }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// `noun.verb`.
    pub action: &'static str,
    /// Id of the thing.
    pub target_id: Option<String>,
    /// Its name.
    pub target_name: Option<String>,
    /// More; never a secret.
    pub details: Value,
}

impl Event {
    /// Without details.
    pub fn new(action: &'static str, target_id: impl ToString, target_name: &str) -> Self {
        Self {
            action,
            target_id: Some(target_id.to_string()),
            target_name: Some(target_name.to_owned()),
            details: Value::Object(Default::default()),
        }
    }

    /// With details.
    pub fn with(mut self, details: Value) -> Self {
        self.details = details;
        self
    }
}

/// Writes events of one actor.
pub async fn record(conn: &mut PgConnection, actor: &Actor, events: &[Event]) -> Result<(), sqlx::Error> {
    if events.is_empty() {
        return Ok(());
    }
    let mut new = Columns::default();
    events.iter().for_each(|event| new.push(actor, event.clone()));
    sqlx::query!(
        "insert into audit_log (actor_kind, actor_id, actor_name, address, request_id, action, target_id, target_name, details)
         select * from unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::jsonb[])",
        &new.kinds,
        &new.ids as &[Option<uuid::Uuid>],
        &new.names,
        &new.addresses as &[Option<String>],
        &new.requests as &[Option<String>],
        &new.actions,
        &new.targets as &[Option<String>],
        &new.target_names as &[Option<String>],
        &new.details,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Columns of the lines to write, for `unnest`.
#[derive(Default)]
pub(crate) struct Columns {
    pub(crate) kinds: Vec<String>,
    pub(crate) ids: Vec<Option<uuid::Uuid>>,
    pub(crate) names: Vec<String>,
    pub(crate) addresses: Vec<Option<String>>,
    pub(crate) requests: Vec<Option<String>>,
    pub(crate) actions: Vec<String>,
    pub(crate) targets: Vec<Option<String>>,
    pub(crate) target_names: Vec<Option<String>>,
    pub(crate) details: Vec<Value>,
}

impl Columns {
    pub(crate) fn push(&mut self, actor: &Actor, event: Event) {
        self.kinds.push(actor.kind.to_owned());
        self.ids.push(actor.id);
        self.names.push(actor.name.clone());
        self.addresses.push(actor.address.map(|address| address.to_string()));
        self.requests.push(actor.request_id.clone());
        self.actions.push(event.action.to_owned());
        self.targets.push(event.target_id);
        self.target_names.push(event.target_name);
        self.details.push(event.details);
    }
}

/// A line of the log as clients read it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Order and cursor.
    #[serde(rename = "id", serialize_with = "as_text")]
    #[schema(value_type = String)]
    pub seq: i64,
    /// When.
    #[serde(serialize_with = "crate::time::millis")]
    pub at: DateTime<Utc>,
    /// ApiKey, User, Administrator, Schedule or Anonymous.
    pub actor_kind: String,
    /// The key or the user.
    pub actor_id: Option<uuid::Uuid>,
    /// Its name then.
    pub actor_name: String,
    /// Address of the client.
    pub address: Option<String>,
    /// As in `X-Request-Id`.
    pub request_id: Option<String>,
    /// `noun.verb`.
    pub action: String,
    /// Id of the thing.
    pub target_id: Option<String>,
    /// Its name then.
    pub target_name: Option<String>,
    /// More.
    pub details: Value,
}

fn as_text<S: serde::Serializer>(seq: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(seq)
}

/// Which entries a list shows.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this action.
    pub action: Option<String>,
    /// Only of this thing.
    pub target_id: Option<String>,
    /// Only by this key or user.
    pub actor_id: Option<uuid::Uuid>,
    /// At this time or later.
    pub from: Option<DateTime<Utc>>,
    /// Before this time.
    pub to: Option<DateTime<Utc>>,
    /// Rows on a page.
    pub limit: Option<i64>,
    /// The last `seq` of the page before.
    pub cursor: Option<i64>,
}

/// A page of entries, newest first.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<Page<Entry>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Entry,
        "select seq, at, actor_kind, actor_id, actor_name, address, request_id, action, target_id, target_name, details
           from audit_log
          where ($1::text is null or action = $1)
            and ($2::text is null or target_id = $2)
            and ($3::uuid is null or actor_id = $3)
            and ($4::timestamptz is null or at >= $4)
            and ($5::timestamptz is null or at < $5)
            and ($6::bigint is null or seq < $6)
          order by seq desc
          limit $7",
        filter.action,
        filter.target_id,
        filter.actor_id,
        filter.from,
        filter.to,
        filter.cursor,
        fetch_limit(filter.limit),
    )
    .fetch_all(conn)
    .await?;
    Ok(Page::cut(rows, filter.limit, |entry| entry.seq.to_string()))
}
