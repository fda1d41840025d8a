//! Freshness: whether the backups that ought to be there are there. Nothing here waits for a schedule to fire or a run to
//! fail: a job that nobody triggers any more is overdue all the same.
//!
//! A good backup is expected by `expectEverySeconds`, counted from the time whose data the newest one holds. Without it
//! the schedule of a job that is enabled says so: the backup of each time that it names is to be there by the next one,
//! which leaves room for a long run and its retries. A job with neither expects nothing.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::{PgConnection, types::Json};

use crate::{
    id::{JobId, SourceId},
    schedule::Schedule,
    source::Engine,
};

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its newest good backup is as new as expected, or nothing is expected.
    Fresh,
    /// Its newest good backup is older than expected.
    Overdue,
    /// It has no good backup.
    NeverSucceeded,
    /// It is paused, and not overdue by `expectEverySeconds`.
    Paused,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Fresh, Self::Overdue, Self::NeverSucceeded, Self::Paused];

    /// The name as clients write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Fresh => "fresh",
            State::Overdue => "overdue",
            State::NeverSucceeded => "never_succeeded",
            State::Paused => "paused",
        }
    }
}

/// What says how often a good backup is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Expectation {
    /// The job's field.
    ExpectEverySeconds,
    /// The job's schedule.
    Schedule,
}

/// How fresh the backups of a job are.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "jobId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d30", "job": "shop-daily", "jobName": "Shop daily",
    "sourceId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d31", "state": "overdue", "healthy": false, "enabled": true,
    "snapshotAt": "2025-01-13T02:00:00.400Z", "ageSeconds": 115200, "expectEverySeconds": 86400,
    "expectation": "expectEverySeconds", "intervalSeconds": 86400, "expectedBy": "2025-01-14T02:00:00.400Z",
    "message": "a good backup was expected by 2025-01-14T02:00:00.400Z: see why its runs failed, or that nothing triggers them any more"
}))]
pub struct JobFreshness {
    /// Id of the job.
    pub job_id: JobId,
    /// Its slug.
    #[serde(rename = "job")]
    pub slug: String,
    /// Its name.
    #[serde(rename = "jobName")]
    pub name: String,
    /// What it backs up.
    pub source_id: SourceId,
    /// Where it stands.
    pub state: State,
    /// Whether nobody needs to act: false when it is overdue, and when it has no good backup although one was expected
    /// by now, or nothing says when.
    pub healthy: bool,
    /// False while it is paused.
    pub enabled: bool,
    /// The time whose data its newest good backup holds.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub snapshot_at: Option<DateTime<Utc>>,
    /// Seconds since then.
    pub age_seconds: Option<i64>,
    /// The job's own field.
    pub expect_every_seconds: Option<i32>,
    /// What the next three are made from; null where nothing is expected.
    pub expectation: Option<Expectation>,
    /// Longest time between two good backups.
    pub interval_seconds: Option<i64>,
    /// When the next good backup is overdue.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub expected_by: Option<DateTime<Utc>>,
    /// What is to be done; null where nothing is.
    pub message: Option<String>,
    /// Milliseconds that the run of its newest good backup took, for metrics.
    #[serde(skip)]
    pub duration_ms: Option<i64>,
    /// Stored bytes of one copy of it, for metrics.
    #[serde(skip)]
    pub size_bytes: Option<i64>,
}

struct Row {
    id: JobId,
    slug: String,
    name: String,
    source_id: SourceId,
    schedule: Option<String>,
    timezone: String,
    enabled: bool,
    expect_every_seconds: Option<i32>,
    created_at: DateTime<Utc>,
    snapshot_at: Option<DateTime<Utc>>,
    duration_ms: Option<i64>,
    size_bytes: Option<i64>,
    now: DateTime<Utc>,
}

/// How fresh every job is, or each of `only`, oldest job first.
pub async fn jobs(conn: &mut PgConnection, only: Option<&[JobId]>) -> Result<Vec<JobFreshness>, sqlx::Error> {
    // The server of a source may have a wrong clock: data is not newer than the backup of it, by our own. And a backup of
    // a source that the job had before says nothing of the one that it has: of the latest hundred one must be of this.
    let rows = sqlx::query_as!(
        Row,
        r#"select j.id as "id: JobId", j.slug, j.name, j.source_id as "source_id: SourceId", j.schedule, j.timezone, j.enabled,
                  j.expect_every_seconds, j.created_at, least(e.snapshot_at, e.ended_at) as snapshot_at,
                  (extract(epoch from e.ended_at - e.started_at) * 1000)::bigint as duration_ms, e.size_bytes as "size_bytes?",
                  clock_timestamp() as "now!"
             from jobs j
             left join lateral (select l.snapshot_at, l.ended_at, l.started_at, l.size_bytes
                                  from (select snapshot_at, ended_at, started_at, size_bytes, source_id from executions
                                         where job_id = j.id and type = 'Backup' and status = 'Success' order by ended_at desc limit 100) l
                                 where l.source_id = j.source_id order by l.ended_at desc limit 1) e on true
            where $1::uuid[] is null or j.id = any ($1)
            order by j.id"#,
        only as _,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Row::judge).collect())
}

/// When a backup is overdue, and why then.
struct Due {
    by: DateTime<Utc>,
    interval: TimeDelta,
    expectation: Expectation,
}

impl Row {
    fn judge(self) -> JobFreshness {
        let due = self.due();
        let late = due.as_ref().map(|due| due.by < self.now);
        let explicit = self.expect_every_seconds.is_some();
        let state = match self.snapshot_at {
            None if self.enabled || explicit => State::NeverSucceeded,
            Some(_) if late == Some(true) => State::Overdue,
            _ if !self.enabled => State::Paused,
            _ => State::Fresh,
        };
        let healthy = match state {
            State::Fresh | State::Paused => true,
            State::Overdue => false,
            State::NeverSucceeded => late == Some(false),
        };
        let expected_by = due.as_ref().map(|due| due.by);
        JobFreshness {
            message: next_action(state, healthy, expected_by),
            job_id: self.id,
            slug: self.slug,
            name: self.name,
            source_id: self.source_id,
            state,
            healthy,
            enabled: self.enabled,
            snapshot_at: self.snapshot_at,
            age_seconds: self.snapshot_at.map(|at| (self.now - at).num_seconds().max(0)),
            expect_every_seconds: self.expect_every_seconds,
            expectation: due.as_ref().map(|due| due.expectation),
            interval_seconds: due.as_ref().map(|due| due.interval.num_seconds()),
            expected_by,
            duration_ms: self.duration_ms,
            size_bytes: self.size_bytes,
        }
    }

    /// Counted from the newest good backup, else from when the job was made.
    fn due(&self) -> Option<Due> {
        let since = self.snapshot_at.unwrap_or(self.created_at);
        if let Some(seconds) = self.expect_every_seconds {
            let interval = TimeDelta::seconds(seconds.into());
            return Some(Due { by: since + interval, interval, expectation: Expectation::ExpectEverySeconds });
        }
        let schedule = self.schedule.as_deref().filter(|_| self.enabled)?;
        let schedule = Schedule::parse(schedule, &self.timezone).ok()?;
        let first = schedule.next_after(since)?;
        let by = schedule.next_after(first)?;
        // A weekend is longer than a day of the week: the longer of the two is what no good week exceeds.
        let interval = (first - since).max(by - first);
        Some(Due { by, interval, expectation: Expectation::Schedule })
    }
}

fn next_action(state: State, healthy: bool, by: Option<DateTime<Utc>>) -> Option<String> {
    let by = by.map(|by| crate::time::as_text(&by)).unwrap_or_default();
    match state {
        State::Fresh => None,
        State::Overdue => Some(format!(
            "a good backup was expected by {by}: see why its runs failed, or that nothing triggers them any more"
        )),
        State::NeverSucceeded if healthy => Some(format!("its first good backup is expected by {by}")),
        State::NeverSucceeded => Some("it has no good backup: trigger a run, and see why it fails".to_owned()),
        State::Paused => Some("its schedule is paused: enable the job, or delete it".to_owned()),
    }
}

/// Databases of a source that no job backs up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "sourceId": "01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d31", "source": "shop", "databases": ["crm"],
                           "seenAt": "2025-01-15T02:00:00.400Z" }))]
pub struct Uncovered {
    /// Id of the source: the oldest of those on the same server.
    pub source_id: SourceId,
    /// Its slug.
    #[serde(rename = "source")]
    pub source_slug: String,
    /// Their names.
    pub databases: Vec<String>,
    /// When a worker last looked which databases the server has; null before the first run or test.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    pub seen_at: Option<DateTime<Utc>>,
}

/// A source, and what is known of its server.
#[derive(Clone, Debug)]
struct Inventory {
    id: SourceId,
    slug: String,
    engine: Engine,
    config: Map<String, Value>,
    has_job: bool,
    seen: Option<Vec<String>>,
    seen_at: Option<DateTime<Utc>>,
}

impl Inventory {
    /// Where its server is: sources of one server cover its databases together.
    fn server(&self) -> (bool, String) {
        let text = |name: &str| self.config.get(name).and_then(Value::as_str).map(str::to_lowercase);
        let port = self.config.get("port").and_then(Value::as_u64).unwrap_or(self.engine.default_port().into());
        let place = match text("socket") {
            Some(socket) => socket,
            None => format!("{}:{port}", text("host").unwrap_or_default()),
        };
        (self.engine == Engine::Postgres, place)
    }

    fn named(&self) -> impl Iterator<Item = &str> {
        self.config.get("databases").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
    }
}

/// Every source with databases that no job backs up, as far as a run or a test has seen them; a source without a job
/// counts with all that it names.
pub async fn uncovered(conn: &mut PgConnection) -> Result<Vec<Uncovered>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select s.id as "id: SourceId", s.slug, s.engine as "engine: Engine", s.config as "config: Json<Map<String, Value>>",
                  exists (select 1 from jobs j where j.source_id = s.id) as "has_job!",
                  i.databases as "seen?", i.seen_at as "seen_at?"
             from sources s left join source_inventories i on i.source_id = s.id
            order by s.id"#
    )
    .fetch_all(conn)
    .await?;
    let sources = rows.into_iter().map(|row| Inventory {
        id: row.id,
        slug: row.slug,
        engine: row.engine,
        config: row.config.0,
        has_job: row.has_job,
        seen: row.seen,
        seen_at: row.seen_at,
    });
    Ok(gaps(sources.collect()))
}

fn gaps(sources: Vec<Inventory>) -> Vec<Uncovered> {
    let mut servers: BTreeMap<(bool, String), Vec<Inventory>> = BTreeMap::new();
    for source in sources {
        servers.entry(source.server()).or_default().push(source);
    }
    let mut gaps = Vec::new();
    for sources in servers.into_values() {
        let mut told: BTreeSet<String> = sources
            .iter()
            .filter(|source| source.has_job)
            .flat_map(|source| source.named().map(str::to_owned))
            .collect();
        for source in &sources {
            let seen = source.seen.iter().flatten().filter(|name| !is_the_servers_own(source.engine, name)).cloned();
            // Named by hand counts whatever its name is.
            let there: BTreeSet<String> = seen.chain(source.named().map(str::to_owned)).collect();
            let databases: Vec<String> = there.into_iter().filter(|name| told.insert(name.clone())).collect();
            if !databases.is_empty() {
                let (source_slug, seen_at) = (source.slug.clone(), source.seen_at);
                gaps.push(Uncovered { source_id: source.id, source_slug, databases, seen_at });
            }
        }
    }
    gaps.sort_by_key(|gap| gap.source_id);
    gaps
}

fn is_the_servers_own(engine: Engine, database: &str) -> bool {
    match engine {
        Engine::Postgres => matches!(database, "postgres" | "template0" | "template1"),
        Engine::Mysql | Engine::Mariadb => {
            matches!(database, "information_schema" | "mysql" | "performance_schema" | "sys")
        }
    }
}

/// Notes which databases the server of a source has. A source that is looked at all the time is written once a minute.
pub async fn saw(conn: &mut PgConnection, source: SourceId, databases: &[String]) -> Result<(), sqlx::Error> {
    // A source that is being deleted has no inventory.
    sqlx::query!(
        "insert into source_inventories as i (source_id, databases) select id, $2 from sources where id = $1
         on conflict (source_id) do update set databases = excluded.databases, seen_at = excluded.seen_at
          where i.databases <> excluded.databases or i.seen_at < excluded.seen_at - interval '1 minute'",
        source as _,
        databases,
    )
    .execute(conn)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests;
