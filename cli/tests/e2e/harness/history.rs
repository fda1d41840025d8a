//! A long history, made by SQL: ended executions with logs, and jobs whose runs wait.

use std::collections::BTreeMap;

use api::auth::Access;
use common::id::JobId;
use serde_json::json;

use super::{
    Cluster, SOON,
    plans::{self, Plan},
    source::PostgresSource,
    sql, unique, until,
};

/// Waiting runs of one job: as many as the default cap allows.
const PENDING_OF_A_JOB: u32 = 100;

/// As the service makes ids, of a time given as an expression.
const ID: &str = "create or replace function id_at(at timestamptz, n bigint) returns uuid language sql immutable as $$
    select (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7' || substr(md5(n::text), 1, 3)
            || '8' || substr(md5(n::text), 4, 15))::uuid $$;";

/// Adds so many ended executions, a tenth of them failed, over the last 80 days (none so old as to be forgotten), and so
/// many that wait: half of the former are of `job`, the others of jobs like it.
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
             select id_at(t.at, n), case when n % 2 = 0 then '{job}' else p.id end, p.slug, p.slug, p.source_id, 'default', true,
                    case when (n / {jobs}) % 10 = 0 then 'Failed' else 'Success' end, case when n % 1000 = 0 then 'TimedOut' end, 1, 3, 0,
                    'Api', t.at, t.at, t.at + interval '1 minute', 'Completed',
                    case when (n / {jobs}) % 10 = 0 then 'it failed' end, case when (n / {jobs}) % 10 = 0 then 'dump_failed' end
               from generate_series(1, {ended}) n
              cross join lateral (select clock_timestamp() - interval '80 days' * (1 - n::float8 / {ended}) - interval '1 day' as at) t
               join of_the_past p on p.nr = n % {jobs} + 1;
             insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, max_attempts, trigger_kind)
             select id_at(clock_timestamp(), -n), p.id, p.slug, p.slug, p.source_id, 'default', true, 3, 'Api'
               from generate_series(1, {pending}) n join of_the_past p on p.nr = n % {jobs} + 1;
             insert into artifacts (id, execution_id, job_id, destination_id, path, size_bytes, sha256)
             select gen_random_uuid(), e.id, e.job_id, d.destination_id, e.id::text, 1, 'x'
               from executions e join job_destinations d on d.job_id = e.job_id where e.status = 'Success' and e.job_slug like '{past}-%';
             insert into execution_logs (execution_id, at, level, stage, message)
             select id, ended_at, 'info', 'Completed', 'it ended' from executions where ended_at is not null and job_slug like '{past}-%';
             insert into audit_log (actor_kind, actor_name, action, target_id)
             select 'ApiKey', 'past', 'execution.trigger', n::text from generate_series(1, {ended}) n;
             drop table of_the_past;"
        ),
    )
    .await;
    // Each apart: PostgreSQL takes several for a transaction, and there is no vacuum in one.
    for table in ["executions", "artifacts", "execution_logs", "audit_log", "jobs"] {
        sql(&cluster.database, &format!("vacuum analyze {table}")).await;
    }
}

/// A job that a worker can run.
pub async fn with_job(cluster: &Cluster) -> String {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    cluster.job(&source, &[&destination], json!({})).await
}

/// Tables of which there is much after years, and all of which nothing may read.
const LONG: [&str; 4] = ["executions", "audit_log", "execution_logs", "artifacts"];

/// How often each request is made: PostgreSQL may take another plan, for any value, from the sixth time on.
const TIMES: usize = 8;

/// What can be asked without a name: every list, and a few things that there are one of. Those of the route table, so that a
/// new one is not forgotten.
pub fn questions() -> Vec<&'static str> {
    let routes = api::router::table();
    let asked = routes.iter().filter(|route| route.method == "GET" && route.access != Access::Open);
    asked.map(|route| route.path).filter(|path| !path.contains('{')).collect()
}

/// Every list, and what else is asked of a long history, with each filter.
fn requests(job: &str, run: &str, others: &[String]) -> Vec<String> {
    let lists = questions().into_iter().filter(|path| *path != "/api/events");
    let mut requests: Vec<String> = lists.map(str::to_owned).collect();
    assert!(requests.len() >= 15, "{requests:?}");
    let old = "from=2020-01-01T00:00:00Z&to=2020-01-02T00:00:00Z";
    for filter in [
        "limit=50",
        "status=Pending",
        "status=Running",
        "status=Success",
        "status=Failed",
        "outcome=TimedOut",
        "outcome=Expired",
        old,
        "from=2099-01-01T00:00:00Z",
        &format!("jobId={job}"),
        &format!("jobId={job}&status=Pending"),
        &format!("jobId={job}&status=Running"),
        &format!("jobId={job}&status=Success"),
        &format!("jobId={job}&status=Failed"),
        &format!("jobId={job}&outcome=TimedOut"),
        &format!("jobId={job}&{old}"),
        &format!("status=Failed&{old}"),
        &format!("outcome=TimedOut&{old}"),
    ] {
        requests.push(format!("/api/executions?{filter}"));
    }
    for filter in ["action=job.create", &format!("targetId={run}"), old, &format!("action=job.create&{old}")] {
        requests.push(format!("/api/audit?limit=50&{filter}"));
    }
    for execution in others.iter().map(String::as_str).chain([run]) {
        requests.push(format!("/api/executions/{execution}"));
        requests.push(format!("/api/executions/{execution}?includeLogs=true"));
    }
    requests
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
    cluster.apis.clear();
    cluster.workers.clear();
    plans::explain(&cluster).await;
    sql(&cluster.database, "update queue_gate set max_concurrency = 2").await;

    cluster.set_env("RUST_LOG", Some(plans::TOLD));
    cluster.add_api().await;
    cluster.add_worker(&[]).await;
    let run = cluster.trigger(job).await;
    let waiting =
        cluster.text("select id::text from executions where status = 'Pending' order by seq desc limit 1").await;
    let failed = cluster.text("select id::text from executions where status = 'Failed' order by seq limit 1").await;
    for path in requests(job, &run, &[waiting.clone(), failed.clone()]) {
        for _ in 0..TIMES {
            cluster.ok("GET", &path, None).await;
        }
    }
    // A live list is looked for anew every second while somebody has it open.
    let live = cluster.http.get(format!("{}/api/events", cluster.url(0))).bearer_auth(&cluster.admin_key).send();
    let mut live = live.await.expect("answers");
    live.chunk().await.expect("streams");
    cluster.ok("POST", &format!("/api/executions/{failed}/retry"), None).await;
    cluster.ok("POST", &format!("/api/executions/{waiting}/cancel"), None).await;
    until("some of what waits is claimed", SOON, || async {
        (cluster.count("select last_value from fencing_token_seq").await >= 6).then_some(())
    })
    .await;
    drop(live);
    let processes = cluster.apis.drain(..).map(|(api, _)| api).chain(cluster.workers.drain(..));
    let mut told = Vec::new();
    for mut process in processes {
        process.signal(nix::sys::signal::Signal::SIGTERM);
        process.end(SOON).await;
        told.extend(Plan::of(&process));
    }
    assert_no_walks(&told, pending);
}

/// Rows of the long tables that one statement may read: a page, what its filter skips, and a range of blocks.
const FEW: u64 = 5_000;

/// By the plans of what was asked: no long table was walked, and nothing read more than a little of it, but for what counts
/// the runs that wait, which may read all of these.
fn assert_no_walks(plans: &[Plan], pending: u32) {
    let mut wrong = BTreeMap::new();
    for plan in plans {
        // A claim counts leases.
        let counts = ["count(*)", "'Pending'"].iter().all(|part| plan.query.contains(part))
            && !plan.query.contains("for update");
        let allowed = if counts { FEW + u64::from(pending) } else { FEW };
        let read: u64 = LONG.iter().filter_map(|table| plan.read.get(*table)).sum();
        if read > allowed || plan.walked.iter().any(|table| LONG.contains(&table.as_str())) {
            wrong.insert(&plan.query, plan);
        }
    }
    let told: Vec<String> = wrong.values().map(|plan| plan.told()).collect();
    assert!(told.is_empty(), "{} statements read too much:\n{}", told.len(), told.join("\n\n"));
    // What is asked of them: a claim from within its function, a trigger, a poll, a list.
    for part in [
        "nextval('fencing_token_seq')",
        "insert into executions",
        "where e.id = any",
        "from execution_logs where execution_id = $1",
        "order by e.seq desc",
    ] {
        assert!(plans.iter().any(|plan| plan.query.contains(part)), "no plan of '{part}' among {}", plans.len());
    }
    println!("{} plans, and none reads more than a little of the history", plans.len());
}
