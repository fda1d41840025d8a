//! Jobs: stored definitions of a backup.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, types::Json};

use crate::{
    db,
    encryption::Encryption,
    id::{DestinationId, JobId, Reference, SourceId},
    label::Labels,
    page::{Page, fetch_limit},
    schedule,
};

/// How the dump is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Compression {
    /// Zstandard, level 3.
    #[default]
    Zstd,
    /// gzip, level 6.
    Gzip,
    /// As the tool wrote it.
    None,
}

impl Compression {
    /// The name as clients write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Compression::Zstd => "zstd",
            Compression::Gzip => "gzip",
            Compression::None => "none",
        }
    }
}

/// What a trigger does while a run of the job is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Overlap {
    /// Wait behind it.
    #[default]
    Queue,
    /// Be refused.
    Reject,
    /// Run beside it.
    Allow,
}

impl Overlap {
    /// The name as clients write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Overlap::Queue => "queue",
            Overlap::Reject => "reject",
            Overlap::Allow => "allow",
        }
    }
}

/// A job as clients see it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Its stable name.
    pub slug: String,
    /// Its name for people.
    pub name: String,
    /// What is backed up.
    pub source_id: SourceId,
    /// Where to; every backup goes to all of them.
    pub destination_ids: Vec<DestinationId>,
    /// See [`Compression`].
    pub compression: Compression,
    /// Who can open the backups; null for everybody who can read them.
    pub encryption: Option<Encryption>,
    /// When it runs by itself: a cron expression of minute, hour, day of month, month and day of week, or a nickname
    /// such as @daily; null is never.
    #[schema(example = "0 3 * * *")]
    pub schedule: Option<String>,
    /// IANA name of the time zone whose wall clock the schedule means.
    #[schema(example = "Europe/Berlin")]
    pub timezone: String,
    /// Governs the schedule: false pauses it. A trigger runs a paused job too.
    pub enabled: bool,
    /// When the schedule fires next; null without one, and while it is paused.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    #[schema(example = "2025-01-16T02:00:00.000Z")]
    pub next_run_at: Option<DateTime<Utc>>,
    /// Start of the newest run that has started, whatever triggered it.
    #[serde(serialize_with = "crate::time::millis_or_null")]
    #[schema(example = "2025-01-15T02:00:00.412Z")]
    pub last_run_at: Option<DateTime<Utc>>,
    /// See [`Overlap`].
    pub overlap: Overlap,
    /// Failures that may be retried, the first included.
    pub max_attempts: i32,
    /// Longest time of one attempt.
    pub timeout_seconds: i32,
    /// A good backup is expected this often, whatever triggers it.
    pub expect_every_seconds: Option<i32>,
    /// Free labels.
    pub labels: Labels,
    /// When it was made.
    #[serde(serialize_with = "crate::time::millis")]
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    #[serde(serialize_with = "crate::time::millis")]
    pub updated_at: DateTime<Utc>,
}

/// A whole job to be stored.
#[derive(Clone, Debug)]
pub struct JobDraft {
    /// See [`Job::name`].
    pub name: String,
    /// Chosen by the client, else made from the name.
    pub slug: Option<String>,
    /// See [`Job::source_id`].
    pub source_id: SourceId,
    /// See [`Job::destination_ids`].
    pub destination_ids: Vec<DestinationId>,
    /// See [`Job::compression`].
    pub compression: Compression,
    /// See [`Job::encryption`].
    pub encryption: Option<Encryption>,
    /// See [`Job::schedule`].
    pub schedule: Option<String>,
    /// See [`Job::timezone`].
    pub timezone: String,
    /// See [`Job::enabled`].
    pub enabled: bool,
    /// See [`Job::overlap`].
    pub overlap: Overlap,
    /// See [`Job::max_attempts`].
    pub max_attempts: i32,
    /// See [`Job::timeout_seconds`].
    pub timeout_seconds: i32,
    /// See [`Job::expect_every_seconds`].
    pub expect_every_seconds: Option<i32>,
    /// See [`Job::labels`].
    pub labels: Labels,
}

/// Which jobs a list shows.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Part of the name, in any case.
    pub name: Option<String>,
    /// Labels that must be there.
    pub labels: Labels,
    /// Only jobs of this source.
    pub source_id: Option<SourceId>,
    /// Only these, for a caller that is scoped to some.
    pub only: Option<Vec<JobId>>,
    /// Rows on a page; `None` for all.
    pub limit: Option<i64>,
    /// The last id of the page before.
    pub cursor: Option<uuid::Uuid>,
}

struct Row {
    id: JobId,
    slug: String,
    name: String,
    source_id: SourceId,
    destination_ids: Vec<DestinationId>,
    compression: Compression,
    recipients: Vec<String>,
    schedule: Option<String>,
    timezone: String,
    enabled: bool,
    next_run_at: Option<DateTime<Utc>>,
    last_run_at: Option<DateTime<Utc>>,
    overlap: Overlap,
    max_attempts: i32,
    timeout_seconds: i32,
    expect_every_seconds: Option<i32>,
    labels: Json<Labels>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl From<Row> for Job {
    fn from(row: Row) -> Self {
        Job {
            id: row.id,
            slug: row.slug,
            name: row.name,
            source_id: row.source_id,
            destination_ids: row.destination_ids,
            compression: row.compression,
            encryption: Encryption::of(row.recipients),
            schedule: row.schedule,
            timezone: row.timezone,
            enabled: row.enabled,
            next_run_at: row.next_run_at,
            last_run_at: row.last_run_at,
            overlap: row.overlap,
            max_attempts: row.max_attempts,
            timeout_seconds: row.timeout_seconds,
            expect_every_seconds: row.expect_every_seconds,
            labels: row.labels.0,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// What became of a create.
#[derive(Debug)]
pub enum Created {
    /// Stored.
    Job(Box<Job>),
    /// The chosen slug belongs to another job.
    SlugTaken,
}

/// Stores a new job with its destinations. Fails on `jobs_source_exists` or
/// `job_destinations_destination_exists` when one of them is gone.
pub async fn create(conn: &mut PgConnection, draft: &JobDraft) -> Result<Created, sqlx::Error> {
    let id = JobId::new();
    let mut tx = conn.begin().await?;
    let next_run_at = draft.plan(db::now(&mut tx).await?);
    let mut inserted = false;
    for n in 0..1000 {
        let slug = draft.slug.clone().unwrap_or_else(|| crate::slug::candidate(&draft.name, n));
        let done =
            sqlx::query!(
            "insert into jobs (id, slug, name, source_id, compression, enabled, overlap, max_attempts, timeout_seconds,
                               expect_every_seconds, labels, schedule, timezone, next_run_at, recipients)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
             on conflict on constraint jobs_slug_unique do nothing",
            id as _, slug, draft.name, draft.source_id as _, draft.compression.as_str(), draft.enabled,
            draft.overlap.as_str(), draft.max_attempts, draft.timeout_seconds, draft.expect_every_seconds,
            Json(&draft.labels) as _, draft.schedule, draft.timezone, next_run_at,
            draft.recipients(),
        )
            .execute(&mut *tx)
            .await?;
        inserted = done.rows_affected() == 1;
        if inserted || draft.slug.is_some() {
            break;
        }
    }
    if !inserted {
        return Ok(Created::SlugTaken);
    }
    insert_destinations(&mut tx, id, &draft.destination_ids).await?;
    tx.commit().await?;
    let job = find(conn, &Reference::new(id.to_string())).await?.ok_or(sqlx::Error::RowNotFound)?;
    Ok(Created::Job(Box::new(job)))
}

/// Replaces a job that was read as of `updated_at`; `None` when it is gone or was changed since. Fails on the same
/// constraints as [`create`], and on `jobs_slug_unique`.
pub async fn update(
    conn: &mut PgConnection,
    (id, updated_at): (JobId, DateTime<Utc>),
    draft: &JobDraft,
) -> Result<Option<Job>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let Some(next_run_at) = plan_anew(&mut tx, (id, updated_at), draft).await? else { return Ok(None) };
    sqlx::query!(
        "update jobs
            set slug = coalesce($2, slug), name = $3, source_id = $4, compression = $5, enabled = $6, overlap = $7,
                max_attempts = $8, timeout_seconds = $9, expect_every_seconds = $10, labels = $11,
                schedule = $12, timezone = $13, next_run_at = $14, recipients = $15, updated_at = clock_timestamp()
          where id = $1",
        id as _,
        draft.slug,
        draft.name,
        draft.source_id as _,
        draft.compression.as_str(),
        draft.enabled,
        draft.overlap.as_str(),
        draft.max_attempts,
        draft.timeout_seconds,
        draft.expect_every_seconds,
        Json(&draft.labels) as _,
        draft.schedule,
        draft.timezone,
        next_run_at,
        draft.recipients(),
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!("delete from job_destinations where job_id = $1", id as _).execute(&mut *tx).await?;
    insert_destinations(&mut tx, id, &draft.destination_ids).await?;
    tx.commit().await?;
    find(conn, &Reference::new(id.to_string())).await
}

impl JobDraft {
    fn recipients(&self) -> &[String] {
        self.encryption.as_ref().map_or(&[], |encryption| &encryption.recipients)
    }

    fn plan(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        schedule::plan(self.enabled, self.schedule.as_deref(), &self.timezone, now)
    }
}

/// When a job that is being changed fires next; `None` when it is gone or was changed since it was read. A change of the
/// schedule plans from now on and makes up nothing; any other change leaves a firing that is due to the workers.
async fn plan_anew(
    conn: &mut PgConnection,
    (id, updated_at): (JobId, DateTime<Utc>),
    draft: &JobDraft,
) -> Result<Option<Option<DateTime<Utc>>>, sqlx::Error> {
    // The lock that a firing takes: the plan is this one's or that one's, never a mixture.
    let stored = sqlx::query!(
        "select schedule, timezone, enabled, next_run_at from jobs where id = $1 and updated_at = $2 for no key update",
        id as _,
        updated_at,
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(stored) = stored else { return Ok(None) };
    // After the lock, which may have been waited for.
    let planned = draft.plan(db::now(conn).await?);
    let same =
        (&stored.schedule, &stored.timezone, stored.enabled) == (&draft.schedule, &draft.timezone, draft.enabled);
    // The earlier one: a plan beyond the next time was made by a clock that has been set back since.
    let kept = stored.next_run_at.filter(|_| same);
    Ok(Some(planned.map(|next| kept.map_or(next, |kept| kept.min(next)))))
}

async fn insert_destinations(
    conn: &mut PgConnection,
    id: JobId,
    destinations: &[DestinationId],
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "insert into job_destinations (job_id, destination_id, position)
         select $1, d.id, d.position from unnest($2::uuid[]) with ordinality as d (id, position)",
        id as _,
        destinations as _,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// One job by id or slug.
pub async fn find(conn: &mut PgConnection, reference: &Reference) -> Result<Option<Job>, sqlx::Error> {
    let row = sqlx::query_as!(
        Row,
        r#"select id as "id: JobId", slug, name, source_id as "source_id: SourceId",
                  array(select destination_id from job_destinations d where d.job_id = jobs.id order by position)
                      as "destination_ids!: Vec<DestinationId>",
                  compression as "compression: Compression", recipients, schedule, timezone, enabled,
                  case when enabled then next_run_at end as next_run_at,
                  (select e.started_at from executions e
                    where e.job_id = jobs.id and e.type = 'Backup' and e.started_at is not null
                    order by e.seq desc limit 1) as last_run_at,
                  overlap as "overlap: Overlap", max_attempts,
                  timeout_seconds, expect_every_seconds, labels as "labels: Json<Labels>", created_at, updated_at
             from jobs where id = $1 or slug = $2"#,
        reference.id(),
        reference.slug(),
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Job::from))
}

/// A page of jobs, oldest first.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<Page<Job>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: JobId", slug, name, source_id as "source_id: SourceId",
                  array(select destination_id from job_destinations d where d.job_id = jobs.id order by position)
                      as "destination_ids!: Vec<DestinationId>",
                  compression as "compression: Compression", recipients, schedule, timezone, enabled,
                  case when enabled then next_run_at end as next_run_at,
                  (select e.started_at from executions e
                    where e.job_id = jobs.id and e.type = 'Backup' and e.started_at is not null
                    order by e.seq desc limit 1) as last_run_at,
                  overlap as "overlap: Overlap", max_attempts,
                  timeout_seconds, expect_every_seconds, labels as "labels: Json<Labels>", created_at, updated_at
             from jobs
            where ($1::text is null or position(lower($1) in lower(name)) > 0)
              and labels @> $2
              and ($3::uuid is null or source_id = $3)
              and ($4::uuid[] is null or id = any ($4))
              and ($5::uuid is null or id > $5)
            order by id
            limit $6"#,
        filter.name,
        Json(&filter.labels) as _,
        filter.source_id as _,
        filter.only.as_deref() as _,
        filter.cursor,
        fetch_limit(filter.limit),
    )
    .fetch_all(conn)
    .await?;
    Ok(Page::cut(rows.into_iter().map(Job::from).collect(), filter.limit, |j| j.id.to_string()))
}

/// What became of a delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// Gone; its artifacts and history stay.
    Done,
    /// There was none.
    NotFound,
    /// A run is waiting or running.
    Active,
}

/// Deletes a job that has no active run. The row lock is the one that a trigger takes, so none slips in between.
pub async fn delete(conn: &mut PgConnection, id: JobId) -> Result<Deleted, sqlx::Error> {
    let mut tx = conn.begin().await?;
    if sqlx::query!("select id from jobs where id = $1 for update", id as _).fetch_optional(&mut *tx).await?.is_none() {
        return Ok(Deleted::NotFound);
    }
    let active = sqlx::query_scalar!(
        r#"select exists (select 1 from executions where job_id = $1 and status in ('Pending', 'Running')) as "active!""#,
        id as _
    )
    .fetch_one(&mut *tx)
    .await?;
    if active {
        return Ok(Deleted::Active);
    }
    sqlx::query!("delete from jobs where id = $1", id as _).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(Deleted::Done)
}
