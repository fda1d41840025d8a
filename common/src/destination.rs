//! Destinations: the stores that backups are written to.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::{PgConnection, types::Json};

use crate::{
    connection::{FieldProblem, Shape, SplitConfig},
    id::{DestinationId, Reference},
    label::Labels,
    page::{Page, fetch_limit},
    seal::{SealError, SealKey},
};

/// What kind of store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Kind {
    /// A folder that the workers have mounted.
    Local,
    /// S3 and what speaks its protocol.
    S3,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 2] = [Kind::Local, Kind::S3];

    /// The name as clients write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Local => "local",
            Kind::S3 => "s3",
        }
    }

    /// Secrets and address of this kind's config.
    pub fn shape(self) -> Shape {
        match self {
            Kind::Local => Shape { secrets: &[], address: &[] },
            Kind::S3 => Shape { secrets: &["secretAccessKey"], address: &["endpoint", "pathStyle"] },
        }
    }
}

/// The open part of a local destination's config.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LocalConfig {
    /// Folder on every worker of the pool, under one of `DBACKUP_LOCAL_PATHS`.
    pub root: PathBuf,
}

/// The open part of an S3 destination's config.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct S3Config {
    /// The bucket; it must exist.
    pub bucket: String,
    /// URL of the service; AWS when left out.
    pub endpoint: Option<String>,
    /// Region; `us-east-1` when left out.
    pub region: Option<String>,
    /// Who signs the requests.
    pub access_key_id: String,
    /// Put in front of every name.
    pub prefix: Option<String>,
    /// `endpoint/bucket/key` instead of `bucket.endpoint/key`. Left out: true when there is an endpoint.
    pub path_style: Option<bool>,
}

/// A config with its secrets, ready to be used.
#[derive(Clone, Debug)]
pub enum DestinationAccess {
    /// A folder.
    Local(LocalConfig),
    /// An object store.
    S3 {
        /// Where it is.
        config: S3Config,
        /// Signs the requests.
        secret_access_key: SecretString,
    },
}

/// What is wrong with a config, field by field.
pub fn config_problems(kind: Kind, config: &SplitConfig) -> Vec<FieldProblem> {
    let mut problems = Vec::new();
    let mut refuse = |field: &str, message: &str| problems.push(FieldProblem::new(format!("config.{field}"), message));
    match kind {
        Kind::Local => match config.typed::<LocalConfig>() {
            Err(problem) => return vec![problem],
            Ok(local) => {
                let climbs = local.root.components().any(|c| matches!(c, std::path::Component::ParentDir));
                if !local.root.is_absolute() || climbs {
                    refuse("root", "must be an absolute path without '..'");
                }
            }
        },
        Kind::S3 => match config.typed::<S3Config>() {
            Err(problem) => return vec![problem],
            Ok(s3) => {
                let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
                if s3.bucket.is_empty() || s3.bucket.len() > 255 || !s3.bucket.chars().all(sane) {
                    refuse("bucket", "must be the name of a bucket: letters, digits, dot, hyphen");
                }
                if let Some(endpoint) = &s3.endpoint {
                    match url::Url::parse(endpoint) {
                        Ok(url)
                            if matches!(url.scheme(), "http" | "https")
                                && url.host().is_some()
                                && url.password().is_none() => {}
                        _ => refuse("endpoint", "must be a URL that begins with https:// or http://"),
                    }
                }
                if s3.access_key_id.is_empty() {
                    refuse("accessKeyId", "must not be empty");
                }
                if s3
                    .prefix
                    .as_deref()
                    .is_some_and(|p| p.starts_with('/') || p.split('/').any(|part| part == ".." || part == "."))
                {
                    refuse("prefix", "must not begin with '/' or hold '.' or '..' as a part");
                }
                if !config.secrets.contains_key("secretAccessKey") {
                    refuse("secretAccessKey", "is required");
                }
            }
        },
    }
    problems
}

/// A destination as clients see it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Destination {
    /// Its id.
    pub id: DestinationId,
    /// Its stable name.
    pub slug: String,
    /// Its name for people.
    pub name: String,
    /// What kind of store.
    pub kind: Kind,
    /// Where it is, secrets masked.
    #[schema(value_type = Object)]
    pub config: Map<String, Value>,
    /// Which workers test it.
    pub pool: String,
    /// When a test first found it writable.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub ready_at: Option<DateTime<Utc>>,
    /// Free labels.
    pub labels: Labels,
    /// When it was made.
    #[serde(serialize_with = "crate::time::millis")]
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    #[serde(serialize_with = "crate::time::millis")]
    pub updated_at: DateTime<Utc>,
    #[serde(skip)]
    sealed_secrets: Option<Vec<u8>>,
}

/// A whole destination to be stored.
#[derive(Clone, Debug)]
pub struct DestinationDraft {
    /// See [`Destination::name`].
    pub name: String,
    /// Chosen by the client, else made from the name.
    pub slug: Option<String>,
    /// See [`Destination::kind`].
    pub kind: Kind,
    /// With its secrets.
    pub config: SplitConfig,
    /// See [`Destination::pool`].
    pub pool: String,
    /// See [`Destination::labels`].
    pub labels: Labels,
}

/// Which destinations a list shows.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Part of the name, in any case.
    pub name: Option<String>,
    /// Labels that must be there.
    pub labels: Labels,
    /// Rows on a page; `None` for all.
    pub limit: Option<i64>,
    /// The last id of the page before.
    pub cursor: Option<uuid::Uuid>,
}

pub(crate) fn context(id: DestinationId) -> String {
    format!("destination:{id}")
}

impl Destination {
    /// Opens the stored config with its secrets.
    pub fn open_config(&self, key: &SealKey) -> Result<SplitConfig, SealError> {
        let mut open = self.config.clone();
        open.retain(|name, _| !self.kind.shape().secrets.contains(&name.as_str()));
        SplitConfig::open(open, self.sealed_secrets.as_deref(), key, &context(self.id))
    }

    /// What a worker needs to write to it.
    pub fn access(&self, key: &SealKey) -> Result<DestinationAccess, SealError> {
        let mut config = self.open_config(key)?;
        Ok(match self.kind {
            Kind::Local => DestinationAccess::Local(config.typed().map_err(|_| SealError::DoesNotOpen)?),
            Kind::S3 => DestinationAccess::S3 {
                secret_access_key: config.secrets.remove("secretAccessKey").ok_or(SealError::DoesNotOpen)?,
                config: config.typed().map_err(|_| SealError::DoesNotOpen)?,
            },
        })
    }
}

struct Row {
    id: DestinationId,
    slug: String,
    name: String,
    kind: Kind,
    config: Json<Map<String, Value>>,
    sealed_secrets: Option<Vec<u8>>,
    pool: String,
    ready_at: Option<DateTime<Utc>>,
    labels: Json<Labels>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl From<Row> for Destination {
    fn from(row: Row) -> Self {
        let secrets = row.sealed_secrets.iter().flat_map(|_| row.kind.shape().secrets).map(|s| (*s).to_owned());
        Destination {
            id: row.id,
            slug: row.slug,
            name: row.name,
            kind: row.kind,
            config: SplitConfig::masked(&row.config.0, secrets),
            pool: row.pool,
            ready_at: row.ready_at,
            labels: row.labels.0,
            created_at: row.created_at,
            updated_at: row.updated_at,
            sealed_secrets: row.sealed_secrets,
        }
    }
}

/// Stores a new destination; `None` when the chosen slug is taken. A slug made from the name gets a number instead.
pub async fn create(
    conn: &mut PgConnection,
    key: &SealKey,
    draft: &DestinationDraft,
) -> Result<Option<Destination>, sqlx::Error> {
    let id = DestinationId::new();
    let sealed = draft.config.seal(key, &context(id));
    for n in 0.. {
        let slug = draft.slug.clone().unwrap_or_else(|| crate::slug::candidate(&draft.name, n));
        let row = sqlx::query_as!(
            Row,
            r#"insert into destinations (id, slug, name, kind, config, sealed_secrets, pool, labels)
               values ($1, $2, $3, $4, $5, $6, $7, $8)
               on conflict on constraint destinations_slug_unique do nothing
               returning id as "id: DestinationId", slug, name, kind as "kind: Kind", config as "config: Json<Map<String, Value>>",
                         sealed_secrets, pool, ready_at, labels as "labels: Json<Labels>", created_at, updated_at"#,
            id as _, slug, draft.name, draft.kind.as_str(), Json(&draft.config.open) as _, sealed, draft.pool,
            Json(&draft.labels) as _,
        )
        .fetch_optional(&mut *conn)
        .await?;
        match row {
            Some(row) => return Ok(Some(row.into())),
            None if draft.slug.is_some() || n > 1000 => break,
            None => {}
        }
    }
    Ok(None)
}

/// Replaces a destination that was read as of `updated_at`; `None` when it is gone or was changed since.
pub async fn update(
    conn: &mut PgConnection,
    key: &SealKey,
    (id, updated_at): (DestinationId, DateTime<Utc>),
    draft: &DestinationDraft,
) -> Result<Option<Destination>, sqlx::Error> {
    let sealed = draft.config.seal(key, &context(id));
    let row = sqlx::query_as!(
        Row,
        r#"update destinations
              set slug = coalesce($2, slug), name = $3, kind = $4, config = $5, sealed_secrets = $6, pool = $7,
                  -- Another root or bucket is another store: its marker is not written yet.
                  ready_at = case when config = $5 then ready_at end, labels = $8, updated_at = clock_timestamp()
            where id = $1 and updated_at = $9
           returning id as "id: DestinationId", slug, name, kind as "kind: Kind", config as "config: Json<Map<String, Value>>",
                     sealed_secrets, pool, ready_at, labels as "labels: Json<Labels>", created_at, updated_at"#,
        id as _, draft.slug, draft.name, draft.kind.as_str(), Json(&draft.config.open) as _, sealed, draft.pool,
        Json(&draft.labels) as _, updated_at,
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Destination::from))
}

/// One destination by id or slug.
pub async fn find(conn: &mut PgConnection, reference: &Reference) -> Result<Option<Destination>, sqlx::Error> {
    let row = sqlx::query_as!(
        Row,
        r#"select id as "id: DestinationId", slug, name, kind as "kind: Kind", config as "config: Json<Map<String, Value>>",
                  sealed_secrets, pool, ready_at, labels as "labels: Json<Labels>", created_at, updated_at
             from destinations where id = $1 or slug = $2"#,
        reference.id(),
        reference.slug(),
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Destination::from))
}

/// A page of destinations, oldest first.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<Page<Destination>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: DestinationId", slug, name, kind as "kind: Kind", config as "config: Json<Map<String, Value>>",
                  sealed_secrets, pool, ready_at, labels as "labels: Json<Labels>", created_at, updated_at
             from destinations
            where ($1::text is null or position(lower($1) in lower(name)) > 0)
              and labels @> $2
              and ($3::uuid is null or id > $3)
            order by id
            limit $4"#,
        filter.name,
        Json(&filter.labels) as _,
        filter.cursor,
        fetch_limit(filter.limit),
    )
    .fetch_all(conn)
    .await?;
    Ok(Page::cut(rows.into_iter().map(Destination::from).collect(), filter.limit, |s| s.id.to_string()))
}

/// Deletes a destination; `false` when it was gone. One that a job uses fails on `job_destinations_destination_exists`.
pub async fn delete(conn: &mut PgConnection, id: DestinationId) -> Result<bool, sqlx::Error> {
    let done = sqlx::query!("delete from destinations where id = $1", id as _).execute(conn).await?;
    Ok(done.rows_affected() == 1)
}

/// Notes that a test found the store writable; the first time stays. `false` when it was changed since it was read: what was
/// tested may be another store.
pub async fn mark_ready(conn: &mut PgConnection, tested: &Destination) -> Result<bool, sqlx::Error> {
    let done = sqlx::query!(
        "update destinations set ready_at = coalesce(ready_at, clock_timestamp()) where id = $1 and updated_at = $2",
        tested.id as _,
        tested.updated_at,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The folders that workers of these pools are to see: those that a test found writable once, where backups of their jobs go,
/// also those that keep what their job was before, and where the backups of their restores lie.
pub async fn folders(conn: &mut PgConnection, pools: &[String]) -> Result<Vec<Destination>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: DestinationId", slug, name, kind as "kind: Kind", config as "config: Json<Map<String, Value>>",
                  sealed_secrets, pool, ready_at, labels as "labels: Json<Labels>", created_at, updated_at
             from destinations d
            where kind = 'local' and ready_at is not null
              and (exists (select 1 from job_destinations jd join jobs j on j.id = jd.job_id join sources s on s.id = j.source_id
                            where jd.destination_id = d.id and s.pool = any ($1))
                   or exists (select 1 from restores r join executions e on e.id = r.execution_id
                                       join artifacts a on a.execution_id = r.backup_id
                               where e.ended_at is null and e.pool = any ($1) and a.destination_id = d.id)
                   or exists (select 1 from execution_pins p join executions e on e.id = p.execution_id
                               where e.ended_at is null and e.pool = any ($1) and d.id = any (p.destination_ids)))"#,
        pools
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Destination::from).collect())
}

/// The destinations of these ids, in their order; those that are gone are left out.
pub async fn of_ids(conn: &mut PgConnection, ids: &[DestinationId]) -> Result<Vec<Destination>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select d.id as "id: DestinationId", d.slug, d.name, d.kind as "kind: Kind", d.config as "config: Json<Map<String, Value>>",
                  d.sealed_secrets, d.pool, d.ready_at, d.labels as "labels: Json<Labels>", d.created_at, d.updated_at
             from unnest($1::uuid[]) with ordinality as i (id, position) join destinations d on d.id = i.id
            order by i.position"#,
        ids as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Destination::from).collect())
}
