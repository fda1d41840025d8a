//! Enqueue: idempotency, overlap, caps.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use sqlx::postgres::PgListener;

use crate::harness::{Cluster, postgres_url, source::PostgresSource};

pub async fn paused_cluster_with_job(more: Value) -> (Cluster, String) {
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], more).await;
    (cluster, job)
}

async fn trigger_with_key(cluster: &Cluster, api: usize, job: &str, key: &str, body: Value) -> (u16, bool, Value) {
    let request = cluster.http.post(format!("{}/api/jobs/{job}/run", cluster.url(api))).bearer_auth(&cluster.admin_key);
    let response = request.header("Idempotency-Key", key).json(&body).send().await.expect("answers");
    let replayed = response.headers().get("idempotency-replayed").is_some();
    (response.status().as_u16(), replayed, response.json().await.expect("JSON"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_idempotency_key_on_two_api_processes_makes_one_execution() {
    let (cluster, job) = paused_cluster_with_job(json!({})).await;
    let answers =
        futures::future::join_all((0..200).map(|n| trigger_with_key(&cluster, n % 2, &job, "deploy-42", json!({}))))
            .await;
    let ids: BTreeSet<String> = answers
        .iter()
        .map(|(status, _, a)| {
            assert_eq!(*status, 200, "{a}");
            a["executionId"].as_str().expect("an id").to_owned()
        })
        .collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(answers.iter().filter(|(_, replayed, _)| !replayed).count(), 1, "one made it, the others were replayed");
    assert_eq!(cluster.count("select count(*) from executions").await, 1);
    let (status, _, answer) = trigger_with_key(&cluster, 0, &job, "deploy-42", json!({ "priority": 3 })).await;
    assert_eq!((status, answer["code"].as_str()), (422, Some("idempotency_key_reused")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_is_its_callers_and_its_jobs_own_and_counts_for_a_day() {
    let (cluster, job) = paused_cluster_with_job(json!({})).await;
    let same = cluster.ok("GET", &format!("/api/jobs/{job}"), None).await;
    let (source, destination) = (same["sourceId"].as_str(), same["destinationIds"][0].as_str());
    let other = cluster.job(source.expect("an id"), &[destination.expect("an id")], json!({})).await;
    let callers = [cluster.admin_key.clone(), cluster.key(&["jobs:execute"]).await];
    let trigger = async |caller: &str, job: &str| {
        let request = cluster.http.post(format!("{}/api/jobs/{job}/run", cluster.url(1))).bearer_auth(caller);
        let answer = request.header("Idempotency-Key", "nightly").send().await.expect("answers");
        answer.json::<Value>().await.expect("JSON")["executionId"].as_str().expect("an id").to_owned()
    };
    let mut made = BTreeSet::new();
    for _ in 0..2 {
        for (caller, job) in [(&callers[0], &job), (&callers[1], &job), (&callers[0], &other)] {
            made.insert(trigger(caller, job).await);
        }
    }
    assert_eq!(made.len(), 3, "one for each caller and job");
    let age = async |hours: i32| {
        let moved = "update idempotency_keys set created_at = clock_timestamp() - $1 * interval '1 hour'";
        sqlx::query(moved).bind(hours).execute(&cluster.pool).await.expect("updates");
    };
    age(23).await;
    assert!(made.contains(&trigger(&callers[0], &job).await), "forgotten before its day was over");
    age(25).await;
    assert!(!made.contains(&trigger(&callers[0], &job).await), "after its day it means a new run");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reject_job_names_the_run_that_is_in_the_way() {
    let (cluster, job) = paused_cluster_with_job(json!({ "overlap": "reject" })).await;
    let path = format!("/api/jobs/{job}/run");
    let answers = futures::future::join_all((0..20).map(|_| cluster.request("POST", &path, None))).await;
    let made: Vec<&Value> = answers.iter().filter(|(status, _)| *status == 200).map(|(_, a)| a).collect();
    assert_eq!(made.len(), 1, "{answers:?}");
    for (status, answer) in answers.iter().filter(|(status, _)| *status != 200) {
        assert_eq!((*status, &answer["executionId"]), (409, &made[0]["executionId"]), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_with_429_and_a_stored_key_still_wins() {
    let (cluster, job) = paused_cluster_with_job(json!({})).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPendingPerJob": 3 }))).await;
    assert_eq!(trigger_with_key(&cluster, 0, &job, "first", json!({})).await.0, 200);
    let path = format!("/api/jobs/{job}/run");
    let answers = futures::future::join_all((0..10).map(|_| cluster.request("POST", &path, None))).await;
    assert_eq!(answers.iter().filter(|(status, _)| *status == 200).count(), 2, "{answers:?}");
    let refused = answers.iter().find(|(status, _)| *status == 429).expect("one is refused");
    assert_eq!(refused.1["code"], "queue_full");
    assert_eq!(cluster.count("select count(*) from executions").await, 3);
    let (status, replayed, _) = trigger_with_key(&cluster, 1, &job, "first", json!({})).await;
    assert_eq!((status, replayed), (200, true));
    // A refusal is not kept: the same request is a new one when there is room.
    assert_eq!(trigger_with_key(&cluster, 0, &job, "late", json!({})).await.0, 429);
    let waiting = cluster.text("select id::text from executions order by seq desc limit 1").await;
    cluster.ok("POST", &format!("/api/executions/{waiting}/cancel"), None).await;
    let (status, replayed, made) = trigger_with_key(&cluster, 1, &job, "late", json!({})).await;
    assert_eq!((status, replayed), (200, false), "{made}");
    assert_eq!(cluster.execution(made["executionId"].as_str().expect("an id")).await["status"], "Pending");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_jobs_together_may_have_only_so_many_waiting_until_one_of_them_ends() {
    let (cluster, job) = paused_cluster_with_job(json!({})).await;
    let same = cluster.ok("GET", &format!("/api/jobs/{job}"), None).await;
    let (source, destination) = (same["sourceId"].as_str(), same["destinationIds"][0].as_str());
    let other = cluster.job(source.expect("an id"), &[destination.expect("an id")], json!({})).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPending": 3 }))).await;
    let waiting = cluster.trigger(&job).await;
    cluster.trigger(&job).await;
    cluster.trigger(&other).await;
    for job in [&job, &other] {
        let (status, answer) = cluster.request("POST", &format!("/api/jobs/{job}/run"), None).await;
        assert_eq!((status, answer["code"].as_str()), (429, Some("queue_full")), "{answer}");
        assert!(answer["error"].as_str().is_some_and(|e| e.contains("3 runs wait already")), "{answer}");
    }
    cluster.ok("POST", &format!("/api/executions/{waiting}/cancel"), None).await;
    cluster.trigger(&other).await;
    assert_eq!(cluster.count("select count(*) from executions where status = 'Pending'").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_that_arrive_together_share_transactions() {
    let (cluster, job) = paused_cluster_with_job(json!({ "overlap": "allow" })).await;
    let path = format!("{}/api/jobs/{job}/run", cluster.url(0));
    let trigger = || cluster.http.post(&path).bearer_auth(&cluster.admin_key).send();
    for answer in futures::future::join_all((0..80).map(|_| trigger())).await {
        assert_eq!(answer.expect("answers").status(), 200);
    }
    assert_eq!(cluster.count("select count(*) from executions").await, 80);
    let transactions = cluster.count("select count(distinct xmin::text) from executions").await;
    assert!(transactions <= 40, "80 triggers took {transactions} transactions");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_sends_at_most_one_notice_of_work_in_20_ms() {
    let (cluster, job) = paused_cluster_with_job(json!({ "overlap": "allow" })).await;
    let mut listener = PgListener::connect(&postgres_url(&cluster.database)).await.expect("connects");
    listener.listen("dbackup").await.expect("listens");
    let path = format!("{}/api/jobs/{job}/run", cluster.url(0));
    let began = std::time::Instant::now();
    // One after the other: each has a transaction of its own, and none waits for a notice.
    for _ in 0..100 {
        let answer = cluster.http.post(&path).bearer_auth(&cluster.admin_key).send().await.expect("answers");
        assert_eq!(answer.status(), 200);
    }
    let allowed = began.elapsed().as_millis() / 20 + 2;
    sqlx::query("select pg_notify('dbackup', 'end')").execute(&cluster.pool).await.expect("notifies");
    let mut notices = 0;
    loop {
        match listener.recv().await.expect("hears").payload() {
            "end" => break,
            "work" => notices += 1,
            _ => {}
        }
    }
    assert!((1..=allowed).contains(&notices), "{notices} notices, but {allowed} would do");
}
