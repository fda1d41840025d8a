//! What a process remembers of keys, sessions and settings, and for how long it may.
//!
//! A memory counts only while the database's `auth_epoch` was seen unchanged within the last half second; otherwise
//! the process asks. So a key that is disabled, rotated or deleted is refused by every process within that time, also
//! where a notification would be lost, and a busy process asks twice a second instead of once a request.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use common::{
    api_key::{self, HashedKey, Lookup, Use},
    db::{Db, DbError},
    id::{ApiKeyId, SessionId},
    seal::SealKey,
    session::{self, SignedIn, SigningKey},
    setting::{self, Settings},
};

use crate::one_asks::OneAsks;

/// How long a confirmation of the epoch counts, from when it was asked for.
const TRUST: Duration = Duration::from_millis(500);
/// Longest time of a question.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time that a request waits to hear of changed settings.
const SETTINGS_TIMEOUT: Duration = Duration::from_millis(100);
/// Keys, and sessions, remembered at once.
const MOST_NOTES: usize = 10_000;
/// Time between two looks whether a new signing key is due.
const SIGNING_KEYS: Duration = Duration::from_secs(3_600);
/// Shortest time between two looks for a key that a token names and this process does not know.
const NEWER_KEYS: Duration = Duration::from_millis(50);
/// Shortest time between two records of a key's last use.
const USE_EVERY: Duration = Duration::from_secs(60);

/// See the module.
pub struct Memory {
    db: Db,
    state: Mutex<State>,
    /// Asks for the epoch.
    asking: OneAsks,
    asking_for_keys: OneAsks,
    uses: Mutex<HashMap<ApiKeyId, LastUse>>,
}

#[derive(Default)]
struct State {
    epoch: i64,
    confirmed: Option<Instant>,
    settings: Arc<Settings>,
    keys: Notes<HashedKey, Lookup>,
    sessions: Notes<SessionId, Option<SignedIn>>,
    signing_keys: Option<(i64, Instant, Arc<Vec<SigningKey>>)>,
}

/// Answers of the database, each with the epoch of its moment and its end.
struct Notes<K, V>(HashMap<K, (V, i64, Option<Instant>)>);

impl<K, V> Default for Notes<K, V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash, V: Clone> Notes<K, V> {
    fn recall(&self, key: &K, epoch: i64) -> Option<V> {
        let (value, of, until) = self.0.get(key)?;
        (*of == epoch && until.is_none_or(|until| Instant::now() < until)).then(|| value.clone())
    }

    fn note(&mut self, key: K, value: V, epoch: i64, until: Option<Instant>) {
        if self.0.len() >= MOST_NOTES {
            self.0.clear();
        }
        self.0.insert(key, (value, epoch, until));
    }
}

struct LastUse {
    address: IpAddr,
    /// Used since it was last recorded.
    fresh: bool,
    recorded: Option<Instant>,
}

impl Memory {
    /// Remembers nothing yet.
    pub fn new(db: Db) -> Self {
        Self {
            db,
            state: Mutex::default(),
            asking: OneAsks::default(),
            asking_for_keys: OneAsks::default(),
            uses: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn confirmed_epoch(&self) -> Option<i64> {
        let state = self.state();
        state.confirmed.filter(|at| at.elapsed() < TRUST).map(|_| state.epoch)
    }

    /// The epoch in force, asked for when the last answer is too old.
    pub async fn epoch(&self) -> Result<i64, DbError> {
        self.asking.or_ask(|| self.confirmed_epoch(), self.ask_for_epoch()).await
    }

    async fn ask_for_epoch(&self) -> Result<i64, DbError> {
        // Counted from before the question: what changed while it was under way may be missing in the answer.
        let asked = Instant::now();
        let known = {
            let state = self.state();
            state.confirmed.map(|_| state.epoch)
        };
        let ask = async |conn: &mut sqlx::PgConnection| {
            let epoch = api_key::auth_epoch(conn).await?;
            let settings = if known == Some(epoch) { None } else { Some(setting::read(conn).await?) };
            Ok((epoch, settings))
        };
        let (epoch, settings) = self.db.within(TIMEOUT, ask).await?;
        let mut state = self.state();
        state.epoch = epoch;
        state.confirmed = Some(asked);
        if let Some(settings) = settings {
            state.settings = Arc::new(settings);
            state.keys.0.clear();
            state.sessions.0.clear();
        }
        Ok(epoch)
    }

    /// What is remembered of a key.
    pub async fn recall(&self, hash: &HashedKey) -> Result<Option<Lookup>, DbError> {
        let epoch = self.epoch().await?;
        Ok(self.state().keys.recall(hash, epoch))
    }

    /// Looks a key up where it is not remembered, and remembers it.
    pub async fn look_up(&self, hash: &HashedKey) -> Result<Lookup, DbError> {
        if let Some(lookup) = self.recall(hash).await? {
            return Ok(lookup);
        }
        let asked = Instant::now();
        let found = self.db.within(TIMEOUT, async |conn| api_key::look_up(conn, hash).await).await?;
        let until = found.good_for.map(|good_for| asked + good_for);
        self.state().keys.note(hash.clone(), found.lookup.clone(), found.epoch, until);
        Ok(found.lookup)
    }

    /// Looks a session up; `None` when it is over.
    pub async fn session(&self, id: SessionId) -> Result<Option<SignedIn>, DbError> {
        let epoch = self.epoch().await?;
        if let Some(signed_in) = self.state().sessions.recall(&id, epoch) {
            return Ok(signed_in);
        }
        let asked = Instant::now();
        let found = self.db.within(TIMEOUT, async |conn| session::look_up(conn, id).await).await?;
        let until = found.good_for.map(|good_for| asked + good_for);
        self.state().sessions.note(id, found.signed_in.clone(), found.epoch, until);
        Ok(found.signed_in)
    }

    /// The keys that sign and verify the tokens of sessions.
    pub async fn signing_keys(&self, key: &SealKey) -> Result<Arc<Vec<SigningKey>>, DbError> {
        let epoch = self.epoch().await?;
        if let Some((of, at, keys)) = &self.state().signing_keys
            && *of == epoch
            && at.elapsed() < SIGNING_KEYS
        {
            return Ok(keys.clone());
        }
        self.read_signing_keys(key, epoch).await
    }

    /// The same, read after this was asked for; but not more often than a stranger with made-up tokens may make it.
    pub async fn newer_signing_keys(&self, key: &SealKey) -> Result<Arc<Vec<SigningKey>>, DbError> {
        let came = Instant::now();
        let last = || self.state().signing_keys.clone();
        let known = || last().filter(|(_, at, _)| *at > came).map(|(.., keys)| keys);
        let ask = async {
            if let Some(pause) = last().and_then(|(_, at, _)| NEWER_KEYS.checked_sub(at.elapsed())) {
                tokio::time::sleep(pause).await;
            }
            let epoch = self.epoch().await?;
            self.read_signing_keys(key, epoch).await
        };
        self.asking_for_keys.or_ask(known, ask).await
    }

    async fn read_signing_keys(&self, key: &SealKey, epoch: i64) -> Result<Arc<Vec<SigningKey>>, DbError> {
        let asked = Instant::now();
        let ask = async |conn: &mut sqlx::PgConnection| session::signing_keys(conn, key, false).await;
        let keys = Arc::new(self.db.within(TIMEOUT, ask).await?);
        self.state().signing_keys = Some((epoch, asked, keys.clone()));
        Ok(keys)
    }

    /// The settings, at most half a second old; the last known ones (or the defaults) when the database does not
    /// answer at once.
    pub async fn settings_or_last(&self) -> Arc<Settings> {
        let _ = tokio::time::timeout(SETTINGS_TIMEOUT, self.epoch()).await;
        self.state().settings.clone()
    }

    /// Notes a use of a key, to be recorded with others.
    pub fn used(&self, key: ApiKeyId, address: IpAddr) {
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        let last = uses.entry(key).or_insert(LastUse { address, fresh: true, recorded: None });
        (last.address, last.fresh) = (address, true);
    }

    /// Records the uses that are due. A failure costs a line of the list of keys, so it is only told.
    pub async fn record_uses(&self) {
        let due: Vec<Use> = {
            let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
            uses.retain(|_, last| last.fresh || last.recorded.is_some_and(|at| at.elapsed() < USE_EVERY));
            let due = uses
                .iter_mut()
                .filter(|(_, last)| last.fresh && last.recorded.is_none_or(|at| at.elapsed() >= USE_EVERY));
            due.map(|(key, last)| {
                (last.fresh, last.recorded) = (false, Some(Instant::now()));
                Use { key: *key, address: last.address }
            })
            .collect()
        };
        if due.is_empty() {
            return;
        }
        if let Err(error) = self.db.within(TIMEOUT, async |conn| api_key::record_uses(conn, &due).await).await {
            tracing::debug!(error = %common::error::Chain(&error), "the last uses of keys could not be recorded");
        }
    }
}
