//! Connections that are lent and given back. The driver's own pool asks the server after each use whether the connection is
//! well, and waits for the answer without limit: that is a round trip more for each question, and where the server has gone
//! silently a pool of one stays empty for as long as the kernel goes on sending. Here a connection that has done what it was
//! asked is lent again at once, one that has more to say gets a moment, and every other one is closed.

use std::{
    io::ErrorKind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::Connections;

/// Longest wait for a place, and then for a new connection.
pub(super) const ACQUIRE: Duration = Duration::from_secs(5);
/// A connection that nobody has used for so long is closed.
const IDLE: Duration = Duration::from_secs(300);
/// And one of this age, that what the server keeps for it does not grow for ever.
const LIFETIME: Duration = Duration::from_secs(1800);
/// For a rollback, or to say good-bye.
const SETTLE: Duration = Duration::from_secs(5);

/// What every session is told at its beginning, and not in the start packet: PgBouncer takes no unknown parameter there.
const SETTINGS: &str = "
set statement_timeout = 15000;
set lock_timeout = 10000;
-- A stopped process must not hold a row lock that others wait for.
set idle_in_transaction_session_timeout = 5000;
-- Every question is short: to compile one takes longer than to answer it.
set jit = off;
set synchronous_commit = on;
set timezone = 'UTC';
-- The server's side of a half-open connection; the client's side is ANSWER_TIMEOUT.
set tcp_user_timeout = 15000;
set tcp_keepalives_idle = 10;
set tcp_keepalives_interval = 5;
set tcp_keepalives_count = 3;
-- A question that nobody waits for any more is given up: those who ask every few seconds would otherwise pile up what they
-- abandoned.
set client_connection_check_interval = 1000;
";

/// Prepares a session.
pub(super) async fn settle_in(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(SETTINGS).execute(conn).await?;
    Ok(())
}

/// See the module.
#[derive(Clone)]
pub(super) struct Pool(Arc<Inner>);

struct Inner {
    options: PgConnectOptions,
    /// Of each session, beside [`SETTINGS`].
    settings: &'static str,
    most: u32,
    places: Arc<Semaphore>,
    /// The one given back last is lent first: the others may grow old.
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    conn: PgConnection,
    made: Instant,
    since: Instant,
}

impl Idle {
    fn is_good(&self) -> bool {
        self.since.elapsed() < IDLE && self.made.elapsed() < LIFETIME
    }
}

impl Pool {
    pub(super) fn new(options: PgConnectOptions, most: u32, settings: &'static str) -> Self {
        let places = Arc::new(Semaphore::new(usize::try_from(most).unwrap_or(usize::MAX)));
        Self(Arc::new(Inner { options, settings, most, places, idle: Mutex::default() }))
    }

    pub(super) fn options(&self) -> &PgConnectOptions {
        &self.0.options
    }

    /// A new connection, which counts nowhere.
    pub(super) async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        let mut conn = self.0.options.connect().await?;
        settle_in(&mut conn).await?;
        if !self.0.settings.is_empty() {
            sqlx::raw_sql(self.0.settings).execute(&mut conn).await?;
        }
        Ok(conn)
    }

    /// The same, of a server that is just starting, too.
    async fn connect_when_up(&self) -> Result<PgConnection, sqlx::Error> {
        let mut pause = Duration::from_millis(10);
        loop {
            match self.connect().await {
                Err(sqlx::Error::Io(error)) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(sqlx::Error::Database(error)) if super::is_starting(error.code().as_deref()) => {}
                done => return done,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connections(&self) -> Connections {
        let free = u32::try_from(self.0.places.available_permits()).unwrap_or(u32::MAX);
        let idle = u32::try_from(self.idle().len()).unwrap_or(u32::MAX);
        Connections { in_use: self.0.most.saturating_sub(free), idle, most: self.0.most }
    }

    /// A connection, or `PoolTimedOut` where all are lent for too long or no new one can be made in time.
    pub(super) async fn acquire(&self) -> Result<Lent, sqlx::Error> {
        let place = timeout(ACQUIRE, self.0.places.clone().acquire_owned()).await;
        let place = place.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.idle().pop().filter(Idle::is_good);
        let (conn, made) = match idle {
            Some(idle) => (idle.conn, idle.made),
            None => {
                let made = Instant::now();
                let conn = timeout(ACQUIRE, self.connect_when_up()).await;
                (conn.map_err(|_| sqlx::Error::PoolTimedOut)??, made)
            }
        };
        Ok(Lent { conn, made, pool: self.clone(), place })
    }

    fn take_back(&self, conn: PgConnection, made: Instant) {
        let old: Vec<Idle> = {
            let mut idle = self.idle();
            idle.push(Idle { conn, made, since: Instant::now() });
            idle.extract_if(.., |idle| !idle.is_good()).collect()
        };
        for old in old {
            tokio::spawn(timeout(SETTLE, old.conn.close()));
        }
    }
}

/// A connection that is lent. One that is dropped is closed: who was interrupted leaves it in a state that nobody knows.
pub(super) struct Lent {
    conn: PgConnection,
    made: Instant,
    pool: Pool,
    place: OwnedSemaphorePermit,
}

impl Lent {
    /// Asks, and gives the connection back.
    pub(super) async fn ask<T>(
        mut self,
        ask: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let answer = ask(&mut self.conn).await;
        self.give_back(answer.as_ref().err());
        answer
    }

    /// After a question that came to its end, or `failed`.
    fn give_back(mut self, failed: Option<&sqlx::Error>) {
        if matches!(failed, Some(sqlx::Error::Io(_) | sqlx::Error::Protocol(_))) {
            // The others have most likely lost the same server, and would show it one question at a time.
            return self.pool.idle().clear();
        }
        // A transaction that was dropped is rolled back by what is said next, and holds its locks until then.
        if failed.is_none() && !self.conn.should_flush() && !self.conn.is_in_transaction() {
            return self.done();
        }
        tokio::spawn(async move {
            if let Ok(Ok(())) = timeout(SETTLE, self.conn.ping()).await {
                self.done();
            }
        });
    }

    fn done(self) {
        let Self { conn, made, pool, place } = self;
        pool.take_back(conn, made);
        // Only now: whoever waits for the place finds the connection.
        drop(place);
    }
}
