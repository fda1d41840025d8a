//! The limits of all API processes together: a sliding log in Redis. One round trip, one atomic script, Redis's own
//! clock. Not GCRA, which lets almost twice the limit through a window.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use common::{metrics, setting::RateLimit};
use redis::{AsyncConnectionConfig, Client, Script, aio::MultiplexedConnection};
use secrecy::ExposeSecret;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Decision, RedisConfig};

/// Failures in a row after which Redis is left alone until a probe succeeds.
const FAILURES: u32 = 3;
/// Time between probes.
const PROBE: Duration = Duration::from_millis(500);
/// Longest time of a probe, which may have to connect.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// KEYS[1] the log; ARGV limit, window in microseconds, a name unique to the request. Gives whether it passes, how many
/// more would, and the microseconds until one more does (of one that passed: until the oldest leaves the window).
/// Scores are whole microseconds below 2^53, so Lua's numbers hold them exactly.
const SLIDING_LOG: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now - window))
local used = redis.call('ZCARD', KEYS[1])
local allowed, rank = 0, used - limit
if used < limit then
  allowed, rank, used = 1, 0, used + 1
  redis.call('ZADD', KEYS[1], string.format('%d', now), ARGV[3])
  redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000))
end
local entry = redis.call('ZRANGE', KEYS[1], rank, rank, 'WITHSCORES')
return { allowed, math.max(limit - used, 0), tonumber(entry[2]) + window - now }
";

/// Asks Redis, and knows when not to.
pub struct SharedLimiter(Arc<Inner>);

struct Inner {
    timeout: Duration,
    script: Script,
    /// `None` while Redis is away: then nobody waits for it.
    connection: RwLock<Option<MultiplexedConnection>>,
    failures: AtomicU32,
    lost: Notify,
}

impl SharedLimiter {
    /// Starts the connecting task.
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
        Self(inner)
    }

    /// Counts one request; `None` when Redis does not answer in time.
    pub async fn check(&self, key: &str, rule: RateLimit) -> Option<Decision> {
        let mut connection = self.0.connection()?;
        let mut call = self.0.script.key(key);
        call.arg(rule.limit)
            .arg(u64::from(rule.window_seconds) * 1_000_000)
            .arg(uuid::Uuid::now_v7().simple().to_string());
        let answer = tokio::time::timeout(self.0.timeout, call.invoke_async::<(u8, u32, u64)>(&mut connection)).await;
        match answer {
            Ok(Ok((allowed, remaining, reset))) => {
                self.0.failures.store(0, Ordering::Relaxed);
                let reset = Duration::from_micros(reset);
                let window = Duration::from_secs(rule.window_seconds.into());
                Some(Decision { allowed: allowed == 1, limit: rule.limit, remaining, window, reset })
            }
            Ok(Err(error)) => {
                self.0.failed(&error.to_string());
                None
            }
            Err(_) => {
                self.0.failed(&format!("no answer within {} ms", self.0.timeout.as_millis()));
                None
            }
        }
    }

    /// Whether Redis decides now.
    pub fn is_up(&self) -> bool {
        self.0.connection().is_some()
    }
}

impl Inner {
    fn connection(&self) -> Option<MultiplexedConnection> {
        self.connection.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn failed(&self, why: &str) {
        if self.failures.fetch_add(1, Ordering::Relaxed) + 1 < FAILURES {
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
