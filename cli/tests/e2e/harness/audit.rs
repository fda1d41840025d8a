//! An audit that the database itself writes: a trigger sees every lease come and go. Samples would miss what
//! lasts a millisecond.

use super::Cluster;

const AUDIT: &str = "
    create table lease_audit (id bigserial, what text, execution_id uuid, job_id uuid, running int, max_concurrency int, same_job int);
    create function audit_lease() returns trigger language plpgsql as $$
    begin
        insert into lease_audit (what, execution_id, job_id, running, max_concurrency, same_job)
        select tg_op, coalesce(new.execution_id, old.execution_id), coalesce(new.job_id, old.job_id),
               (select count(*) from execution_leases), g.max_concurrency,
               (select count(*) from execution_leases l where l.job_id = coalesce(new.job_id, old.job_id))
          from queue_gate g;
        return null;
    end $$;
    create trigger audit_lease after insert or delete on execution_leases for each row execute function audit_lease();";

/// Begins to record every lease of a cluster.
pub async fn install(cluster: &Cluster) {
    super::sql(&cluster.database, AUDIT).await;
}

/// Claims that made more run than the limit of that moment allowed.
pub async fn claims_over_the_limit(cluster: &Cluster) -> i64 {
    cluster.count("select count(*) from lease_audit where what = 'INSERT' and running > max_concurrency").await
}

/// Most runs at once while the limit was so.
pub async fn most_running_at(cluster: &Cluster, limit: i32) -> i64 {
    cluster.count(&format!("select coalesce(max(running), 0)::bigint from lease_audit where what = 'INSERT' and max_concurrency = {limit}")).await
}

/// Claims of a job that had a run already.
pub async fn overlaps(cluster: &Cluster) -> i64 {
    cluster.count("select count(*) from lease_audit where what = 'INSERT' and same_job > 1").await
}
