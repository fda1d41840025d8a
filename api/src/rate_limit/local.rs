//! The limits of a process by itself, when there is no Redis: at most `limit` at once, and under twice that in any
//! window, since a bucket that starts full is refilled while it is emptied.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use common::setting::RateLimit;
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
    state::keyed::DashMapStateStore,
};

use super::{Decision, LimitClass, Subject};

/// By the name of the class, which polls and reads share.
type Key = (&'static str, Subject);
type Buckets = RateLimiter<Key, DashMapStateStore<Key>, DefaultClock, StateInformationMiddleware>;

/// Rules remembered at once; there are a handful, unless somebody changes the settings all the time.
const MOST_RULES: usize = 256;
/// Clients of one rule after which those whose bucket is full again are forgotten.
const MOST_CLIENTS: usize = 10_000;

/// A bucket for each client and rule. A changed rule begins with full buckets.
#[derive(Default)]
pub struct LocalLimiter {
    rules: RwLock<HashMap<RateLimit, Arc<Buckets>>>,
    clock: DefaultClock,
}

impl LocalLimiter {
    /// Counts one request.
    pub fn check(&self, class: LimitClass, subject: Subject, rule: RateLimit) -> Decision {
        let buckets = self.buckets(rule);
        let (window, spacing) = (rule.window(), spacing(rule));
        match buckets.check_key(&(class.name(), subject)) {
            Ok(state) => Decision {
                allowed: true,
                limit: rule.limit,
                remaining: state.remaining_burst_capacity(),
                window,
                reset: spacing,
            },
            Err(until) => Decision {
                allowed: false,
                limit: rule.limit,
                remaining: 0,
                window,
                reset: until.wait_time_from(self.clock.now()),
            },
        }
    }

    fn buckets(&self, rule: RateLimit) -> Arc<Buckets> {
        if let Some(buckets) = self.rules.read().unwrap_or_else(PoisonError::into_inner).get(&rule) {
            if buckets.len() > MOST_CLIENTS {
                buckets.retain_recent();
            }
            return buckets.clone();
        }
        let mut rules = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        if rules.len() >= MOST_RULES {
            rules.clear();
        }
        rules.entry(rule).or_insert_with(|| Arc::new(RateLimiter::dashmap(quota(rule)).with_middleware())).clone()
    }
}

fn spacing(rule: RateLimit) -> Duration {
    rule.window() / rule.limit.max(1)
}

fn quota(rule: RateLimit) -> Quota {
    let burst = NonZeroU32::new(rule.limit).unwrap_or(NonZeroU32::MIN);
    let period = spacing(rule).max(Duration::from_nanos(1));
    Quota::with_period(period).unwrap_or_else(|| Quota::per_minute(burst)).allow_burst(burst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_alone_lets_the_limit_through_at_once_and_no_more() {
        let limiter = LocalLimiter::default();
        let (rule, subject) = (RateLimit::a_minute(20), Subject::of([192, 0, 2, 1].into()));
        let check = |class, subject| limiter.check(class, subject, rule);
        let allowed = (0..50).filter(|_| check(LimitClass::Write, subject).allowed).count();
        assert_eq!(allowed, 20);
        let refused = check(LimitClass::Write, subject);
        assert!(!refused.allowed && refused.reset <= Duration::from_secs(3), "{refused:?}");
        assert!(check(LimitClass::Read, subject).allowed, "each class has its own");
        let other = check(LimitClass::Write, Subject::of([192, 0, 2, 2].into()));
        assert_eq!((other.allowed, other.remaining), (true, 19), "each client has its own");
    }
}
