//! Schedules: each time fires exactly once, whoever looks and whoever dies. Time is moved by setting `next_run_at`.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::harness::{Cluster, SOON, id, postgres_url, process::wrong_clock, source::PostgresSource, until};

/// A cluster in which nothing runs, with a job that has this and fires next in half an hour.
async fn waiting_cluster(workers: usize, more: Value) -> (Cluster, String) {
    let cluster = Cluster::build().limit(0).workers(workers).start().await;
    let job = job(&cluster, more).await;
    (cluster, job)
}

async fn job(cluster: &Cluster, more: Value) -> String {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let mut body = json!({ "schedule": hourly(cluster).await });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    cluster.job(&source, &[&destination], body).await
}

/// Every hour, and not within some minutes of now.
async fn hourly(cluster: &Cluster) -> String {
    cluster.text("select extract(minute from clock_timestamp() + interval '30 minutes') || ' * * * *'").await
}

/// Every day twelve hours from now in a zone, and that moment as PostgreSQL reckons it.
async fn half_a_day_away(cluster: &Cluster, zone: &str) -> (String, DateTime<Utc>) {
    let there = format!("date_trunc('hour', clock_timestamp() at time zone '{zone}' + interval '12 hours')");
    let schedule = cluster.text(&format!("select '0 ' || extract(hour from {there}) || ' * * *'")).await;
    let moment = cluster.text(&format!("select to_json({there} at time zone '{zone}')#>>'{{}}'")).await;
    (schedule, moment.parse().unwrap_or_else(|e| panic!("{moment}: {e}")))
}

/// Has its schedule fire now.
pub async fn set_due(cluster: &Cluster, job: &str) {
    sqlx::query("update jobs set next_run_at = clock_timestamp() - interval '1 second' where id::text = $1")
        .bind(job)
        .execute(&cluster.pool)
        .await
        .expect("updates");
}

async fn get(cluster: &Cluster, job: &str) -> Value {
    cluster.ok("GET", &format!("/api/jobs/{job}"), None).await
}

async fn runs_of(cluster: &Cluster, job: &str) -> i64 {
    cluster.count(&format!("select count(*) from executions where job_id = '{job}'")).await
}

async fn fires(cluster: &Cluster, job: &str, runs: i64) {
    until("the schedule fires", SOON, || async { (runs_of(cluster, job).await >= runs).then_some(()) }).await;
}

/// Waits until a worker has looked once more. It takes what is due longest first, so what was due before is not: it
/// has fired with this one, or will not.
async fn another_look(cluster: &Cluster) {
    let sentinel = job(cluster, json!({})).await;
    set_due(cluster, &sentinel).await;
    fires(cluster, &sentinel, 1).await;
}

fn time(value: &Value) -> DateTime<Utc> {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no time: {value}"))
}

async fn now(cluster: &Cluster) -> DateTime<Utc> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(&cluster.pool).await.expect("answers")
}

async fn audit(cluster: &Cluster, action: &str) -> Vec<Value> {
    let entries = cluster.ok("GET", &format!("/api/audit?action={action}&limit=1000"), None).await;
    entries.as_array().expect("entries").clone()
}

async fn somebody_says(cluster: &Cluster, text: &str) {
    let told = || async { cluster.logs().contains(text).then_some(()) };
    until(&format!("a worker says '{text}'"), SOON, told).await;
}

/// Holds every worker that is about to write the audit log: it has fired, and not committed.
async fn hold_firings(cluster: &Cluster) -> PgConnection {
    let mut conn = PgConnection::connect(&postgres_url(&cluster.database)).await.expect("connects");
    sqlx::raw_sql("begin; lock table audit_log in share mode").execute(&mut conn).await.expect("locks");
    conn
}

async fn waits_for_a_lock(cluster: &Cluster, program: &str, query: &str) {
    let look = format!(
        "select count(*) from pg_stat_activity
          where datname = current_database() and application_name = '{program}' and wait_event_type = 'Lock'
            and query like '{query}%'"
    );
    until(&format!("{program} waits"), SOON, || async { (cluster.count(&look).await > 0).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduled_job_runs_by_itself_behind_those_that_somebody_waits_for() {
    // A worker that is not told looks for work after 48 s at the earliest.
    let cluster = Cluster::build().env("DBACKUP_POLL_MS", 60_000).start().await;
    let (schedule, moment) = half_a_day_away(&cluster, "Asia/Kolkata").await;
    let job = job(&cluster, json!({ "schedule": schedule, "timezone": "Asia/Kolkata" })).await;
    set_due(&cluster, &job).await;
    fires(&cluster, &job, 1).await;
    let execution = cluster.ended(&cluster.text("select id::text from executions").await, SOON).await;
    assert_eq!(execution["status"], "Success", "{execution:#}");
    assert_eq!(execution["trigger"], json!({ "type": "Schedule", "label": format!("{schedule} Asia/Kolkata") }));
    assert_eq!((execution["priority"].as_i64(), execution["traceId"].is_string()), (Some(-5), true), "{execution:#}");
    let trigger = audit(&cluster, "execution.trigger").await;
    assert_eq!(
        (trigger.len(), trigger[0]["actorKind"].as_str(), trigger[0]["targetId"].as_str()),
        (1, Some("Schedule"), execution["id"].as_str()),
        "{trigger:?}"
    );
    let told = &trigger[0]["details"];
    assert_eq!((told["jobId"].as_str(), time(&told["scheduledFor"])), (Some(&*job), moment - TimeDelta::days(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_are_due_at_one_moment_fire_exactly_once_over_four_workers_and_in_slices() {
    let (cluster, job) = waiting_cluster(4, json!({})).await;
    let copies = "
        with copies as (
            insert into jobs (id, slug, name, source_id, schedule)
            select gen_random_uuid(), 'copy-' || n, 'Copy', source_id, schedule from jobs, generate_series(1, 749) n
            returning id
        )
        insert into job_destinations (job_id, destination_id, position)
        select copies.id, d.destination_id, 1 from copies, job_destinations d;";
    sqlx::raw_sql(copies).execute(&cluster.pool).await.expect("copies");
    sqlx::query("update jobs set next_run_at = '2026-01-01T03:00Z'").execute(&cluster.pool).await.expect("updates");
    until("nothing is due any more", SOON, || async {
        (cluster.count("select count(*) from jobs where next_run_at <= clock_timestamp()").await == 0).then_some(())
    })
    .await;
    another_look(&cluster).await;
    // With that of the last look.
    assert_eq!(cluster.count("select count(*) from executions where trigger_kind = 'Schedule'").await, 751);
    assert_eq!(cluster.count("select count(distinct job_id) from executions").await, 751);
    assert_eq!(runs_of(&cluster, &job).await, 1);
    let largest =
        cluster.count("select max(n) from (select count(*) n from executions group by xmin::text) slices").await;
    assert!(largest <= 100, "one transaction took {largest} jobs");
    let triggers = "select count(distinct target_id) from audit_log
                     where action = 'execution.trigger' and actor_kind = 'Schedule'";
    assert_eq!(cluster.count(triggers).await, 751);
    let planned = "select count(*) from jobs
                    where next_run_at between clock_timestamp() and clock_timestamp() + interval '1 hour'";
    assert_eq!(cluster.count(planned).await, 751);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_times_missed_in_an_outage_the_latest_is_made_up_and_only_once() {
    let (mut cluster, job) = waiting_cluster(1, json!({})).await;
    let planned = time(&get(&cluster, &job).await["nextRunAt"]);
    cluster.workers[0].kill().await;
    sqlx::query("update jobs set next_run_at = next_run_at - interval '3 days'")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    for _ in 0..2 {
        cluster.add_worker(&[]).await;
    }
    fires(&cluster, &job, 1).await;
    another_look(&cluster).await;
    assert_eq!(runs_of(&cluster, &job).await, 1, "72 were missed");
    assert_eq!(time(&get(&cluster, &job).await["nextRunAt"]), planned);
    let scheduled = audit(&cluster, "execution.trigger").await;
    let of_the_job = scheduled.iter().find(|e| e["details"]["jobId"] == *job).expect("an entry");
    assert_eq!(time(&of_the_job["details"]["scheduledFor"]), planned - TimeDelta::hours(1), "{of_the_job}");
    somebody_says(&cluster, "a schedule missed its times; the latest is made up").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_sleeps_wakes_for_the_next_planned_time() {
    let (mut cluster, job) = waiting_cluster(1, json!({})).await;
    cluster.workers[0].kill().await;
    let soon = "update jobs set next_run_at = clock_timestamp() + interval '4 seconds' returning next_run_at";
    let planned: DateTime<Utc> = sqlx::query_scalar(soon).fetch_one(&cluster.pool).await.expect("updates");
    // But for the plan, its next look would come after 45 s at the earliest.
    let slow = [("DBACKUP_TICKER_MS", "60000".to_owned()), ("DBACKUP_LEASE_MS", "60000".to_owned())];
    cluster.add_worker(&slow).await;
    fires(&cluster, &job, 1).await;
    let queued: DateTime<Utc> =
        sqlx::query_scalar("select queued_at from executions").fetch_one(&cluster.pool).await.expect("answers");
    assert!(queued >= planned && queued < planned + TimeDelta::seconds(10), "{planned} was fired at {queued}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_clock_is_an_hour_wrong_fires_at_the_databases_time() {
    let (mut cluster, not_due) = waiting_cluster(1, json!({})).await;
    for seconds in [3600, -3600] {
        let due = job(&cluster, json!({})).await;
        let planned = get(&cluster, &due).await["nextRunAt"].clone();
        cluster.workers.last_mut().expect("a worker").kill().await;
        set_due(&cluster, &due).await;
        let worker = cluster.add_worker(&wrong_clock(seconds)).await;
        let told: Value = serde_json::from_str(worker.log().lines().next().expect("a line")).expect("JSON");
        fires(&cluster, &due, 1).await;
        let off = time(&told["timestamp"]) - now(&cluster).await;
        assert!((off.num_seconds() - seconds).abs() < 60, "its clock is right: {told}");
        assert_eq!(get(&cluster, &due).await["nextRunAt"], planned);
    }
    assert_eq!(runs_of(&cluster, &not_due).await, 0, "it fires in half an hour");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_while_it_fires_loses_nothing_and_doubles_nothing() {
    let (mut cluster, job) = waiting_cluster(1, json!({})).await;
    let mut held = hold_firings(&cluster).await;
    set_due(&cluster, &job).await;
    waits_for_a_lock(&cluster, "dbackup-worker", "with locked as").await;
    cluster.workers[0].kill().await;
    sqlx::raw_sql("rollback").execute(&mut held).await.expect("rolls back");
    until("its connections are gone", SOON, || async {
        let left = "select count(*) from pg_stat_activity
                     where datname = current_database() and application_name = 'dbackup-worker'";
        (cluster.count(left).await == 0).then_some(())
    })
    .await;
    assert_eq!(runs_of(&cluster, &job).await, 0, "what was not committed is not there");
    cluster.add_worker(&[]).await;
    fires(&cluster, &job, 1).await;
    another_look(&cluster).await;
    assert_eq!(runs_of(&cluster, &job).await, 1);
    assert!(time(&get(&cluster, &job).await["nextRunAt"]) > now(&cluster).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_and_a_delete_wait_for_a_firing_under_way() {
    let (cluster, job) = waiting_cluster(2, json!({})).await;
    let planned = get(&cluster, &job).await["nextRunAt"].clone();
    let mut held = hold_firings(&cluster).await;
    set_due(&cluster, &job).await;
    waits_for_a_lock(&cluster, "dbackup-worker", "with locked as").await;
    let path = format!("/api/jobs/{job}");
    let release = async {
        waits_for_a_lock(&cluster, "dbackup-api", "select schedule, timezone").await;
        waits_for_a_lock(&cluster, "dbackup-api", "select id from jobs").await;
        sqlx::raw_sql("rollback").execute(&mut held).await.expect("rolls back");
    };
    let change = cluster.request("PUT", &path, Some(json!({ "name": "Renamed meanwhile" })));
    let ((changed, answer), (deleted, refusal), ()) =
        tokio::join!(change, cluster.request("DELETE", &path, None), release);
    assert_eq!((changed, &answer["data"]["nextRunAt"]), (200, &planned), "{answer}");
    assert_eq!((deleted, refusal["code"].as_str()), (409, Some("in_use")), "{refusal}");
    another_look(&cluster).await;
    assert_eq!(runs_of(&cluster, &job).await, 1);
    assert!(!cluster.logs().contains("decided before"), "the change put back what was due");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_being_changed_is_left_alone_and_holds_up_no_other() {
    let (mut cluster, job) = waiting_cluster(1, json!({})).await;
    let planned = get(&cluster, &job).await["nextRunAt"].clone();
    cluster.workers[0].kill().await;
    set_due(&cluster, &job).await;
    let mut change = cluster.pool.begin().await.expect("begins");
    let changed = "update jobs set schedule = '@monthly', next_run_at = $1 where id::text = $2";
    let change_it = sqlx::query(changed).bind(time(&planned) + TimeDelta::days(9)).bind(&job);
    change_it.execute(&mut *change).await.expect("updates");
    cluster.add_worker(&[]).await;
    another_look(&cluster).await;
    change.commit().await.expect("commits");
    another_look(&cluster).await;
    assert_eq!(runs_of(&cluster, &job).await, 0, "it was due by the schedule that it had before");
    assert_eq!(time(&get(&cluster, &job).await["nextRunAt"]), time(&planned) + TimeDelta::days(9));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_is_set_back_fires_no_time_twice() {
    let (cluster, job) = waiting_cluster(2, json!({})).await;
    let days_ago = "insert into job_firings
                    select id, clock_timestamp() - n * interval '1 day' from jobs, unnest('{6,8}'::int[]) n";
    sqlx::query(days_ago).execute(&cluster.pool).await.expect("inserts");
    set_due(&cluster, &job).await;
    fires(&cluster, &job, 1).await;
    assert_eq!(cluster.count("select count(*) from job_firings").await, 2, "kept for a week");
    let planned = get(&cluster, &job).await["nextRunAt"].clone();
    set_due(&cluster, &job).await;
    until("the plan is moved on", SOON, || async { (get(&cluster, &job).await["nextRunAt"] == planned).then_some(()) })
        .await;
    assert_eq!(runs_of(&cluster, &job).await, 1);
    // A clock that ran ahead has left a plan that is too far off: the next change takes it back.
    sqlx::query("update jobs set next_run_at = next_run_at + interval '1 year'")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    let changed = cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "name": "Again" }))).await;
    assert_eq!(changed["nextRunAt"], planned);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_schedule_makes_up_nothing_and_another_change_leaves_what_is_due() {
    let (mut cluster, rescheduled) = waiting_cluster(1, json!({})).await;
    let renamed = job(&cluster, json!({})).await;
    cluster.workers[0].kill().await;
    for job in [&rescheduled, &renamed] {
        set_due(&cluster, job).await;
    }
    let change = async |job: &str, body: Value| cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(body)).await;
    let (daily, moment) = half_a_day_away(&cluster, "Pacific/Kiritimati").await;
    let now_daily = change(&rescheduled, json!({ "schedule": daily, "timezone": "Pacific/Kiritimati" })).await;
    assert_eq!(time(&now_daily["nextRunAt"]), moment);
    change(&renamed, json!({ "name": "Renamed", "schedule": get(&cluster, &renamed).await["schedule"] })).await;
    // The same schedule for another zone is another schedule: 14 hours later there, or 10 earlier.
    let zoned = change(&rescheduled, json!({ "timezone": "UTC" })).await;
    assert_eq!((&zoned["schedule"], time(&zoned["nextRunAt"])), (&json!(daily), moment - TimeDelta::hours(10)));
    cluster.add_worker(&[]).await;
    fires(&cluster, &renamed, 1).await;
    another_look(&cluster).await;
    assert_eq!((runs_of(&cluster, &renamed).await, runs_of(&cluster, &rescheduled).await), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_is_not_fired_but_can_be_triggered_and_makes_up_nothing_when_it_goes_on() {
    let (cluster, job) = waiting_cluster(2, json!({ "enabled": false })).await;
    let never = cluster
        .job(
            get(&cluster, &job).await["sourceId"].as_str().expect("an id"),
            &[get(&cluster, &job).await["destinationIds"][0].as_str().expect("an id")],
            json!({}),
        )
        .await;
    assert_eq!(
        (&get(&cluster, &job).await["nextRunAt"], &get(&cluster, &never).await["schedule"]),
        (&Value::Null, &Value::Null)
    );
    // As a process of a version without schedules pauses a job: it leaves the plan.
    set_due(&cluster, &job).await;
    another_look(&cluster).await;
    assert_eq!((runs_of(&cluster, &job).await, &get(&cluster, &job).await["nextRunAt"]), (0, &Value::Null));
    cluster.trigger(&job).await;
    let path = format!("/api/jobs/{job}");
    let resumed = cluster.ok("PUT", &path, Some(json!({ "enabled": true }))).await;
    assert!(time(&resumed["nextRunAt"]) > now(&cluster).await, "{resumed}");
    another_look(&cluster).await;
    assert_eq!(runs_of(&cluster, &job).await, 1, "the trigger's");
    let removed = cluster.ok("PUT", &path, Some(json!({ "schedule": null }))).await;
    assert_eq!(
        (&removed["schedule"], &removed["nextRunAt"], &removed["enabled"]),
        (&Value::Null, &Value::Null, &json!(true))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_that_overlap_or_a_full_queue_leaves_out_is_audited_and_logged() {
    let (cluster, job) = waiting_cluster(2, json!({ "overlap": "reject" })).await;
    let active = cluster.trigger(&job).await;
    let full = self::job(&cluster, json!({ "overlap": "queue" })).await;
    for _ in 0..2 {
        cluster.trigger(&full).await;
    }
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPendingPerJob": 2 }))).await;
    for job in [&job, &full] {
        set_due(&cluster, job).await;
    }
    let skipped = until("both are in the audit log", SOON, || async {
        let skipped = audit(&cluster, "schedule.skip").await;
        (skipped.len() >= 2).then_some(skipped)
    })
    .await;
    another_look(&cluster).await;
    assert_eq!((runs_of(&cluster, &job).await, runs_of(&cluster, &full).await), (1, 2));
    assert_eq!(skipped.len(), 2, "{skipped:?}");
    for (target, details) in [
        (&job, json!({ "reason": "already_active", "executionId": active })),
        (&full, json!({ "reason": "queue_full", "waiting": 2 })),
    ] {
        let entry = skipped.iter().find(|e| e["targetId"] == **target).expect("an entry");
        assert_eq!(entry["actorKind"], "Schedule");
        let next = time(&get(&cluster, target).await["nextRunAt"]);
        assert_eq!(time(&entry["details"]["scheduledFor"]), next - TimeDelta::hours(1), "it moved on: {entry}");
        for (name, value) in details.as_object().expect("an object") {
            assert_eq!(&entry["details"][name], value, "{entry}");
        }
    }
    somebody_says(&cluster, "a run is active and overlap is reject").await;
    somebody_says(&cluster, "too many wait already").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_that_cannot_be_is_refused_with_the_field_and_what_is_wrong() {
    let (cluster, job) = waiting_cluster(1, json!({})).await;
    let path = format!("/api/jobs/{job}");
    let before = get(&cluster, &job).await;
    for (body, field, says) in [
        (json!({ "schedule": "every day" }), "schedule", "not a cron expression"),
        (json!({ "schedule": "0 0 3 * * *" }), "schedule", "must have 5 fields"),
        (json!({ "schedule": "0 25 * * *" }), "schedule", "hour \"25\""),
        (json!({ "schedule": "0 3 31 2 *" }), "schedule", "never fires"),
        (json!({ "schedule": "" }), "schedule", "empty"),
        (json!({ "timezone": "Berlin" }), "timezone", "Europe/Berlin"),
        (json!({ "timezone": "CEST+1", "schedule": null }), "timezone", "IANA"),
    ] {
        let (status, answer) = cluster.request("PUT", &path, Some(body.clone())).await;
        let problem = &answer["fields"][0];
        assert_eq!((status, problem["field"].as_str()), (422, Some(field)), "{body}: {answer}");
        assert!(problem["message"].as_str().is_some_and(|m| m.contains(says)), "{body}: {answer}");
    }
    let new = json!({ "name": "New", "sourceId": before["sourceId"], "destinationIds": before["destinationIds"],
                      "schedule": "x", "timezone": "y" });
    let (status, answer) = cluster.request("POST", "/api/jobs", Some(new)).await;
    let fields: Vec<&str> =
        answer["fields"].as_array().expect("fields").iter().filter_map(|f| f["field"].as_str()).collect();
    assert_eq!((status, fields), (422, vec!["schedule", "timezone"]), "{answer}");
    assert_eq!(get(&cluster, &job).await, before, "nothing changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_tells_when_it_runs_next_and_when_it_ran_last() {
    let cluster = Cluster::build().limit(1).start().await;
    let (schedule, moment) = half_a_day_away(&cluster, "Asia/Kolkata").await;
    let job = job(&cluster, json!({ "schedule": schedule, "timezone": "Asia/Kolkata" })).await;
    let fresh = get(&cluster, &job).await;
    assert_eq!((time(&fresh["nextRunAt"]), &fresh["lastRunAt"]), (moment, &Value::Null), "{fresh}");
    assert_eq!((fresh["schedule"].as_str(), fresh["timezone"].as_str()), (Some(&*schedule), Some("Asia/Kolkata")));
    let run = cluster.backup(&job).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    cluster.trigger(&job).await;
    let after = get(&cluster, &job).await;
    assert_eq!((&after["lastRunAt"], &after["nextRunAt"]), (&run["startedAt"], &fresh["nextRunAt"]), "{after}");
    let list = cluster.ok("GET", "/api/jobs", None).await;
    assert_eq!(list.as_array().expect("jobs").iter().find(|j| id(j) == job), Some(&after));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_that_this_version_cannot_read_is_reported_and_holds_up_no_other() {
    let (cluster, job) = waiting_cluster(2, json!({})).await;
    let newer = "update jobs set schedule = '0 3 * * * of a newer version', next_run_at = '2026-01-01T03:00Z'";
    sqlx::query(newer).execute(&cluster.pool).await.expect("updates");
    another_look(&cluster).await;
    assert_eq!(runs_of(&cluster, &job).await, 0);
    somebody_says(&cluster, "a job does not run: its schedule is not a cron expression").await;
    let next = time(&get(&cluster, &job).await["nextRunAt"]);
    let wait = next - now(&cluster).await;
    assert!(wait > TimeDelta::minutes(50) && wait <= TimeDelta::hours(1), "looked at again in {wait}");
}
