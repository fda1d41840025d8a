//! Addresses that keep coming with keys that nobody has. Each such key is a question to the database, and anybody can make
//! up as many as they like: an address that has tried as many as it may send requests is not asked for any more.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use common::setting::RateLimit;

use crate::rate_limit::Subject;

/// Addresses remembered at once; then all are forgotten.
const MOST: usize = 10_000;

/// How many unknown keys have come from where in the window that began then.
#[derive(Default)]
pub struct Strangers(Mutex<HashMap<Subject, (Instant, u32)>>);

impl Strangers {
    fn tries(&self) -> MutexGuard<'_, HashMap<Subject, (Instant, u32)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how long no key from there is looked up; `None` when it may be.
    pub fn shut_out(&self, from: Subject, rule: RateLimit) -> Option<Duration> {
        let (since, tries) = *self.tries().get(&from)?;
        let left = rule.window().checked_sub(since.elapsed())?;
        (tries >= rule.limit).then_some(left)
    }

    /// An unknown key has come from there.
    pub fn note(&self, from: Subject, rule: RateLimit) {
        let mut tries = self.tries();
        if tries.len() >= MOST && !tries.contains_key(&from) {
            tries.clear();
        }
        let begun = tries.entry(from).or_insert_with(|| (Instant::now(), 0));
        if begun.0.elapsed() >= rule.window() {
            *begun = (Instant::now(), 0);
        }
        begun.1 = begun.1.saturating_add(1);
    }
}
