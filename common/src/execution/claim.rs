//! Claim: the right to run an execution, given under the gate. The SQL is one function of the database
//! (`claim_executions_v7`), because the lock and the count must be two statements and one round trip.

use std::{
    collections::{HashMap, hash_map::Entry},
    time::Duration,
};

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

use super::{
    pin,
    restore::{self, Order},
};
use crate::{
    artifact::{self, Artifact},
    destination::{self, Destination},
    id::{ExecutionId, JobId, Reference, SourceId, WorkerId},
    job::{self, Job},
    label::Labels,
    source::{self, Engine, Source},
    telemetry::TraceContext,
    worker,
};

/// A fencing token: grows with every claim, and every write under a claim names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, sqlx::Type)]
#[sqlx(transparent)]
pub struct Token(pub i64);

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The right to run an execution until the lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// What to run.
    pub execution: ExecutionId,
    /// Proof of the right.
    pub token: Token,
    /// Unit of the global limit.
    pub slot: i32,
    /// Which claim of this execution.
    pub attempt: i32,
}

/// Who claims.
#[derive(Clone, Debug)]
pub struct Claimant {
    /// The worker; it gets nothing while it is cordoned.
    pub id: WorkerId,
    /// Its name.
    pub name: String,
    /// Pools that it reaches.
    pub pools: Vec<String>,
    /// What it can dump. Others are left to the workers that can, as long as there are such.
    pub engines: Vec<Engine>,
    /// Sources, destinations and restores that it cannot serve. Runs that need them are left to others likewise.
    pub out_of_reach: Vec<Uuid>,
}

/// Claims at most `want` executions of the worker's pools: never more than the global limit, than the limit of
/// a source (backups and restores apart), or than one of a serial job.
pub async fn claim(
    conn: &mut PgConnection,
    worker: &Claimant,
    lease: Duration,
    want: usize,
) -> Result<Vec<Claim>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select execution_id as "execution_id!: ExecutionId", token as "token!: Token", slot as "slot!", attempt as "attempt!"
             from claim_executions_v7($1, $2, $3, $4, $5, $6, $7)"#,
        worker.id as _,
        worker.name,
        &worker.pools,
        &worker::names(&worker.engines),
        &worker.out_of_reach,
        crate::time::ms(lease),
        i32::try_from(want).unwrap_or(i32::MAX),
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|r| Claim { execution: r.execution_id, token: r.token, slot: r.slot, attempt: r.attempt })
        .collect())
}

/// Whether the next claim of this worker leaves an execution alone because another can serve it: it may be given back.
pub async fn is_for_others(
    conn: &mut PgConnection,
    execution: ExecutionId,
    worker: &Claimant,
    lease: Duration,
) -> Result<bool, sqlx::Error> {
    let found = sqlx::query_scalar!(
        r#"select run_key(type, pool, job_id, source_id, id) = any (runs_for_others($2, $3, $4, $5)) as "is_for_others!"
             from executions where id = $1"#,
        execution as _,
        worker.id as _,
        &worker.pools,
        &worker.out_of_reach,
        crate::time::ms(lease),
    )
    .fetch_optional(conn)
    .await?;
    Ok(found.unwrap_or(false))
}

/// When to look at the queue again at the latest: the next back-off that ends. `None` when nothing waits for a time. Only
/// what was claimed before waits for one.
pub async fn next_due(conn: &mut PgConnection, pools: &[String]) -> Result<Option<Duration>, sqlx::Error> {
    let ms = sqlx::query_scalar!(
        "select extract(epoch from min(run_at) - clock_timestamp())::float8 * 1000
           from executions where status = 'Pending' and attempt > 0 and run_at > clock_timestamp() and pool = any ($1)",
        pools
    )
    .fetch_one(conn)
    .await?;
    Ok(ms.map(|ms| Duration::from_secs_f64(ms.max(0.0) / 1000.0)))
}

/// What is known of a claim whatever became of its job.
#[derive(Clone, Debug)]
pub struct Briefing {
    /// Trace of the trigger.
    pub trace: TraceContext,
    /// The pool of its source at the trigger.
    pub pool: String,
    /// When the run was queued, or queued again, by the database's clock.
    pub queued_at: DateTime<Utc>,
    /// When this attempt was claimed, by the database's clock: names the files.
    pub claimed_at: DateTime<Utc>,
    /// Token of the attempt before.
    pub previous: Option<Token>,
}

/// What a claim turned out to be about.
#[derive(Clone, Debug)]
pub enum Assigned {
    /// Something of what its trigger named was deleted meanwhile.
    Gone(Briefing),
    /// A backup.
    Run(Box<Assignment>),
    /// A restore.
    Restore(Box<RestoreAssignment>),
}

impl Assigned {
    /// What is known in both cases.
    pub fn briefing(&self) -> &Briefing {
        match self {
            Assigned::Gone(briefing) => briefing,
            Assigned::Run(assignment) => &assignment.briefing,
            Assigned::Restore(assignment) => &assignment.briefing,
        }
    }
}

/// All that a run needs to know, read once after its claim.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// The claim.
    pub claim: Claim,
    /// When, where and for whom.
    pub briefing: Briefing,
    /// The job as it is now.
    pub job: Job,
    /// The job's slug at the trigger.
    pub job_slug: String,
    /// What to back up.
    pub source: Source,
    /// Where to.
    pub destinations: Vec<Destination>,
    /// Labels of the execution.
    pub labels: Labels,
    /// Retention leaves the backup alone.
    pub locked: bool,
}

/// All that a restore needs to know, read once after its claim.
#[derive(Clone, Debug)]
pub struct RestoreAssignment {
    /// The claim.
    pub claim: Claim,
    /// When, where and for whom.
    pub briefing: Briefing,
    /// What, and how.
    pub order: Order,
    /// Where to.
    pub target: Source,
    /// Every object of the backup, with the destination where it lies unless that is gone.
    pub copies: Vec<(Artifact, Option<Destination>)>,
    /// What opens the backup, sealed as [`restore::identity_context`] says; `None` when it is not encrypted.
    pub sealed_identity: Option<Vec<u8>>,
    /// Longest time of all attempts' each, in seconds: that of the backup's job.
    pub timeout_seconds: i32,
}

/// Reads what a claim is about; `None` when the claim is no longer ours.
pub async fn assignment(conn: &mut PgConnection, claim: Claim) -> Result<Option<Assigned>, sqlx::Error> {
    let row = sqlx::query!(
        r#"select e.type as kind, e.source_id as "source_id: SourceId", e.job_id as "job_id: JobId", e.job_slug, e.labels as "labels: Json<Labels>", e.locked, e.traceparent, e.tracestate,
                  e.pool, coalesce(e.requeued_at, e.queued_at) as "queued_at!", e.previous_token as "previous: Token", l.claimed_at
             from executions e join execution_leases l on l.execution_id = e.id and l.token = $2
            where e.id = $1"#,
        claim.execution as _,
        claim.token as _,
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let briefing = Briefing {
        trace: TraceContext { traceparent: row.traceparent, tracestate: row.tracestate },
        pool: row.pool,
        queued_at: row.queued_at,
        claimed_at: row.claimed_at,
        previous: row.previous,
    };
    let gone = |briefing| Ok(Some(Assigned::Gone(briefing)));
    if row.kind == "Restore" {
        return restore(conn, claim, briefing, row.job_id, row.source_id).await.map(Some);
    }
    let Some(mut job) = job::find(conn, &Reference::new(row.job_id.to_string())).await? else { return gone(briefing) };
    // The one that the trigger named, which the gate counts it for and a restore goes back to: the job may have another now.
    // Then its destinations and recipients are not meant for this one.
    if job.source_id != row.source_id {
        let Some(pinned) = pin::find(conn, claim.execution).await? else { return gone(briefing) };
        (job.destination_ids, job.encryption) = pinned;
    }
    let source = source::find(conn, &Reference::new(row.source_id.to_string())).await?;
    let Some(source) = source else { return gone(briefing) };
    // Those that were read together with the recipients.
    let destinations = destination::of_ids(conn, &job.destination_ids).await?;
    if destinations.len() < job.destination_ids.len() {
        return gone(briefing);
    }
    Ok(Some(Assigned::Run(Box::new(Assignment {
        claim,
        briefing,
        job,
        job_slug: row.job_slug,
        source,
        destinations,
        labels: row.labels.0,
        locked: row.locked,
    }))))
}

/// The job may be gone: its backups stay.
async fn restore(
    conn: &mut PgConnection,
    claim: Claim,
    briefing: Briefing,
    job: JobId,
    target: SourceId,
) -> Result<Assigned, sqlx::Error> {
    let target = source::find(conn, &Reference::new(target.to_string())).await?;
    let (Some(order), Some(target)) = (restore::find(conn, claim.execution).await?, target) else {
        return Ok(Assigned::Gone(briefing));
    };
    let job = job::find(conn, &Reference::new(job.to_string())).await?;
    let (mut copies, mut destinations) = (Vec::new(), HashMap::new());
    for artifact in artifact::of_executions(conn, &[order.backup_id]).await? {
        let id = artifact.destination_id;
        if let Entry::Vacant(unknown) = destinations.entry(id) {
            unknown.insert(destination::find(conn, &Reference::new(id.to_string())).await?);
        }
        copies.push((artifact, destinations[&id].clone()));
    }
    let timeout_seconds = job.map_or(restore::DEFAULT_TIMEOUT_SECONDS, |job| job.timeout_seconds);
    let sealed_identity = restore::sealed_identity(conn, claim.execution).await?;
    let all = RestoreAssignment { claim, briefing, order, target, copies, sealed_identity, timeout_seconds };
    Ok(Assigned::Restore(Box::new(all)))
}
