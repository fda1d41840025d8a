//! Definitions that change: while a run waits, two at once, and by whom.

use common::{destination, id::Reference};
use serde_json::{Value, json};

use crate::{
    cluster::untested_destination,
    encryption::key_file,
    harness::{Cluster, SOON, files, id, source::PostgresSource, until},
};

/// A change: method, path, body.
pub type Change<'a> = (&'a str, &'a str, Value);

/// Has both changes under way on different processes, in this order, before either can touch the row; then lets them.
pub async fn at_once(cluster: &Cluster, table: &str, row: &str, changes: [Change<'_>; 2]) -> [(u16, Value); 2] {
    let mut lock = cluster.pool.begin().await.expect("begins");
    let locked = format!("select from {table} where id::text = '{row}' for update");
    sqlx::query(sqlx::AssertSqlSafe(locked)).execute(&mut *lock).await.expect("locks");
    let mut under_way = Vec::new();
    for (api, (method, path, body)) in changes.into_iter().enumerate() {
        let method: reqwest::Method = method.parse().expect("a method");
        let request = cluster.http.request(method, format!("{}{path}", cluster.url(api)));
        let sent = request.bearer_auth(&cluster.admin_key).json(&body).send();
        under_way.push(tokio::spawn(async move {
            let answer = sent.await.expect("answers");
            (answer.status().as_u16(), answer.json().await.expect("JSON"))
        }));
        waits(cluster, under_way.len()).await;
    }
    lock.commit().await.expect("commits");
    let [first, second] = under_way.try_into().expect("two");
    [first.await.expect("joins"), second.await.expect("joins")]
}

/// Until so many of the cluster's connections wait for a lock.
pub async fn waits(cluster: &Cluster, changes: usize) {
    until("the change waits", SOON, || async {
        let waits =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        (cluster.count(waits).await == i64::try_from(changes).expect("few")).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_at_once_neither_undoes_the_other() {
    let cluster = Cluster::start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let hook = json!({ "name": "hook", "url": "https://example.com/x", "events": ["failed"] });
    let hook = id(&cluster.ok("POST", "/api/webhooks", Some(hook)).await);
    let off = json!({ "enabled": false });
    for (table, id, first, second) in [
        ("jobs", &job, off.clone(), json!({ "labels": { "env": "prod" } })),
        ("sources", &source, json!({ "maxConcurrentRuns": 1 }), json!({ "labels": { "env": "prod" } })),
        ("destinations", &destination, json!({ "pool": "far" }), json!({ "labels": { "env": "prod" } })),
        ("webhooks", &hook, off.clone(), json!({ "labels": { "env": "prod" } })),
    ] {
        let path = format!("/api/{table}/{id}");
        let changes = [("PUT", path.as_str(), first.clone()), ("PUT", path.as_str(), second.clone())];
        for (status, answer) in at_once(&cluster, table, id, changes).await {
            assert_eq!(status, 200, "{table}: {answer}");
        }
        let now = cluster.ok("GET", &path, None).await;
        for change in [first, second] {
            let (name, value) = change.as_object().expect("an object").iter().next().expect("a field");
            assert_eq!(&now[name], value, "{table}: {now}");
        }
    }
    // A new secret neither switches a webhook on again, nor gives way to a change of its address.
    let (path, rotate) = (format!("/api/webhooks/{hook}"), format!("/api/webhooks/{hook}/rotate"));
    cluster.ok("PUT", &path, Some(json!({ "enabled": true }))).await;
    let changes = [("PUT", path.as_str(), off), ("POST", rotate.as_str(), json!({}))];
    let [_, (status, answer)] = at_once(&cluster, "webhooks", &hook, changes).await;
    assert_eq!((status, &answer["data"]["enabled"]), (200, &json!(false)), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_rotated_by_nobody_who_may_do_less_than_it_may_by_then() {
    let cluster = Cluster::build().workers(0).start().await;
    let body = json!({ "name": "ci", "permissions": ["jobs:read"] });
    let key = id(&cluster.ok("POST", "/api/api-keys", Some(body)).await);
    let keeper = cluster.key(&["api-keys:write", "jobs:read"]).await;
    let rotate = format!("{}/api/api-keys/{key}/rotate", cluster.url(1));
    // The keeper's request is on its way while the key becomes mighty.
    let mut mighty = cluster.pool.begin().await.expect("begins");
    sqlx::query("update api_keys set permissions = array['jobs:read', 'settings:write'] where id::text = $1")
        .bind(&key)
        .execute(&mut *mighty)
        .await
        .expect("updates");
    let rotated = tokio::spawn(cluster.http.post(rotate).bearer_auth(&keeper).send());
    waits(&cluster, 1).await;
    mighty.commit().await.expect("commits");
    let rotated = rotated.await.expect("joins").expect("answers");
    assert_eq!(rotated.status(), 403, "{:?}", rotated.text().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_waits_is_of_the_source_that_its_trigger_named_whatever_its_job_is_given_meanwhile() {
    let cluster = Cluster::start().await;
    let (named, other) = (PostgresSource::with_rows(100).await, PostgresSource::with_rows(7).await);
    let first = cluster.source("postgres", named.config()).await;
    let second = cluster.source("postgres", other.config()).await;
    let (destination, root) = cluster.local_destination().await;
    let job = cluster.job(&first, &[&destination], json!({})).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let run = cluster.trigger(&job).await;
    cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "sourceId": second }))).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    let ended = cluster.ended(&run, SOON).await;
    let restored = named.restore(&root.join(ended["path"].as_str().expect("a path"))).await;
    named.assert_same(&restored).await;
    let next = cluster.backup(&job).await;
    let restored = other.restore(&root.join(next["path"].as_str().expect("a path"))).await;
    other.assert_same(&restored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_waits_goes_where_its_source_was_to_go_and_is_for_whom_it_was_to_be() {
    let cluster = Cluster::start().await;
    let first = cluster.source("postgres", PostgresSource::with_rows(100).await.config()).await;
    let second = cluster.source("postgres", PostgresSource::with_rows(7).await.config()).await;
    let (vault, vault_root) = cluster.local_destination().await;
    let (safe, safe_root) = cluster.local_destination().await;
    let (public, public_root) = cluster.local_destination().await;
    let (_, recipient) = key_file(&cluster.scratch);
    let more = json!({ "encryption": { "recipients": [recipient] } });
    let job = cluster.job(&first, &[&vault], more.clone()).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let run = cluster.trigger(&job).await;
    let elsewhere = json!({ "sourceId": second, "destinationIds": [public], "encryption": null });
    // Back and forth: what counts is what the job was when it last had the source.
    let back = json!({ "sourceId": first, "destinationIds": [safe], "encryption": more["encryption"] });
    for change in [&elsewhere, &back, &elsewhere] {
        cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(change.clone())).await;
    }
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    let ended = cluster.ended(&run, SOON).await;
    assert_eq!(ended["status"], "Success", "{ended:#}");
    let stored = || [&vault_root, &safe_root, &public_root].map(|root| files(root).len());
    assert_eq!(stored(), [0, 2, 0], "{ended:#}");
    assert!(ended["artifacts"].as_array().expect("a list").iter().any(|a| a["recipients"] == json!([recipient])));
    let next = cluster.backup(&job).await;
    assert_eq!(stored(), [0, 2, 2], "{next:#}");
    assert!(next["artifacts"].as_array().expect("a list").iter().all(|a| a["recipients"].is_null()), "{next:#}");
    // What it was to go to is gone: it goes nowhere.
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let run = cluster.trigger(&job).await;
    cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(back)).await;
    cluster.ok("DELETE", &format!("/api/destinations/{public}"), None).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    let ended = cluster.ended(&run, SOON).await;
    assert_eq!((&ended["status"], &ended["errorCode"]), (&json!("Failed"), &json!("job_gone")), "{ended:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_the_source_before_is_none_of_the_source_that_a_job_has_now() {
    let cluster = Cluster::start().await;
    let first = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let second = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&first, &[&destination], json!({ "overlap": "allow", "expectEverySeconds": 90_000 })).await;
    let state = async || {
        let (_, health) = cluster.request("GET", "/api/health/backups", None).await;
        health["data"][0]["state"].as_str().unwrap_or_else(|| panic!("{health}")).to_owned()
    };
    let run = format!("/api/jobs/{job}/run");
    let young = json!({ "maxAgeSeconds": 3600 });
    let backup = cluster.backup(&job).await;
    assert_eq!(state().await, "fresh");
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let waiting = cluster.trigger(&job).await;
    cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "sourceId": second }))).await;
    assert_eq!(state().await, "never_succeeded");
    let (_, answer) = cluster.request("POST", &run, Some(young.clone())).await;
    let id = answer["executionId"].as_str().unwrap_or_else(|| panic!("{answer}"));
    assert!(answer["reused"] != json!(true) && backup["id"] != id && waiting != id, "{answer}");
    let (_, again) = cluster.request("POST", &run, Some(young)).await;
    assert_eq!((&again["executionId"], &again["reused"]), (&json!(id), &json!(true)), "{again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_of_a_destination_that_was_changed_meanwhile_says_nothing_of_what_it_is_now() {
    let cluster = Cluster::start().await;
    let destination = untested_destination(&cluster).await;
    let path = format!("/api/destinations/{destination}");
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let tested = destination::find(&mut conn, &Reference::new(destination)).await.expect("answers").expect("one");
    let elsewhere = cluster.scratch.join("elsewhere");
    std::fs::create_dir(&elsewhere).expect("a folder");
    cluster.ok("PUT", &path, Some(json!({ "config": { "root": elsewhere } }))).await;
    assert!(!destination::mark_ready(&mut conn, &tested).await.expect("answers"));
    assert_eq!(cluster.count("select count(*) from destinations where ready_at is not null").await, 0);
    cluster.ok("POST", &format!("{path}/test"), None).await;
    assert!(elsewhere.join(".dbackup-store").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_for_some_jobs_leads_none_of_them_elsewhere_and_reads_nothing_of_others() {
    let cluster = Cluster::start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let other = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let (elsewhere, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let key = cluster.scoped_key(&["*"], Some(vec![job.parse().expect("an id")])).await;
    let path = format!("/api/jobs/{job}");
    for (change, status) in [
        (json!({ "sourceId": other }), 403),
        (json!({ "destinationIds": [destination, elsewhere] }), 403),
        (json!({ "name": "renamed", "sourceId": source, "destinationIds": [destination] }), 200),
    ] {
        let (got, answer) = cluster.request_as(&key, "PUT", &path, Some(change.clone())).await;
        assert_eq!(got, status, "{change}: {answer}");
        assert!(status == 200 || answer["code"] == "job_scoped", "{answer}");
    }
    let job = cluster.ok("GET", &path, None).await;
    assert_eq!((&job["name"], &job["sourceId"]), (&json!("renamed"), &json!(source)), "{job}");
    for path in ["/api/audit", "/access/audit-log"] {
        for (key, status) in [(&key, 403), (&cluster.admin_key, 200)] {
            let answer = cluster.http.get(format!("{}{path}", cluster.url(0))).bearer_auth(key).send().await;
            assert_eq!(answer.expect("answers").status(), status, "{path}");
        }
    }
}
