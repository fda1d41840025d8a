//! An audit that the database itself writes: a trigger notes when every lease came and went. Samples would miss what
//! lasts a millisecond, and a count within the trigger would miss what another transaction has not committed yet: so
//! the times are noted, and the overlaps are counted afterwards. A claim that waited for a slot notes its time after
//! the finish that freed it, so a right history has no overlap beyond the limit.

use std::future::Future;

use sqlx::{AssertSqlSafe, PgPool};

use super::Cluster;

/// What has a database that can be audited.
pub trait Audited {
    /// The database.
    fn pool(&self) -> &PgPool;

    /// One number from it.
    fn number(&self, query: &str) -> impl Future<Output = i64> + Send {
        let (pool, query) = (self.pool().clone(), query.to_owned());
        async move {
            let answer = sqlx::query_scalar(AssertSqlSafe(query.clone())).fetch_one(&pool).await;
            answer.unwrap_or_else(|e| panic!("{query}: {e}"))
        }
    }
}

impl Audited for Cluster {
    fn pool(&self) -> &PgPool {
        &self.pool
    }
}

const AUDIT: &str = "
    create table lease_audit (
        id bigserial, at timestamptz not null default clock_timestamp(), change int not null, job_id uuid not null,
        execution_id uuid not null, worker text not null, max_concurrency int not null, source_id uuid not null,
        type text not null, source_limit int
    );
    create function audit_lease() returns trigger language plpgsql as $$
    begin
        insert into lease_audit (change, job_id, execution_id, worker, max_concurrency, source_id, type, source_limit)
        select case tg_op when 'INSERT' then 1 else -1 end, l.job_id, l.execution_id, l.worker, g.max_concurrency, l.source_id, l.type,
               case l.type when 'Restore' then s.max_concurrent_restores else s.max_concurrent_runs end
          from queue_gate g, (select (coalesce(new, old)).*) l left join sources s on s.id = l.source_id;
        return null;
    end $$;
    create trigger audit_lease after insert or delete on execution_leases for each row execute function audit_lease();
    create view lease_history as
    select *, sum(change) over (order by at, id) as running, sum(change) over (partition by job_id order by at, id) as same_job,
           sum(change) over (partition by source_id, type order by at, id) as same_source
      from lease_audit;";

/// Begins to record every lease of a cluster.
pub async fn install(cluster: &impl Audited) {
    sqlx::raw_sql(AUDIT).execute(cluster.pool()).await.expect("the audit is installed");
}

/// Claims that made more run than the limit of that moment allowed.
pub async fn claims_over_the_limit(cluster: &impl Audited) -> i64 {
    cluster.number("select count(*) from lease_history where change = 1 and running > max_concurrency").await
}

/// Most runs at once while the limit was so.
pub async fn most_running_at(cluster: &impl Audited, limit: i32) -> i64 {
    let query = "select coalesce(max(running), 0)::bigint from lease_history where change = 1 and max_concurrency =";
    cluster.number(&format!("{query} {limit}")).await
}

/// Most runs of one job at once.
pub async fn most_of_one_job(cluster: &impl Audited) -> i64 {
    cluster.number("select coalesce(max(same_job), 0)::bigint from lease_history").await
}

/// Claims that gave a second run to a job whose runs must not overlap.
pub async fn serial_overlaps(cluster: &impl Audited) -> i64 {
    cluster
        .number(
            "select count(*) from lease_history h join executions e on e.id = h.execution_id
              where h.change = 1 and e.serial and h.same_job > 1",
        )
        .await
}

/// Claims that made more run against a source than it allowed at that moment, backups and restores apart.
pub async fn claims_over_the_limit_of_a_source(cluster: &Cluster) -> i64 {
    cluster.count("select count(*) from lease_history where change = 1 and same_source > source_limit").await
}

/// Most runs at once against a source while it allowed so many.
pub async fn most_running_at_source_limit(cluster: &Cluster, limit: i32) -> i64 {
    let query = "select coalesce(max(same_source), 0)::bigint from lease_history where change = 1 and source_limit =";
    cluster.count(&format!("{query} {limit}")).await
}

/// The end of a run that looked for what is wrong: every line, or that there is none.
#[allow(dead_code, reason = "for the programs that disturb a cluster")]
pub fn verdict(wrong: &[String]) -> std::process::ExitCode {
    for line in wrong {
        println!("WRONG: {line}");
    }
    if wrong.is_empty() {
        println!("limit never exceeded, nothing lost, nothing published twice, nothing left over");
        std::process::ExitCode::SUCCESS
    } else {
        std::process::ExitCode::FAILURE
    }
}
