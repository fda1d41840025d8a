//! What the database knows, asked when somebody scrapes, and every [`AGE`] at most.
//!
//! API processes tell it: every process would tell the same. When the database does not answer, nothing of it is told
//! but that: a number that may be wrong would hide what is.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};

use super::Role;
use crate::{
    cluster::{self, Numbers, Queue},
    db::{Db, DbError},
    freshness::{self, JobFreshness, State},
};

/// How old an answer of the database may be.
const AGE: Duration = Duration::from_secs(2);
/// Longest time of a question.
const ANSWER: Duration = Duration::from_secs(3);
/// Longest time that a scrape waits for it: a scraper's own patience is 10 s by custom.
const PATIENCE: Duration = Duration::from_secs(4);

/// The last answer, and how to get the next.
#[derive(Debug)]
pub(super) struct Known {
    role: Role,
    db: Db,
    last: Mutex<Last>,
    asking: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct Last {
    asked: Option<Instant>,
    up: bool,
    seen: Option<Seen>,
}

/// What the database said.
#[derive(Debug)]
struct Seen {
    numbers: Numbers,
    queue: Queue,
    jobs: Vec<JobFreshness>,
    uncovered: Vec<(String, usize)>,
}

impl Known {
    pub(super) fn new(role: Role, db: Db) -> Self {
        Self { role, db, last: Mutex::default(), asking: Arc::default() }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the database, unless it was asked a moment ago.
    pub(super) async fn refresh(self: &Arc<Self>) {
        let (known, asking) = (self.clone(), self.asking.clone());
        // A task of its own: a scraper that breaks off must not leave a connection in the middle of an answer.
        let ask = tokio::spawn(async move {
            let _one = asking.lock().await;
            if known.last().asked.is_some_and(|asked| asked.elapsed() < AGE) {
                return;
            }
            let asked = Instant::now();
            let answer = known.ask().await;
            if let Err(error) = &answer {
                tracing::debug!(error = %crate::error::Chain(error), "a scrape could not ask the database");
            }
            *known.last() = Last { asked: Some(asked), up: answer.is_ok(), seen: answer.ok().flatten() };
        });
        if tokio::time::timeout(PATIENCE, ask).await.is_err() {
            *self.last() = Last { asked: None, up: false, seen: None };
        }
    }

    async fn ask(&self) -> Result<Option<Seen>, DbError> {
        if self.role == Role::Worker {
            return self.db.ping(ANSWER).await.map(|()| None);
        }
        let ask = async |conn: &mut sqlx::PgConnection| {
            let jobs = freshness::jobs(conn, None).await?;
            let uncovered = freshness::uncovered(conn).await?;
            Ok(Seen {
                numbers: cluster::numbers(conn).await?,
                queue: cluster::queue(conn).await?,
                jobs,
                uncovered: uncovered.into_iter().map(|source| (source.source_slug, source.databases.len())).collect(),
            })
        };
        self.db.within(ANSWER, ask).await.map(Some)
    }
}

impl Collector for Known {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let pool = self.db.connections();
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        gauges(&mut encoder, "build_info", "Version of this program", [(version, 1.0)])?;
        let states = [([("state", "in_use")], pool.in_use.into()), ([("state", "idle")], pool.idle.into())];
        gauges(&mut encoder, "database_connections", "Connections of this process's pool, by state", states)?;
        let most = "Connections that this process's pool may have";
        gauge(&mut encoder, "database_connections_max", most, pool.most.into())?;
        let last = self.last();
        let up = "Whether the database answered this process when it was scraped";
        gauge(&mut encoder, "database_up", up, number(last.up))?;
        match &last.seen {
            Some(seen) => seen.encode(&mut encoder),
            None => Ok(()),
        }
    }
}

impl Seen {
    fn encode(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let Numbers { limit, paused, used, pools, workers, hindered } = &self.numbers;
        gauge(encoder, "slots_limit", "Runs at once over all workers, at most: maxConcurrentJobs", f64::from(*limit))?;
        gauge(encoder, "slots_used", "Slots in use over all workers", as_f64(*used))?;
        gauge(encoder, "queue_paused", "1 while nothing is claimed: the setting paused", number(*paused))?;
        let of = |pool: &String| self.queue.pools.iter().find(|queue| queue.pool == *pool);
        let by_pool = |value: fn(&cluster::PoolQueue) -> f64| {
            pools.iter().map(move |pool| ([("pool", pool.clone())], of(pool).map_or(0.0, value)))
        };
        gauges(encoder, "queue_pending", "Executions that wait, by pool", by_pool(|queue| as_f64(queue.pending)))?;
        let due = "Executions that wait and not for the time of a retry, by pool";
        gauges(encoder, "queue_due", due, by_pool(|queue| as_f64(queue.due)))?;
        let oldest = "Age of the oldest execution that waits, by pool; 0 when none does";
        let age = by_pool(|queue| as_f64(queue.oldest_wait_ms) / 1_000.0);
        gauges(encoder, "queue_oldest_pending_age_seconds", oldest, age)?;
        let workers = workers.iter().map(|(state, count)| ([("state", *state)], as_f64(*count)));
        gauges(encoder, "workers", "Workers by state; one that is gone is forgotten after ten minutes", workers)?;
        let hindering = "Workers that run and cannot serve a source or a destination, whose runs they leave to others";
        gauge(encoder, "workers_hindered", hindering, as_f64(*hindered))?;
        self.encode_jobs(encoder)?;
        let uncovered = "Databases of a source that no job backs up, by source";
        let sources = self.uncovered.iter();
        let sources = sources
            .map(|(slug, count)| ([("source", slug.clone())], as_f64(i64::try_from(*count).unwrap_or(i64::MAX))));
        gauges(encoder, "source_uncovered_databases", uncovered, sources)
    }

    fn encode_jobs(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        // Not `job`, which Prometheus gives to every series itself.
        let by_job = |value: fn(&JobFreshness) -> Option<f64>| {
            self.jobs.iter().filter_map(move |job| Some(([("backup_job", job.slug.clone())], value(job)?)))
        };
        let last = "Time whose data the newest good backup of a job holds (snapshotAt), by job";
        gauges(encoder, "job_last_success_timestamp_seconds", last, by_job(|job| job.snapshot_at.map(seconds)))?;
        let took = "Time from the first claim to the end of the run that made the newest good backup, by job";
        gauges(
            encoder,
            "job_last_success_duration_seconds",
            took,
            by_job(|job| job.duration_ms.map(|ms| as_f64(ms) / 1_000.0)),
        )?;
        let size = "Stored bytes of one copy of the newest good backup, by job";
        gauges(encoder, "job_last_success_size_bytes", size, by_job(|job| job.size_bytes.map(as_f64)))?;
        let every = "Longest time between two good backups of a job, by expectEverySeconds or else by its schedule";
        gauges(encoder, "job_expected_interval_seconds", every, by_job(|job| job.interval_seconds.map(as_f64)))?;
        let overdue = "1 when the newest good backup of a job is older than expected";
        gauges(encoder, "job_overdue", overdue, by_job(|job| Some(number(job.state == State::Overdue))))?;
        let never = "1 when a job has no good backup although one was expected by now";
        let never_succeeded = |job: &JobFreshness| Some(number(job.state == State::NeverSucceeded && !job.healthy));
        gauges(encoder, "job_never_succeeded", never, by_job(never_succeeded))?;
        gauges(encoder, "job_paused", "1 while a job is paused", by_job(|job| Some(number(!job.enabled))))
    }
}

fn gauge(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: f64) -> fmt::Result {
    ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, f64)>,
) -> fmt::Result {
    let mut values = values.into_iter().peekable();
    if values.peek().is_none() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    values.try_for_each(|(labels, value)| ConstGauge::new(value).encode(family.encode_family(&labels)?))
}

fn number(whether: bool) -> f64 {
    f64::from(u8::from(whether))
}

#[allow(clippy::cast_precision_loss, reason = "counts and ages stay far below 2^53")]
fn as_f64(value: i64) -> f64 {
    value as f64
}

fn seconds(time: DateTime<Utc>) -> f64 {
    as_f64(time.timestamp_millis()) / 1_000.0
}
