//! What was read for one slice of triggers serves the next. Most triggers want nothing but a new run of a job that lets it
//! wait, and what that is decided from hardly ever changes: so the slice is decided from memory, and the one statement that
//! inserts it locks the jobs and compares. Where anything has changed nothing is inserted, and the slice is decided from
//! what is read under the locks, as one with other wishes always is.

use std::collections::HashMap;

use serde_json::Value;

use super::{
    enqueue::{Desk, JobRow, Locked, TriggerRequest},
    inserts::Assumed,
    room::Room,
};
use crate::{id::JobId, job::Overlap, setting::Settings};

/// Jobs remembered at once.
const MOST_JOBS: usize = 10_000;

/// See the module. An empty one reads everything.
#[derive(Debug, Default)]
pub struct Remembered {
    pub(super) room: Room,
    jobs: HashMap<JobId, JobRow>,
    by_slug: HashMap<String, JobId>,
    stored: Option<Value>,
    settings: Settings,
    sequence: i64,
}

impl Remembered {
    /// Remembers what was read; without a job it is nothing.
    pub(super) fn note(&mut self, locked: &Locked) {
        if locked.jobs.is_empty() {
            return;
        }
        if self.jobs.len() + locked.jobs.len() > MOST_JOBS {
            self.jobs.clear();
            self.by_slug.clear();
        }
        self.by_slug.extend(locked.jobs.iter().map(|job| (job.slug.clone(), job.id)));
        self.jobs.extend(locked.jobs.iter().map(|job| (job.id, job.clone())));
        self.stored.clone_from(&locked.stored);
        self.settings = locked.settings.clone();
        self.sequence = locked.sequence;
    }

    /// What decides the slice, and what must still be so when it is inserted; `None` where something must be read.
    pub(super) fn desk(&self, requests: &[TriggerRequest]) -> Option<(Desk, Assumed)> {
        let mut wanted: HashMap<JobId, i64> = HashMap::new();
        for request in requests {
            if request.idempotency.is_some() || request.max_age_seconds.is_some() {
                return None;
            }
            let by_id = request.job.id().and_then(|id| self.jobs.get(&JobId(id)));
            // A slug that another job has by now: then this one's row has changed.
            let job = by_id.or_else(|| self.jobs.get(self.by_slug.get(request.job.slug())?))?;
            if job.overlap == Overlap::Reject {
                return None;
            }
            *wanted.entry(job.id).or_default() += 1;
        }
        let most = self.room.sequence_at_most(&self.settings, &wanted).filter(|most| *most >= self.sequence)?;
        let jobs: Vec<JobRow> = wanted.keys().map(|id| self.jobs[id].clone()).collect();
        let assumed = Assumed {
            jobs: jobs.iter().map(|job| job.id).collect(),
            job_versions: jobs.iter().map(|job| job.versions.0).collect(),
            source_versions: jobs.iter().map(|job| job.versions.1).collect(),
            settings: self.stored.clone(),
            sequence: (self.sequence, most),
        };
        let desk = Desk::of(jobs, self.settings.clone());
        Some((desk, assumed))
    }
}
