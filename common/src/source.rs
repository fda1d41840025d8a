//! Sources: the database servers that are backed up.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::{PgConnection, types::Json};

use crate::{
    connection::{FieldProblem, Shape, SplitConfig},
    id::{Reference, SourceId},
    label::Labels,
    page::{Page, fetch_limit},
    seal::{SealError, SealKey},
    setting,
};

/// What speaks at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Engine {
    /// PostgreSQL.
    Postgres,
    /// MySQL.
    Mysql,
    /// MariaDB.
    Mariadb,
}

impl Engine {
    /// All of them.
    pub const ALL: [Engine; 3] = [Engine::Postgres, Engine::Mysql, Engine::Mariadb];

    /// The name as clients write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Engine::Postgres => "postgres",
            Engine::Mysql => "mysql",
            Engine::Mariadb => "mariadb",
        }
    }

    /// The port where the server listens by custom.
    pub fn default_port(self) -> u16 {
        match self {
            Engine::Postgres => 5432,
            Engine::Mysql | Engine::Mariadb => 3306,
        }
    }
}

/// How a connection is protected, named as libpq does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// Never TLS.
    Disable,
    /// TLS when the server offers it.
    #[default]
    Prefer,
    /// TLS or no connection; the server's certificate is not checked.
    Require,
    /// TLS, and the certificate must be signed by `caCertificate`. MariaDB's own tools also check the host.
    VerifyCa,
    /// As `verify-ca`, and the certificate must name the host.
    VerifyFull,
}

/// TLS of a source.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tls {
    /// See [`TlsMode`].
    #[serde(default)]
    pub mode: TlsMode,
    /// PEM of the authority that signed the server's certificate.
    pub ca_certificate: Option<String>,
}

/// The open part of a source's config.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SourceConfig {
    /// Name or address of the server; not with `socket`.
    pub host: Option<String>,
    /// TCP port; the engine's usual one when left out.
    pub port: Option<u16>,
    /// A Unix socket instead of a host: PostgreSQL's folder, MariaDB's file.
    pub socket: Option<PathBuf>,
    /// Who to sign in as.
    pub username: String,
    /// The databases to back up, at least one.
    pub databases: Vec<String>,
    /// Protection of the connection.
    #[serde(default)]
    pub tls: Tls,
}

/// Secrets and address of every engine's config so far.
pub const SHAPE: Shape = Shape { secrets: &["password"], address: &["host", "port", "socket", "tls"] };

/// What is wrong with a config, field by field.
pub fn config_problems(config: &SplitConfig) -> Vec<FieldProblem> {
    let typed: SourceConfig = match config.typed() {
        Ok(typed) => typed,
        Err(problem) => return vec![problem],
    };
    let mut problems = Vec::new();
    let mut refuse = |field: &str, message: &str| problems.push(FieldProblem::new(format!("config.{field}"), message));
    let unclean = |text: &str| text.is_empty() || text.chars().any(char::is_control);
    match (&typed.host, &typed.socket) {
        (Some(_), Some(_)) => refuse("socket", "give host or socket, not both"),
        (None, None) => refuse("host", "is required (or socket, for a Unix socket)"),
        (Some(host), None) if unclean(host) || host.contains(['/', ',', ' ']) => {
            refuse("host", "must be one host name or address")
        }
        (None, Some(socket)) if !socket.is_absolute() => refuse("socket", "must be an absolute path"),
        _ => {}
    }
    if typed.port == Some(0) {
        refuse("port", "must be between 1 and 65535");
    }
    if unclean(&typed.username) {
        refuse("username", "must not be empty or hold control characters");
    }
    if typed.databases.is_empty() || typed.databases.len() > 1000 {
        refuse("databases", "must name between 1 and 1000 databases");
    }
    for (at, name) in typed.databases.iter().enumerate() {
        if unclean(name) || name.len() > 255 {
            refuse(&format!("databases[{at}]"), "must have 1 to 255 bytes and no control character");
        } else if typed.databases[..at].contains(name) {
            refuse(&format!("databases[{at}]"), "is listed twice");
        }
    }
    if matches!(typed.tls.mode, TlsMode::VerifyCa | TlsMode::VerifyFull) && typed.tls.ca_certificate.is_none() {
        refuse("tls.caCertificate", "is required to verify a certificate");
    }
    problems
}

/// A source as clients see it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Its id.
    pub id: SourceId,
    /// Its stable name.
    pub slug: String,
    /// Its name for people.
    pub name: String,
    /// What speaks there.
    pub engine: Engine,
    /// How to reach it, secrets masked.
    #[schema(value_type = Object)]
    pub config: Map<String, Value>,
    /// Which workers reach it.
    pub pool: String,
    /// Runs at once against it.
    pub max_concurrent_runs: Option<i32>,
    /// Restores at once into it, counted apart from its runs.
    pub max_concurrent_restores: Option<i32>,
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

/// What a worker needs to reach a source.
#[derive(Clone, Debug)]
pub struct SourceAccess {
    /// What speaks there.
    pub engine: Engine,
    /// Where it is.
    pub config: SourceConfig,
    /// Its password, when it needs one.
    pub password: Option<SecretString>,
    /// What its sessions are called on the server, where that can be said: those of a run bear its id, so that a later
    /// attempt finds what an earlier one has left.
    pub session: String,
}

/// A whole source to be stored.
#[derive(Clone, Debug)]
pub struct SourceDraft {
    /// See [`Source::name`].
    pub name: String,
    /// Chosen by the client, else made from the name.
    pub slug: Option<String>,
    /// See [`Source::engine`].
    pub engine: Engine,
    /// With its secrets.
    pub config: SplitConfig,
    /// See [`Source::pool`].
    pub pool: String,
    /// See [`Source::max_concurrent_runs`].
    pub max_concurrent_runs: Option<i32>,
    /// See [`Source::max_concurrent_restores`].
    pub max_concurrent_restores: Option<i32>,
    /// See [`Source::labels`].
    pub labels: Labels,
}

/// Which sources a list shows.
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

pub(crate) fn context(id: SourceId) -> String {
    format!("source:{id}")
}

impl Source {
    /// Opens the stored config with its secrets.
    pub fn open_config(&self, key: &SealKey) -> Result<SplitConfig, SealError> {
        let mut open = self.config.clone();
        open.retain(|name, _| !SHAPE.secrets.contains(&name.as_str()));
        SplitConfig::open(open, self.sealed_secrets.as_deref(), key, &context(self.id))
    }

    /// What a worker needs to reach it.
    pub fn access(&self, key: &SealKey) -> Result<SourceAccess, SealError> {
        let mut config = self.open_config(key)?;
        Ok(SourceAccess {
            engine: self.engine,
            password: config.secrets.remove("password"),
            config: config.typed().map_err(|_| SealError::DoesNotOpen)?,
            session: "dbackup".to_owned(),
        })
    }
}

struct Row {
    id: SourceId,
    slug: String,
    name: String,
    engine: Engine,
    config: Json<Map<String, Value>>,
    sealed_secrets: Option<Vec<u8>>,
    pool: String,
    max_concurrent_runs: Option<i32>,
    max_concurrent_restores: Option<i32>,
    labels: Json<Labels>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl From<Row> for Source {
    fn from(row: Row) -> Self {
        let secrets = row.sealed_secrets.iter().flat_map(|_| SHAPE.secrets).map(|s| (*s).to_owned());
        Source {
            id: row.id,
            slug: row.slug,
            name: row.name,
            engine: row.engine,
            config: SplitConfig::masked(&row.config.0, secrets),
            pool: row.pool,
            max_concurrent_runs: row.max_concurrent_runs,
            max_concurrent_restores: row.max_concurrent_restores,
            labels: row.labels.0,
            created_at: row.created_at,
            updated_at: row.updated_at,
            sealed_secrets: row.sealed_secrets,
        }
    }
}

/// Stores a new source; `None` when the chosen slug is taken. A slug made from the name gets a number instead.
pub async fn create(
    conn: &mut PgConnection,
    key: &SealKey,
    draft: &SourceDraft,
) -> Result<Option<Source>, sqlx::Error> {
    let id = SourceId::new();
    let sealed = draft.config.seal(key, &context(id));
    for n in 0.. {
        let slug = draft.slug.clone().unwrap_or_else(|| crate::slug::candidate(&draft.name, n));
        let row = sqlx::query_as!(
            Row,
            r#"insert into sources (id, slug, name, engine, config, sealed_secrets, pool, max_concurrent_runs,
                                    max_concurrent_restores, labels)
               values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
               on conflict on constraint sources_slug_unique do nothing
               returning id as "id: SourceId", slug, name, engine as "engine: Engine", config as "config: Json<Map<String, Value>>",
                         sealed_secrets, pool, max_concurrent_runs, max_concurrent_restores, labels as "labels: Json<Labels>", created_at, updated_at"#,
            id as _, slug, draft.name, draft.engine.as_str(), Json(&draft.config.open) as _, sealed, draft.pool,
            draft.max_concurrent_runs, draft.max_concurrent_restores, Json(&draft.labels) as _,
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

/// Replaces a source that was read as of `updated_at`; `None` when it is gone or was changed since. To be called in a
/// transaction: it holds the gate, under which the limits of the source are obeyed, so that no claim goes by the old ones
/// after the commit.
pub async fn update(
    conn: &mut PgConnection,
    key: &SealKey,
    (id, updated_at): (SourceId, DateTime<Utc>),
    draft: &SourceDraft,
) -> Result<Option<Source>, sqlx::Error> {
    let sealed = draft.config.seal(key, &context(id));
    setting::lock_gate(conn).await?;
    let row = sqlx::query_as!(
        Row,
        r#"update sources
              set slug = coalesce($2, slug), name = $3, engine = $4, config = $5, sealed_secrets = $6, pool = $7,
                  max_concurrent_runs = $8, max_concurrent_restores = $9, labels = $10, updated_at = clock_timestamp()
            where id = $1 and updated_at = $11
           returning id as "id: SourceId", slug, name, engine as "engine: Engine", config as "config: Json<Map<String, Value>>",
                     sealed_secrets, pool, max_concurrent_runs, max_concurrent_restores, labels as "labels: Json<Labels>", created_at, updated_at"#,
        id as _, draft.slug, draft.name, draft.engine.as_str(), Json(&draft.config.open) as _, sealed, draft.pool,
        draft.max_concurrent_runs, draft.max_concurrent_restores, Json(&draft.labels) as _, updated_at,
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Source::from))
}

/// One source by id or slug.
pub async fn find(conn: &mut PgConnection, reference: &Reference) -> Result<Option<Source>, sqlx::Error> {
    let row = sqlx::query_as!(
        Row,
        r#"select id as "id: SourceId", slug, name, engine as "engine: Engine", config as "config: Json<Map<String, Value>>",
                  sealed_secrets, pool, max_concurrent_runs, max_concurrent_restores, labels as "labels: Json<Labels>", created_at, updated_at
             from sources where id = $1 or slug = $2"#,
        reference.id(),
        reference.slug(),
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Source::from))
}

/// A page of sources, oldest first.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<Page<Source>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: SourceId", slug, name, engine as "engine: Engine", config as "config: Json<Map<String, Value>>",
                  sealed_secrets, pool, max_concurrent_runs, max_concurrent_restores, labels as "labels: Json<Labels>", created_at, updated_at
             from sources
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
    Ok(Page::cut(rows.into_iter().map(Source::from).collect(), filter.limit, |s| s.id.to_string()))
}

/// Deletes a source; `false` when it was gone. One that a job uses fails on `jobs_source_exists`.
pub async fn delete(conn: &mut PgConnection, id: SourceId) -> Result<bool, sqlx::Error> {
    let done = sqlx::query!("delete from sources where id = $1", id as _).execute(conn).await?;
    Ok(done.rows_affected() == 1)
}
