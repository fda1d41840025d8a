//! Settings that change at run time. The concurrency limit and the pause are columns of the gate, because the
//! row that holds them is also the lock under which they are obeyed.

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;

/// All settings, as clients see them.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// Runs at once over all workers, 0 to 1000.
    pub max_concurrent_jobs: i32,
    /// Nothing new is claimed while true.
    pub paused: bool,
    /// Executions of one job that may wait.
    pub max_pending_per_job: i64,
    /// Executions that may wait in all.
    pub max_pending: i64,
}

/// A change: what is absent stays (RFC 7396; `null` brings back the default).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SettingsChange {
    /// See [`Settings::max_concurrent_jobs`].
    #[serde(default, deserialize_with = "present")]
    pub max_concurrent_jobs: Option<Option<i32>>,
    /// See [`Settings::paused`].
    #[serde(default, deserialize_with = "present")]
    pub paused: Option<Option<bool>>,
    /// See [`Settings::max_pending_per_job`].
    #[serde(default, deserialize_with = "present")]
    pub max_pending_per_job: Option<Option<i64>>,
    /// See [`Settings::max_pending`].
    #[serde(default, deserialize_with = "present")]
    pub max_pending: Option<Option<i64>>,
}

/// Tells an absent field (`None`) from one that is `null` (`Some(None)`).
pub fn present<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

const DEFAULT_MAX_CONCURRENT_JOBS: i32 = 4;
const DEFAULT_MAX_PENDING_PER_JOB: i64 = 100;
const DEFAULT_MAX_PENDING: i64 = 10_000;

impl SettingsChange {
    /// The fields that are out of range, with what is allowed.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if let Some(Some(n)) = self.max_concurrent_jobs
            && !(0..=1000).contains(&n)
        {
            problems.push(("maxConcurrentJobs", "must be between 0 and 1000".to_owned()));
        }
        for (name, value) in [("maxPendingPerJob", self.max_pending_per_job), ("maxPending", self.max_pending)] {
            if let Some(Some(n)) = value
                && !(1..=1_000_000).contains(&n)
            {
                problems.push((name, "must be between 1 and 1000000".to_owned()));
            }
        }
        problems
    }
}

/// The settings in force.
pub async fn read(conn: &mut PgConnection) -> Result<Settings, sqlx::Error> {
    sqlx::query_as!(
        Settings,
        r#"select g.max_concurrency as max_concurrent_jobs, g.paused,
                  coalesce((select (value)::bigint from settings where name = 'maxPendingPerJob'), $1) as "max_pending_per_job!",
                  coalesce((select (value)::bigint from settings where name = 'maxPending'), $2) as "max_pending!"
             from queue_gate g"#,
        DEFAULT_MAX_PENDING_PER_JOB,
        DEFAULT_MAX_PENDING,
    )
    .fetch_one(conn)
    .await
}

/// Applies a change that has no [`SettingsChange::problems`]. A lower limit acts on the next claim; what runs
/// already is left to end.
pub async fn change(conn: &mut PgConnection, change: &SettingsChange) -> Result<(), sqlx::Error> {
    let mut tx = sqlx::Connection::begin(conn).await?;
    sqlx::query!(
        "update queue_gate set max_concurrency = coalesce($1, max_concurrency), paused = coalesce($2, paused)",
        change.max_concurrent_jobs.map(|n| n.unwrap_or(DEFAULT_MAX_CONCURRENT_JOBS)),
        change.paused.map(|p| p.unwrap_or(false)),
    )
    .execute(&mut *tx)
    .await?;
    for (name, value) in [("maxPendingPerJob", change.max_pending_per_job), ("maxPending", change.max_pending)] {
        match value {
            None => {}
            Some(None) => {
                sqlx::query!("delete from settings where name = $1", name).execute(&mut *tx).await?;
            }
            Some(Some(n)) => {
                sqlx::query!(
                    "insert into settings (name, value) values ($1, to_jsonb($2::bigint))
                     on conflict (name) do update set value = excluded.value",
                    name,
                    n
                )
                .execute(&mut *tx)
                .await?;
            }
        }
    }
    tx.commit().await
}
