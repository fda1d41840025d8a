//! Rate limits: so many requests of a class in any window, for each client address or for a key with limits of its
//! own. The counters are in Redis and hold across all API processes ([`shared`]); without Redis, or while it is away,
//! each process limits by itself ([`local`]). A limiter that fails never refuses a request.

mod local;
mod shared;

use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use common::{
    api_key::KeyLimits,
    id::ApiKeyId,
    metrics,
    setting::{RateLimit, RateLimits},
};
use secrecy::SecretString;
use tokio_util::sync::CancellationToken;

use local::LocalLimiter;
use shared::SharedLimiter;

/// Which limit a request counts against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LimitClass {
    /// GET and HEAD.
    Read,
    /// POST, PUT, PATCH and DELETE.
    Write,
    /// Polls of an execution: they count as reads, and are held before they are refused.
    Poll,
    /// Pages of the console: as many as reads, counted apart. Whoever looks at pages does not use up what the scripts
    /// of the same address may read, and scripts that read too much lock nobody out who wants to see why.
    Page,
    /// Sign-ins and the set-up.
    SignIn,
    /// Probes, and the files of the console, which ask nobody: outside the limits.
    Free,
}

impl LimitClass {
    /// Its name in counters and traces.
    pub fn name(self) -> &'static str {
        match self {
            LimitClass::Read | LimitClass::Poll => "read",
            LimitClass::Write => "write",
            LimitClass::Page => "page",
            LimitClass::SignIn => "signIn",
            LimitClass::Free => "free",
        }
    }

    /// The limit of this class that a key has of its own.
    pub fn own(self, limits: &KeyLimits) -> Option<u32> {
        let own = match self {
            LimitClass::Read | LimitClass::Poll | LimitClass::Page => limits.read,
            LimitClass::Write => limits.write,
            LimitClass::SignIn | LimitClass::Free => None,
        };
        own.and_then(|n| u32::try_from(n).ok())
    }

    /// The limit of this class for an address.
    pub fn rule(self, limits: &RateLimits) -> Option<RateLimit> {
        match self {
            LimitClass::Read | LimitClass::Poll | LimitClass::Page => Some(limits.read),
            LimitClass::Write => Some(limits.write),
            LimitClass::SignIn => Some(limits.sign_in),
            LimitClass::Free => None,
        }
    }
}

/// Who is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A client by its address; an IPv6 client by its /64, which is what one customer of a provider holds.
    Address(IpAddr),
    /// A key with limits of its own.
    Key(ApiKeyId),
}

impl Subject {
    /// The client at an address.
    pub fn of(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(v6) => {
                let mut octets = v6.octets();
                octets[8..].fill(0);
                Ipv6Addr::from(octets).into()
            }
            v4 => v4,
        })
    }

    fn name(self) -> String {
        match self {
            Subject::Address(address) => format!("ip:{address}"),
            Subject::Key(id) => format!("key:{id}"),
        }
    }
}

/// What the limiter says of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether it passes.
    pub allowed: bool,
    /// Requests in a window.
    pub limit: u32,
    /// Requests that would still pass now.
    pub remaining: u32,
    /// Length of the window.
    pub window: Duration,
    /// Until one more would pass; of a request that passed, until its oldest companion leaves the window.
    pub reset: Duration,
}

/// Decides, by Redis where it answers.
pub struct RateLimiter {
    instance: String,
    shared: Option<SharedLimiter>,
    local: LocalLimiter,
}

impl RateLimiter {
    /// Starts it; Redis is connected in the background, and looked for again until `stop`.
    /// `instance` tells its counters from those of others in the same Redis.
    pub fn start(instance: String, redis: Option<&RedisConfig>, stop: CancellationToken) -> Self {
        let shared = redis.map(|config| SharedLimiter::start(config, stop));
        Self { instance, shared, local: LocalLimiter::default() }
    }

    /// Counts one request.
    pub async fn check(&self, class: LimitClass, subject: Subject, rule: RateLimit) -> Decision {
        if let Some(shared) = &self.shared {
            let key = format!("dbackup:{}:limit:{}:{}", self.instance, class.name(), subject.name());
            // Boxed, as in Db::within.
            if let Some(decision) = Box::pin(shared.check(key, rule)).await {
                metrics::get().decided(class.name(), "redis", decision.allowed);
                return decision;
            }
        }
        let decision = self.local.check(class, subject, rule);
        metrics::get().decided(class.name(), "process", decision.allowed);
        decision
    }

    /// Where the counters are now: `redis`, or `process` for each process its own.
    pub fn place(&self) -> &'static str {
        match &self.shared {
            Some(shared) if shared.is_up() => "redis",
            _ => "process",
        }
    }
}

/// Where Redis is, and how long it may take.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// `redis://…`
    pub url: SecretString,
    /// Longest time of a decision; after it the process decides by itself.
    pub timeout: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_client_counts_by_its_64_and_an_ipv4_client_by_its_address() {
        let of = |text: &str| Subject::of(text.parse().expect("an address"));
        assert_eq!(of("2001:db8:1:2:aaaa::1"), of("2001:db8:1:2:bbbb::2"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }
}
