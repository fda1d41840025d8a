//! The limits of all API processes together: a sliding log in Redis. One round trip, one atomic script, Redis's own
//! clock. Not GCRA, which lets almost twice the limit through a window. Requests that arrive while others are being counted
//! are counted together, those of one client by one call: it costs Redis hardly more than a single one.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use common::{
    db::DbError,
    grouped::{Answers, Grouped},
    metrics,
    setting::RateLimit,
};
use futures::future::join_all;
use redis::{AsyncConnectionConfig, Client, Script, aio::MultiplexedConnection};
use secrecy::ExposeSecret;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Decision, RedisConfig};
use crate::error::ApiError;

/// Requests in a row that were not counted, after which Redis is left alone until a probe succeeds.
const FAILURES: u32 = 3;
/// Time between probes.
const PROBE: Duration = Duration::from_millis(500);
/// Longest time of a probe, which may have to connect.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Requests counted together, at most; Lua takes some thousands of arguments.
const GROUP: usize = 256;

/// KEYS[1] the log; ARGV limit, window in microseconds, a name unique to the call, and how many requests. Gives how many
/// of them pass, how many more would after those, and the microseconds until one more does (where all passed: until the
/// oldest leaves the window). Scores are whole microseconds below 2^53, so Lua's numbers hold them exactly.
const SLIDING_LOG: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local limit, window, asked = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now - window))
local used = redis.call('ZCARD', KEYS[1])
local passed = math.max(math.min(asked, limit - used), 0)
if passed > 0 then
  local score, entries = string.format('%d', now), {}
  for i = 1, passed do
    entries[2 * i - 1], entries[2 * i] = score, ARGV[3] .. i
  end
  redis.call('ZADD', KEYS[1], unpack(entries))
  redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000))
  used = used + passed
end
local rank = math.max(used - limit, 0)
local entry = redis.call('ZRANGE', KEYS[1], rank, rank, 'WITHSCORES')
return { passed, math.max(limit - used, 0), tonumber(entry[2]) + window - now }
";

/// Asks Redis, and knows when not to.
pub struct SharedLimiter {
    inner: Arc<Inner>,
    counter: Grouped<Counter>,
}

struct Inner {
    timeout: Duration,
    script: Script,
    /// `None` while Redis is away: then nobody waits for it.
    connection: RwLock<Option<MultiplexedConnection>>,
    failures: AtomicU32,
    lost: Notify,
}

impl SharedLimiter {
    /// Starts the tasks that connect and count.
    pub fn start(config: &RedisConfig, stop: CancellationToken) -> Self {
        let inner = Arc::new(Inner {
            timeout: config.timeout,
            script: Script::new(SLIDING_LOG),
            connection: RwLock::new(None),
            failures: AtomicU32::new(0),
            lost: Notify::new(),
        });
        metrics::get().limiter_fallback.set(1);
        match Client::open(config.url.expose_secret()) {
            Ok(client) => {
                tokio::spawn(stop.run_until_cancelled_owned(inner.clone().keep_connected(client)));
            }
            Err(error) => tracing::error!(%error, "REDIS_URL is not understood: every process limits by itself"),
        }
        let counter = Grouped::start(Counter(inner.clone()), GROUP);
        Self { inner, counter }
    }

    /// Counts one request; `None` when Redis does not answer in time.
    pub async fn check(&self, key: String, rule: RateLimit) -> Option<Decision> {
        if !self.is_up() {
            return None;
        }
        let request = Counted { key, rule, until: Instant::now() + self.inner.timeout };
        self.counter.ask(request).await.ok().flatten()
    }

    /// Whether Redis decides now.
    pub fn is_up(&self) -> bool {
        self.inner.connection.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// A request to be counted.
struct Counted {
    key: String,
    rule: RateLimit,
    /// After that its process decides by itself.
    until: Instant,
}

/// Counts groups of requests.
struct Counter(Arc<Inner>);

impl Answers for Counter {
    type Question = Counted;
    type Answer = Option<Decision>;
    type Error = ApiError;

    async fn answer(&mut self, requests: &[Counted]) -> Result<Vec<Option<Decision>>, DbError> {
        let mut decisions = vec![None; requests.len()];
        // The first has waited longest.
        let (Some(first), Some(connection)) = (requests.first(), self.0.connection()) else { return Ok(decisions) };
        let mut same: HashMap<(&str, RateLimit), Vec<usize>> = HashMap::new();
        for (place, request) in requests.iter().enumerate() {
            same.entry((&request.key, request.rule)).or_default().push(place);
        }
        let count = async |(key, rule), places: Vec<usize>| {
            (self.0.count(connection.clone(), key, rule, places.len()).await, places)
        };
        let all = join_all(same.into_iter().map(|(which, places)| count(which, places)));
        let Ok(counted) = tokio::time::timeout_at(first.until, all).await else {
            self.0.failed(requests.len(), &format!("no answer within {} ms", self.0.timeout.as_millis()));
            return Ok(decisions);
        };
        for (counted, places) in counted {
            match counted {
                Ok(counted) => {
                    places.into_iter().zip(counted).for_each(|(at, decision)| decisions[at] = Some(decision))
                }
                Err(error) => self.0.failed(places.len(), &error.to_string()),
            }
        }
        Ok(decisions)
    }
}

impl Inner {
    fn connection(&self) -> Option<MultiplexedConnection> {
        self.connection.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts so many requests of one client, those that pass first.
    async fn count(
        &self,
        mut connection: MultiplexedConnection,
        key: &str,
        rule: RateLimit,
        requests: usize,
    ) -> redis::RedisResult<impl Iterator<Item = Decision> + use<>> {
        let mut call = self.script.key(key);
        call.arg(rule.limit)
            .arg(u64::from(rule.window_seconds) * 1_000_000)
            .arg(uuid::Uuid::now_v7().simple().to_string())
            .arg(requests);
        let (passed, left, reset) = call.invoke_async::<(usize, u32, u64)>(&mut connection).await?;
        self.failures.store(0, Ordering::Relaxed);
        let (window, reset) = (rule.window(), Duration::from_micros(reset));
        Ok((1..=requests).map(move |n| Decision {
            allowed: n <= passed,
            limit: rule.limit,
            remaining: left + u32::try_from(passed.saturating_sub(n)).unwrap_or(u32::MAX),
            window,
            reset,
        }))
    }

    fn failed(&self, requests: usize, why: &str) {
        let requests = u32::try_from(requests).unwrap_or(u32::MAX);
        if self.failures.fetch_add(requests, Ordering::Relaxed).saturating_add(requests) < FAILURES {
            return;
        }
        // Only the one who takes the connection away tells of it.
        if self.connection.write().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            metrics::get().limiter_fallback.set(1);
            tracing::warn!(why, "Redis is away: every API process limits by itself until it is back");
            self.lost.notify_one();
        }
    }

    async fn keep_connected(self: Arc<Self>, client: Client) {
        let mut told = false;
        loop {
            match tokio::time::timeout(PROBE_TIMEOUT, connect(&client)).await {
                Ok(Ok(connection)) => {
                    self.failures.store(0, Ordering::Relaxed);
                    *self.connection.write().unwrap_or_else(PoisonError::into_inner) = Some(connection);
                    metrics::get().limiter_fallback.set(0);
                    tracing::info!("Redis holds the rate limits of all API processes");
                    told = true;
                    self.lost.notified().await;
                }
                failed if !told => {
                    let why = failed.map_or_else(
                        |_| "no answer".to_owned(),
                        |r| r.err().map_or_else(String::new, |e| e.to_string()),
                    );
                    tracing::warn!(why, "Redis is away: every API process limits by itself until it is there");
                    told = true;
                }
                _ => {}
            }
            tokio::time::sleep(PROBE).await;
        }
    }
}

/// A connection that has answered once.
async fn connect(client: &Client) -> redis::RedisResult<MultiplexedConnection> {
    // The time limits are ours: the crate's own would cut a slow connection under load before the breaker counts it.
    let config = AsyncConnectionConfig::new().set_connection_timeout(Some(PROBE_TIMEOUT)).set_response_timeout(None);
    let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
    redis::cmd("PING").query_async::<String>(&mut connection).await?;
    Ok(connection)
}
