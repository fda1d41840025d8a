//! How many more executions may wait, without counting them for every trigger.
//!
//! A count is remembered with the last number that the sequence of `executions.seq` had given before it. At most as many
//! can have been added since as that sequence has moved on, so the two together are never too low; only when they reach
//! the cap is it counted anew. What runs counts too: it may come back to the queue without a new number.
//!
//! Of one job the result is exact, since its row is locked from before the count to the commit. Of all jobs together it
//! misses what other processes have numbered and not yet committed: a group of triggers each.

use std::collections::HashMap;

use sqlx::PgConnection;

use crate::{id::JobId, setting::Settings};

/// Jobs remembered at once.
const MOST_JOBS: usize = 10_000;

/// The last counts of a process. An empty one counts at once.
#[derive(Debug, Default)]
pub struct Room {
    all: Option<Counted>,
    jobs: HashMap<JobId, Counted>,
}

/// What waited or ran when it was counted.
#[derive(Clone, Copy, Debug)]
struct Counted {
    open: i64,
    /// The sequence, read before.
    at: i64,
}

impl Counted {
    /// Not fewer than wait at `now`, of the sequence; `None` when that went back, as in a database that was restored.
    fn most(self, now: i64) -> Option<i64> {
        (now >= self.at).then(|| self.open + (now - self.at))
    }
}

impl Room {
    /// How far the sequence may have come so that there is certainly room for so many of each job; `None` where it must be
    /// counted.
    pub(super) fn sequence_at_most(&self, settings: &Settings, wanted: &HashMap<JobId, i64>) -> Option<i64> {
        let most = |counted: Counted, cap: i64, wanted: i64| counted.at + cap - wanted - counted.open;
        let all = most(self.all?, settings.max_pending, wanted.values().sum());
        wanted.iter().try_fold(all, |least, (job, wanted)| {
            Some(least.min(most(*self.jobs.get(job)?, settings.max_pending_per_job, *wanted)))
        })
    }

    /// How many more may wait in all: exactly, or at least `wanted`. `now` is the sequence, read in an earlier statement.
    pub(super) async fn of_all(
        &mut self,
        conn: &mut PgConnection,
        now: i64,
        cap: i64,
        wanted: i64,
    ) -> Result<i64, sqlx::Error> {
        if wanted == 0 {
            return Ok(0);
        }
        if let Some(room) = self.all.and_then(|counted| Some(cap - counted.most(now)?)).filter(|room| *room >= wanted) {
            return Ok(room);
        }
        let row = sqlx::query!(
            r#"select (select count(*) from (select 1 from executions where status = 'Pending' limit $1) waiting) as "waiting!",
                      (select count(*) from execution_leases) as "running!""#,
            cap
        )
        .fetch_one(conn)
        .await?;
        // Nobody knows how many there are beyond the cap, which may be raised.
        self.all = (row.waiting < cap).then_some(Counted { open: row.waiting + row.running, at: now });
        Ok(cap - row.waiting)
    }

    /// How many executions of each job wait: exactly, or an upper bound that leaves room for `wanted` under the cap. The
    /// jobs' rows are locked.
    pub(super) async fn of_jobs(
        &mut self,
        conn: &mut PgConnection,
        now: i64,
        cap: i64,
        jobs: &[(JobId, i64)],
    ) -> Result<HashMap<JobId, i64>, sqlx::Error> {
        let mut waiting = HashMap::new();
        let mut unsure = Vec::new();
        for (job, wanted) in jobs {
            let most = self.jobs.get(job).and_then(|counted| counted.most(now)).filter(|most| most + wanted <= cap);
            match most {
                Some(most) => drop(waiting.insert(*job, most)),
                None => unsure.push(*job),
            }
        }
        if unsure.is_empty() {
            return Ok(waiting);
        }
        let rows = sqlx::query!(
            r#"select j.id as "job!: JobId",
                      (select count(*) from executions e where e.status = 'Pending' and e.type = 'Backup' and e.job_id = j.id) as "waiting!",
                      (select count(*) from execution_leases l where l.type = 'Backup' and l.job_id = j.id) as "running!"
                 from unnest($1::uuid[]) as j (id)"#,
            &unsure[..] as _
        )
        .fetch_all(conn)
        .await?;
        if self.jobs.len() + rows.len() > MOST_JOBS {
            self.jobs.clear();
        }
        for row in rows {
            self.jobs.insert(row.job, Counted { open: row.waiting + row.running, at: now });
            waiting.insert(row.job, row.waiting);
        }
        Ok(waiting)
    }
}
