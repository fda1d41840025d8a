//! A long history, made by SQL: ended executions with logs, and jobs whose runs wait.

use common::id::JobId;
use serde_json::json;

use super::{Cluster, SOON, source::PostgresSource, sql, unique, until};

/// Waiting runs of one job: as many as the default cap allows.
const PENDING_OF_A_JOB: u32 = 100;

/// As the service makes ids, of a time given as an expression.
const ID: &str = "create or replace function id_at(at timestamptz, n bigint) returns uuid language sql immutable as $$
    select (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7' || substr(md5(n::text), 1, 3)
            || '8' || substr(md5(n::text), 4, 15))::uuid $$;";

/// Adds so many ended executions, a tenth of them failed, over the last 80 days (none so old as to be forgotten), and so many that wait, in jobs like `job`.
pub async fn fill(cluster: &Cluster, job: &str, ended: u32, pending: u32) {
    let job: JobId = serde_json::from_value(job.into()).expect("an id");
    let past = unique("past");
    let jobs = pending.div_ceil(PENDING_OF_A_JOB).max(1);
    sql(
        &cluster.database,
        &format!(
            "{ID}
             create table of_the_past as
             select gen_random_uuid() as id, '{past}-' || n as slug, n as nr, j.source_id from jobs j, generate_series(1, {jobs}) n
              where j.id = '{job}';
             insert into jobs (id, slug, name, source_id) select id, slug, slug, source_id from of_the_past;
             insert into job_destinations select p.id, d.destination_id, d.position
               from of_the_past p, job_destinations d where d.job_id = '{job}';
             insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, status, outcome, attempt,
                                     max_attempts, last_token, trigger_kind, queued_at, started_at, ended_at, stage,
                                     error, error_code)
             select id_at(t.at, n), p.id, p.slug, p.slug, p.source_id, 'default', true,
                    case when (n / {jobs}) % 10 = 0 then 'Failed' else 'Success' end, case when n % 1000 = 0 then 'TimedOut' end, 1, 3, 0,
                    'Api', t.at, t.at, t.at + interval '1 minute', 'Completed',
                    case when (n / {jobs}) % 10 = 0 then 'it failed' end, case when (n / {jobs}) % 10 = 0 then 'dump_failed' end
               from generate_series(1, {ended}) n
              cross join lateral (select clock_timestamp() - interval '80 days' * (1 - n::float8 / {ended}) - interval '1 day' as at) t
               join of_the_past p on p.nr = n % {jobs} + 1;
             insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, max_attempts, trigger_kind)
             select id_at(clock_timestamp(), -n), p.id, p.slug, p.slug, p.source_id, 'default', true, 3, 'Api'
               from generate_series(1, {pending}) n join of_the_past p on p.nr = n % {jobs} + 1;
             insert into audit_log (actor_kind, actor_name, action, target_id)
             select 'ApiKey', 'past', 'execution.trigger', n::text from generate_series(1, {ended}) n;
             drop table of_the_past;"
        ),
    )
    .await;
    // Each apart: PostgreSQL takes several for a transaction, and there is no vacuum in one.
    for table in ["executions", "audit_log", "jobs"] {
        sql(&cluster.database, &format!("vacuum analyze {table}")).await;
    }
}

/// What PostgreSQL has read of the two tables that are long here.
#[derive(Clone, Copy, Debug)]
struct Reads {
    /// Walks over one of them as a whole.
    walks: i64,
    /// Rows of executions, by index or by a walk.
    executions: i64,
    /// Rows of the audit log.
    audit: i64,
}

impl Reads {
    /// Until now. Every process must have ended: a session tells what it read when it is closed at the latest.
    async fn until_now(cluster: &Cluster) -> Self {
        let rows = async |table: &str| {
            let read = "select (seq_tup_read + idx_tup_fetch)::bigint from pg_stat_user_tables where relname =";
            cluster.count(&format!("{read} '{table}'")).await
        };
        let walks = "select sum(seq_scan)::bigint from pg_stat_user_tables
                      where relname in ('executions', 'audit_log')";
        Self { walks: cluster.count(walks).await, executions: rows("executions").await, audit: rows("audit_log").await }
    }
}

/// A job that a worker can run.
pub async fn with_job(cluster: &Cluster) -> String {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    cluster.job(&source, &[&destination], json!({})).await
}

/// Every request and every loop of the processes, on so many executions that ended and so many that wait.
pub async fn assert_nothing_walks(ended: u32, pending: u32) {
    let cluster = Cluster::build().workers(1).limit(0).start().await;
    let job = with_job(&cluster).await;
    assert_nothing_walks_in(cluster, &job, ended, pending).await;
}

/// The same on a cluster that may have a history already.
pub async fn assert_nothing_walks_in(mut cluster: Cluster, job: &str, ended: u32, pending: u32) {
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPending": 1_000_000 }))).await;
    fill(&cluster, job, ended, pending).await;
    stop(&mut cluster).await;
    sql(&cluster.database, "update queue_gate set max_concurrency = 2").await;
    let before = Reads::until_now(&cluster).await;

    cluster.add_api().await;
    cluster.add_worker(&[]).await;
    let run = cluster.trigger(job).await;
    let waiting =
        cluster.text("select id::text from executions where status = 'Pending' order by seq desc limit 1").await;
    let failed = cluster.text("select id::text from executions where status = 'Failed' order by seq limit 1").await;
    let mut requests = vec![
        format!("/api/executions/{run}"),
        format!("/api/executions/{run}?includeLogs=true"),
        format!("/api/executions/{waiting}"),
        format!("/api/executions/{failed}"),
        "/api/jobs?limit=50".to_owned(),
        "/api/audit?limit=50&action=job.create".to_owned(),
        format!("/api/audit?limit=50&targetId={run}"),
        "/api/audit?limit=50&from=2020-01-01T00:00:00Z&to=2020-01-02T00:00:00Z".to_owned(),
    ];
    for filter in [
        "limit=50",
        "status=Pending",
        "status=Running",
        "status=Success",
        "status=Failed",
        "outcome=TimedOut",
        "outcome=Expired",
        "from=2020-01-01T00:00:00Z&to=2020-01-02T00:00:00Z",
        "from=2099-01-01T00:00:00Z",
    ] {
        requests.push(format!("/api/executions?{filter}"));
    }
    requests.push(format!("/api/executions?jobId={job}"));
    for path in &requests {
        cluster.ok("GET", path, None).await;
    }
    // A live list is looked for anew every second while somebody has it open.
    let live = cluster.http.get(format!("{}/api/events", cluster.url(0))).bearer_auth(&cluster.admin_key).send();
    let mut live = live.await.expect("answers");
    live.chunk().await.expect("streams");
    cluster.ok("POST", &format!("/api/executions/{failed}/retry"), None).await;
    cluster.ok("POST", &format!("/api/executions/{waiting}/cancel"), None).await;
    // Not a question about executions: what the test reads is counted too.
    until("some of what waits is claimed", SOON, || async {
        (cluster.count("select last_value from fencing_token_seq").await >= 6).then_some(())
    })
    .await;
    drop(live);
    stop(&mut cluster).await;

    let after = Reads::until_now(&cluster).await;
    assert_eq!(after.walks - before.walks, 0, "a whole table was walked");
    // Each of the two triggers counts what waits against the cap; a page has at most 51 rows.
    let allowed = i64::from(pending) * 3 + 20_000;
    assert!(after.executions - before.executions < allowed, "{before:?} {after:?}, but at most {allowed}");
    assert!(after.audit - before.audit < 5_000, "{before:?} {after:?}");
}

/// Ends every process, so that PostgreSQL counts what they read.
async fn stop(cluster: &mut Cluster) {
    for mut process in cluster.apis.drain(..).map(|(api, _)| api).chain(cluster.workers.drain(..)) {
        process.signal(nix::sys::signal::Signal::SIGTERM);
        process.end(SOON).await;
    }
    until("their sessions are closed", SOON, || async {
        let sessions = "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'dbackup%'";
        (cluster.count(sessions).await == 0).then_some(())
    })
    .await;
}
