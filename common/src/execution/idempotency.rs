//! `Idempotency-Key`: a request that may be repeated without a second run, for 24 hours.

use std::collections::HashMap;

use sqlx::PgConnection;

use crate::id::{ApiKeyId, ExecutionId, JobId};

/// A request that may be repeated without a second run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idempotency {
    /// Whose key it is.
    pub api_key: ApiKeyId,
    /// 1 to 255 characters.
    pub key: String,
    /// SHA-256 of the body.
    pub body_hash: Vec<u8>,
}

/// Keys that were used, and for what.
#[derive(Default)]
pub(super) struct StoredKeys(HashMap<(ApiKeyId, JobId, String), (Vec<u8>, ExecutionId)>);

impl StoredKeys {
    /// What is stored under these keys for these jobs.
    pub(super) async fn of(
        conn: &mut PgConnection,
        keys: impl Iterator<Item = &Idempotency>,
        jobs: impl Iterator<Item = JobId>,
    ) -> Result<Self, sqlx::Error> {
        let keys: Vec<String> = keys.map(|idempotency| idempotency.key.clone()).collect();
        if keys.is_empty() {
            return Ok(Self::default());
        }
        let jobs: Vec<JobId> = jobs.collect();
        let rows = sqlx::query!(
            r#"select api_key_id as "api_key_id: ApiKeyId", job_id as "job_id: JobId", key, body_hash, execution_id as "execution_id: ExecutionId"
                 from idempotency_keys
                where job_id = any ($1) and key = any ($2) and created_at > clock_timestamp() - interval '24 hours'"#,
            &jobs[..] as _,
            &keys,
        )
        .fetch_all(conn)
        .await?;
        Ok(Self(rows.into_iter().map(|r| ((r.api_key_id, r.job_id, r.key), (r.body_hash, r.execution_id))).collect()))
    }

    /// The execution that the same request made; an inner `None` when the key was used with another body.
    pub(super) fn used(&self, idempotency: &Idempotency, job: JobId) -> Option<Option<ExecutionId>> {
        let (body_hash, execution) = self.0.get(&(idempotency.api_key, job, idempotency.key.clone()))?;
        Some((*body_hash == idempotency.body_hash).then_some(*execution))
    }

    /// Another of the same slice may have the same key.
    pub(super) fn insert(&mut self, idempotency: &Idempotency, job: JobId, execution: ExecutionId) {
        let slot = (idempotency.api_key, job, idempotency.key.clone());
        self.0.insert(slot, (idempotency.body_hash.clone(), execution));
    }
}

/// What a single key was used for, as [`StoredKeys::used`].
pub(super) async fn used(
    conn: &mut PgConnection,
    idempotency: &Idempotency,
    job: JobId,
) -> Result<Option<Option<ExecutionId>>, sqlx::Error> {
    let stored = StoredKeys::of(conn, std::iter::once(idempotency), std::iter::once(job)).await?;
    Ok(stored.used(idempotency, job))
}

/// Keys to store, in columns; none of them twice.
#[derive(Default)]
pub(super) struct Keys {
    api_key: Vec<ApiKeyId>,
    job: Vec<JobId>,
    key: Vec<String>,
    body_hash: Vec<Vec<u8>>,
    execution: Vec<ExecutionId>,
}

impl Keys {
    /// A single one.
    pub(super) fn one(idempotency: &Idempotency, job: JobId, execution: ExecutionId) -> Self {
        let mut keys = Self::default();
        keys.push(idempotency, job, execution);
        keys
    }

    pub(super) fn push(&mut self, idempotency: &Idempotency, job: JobId, execution: ExecutionId) {
        self.api_key.push(idempotency.api_key);
        self.job.push(job);
        self.key.push(idempotency.key.clone());
        self.body_hash.push(idempotency.body_hash.clone());
        self.execution.push(execution);
    }

    /// A key past its 24 hours that is still in the table gives way.
    pub(super) async fn store(&self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.key.is_empty() {
            return Ok(());
        }
        sqlx::query!(
            "insert into idempotency_keys (api_key_id, job_id, key, body_hash, execution_id)
             select * from unnest($1::uuid[], $2::uuid[], $3::text[], $4::bytea[], $5::uuid[])
             on conflict (api_key_id, job_id, key)
             do update set body_hash = excluded.body_hash, execution_id = excluded.execution_id, created_at = clock_timestamp()",
            &self.api_key[..] as _,
            &self.job[..] as _,
            &self.key,
            &self.body_hash,
            &self.execution[..] as _,
        )
        .execute(conn)
        .await?;
        Ok(())
    }
}

/// Removes idempotency keys past their 24 hours, a batch at a time; gives how many.
pub async fn forget_old_keys(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from idempotency_keys where (api_key_id, job_id, key) in
             (select api_key_id, job_id, key from idempotency_keys
               where created_at < now() - interval '24 hours' order by created_at limit 1000)"
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}
