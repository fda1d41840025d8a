//! The connection to PostgreSQL: options that keep a dead peer from holding anything, embedded migrations,
//! and a time limit on everything that is asked.

mod migrate;
mod pool;

use std::{str::FromStr, time::Duration};

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    ConnectOptions, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::config::{self, ConfigError};
use pool::Pool;

/// Longest time a process waits for its database when it starts.
pub const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the database could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// PostgreSQL or the connection to it failed.
    #[error("the database refused or failed a statement")]
    Sql(#[from] sqlx::Error),
    /// No answer in time.
    #[error("the database did not answer within {} ms", .0.as_millis())]
    Timeout(Duration),
}

impl DbError {
    /// The constraint that a statement ran into, when that is what happened.
    pub fn constraint(&self) -> Option<&str> {
        match self {
            DbError::Sql(sqlx::Error::Database(e)) => e.constraint(),
            _ => None,
        }
    }
}

/// The database: connections that are lent, and new ones.
#[derive(Clone)]
pub struct Db(Pool);

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Db").field(&self.connections()).finish()
    }
}

/// Connections of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    /// Held by somebody.
    pub in_use: u32,
    /// Open and free.
    pub idle: u32,
    /// As many there may be.
    pub most: u32,
}

/// Longest time of an ordinary question, once it has a connection.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

impl Db {
    /// Connects lazily. `program` is what `pg_stat_activity` shows. The URL holds a secret, so the error does not
    /// quote it.
    pub fn new(url: &SecretString, program: &str, max_connections: u32) -> Result<Self, ConfigError> {
        let options = PgConnectOptions::from_str(url.expose_secret())
            .map_err(|_| ConfigError("DATABASE_URL is not understood by the PostgreSQL driver".into()))?
            .application_name(program)
            // Nothing that PgBouncer would refuse in the start packet: see `pool::SETTINGS`.
            .extra_float_digits(None)
            .log_statements(tracing::log::LevelFilter::Off)
            .log_slow_statements(tracing::log::LevelFilter::Warn, Duration::from_secs(1));
        Ok(Self(Pool::new(options, max_connections, "")))
    }

    /// A connection outside the pool, for heartbeats and migrations.
    pub async fn connect_apart(&self) -> Result<PgConnection, sqlx::Error> {
        self.0.connect().await
    }

    /// How its pool is used now.
    pub fn connections(&self) -> Connections {
        self.0.connections()
    }

    /// The same database by one connection of its own, made when it is needed and again after a failure: for what is asked
    /// again and again, one question at a time. Each new connection plans a claim anew, which takes several times as long as
    /// the claim; and no crowd on the shared pool keeps it waiting.
    pub fn apart(&self) -> Self {
        self.apart_in("")
    }

    /// The same, in sessions with settings of their own.
    pub fn apart_in(&self, settings: &'static str) -> Self {
        Self(Pool::new(self.0.options().clone(), 1, settings))
    }

    /// The driver's own pool of one: what a listener needs.
    pub fn pool_apart(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(pool::ACQUIRE)
            .test_before_acquire(false)
            .after_connect(|conn, _| Box::pin(pool::settle_in(conn)))
            .connect_lazy_with(self.0.options().clone())
    }

    /// Runs `ask` on a lent connection within `limit`. When the time is up the connection is closed.
    pub async fn within<T>(
        &self,
        limit: Duration,
        ask: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, DbError> {
        let lent = Box::pin(self.0.acquire()).await?;
        limited(limit, lent.ask(ask)).await
    }

    /// The same with the wait for a connection in the limit, for those to whom an answer that comes later says nothing.
    pub async fn at_once<T>(
        &self,
        limit: Duration,
        ask: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, DbError> {
        limited(limit, async { self.0.acquire().await?.ask(ask).await }).await
    }

    /// Whether the database answers within `limit`: a probe has a time-out of its own.
    pub async fn ping(&self, limit: Duration) -> Result<(), DbError> {
        self.at_once(limit, async |conn| sqlx::query("select 1").execute(conn).await).await?;
        Ok(())
    }

    /// Waits for the database, at most [`START_TIMEOUT`], then brings its schema up to date. Many processes may
    /// do this at once: the migrations run under PostgreSQL's advisory lock. A schema that is newer than this
    /// program is accepted, so that a cluster can be upgraded process by process.
    pub async fn prepare(&self) -> Result<(), PrepareError> {
        let mut conn = self.wait_until_up().await?;
        migrate::migrate(&mut conn).await
    }

    async fn wait_until_up(&self) -> Result<PgConnection, PrepareError> {
        let give_up = tokio::time::Instant::now() + START_TIMEOUT;
        let mut told = false;
        loop {
            let failed = match tokio::time::timeout(Duration::from_secs(5), self.connect_apart()).await {
                Ok(Ok(conn)) => return Ok(conn),
                Ok(Err(sqlx::Error::Database(e))) if !is_starting(e.code().as_deref()) => {
                    return Err(PrepareError::Away(sqlx::Error::Database(e)));
                }
                Ok(Err(e)) => e,
                Err(_) => sqlx::Error::PoolTimedOut,
            };
            if tokio::time::Instant::now() > give_up {
                return Err(PrepareError::Away(failed));
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(error = %failed, "waiting for the database at most {} s", START_TIMEOUT.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
}

fn limited<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, sqlx::Error>>,
) -> impl Future<Output = Result<T, DbError>> {
    // Boxed before anything waits for it: several kilobytes that would otherwise be part of every future above, up to the
    // request's, and move with it.
    let answer = tokio::time::timeout(limit, Box::pin(answer));
    async move { Ok(answer.await.map_err(|_| DbError::Timeout(limit))??) }
}

/// `cannot_connect_now` while PostgreSQL starts or recovers, and too many connections: both pass.
fn is_starting(sqlstate: Option<&str>) -> bool {
    matches!(sqlstate, Some("57P03" | "53300"))
}

/// The time by the database's clock, the only one that decides: a process's own may be wrong.
pub async fn now(conn: &mut PgConnection) -> Result<DateTime<Utc>, sqlx::Error> {
    sqlx::query_scalar!(r#"select clock_timestamp() as "now!""#).fetch_one(conn).await
}

/// Waits until everything that is committed by now, by whichever connection, survives a crash, and with synchronous
/// standbys a failover: a commit of its own that lies behind all of that in the log. PostgreSQL waits only for one that
/// wrote something, so it writes a message, which no table keeps.
pub async fn flush(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!("select from pg_logical_emit_message(true, 'dbackup', ''::text)").execute(conn).await?;
    Ok(())
}

/// Why a process could not start on its database.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Not reachable, or it refused us.
    #[error("could not connect to the database of DATABASE_URL")]
    Away(#[source] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("could not migrate the database")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// Something holds a table.
    #[error(
        "could not migrate the database while one of its tables is locked: start again when its dump, or what else holds it, has ended"
    )]
    Locked(#[source] sqlx::migrate::MigrateError),
}

/// Why a process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The database is away or its schema could not be made.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The encryption key is not the one of this database.
    #[error("DBACKUP_ENCRYPTION_KEY")]
    Key(#[from] crate::seal::CanaryError),
    /// The database failed later.
    #[error(transparent)]
    Database(#[from] DbError),
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl StartError {
    /// Prints one line for people and gives the exit status: 2 for the configuration, 1 for everything else.
    pub fn report(&self) -> i32 {
        eprintln!("error: {}", crate::error::Chain(self));
        match self {
            StartError::Key(crate::seal::CanaryError::Key(_)) | StartError::Config(_) => config::EXIT_CONFIG,
            _ => 1,
        }
    }
}

/// What every process does first: bring the schema up to date and check the encryption key.
pub async fn start(db: &Db, key: &crate::seal::SealKey) -> Result<(), StartError> {
    db.prepare().await?;
    let mut conn = db.connect_apart().await.map_err(PrepareError::Away)?;
    crate::seal::check_canary(&mut conn, key).await?;
    Ok(())
}

impl DbError {
    /// Whether the same question may be answered a moment later: the database is away, starts, fails over, or is
    /// overloaded.
    pub fn is_passing(&self) -> bool {
        match self {
            DbError::Timeout(_) => true,
            DbError::Sql(sqlx::Error::Database(e)) => {
                let code = e.code().unwrap_or_default();
                // Connection, resources, operator intervention (shutdown, cancel, cannot connect now), locks,
                // serialization and deadlock, and a standby that is not promoted yet.
                ["08", "53", "57"].iter().any(|class| code.starts_with(class))
                    || ["55P03", "40001", "40P01", "25006"].contains(&&*code)
            }
            DbError::Sql(e) => matches!(
                e,
                sqlx::Error::Io(_)
                    | sqlx::Error::Tls(_)
                    | sqlx::Error::PoolTimedOut
                    | sqlx::Error::PoolClosed
                    | sqlx::Error::WorkerCrashed
                    | sqlx::Error::Protocol(_)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_asks_the_database_does_not_carry_the_question_in_its_future() {
        let db = Db::new(&"postgres://127.0.0.1:1/x".to_owned().into(), "test", 1).expect("a URL");
        let question = async |_: &mut PgConnection| {
            let much = [0_u8; 16 << 10];
            tokio::task::yield_now().await;
            Ok(much.len())
        };
        let limit = Duration::from_secs(1);
        let (within, at_once) = (db.within(limit, question), db.at_once(limit, question));
        let sizes = (size_of_val(&within), size_of_val(&at_once));
        assert!(sizes.0 < 1024 && sizes.1 < 1024, "{sizes:?} bytes");
    }
}
