//! Finer triggers: what may be reused, a latest start, priority, retries, groups.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    harness::{Cluster, SOON, source::PostgresSource},
    queue::paused_cluster_with_job,
};

async fn trigger_with(cluster: &Cluster, job: &str, body: Value) -> Value {
    let (status, answer) = cluster.request("POST", &format!("/api/jobs/{job}/run"), Some(body)).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

async fn let_run(cluster: &Cluster) {
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 4 }))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_young_enough_backup_or_a_run_that_waits_is_reused_but_never_one_that_runs() {
    let (cluster, job) = paused_cluster_with_job(json!({ "overlap": "allow" })).await;
    let young = json!({ "maxAgeSeconds": 3600 });
    let first = trigger_with(&cluster, &job, young.clone()).await;
    assert!(first.get("reused").is_none(), "{first}");
    let waiting = futures::future::join_all((0..20).map(|_| trigger_with(&cluster, &job, young.clone()))).await;
    assert!(waiting.iter().all(|a| a["reused"] == true && a["executionId"] == first["executionId"]), "{waiting:?}");
    assert_eq!(cluster.count("select count(*) from executions").await, 1);
    assert_eq!(cluster.count("select count(*) from audit_log where action = 'execution.reuse'").await, 20);

    // One that runs may have taken its snapshot before the request.
    sqlx::query("update executions set status = 'Running', started_at = clock_timestamp(), last_token = 1")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    let second = trigger_with(&cluster, &job, young.clone()).await;
    assert!(second.get("reused").is_none() && second["executionId"] != first["executionId"], "{second}");
    sqlx::query("update executions set status = 'Pending', started_at = null where last_token = 1")
        .execute(&cluster.pool)
        .await
        .expect("updates");

    let_run(&cluster).await;
    let second = second["executionId"].as_str().expect("an id");
    assert_eq!(cluster.ended(second, SOON).await["status"], "Success");
    cluster.ended(first["executionId"].as_str().expect("an id"), SOON).await;
    let third = trigger_with(&cluster, &job, young.clone()).await;
    assert!(third["reused"] == true && third["executionId"].as_str() == Some(second), "the newest success: {third}");
    // Time passes by moving the snapshot.
    sqlx::query("update executions set snapshot_at = snapshot_at - interval '2 hours'")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    let fourth = trigger_with(&cluster, &job, young).await;
    assert!(fourth.get("reused").is_none(), "two hours are too old: {fourth}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_does_not_start_in_time_expires_and_one_that_started_does_not() {
    let (cluster, job) = paused_cluster_with_job(json!({ "overlap": "allow" })).await;
    let late = trigger_with(&cluster, &job, json!({ "startWithinSeconds": 1 })).await;
    let late = cluster.ended(late["executionId"].as_str().expect("an id"), SOON).await;
    assert_eq!(
        (late["status"].as_str(), late["outcome"].as_str(), late["errorCode"].as_str()),
        (Some("Failed"), Some("Expired"), Some("expired")),
        "{late}"
    );
    assert!(late["error"].as_str().is_some_and(|e| e.contains("not started within the 1 s")), "{late}");
    // Past its time, but claimed once before: a run that was given back goes on.
    let started = trigger_with(&cluster, &job, json!({ "startWithinSeconds": 3600 })).await;
    let never = trigger_with(&cluster, &job, json!({ "startWithinSeconds": 3600 })).await;
    let set = "update executions set start_by = clock_timestamp() - interval '1 hour', started_at = clock_timestamp() where id::text = $1";
    sqlx::query(set).bind(started["executionId"].as_str()).execute(&cluster.pool).await.expect("updates");
    // Whoever ends what is late has looked since then.
    let late = trigger_with(&cluster, &job, json!({ "startWithinSeconds": 1 })).await;
    assert_eq!(cluster.ended(late["executionId"].as_str().expect("an id"), SOON).await["outcome"], "Expired");
    let_run(&cluster).await;
    for id in [&started, &never] {
        assert_eq!(cluster.ended(id["executionId"].as_str().expect("an id"), SOON).await["status"], "Success");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_leaves_alone_what_is_past_its_latest_start() {
    // The ticker that ends it does not run: only the claim itself is left to hold it back.
    let cluster = Cluster::build().limit(0).env("DBACKUP_TICKER_MS", 3_000).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    let late = trigger_with(&cluster, &job, json!({ "startWithinSeconds": 3600 })).await;
    sqlx::query("update executions set start_by = clock_timestamp()").execute(&cluster.pool).await.expect("updates");
    let after = trigger_with(&cluster, &job, json!({})).await;
    let_run(&cluster).await;
    assert_eq!(cluster.ended(after["executionId"].as_str().expect("an id"), SOON).await["status"], "Success");
    let late = cluster.ended(late["executionId"].as_str().expect("an id"), SOON).await;
    assert_eq!((late["outcome"].as_str(), late["attempt"].as_i64()), (Some("Expired"), Some(0)), "{late}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_higher_priority_runs_first_and_a_lock_is_kept_with_the_run() {
    let (cluster, job) = paused_cluster_with_job(json!({ "overlap": "queue" })).await;
    let low = trigger_with(&cluster, &job, json!({ "priority": -3 })).await;
    let plain = trigger_with(&cluster, &job, json!({ "lockDays": 30, "labels": { "release": "42" } })).await;
    let high = trigger_with(&cluster, &job, json!({ "priority": 10 })).await;
    let ids = [&high, &plain, &low].map(|a| a["executionId"].as_str().expect("an id").to_owned());
    assert_eq!(cluster.execution(&ids[2]).await["queuePosition"], 3);
    let_run(&cluster).await;
    for id in &ids {
        cluster.ended(id, SOON).await;
    }
    let order = cluster.text("select string_agg(id::text, ' ' order by started_at) from executions").await;
    assert_eq!(order, ids.join(" "));
    assert_eq!(cluster.execution(&ids[1]).await["labels"], json!({ "release": "42" }));
    assert_eq!(cluster.count("select count(*) from executions where locked and lock_days = 30").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_is_a_new_run_of_what_has_ended() {
    let (cluster, job) = paused_cluster_with_job(json!({})).await;
    let first = trigger_with(&cluster, &job, json!({ "priority": 4, "labels": { "a": "b" } })).await;
    let first = first["executionId"].as_str().expect("an id");
    let retry = format!("/api/executions/{first}/retry");
    let (status, answer) = cluster.request("POST", &retry, None).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("not_ended")), "{answer}");
    cluster.ok("POST", &format!("/api/executions/{first}/cancel"), None).await;
    let again = cluster.ok("POST", &retry, None).await;
    let again = cluster.execution(again["executionId"].as_str().expect("an id")).await;
    assert_ne!(again["id"].as_str(), Some(first));
    assert_eq!(
        (again["priority"].as_i64(), &again["labels"], &again["jobId"]),
        (Some(4), &json!({ "a": "b" }), &json!(job))
    );
    let (status, answer) = cluster.request("POST", &format!("/api/executions/{first}/cancel"), None).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("already_ended")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_polled_like_one_run_and_ends_with_its_last_member() {
    let (cluster, one) = paused_cluster_with_job(json!({ "labels": { "env": "prod" } })).await;
    let source = cluster.ok("GET", "/api/sources", None).await[0]["slug"].as_str().expect("a slug").to_owned();
    let (destination, _) = cluster.local_destination().await;
    let two = cluster.job(&source, &[&destination], json!({ "labels": { "env": "prod" } })).await;
    let other = cluster.job(&source, &[&destination], json!({ "labels": { "env": "test" } })).await;
    let by_label = json!({ "selector": { "env": "prod" }, "labels": { "deploy": "7" } });
    let group = cluster.ok("POST", "/api/runs", Some(by_label)).await;
    let id = group["executionId"].as_str().expect("an id").to_owned();
    let waiting = cluster.execution(&id).await;
    assert_eq!((waiting["type"].as_str(), waiting["status"].as_str()), (Some("Group"), Some("Pending")), "{waiting}");
    let members: BTreeSet<&str> =
        waiting["members"].as_array().expect("members").iter().filter_map(|m| m["jobId"].as_str()).collect();
    assert_eq!(members, [one.as_str(), two.as_str()].into());
    for field in
        ["id", "jobId", "jobName", "progress", "stage", "startedAt", "endedAt", "duration", "size", "path", "error"]
    {
        assert!(waiting.get(field).is_some(), "the contract's field {field}: {waiting}");
    }
    let_run(&cluster).await;
    let (_, ended) = cluster.request("GET", &format!("/api/executions/{id}?wait=30"), None).await;
    assert_eq!(
        (ended["data"]["status"].as_str(), ended["data"]["progress"].as_i64()),
        (Some("Success"), Some(100)),
        "{ended}"
    );

    // One that fails makes the group fail, and a group is cancelled whole.
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 0 }))).await;
    let by_name = json!({ "jobs": [one, other] });
    let id = cluster.ok("POST", "/api/runs", Some(by_name)).await["executionId"].as_str().expect("an id").to_owned();
    let member = cluster.execution(&id).await["members"][0]["executionId"].as_str().expect("an id").to_owned();
    cluster.ok("POST", &format!("/api/executions/{member}/cancel"), None).await;
    let going_on = cluster.execution(&id).await;
    assert_eq!((going_on["status"].as_str(), &going_on["endedAt"]), (Some("Running"), &Value::Null), "{going_on}");
    cluster.ok("POST", &format!("/api/executions/{id}/cancel"), None).await;
    let failed = cluster.ended(&id, SOON).await;
    assert_eq!(failed["status"], "Failed", "{failed}");
    assert!(failed["error"].as_str().is_some_and(|e| e.starts_with("2 of 2 runs failed: ")), "{failed}");
    let scoped = cluster.scoped_key(&["history:read"], Some(vec![one.parse().expect("an id")])).await;
    assert_eq!(
        cluster.request_as(&scoped, "GET", &format!("/api/executions/{id}"), None).await.0,
        404,
        "not all its own"
    );
    // A scoped key triggers its own by label, and no other by name.
    let scoped = cluster.scoped_key(&["jobs:execute", "history:read"], Some(vec![one.parse().expect("an id")])).await;
    let (_, group) =
        cluster.request_as(&scoped, "POST", "/api/runs", Some(json!({ "selector": { "env": "prod" } }))).await;
    let path = format!("/api/executions/{}", group["executionId"].as_str().expect("an id"));
    let (_, group) = cluster.request_as(&scoped, "GET", &path, None).await;
    let members: Vec<&str> =
        group["data"]["members"].as_array().expect("members").iter().filter_map(|m| m["jobId"].as_str()).collect();
    assert_eq!(members, [one.as_str()], "{group}");
    let (status, answer) = cluster.request_as(&scoped, "POST", "/api/runs", Some(json!({ "jobs": [one, two] }))).await;
    assert_eq!((status, answer["fields"][0]["field"].as_str()), (404, Some("jobs.1")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_made_whole_or_not_at_all_and_once_for_an_idempotency_key() {
    let (cluster, job) = paused_cluster_with_job(json!({})).await;
    for (body, status, field) in [
        (json!({ "jobs": [job, "no-such-job"] }), 404, Some("jobs.1")),
        (json!({ "jobs": [] }), 422, Some("jobs")),
        (json!({ "selector": { "no": "job" } }), 422, Some("selector")),
        (json!({ "jobs": [job], "selector": { "a": "b" } }), 422, Some("jobs")),
        (json!({}), 422, Some("jobs")),
        (json!({ "jobs": vec![job.clone(); 1001] }), 422, Some("jobs")),
        (json!({ "jobs": [job], "priority": 99 }), 422, Some("priority")),
        (json!({ "jobs": [job], "nonsense": 1 }), 400, Some("nonsense")),
    ] {
        let (got, answer) = cluster.request("POST", "/api/runs", Some(body.clone())).await;
        assert_eq!((got, answer["fields"][0]["field"].as_str()), (status, field), "{answer}");
    }
    assert_eq!(cluster.count("select count(*) from executions").await, 0, "nothing of a refused group is left");
    let send = async |api: usize, body: Value| {
        let request = cluster.http.post(format!("{}/api/runs", cluster.url(api))).bearer_auth(&cluster.admin_key);
        let response = request.header("Idempotency-Key", "release-9").json(&body).send().await.expect("answers");
        (response.status().as_u16(), response.json::<Value>().await.expect("JSON"))
    };
    let answers = futures::future::join_all((0..40).map(|n| send(n % 2, json!({ "jobs": [job] })))).await;
    let ids: BTreeSet<&str> = answers.iter().filter_map(|(_, a)| a["executionId"].as_str()).collect();
    assert_eq!((ids.len(), cluster.count("select count(*) from executions").await), (1, 1), "{answers:?}");
    assert_eq!(send(0, json!({ "jobs": [job], "priority": 1 })).await.0, 422);
}

/// How a process answers a trigger of the job by this name, with no other wish.
async fn answered(cluster: &Cluster, api: usize, name: &str) -> (u16, String) {
    let request = cluster.http.post(format!("{}/api/jobs/{name}/run", cluster.url(api)));
    let answer = request.bearer_auth(&cluster.admin_key).send().await.expect("answers");
    let (status, body) = (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"));
    (status, body["code"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_process_remembers_of_a_job_decides_only_while_it_is_so() {
    let (cluster, job) = paused_cluster_with_job(json!({})).await;
    let path = format!("/api/jobs/{job}");
    let slug = cluster.ok("GET", &path, None).await["slug"].as_str().expect("a slug").to_owned();
    let (done, refused) = ((200, String::new()), |status, code: &str| (status, code.to_owned()));
    // Each change is made by a statement that no process hears of, and is obeyed by the next trigger at either.
    for (change, by_slug, by_id) in [
        ("select", done.clone(), done.clone()),
        ("update jobs set overlap = 'reject'", refused(409, "already_active"), refused(409, "already_active")),
        ("update jobs set overlap = 'queue'", done.clone(), done.clone()),
        (
            "insert into settings values ('maxPendingPerJob', '4')",
            refused(429, "queue_full"),
            refused(429, "queue_full"),
        ),
        ("update settings set value = '1000' where name = 'maxPendingPerJob'", done.clone(), done.clone()),
        ("update sources set pool = 'far'", done.clone(), done.clone()),
        ("update jobs set slug = 'renamed'", refused(404, "job_not_found"), done.clone()),
    ] {
        crate::harness::sql(&cluster.database, change).await;
        for api in 0..2 {
            assert_eq!(answered(&cluster, api, &slug).await, by_slug, "{change}, by its slug at process {api}");
            assert_eq!(answered(&cluster, api, &job).await, by_id, "{change}, by its id at process {api}");
        }
    }
    let pools = "select string_agg(pool, ' ' order by seq) from executions where pool <> 'default'";
    assert_eq!(cluster.text(pools).await, "far far far far far far", "the first of them already");
    assert_eq!(cluster.count("select count(*) from executions").await, 18);
    crate::harness::sql(&cluster.database, "update executions set status = 'Failed', error = 'x', ended_at = now()")
        .await;
    cluster.ok("DELETE", &path, None).await;
    for api in 0..2 {
        assert_eq!(answered(&cluster, api, &job).await, refused(404, "job_not_found"), "deleted, at process {api}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cap_is_exact_for_triggers_from_memory_at_two_processes() {
    let (cluster, job) = paused_cluster_with_job(json!({})).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPendingPerJob": 200 }))).await;
    // Both remember the job, each with a count of its own.
    for api in 0..2 {
        assert_eq!(answered(&cluster, api, &job).await.0, 200);
    }
    let all = (0..400).map(|n| answered(&cluster, n % 2, &job));
    let answers = futures::future::join_all(all).await;
    let made = answers.iter().filter(|(status, _)| *status == 200).count();
    assert_eq!(made, 198, "{answers:?}");
    assert!(answers.iter().all(|(status, code)| *status == 200 || (*status, code.as_str()) == (429, "queue_full")));
    assert_eq!(cluster.count("select count(*) from executions where status = 'Pending'").await, 200);
}
