//! How backups went of late, and how much of them is stored.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

/// Days that a summary looks back.
pub const DAYS: i32 = 30;

/// One day (UTC) of backups that ended.
#[derive(Clone, Debug)]
pub struct Day {
    /// Its beginning.
    pub day: DateTime<Utc>,
    /// Backups that ended well.
    pub good: i64,
    /// Those that failed, but for the cancelled: somebody wanted those to end.
    pub failed: i64,
}

/// The last [`DAYS`] days.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Oldest first, today last; a day without a backup too.
    pub days: Vec<Day>,
    /// Bytes of all stored backups, every copy counted.
    pub stored_bytes: i64,
}

impl Summary {
    /// Counts: along the index of what ended, and once over the artifacts. To be asked now and then, not for each page.
    pub async fn take(conn: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let days = sqlx::query_as!(
            Day,
            r#"select d.day as "day!", count(*) filter (where e.status = 'Success') as "good!",
                      count(*) filter (where e.status = 'Failed' and e.outcome is distinct from 'Cancelled') as "failed!"
                 from generate_series(date_trunc('day', clock_timestamp(), 'UTC') - ($1 - 1) * interval '1 day',
                                      date_trunc('day', clock_timestamp(), 'UTC'), interval '1 day') as d (day)
                 left join executions e
                   on e.status in ('Success', 'Failed') and e.type = 'Backup' and e.ended_at >= d.day and e.ended_at < d.day + interval '1 day'
                group by d.day order by d.day"#,
            DAYS
        )
        .fetch_all(&mut *conn)
        .await?;
        let stored_bytes =
            sqlx::query_scalar!(r#"select coalesce(sum(size_bytes), 0)::bigint as "sum!" from artifacts"#)
                .fetch_one(conn)
                .await?;
        Ok(Self { days, stored_bytes })
    }

    /// Backups that ended well, and that failed.
    pub fn counts(&self) -> (i64, i64) {
        (self.days.iter().map(|day| day.good).sum(), self.days.iter().map(|day| day.failed).sum())
    }
}
