//! Freshness: who is told that a backup which ought to be there is not.

use serde_json::{Value, json};

use crate::harness::{
    Cluster, SOON, id, postgres_port,
    source::{MariadbSource, PASSWORD, PostgresSource, mariadb},
    sql, unique, until,
};

/// Makes a job with a source and a destination of its own; gives its id.
async fn new_job(cluster: &Cluster, slug: &str, more: Value) -> String {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let mut all = json!({ "slug": slug });
    all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    cluster.job(&source, &[&destination], all).await
}

async fn health(cluster: &Cluster, key: &str, query: &str) -> Value {
    let (status, answer) = cluster.request_as(key, "GET", &format!("/api/health/backups{query}"), None).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

/// Of jobs alone: the servers of the tests are full of databases that nobody backs up.
async fn jobs_reader(cluster: &Cluster) -> String {
    cluster.key(&["jobs:read"]).await
}

/// What is said of the only job.
async fn of_the_job(cluster: &Cluster, key: &str) -> (Value, Value) {
    let answer = health(cluster, key, "").await;
    assert_eq!(answer["data"].as_array().map(Vec::len), Some(1), "{answer}");
    (answer["status"].clone(), answer["data"][0].clone())
}

/// Lets time pass for what is stored.
async fn age(cluster: &Cluster, what: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(what.to_owned()))
        .execute(&cluster.pool)
        .await
        .unwrap_or_else(|e| panic!("{what}: {e}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn when_nobody_triggers_a_job_any_more_it_is_overdue_by_its_snapshot_and_a_good_backup_makes_it_fresh() {
    let cluster = Cluster::build().workers(1).env("DBACKUP_METRICS_LISTEN", "127.0.0.1:0").start().await;
    let reader = jobs_reader(&cluster).await;
    let job = new_job(&cluster, "shop", json!({ "expectEverySeconds": 3_600 })).await;
    let (status, never) = of_the_job(&cluster, &reader).await;
    let told = |job: &Value| (job["state"].clone(), job["healthy"].clone());
    assert_eq!((status, told(&never)), (json!("healthy"), (json!("never_succeeded"), json!(true))), "{never}");
    let run = cluster.backup(&job).await;
    let (status, fresh) = of_the_job(&cluster, &reader).await;
    assert_eq!((status, told(&fresh)), (json!("healthy"), (json!("fresh"), json!(true))), "{fresh}");
    assert_eq!((&fresh["snapshotAt"], &fresh["expectation"]), (&run["snapshotAt"], &json!("expectEverySeconds")));
    assert!(fresh["ageSeconds"].as_i64().is_some_and(|age| age < 60) && fresh["message"].is_null(), "{fresh}");

    // Only its data is old: the run itself ended a moment ago.
    age(&cluster, "update executions set snapshot_at = snapshot_at - interval '61 minutes'").await;
    let (status, overdue) = of_the_job(&cluster, &reader).await;
    assert_eq!((status, told(&overdue)), (json!("degraded"), (json!("overdue"), json!(false))), "{overdue}");
    assert!(overdue["ageSeconds"].as_i64().is_some_and(|age| (3_660..3_720).contains(&age)), "{overdue}");
    assert!(
        overdue["message"].as_str().is_some_and(|text| text.contains(overdue["expectedBy"].as_str().expect("a time")))
    );
    let of_job = [("backup_job", "shop")];
    until("the metric says so", SOON, || async {
        (cluster.told("dbackup_job_overdue", &of_job).await == Some(1.0)).then_some(())
    })
    .await;
    // For monitors that look at the status alone.
    for (fail, status) in [("true", 503), ("overdue", 503), ("paused,overdue", 503), ("paused", 200), ("false", 200)] {
        let path = format!("/api/health/backups?fail={fail}");
        let (said, answer) = cluster.request_as(&reader, "GET", &path, None).await;
        assert_eq!(said, status, "{fail}: {answer}");
        if status == 503 {
            assert_eq!((&answer["code"], &answer["error"]), (&json!("backups_degraded"), &json!("overdue: shop")));
        }
    }
    // A pause is no excuse for what is expected anyway.
    cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "enabled": false }))).await;
    assert_eq!(of_the_job(&cluster, &reader).await.1["state"], "overdue");

    cluster.backup(&job).await;
    let (status, paused) = of_the_job(&cluster, &reader).await;
    assert_eq!((status, told(&paused)), (json!("healthy"), (json!("paused"), json!(true))), "{paused}");
    cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "enabled": true }))).await;
    assert_eq!(of_the_job(&cluster, &reader).await.1["state"], "fresh");
    // A source whose clock is ahead makes no job fresh for longer.
    age(
        &cluster,
        "update executions set snapshot_at = snapshot_at + interval '1 year', ended_at = ended_at - interval '2 hours'",
    )
    .await;
    assert_eq!(of_the_job(&cluster, &reader).await.1["state"], "overdue");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_job_is_listed_by_its_schedule_too_in_pages_and_by_state() {
    let cluster = Cluster::build().workers(1).start().await;
    let reader = jobs_reader(&cluster).await;
    let nightly = new_job(&cluster, "nightly", json!({ "schedule": "0 3 * * *" })).await;
    cluster.backup(&nightly).await;
    age(&cluster, "update executions set ended_at = ended_at - interval '73 hours', snapshot_at = snapshot_at - interval '73 hours'").await;
    new_job(&cluster, "asleep", json!({ "schedule": "@daily", "enabled": false })).await;
    new_job(&cluster, "new", json!({ "schedule": "@daily" })).await;
    new_job(&cluster, "forgotten", json!({})).await;
    let free = new_job(&cluster, "free", json!({})).await;
    cluster.backup(&free).await;
    let answer = health(&cluster, &reader, "").await;
    let told: Vec<(&str, &str, bool)> = answer["data"]
        .as_array()
        .expect("jobs")
        .iter()
        .map(|job| {
            (job["job"].as_str().expect("a slug"), job["state"].as_str().expect("a state"), job["healthy"] == true)
        })
        .collect();
    let expected = [
        ("nightly", "overdue", false),
        ("asleep", "paused", true),
        ("new", "never_succeeded", true),
        ("forgotten", "never_succeeded", false),
        ("free", "fresh", true),
    ];
    assert_eq!(told, expected);
    assert_eq!(answer["counts"], json!({ "fresh": 1, "overdue": 1, "neverSucceeded": 2, "paused": 1 }));
    assert_eq!(answer["data"][0]["expectation"], "schedule");
    assert!(answer["data"][4]["expectedBy"].is_null() && answer["data"][4]["intervalSeconds"].is_null());
    let (status, refused) = cluster.request_as(&reader, "GET", "/api/health/backups?fail=true", None).await;
    assert_eq!((status, &refused["error"]), (503, &json!("overdue: nightly; without a good backup: forgotten")));

    let some = health(&cluster, &reader, "?state=paused,overdue").await;
    assert_eq!(some["data"].as_array().map(Vec::len), Some(2), "{some}");
    assert_eq!(some["counts"], answer["counts"], "of all, whatever is shown");
    let mut next = Some("/api/health/backups?limit=2".to_owned());
    let mut seen = Vec::new();
    while let Some(path) = next {
        let response =
            cluster.http.get(format!("{}{path}", cluster.url(0))).bearer_auth(&cluster.admin_key).send().await;
        let response = response.expect("answers");
        let link = response.headers().get("link").map(|link| link.to_str().expect("text").to_owned());
        next = link.map(|link| link.trim_start_matches('<').split('>').next().expect("a URL").to_owned());
        let page: Value = response.json().await.expect("JSON");
        seen.extend(
            page["data"].as_array().expect("jobs").iter().map(|job| job["job"].as_str().expect("a slug").to_owned()),
        );
    }
    assert_eq!(seen, expected.map(|(slug, ..)| slug));
    for bad in ["state=old", "fail=perhaps", "limit=0", "cursor=x"] {
        let (status, answer) = cluster.request("GET", &format!("/api/health/backups?{bad}"), None).await;
        assert_eq!((status, &answer["fields"][0]["field"]), (400, &json!(bad.split('=').next())), "{answer}");
    }

    // A key that is bound to a job hears of that job alone.
    let only = vec![nightly.parse().expect("an id")];
    let key = cluster.scoped_key(&["jobs:read", "sources:read"], Some(only)).await;
    let (_, scoped) = cluster.request_as(&key, "GET", "/api/health/backups", None).await;
    assert_eq!(
        (scoped["data"][0]["job"].as_str(), scoped["data"].as_array().map(Vec::len)),
        (Some("nightly"), Some(1))
    );
    assert!(scoped["uncovered"].is_null() && scoped["counts"]["fresh"] == 0, "{scoped}");
    let (_, answer) = cluster.request_as(&reader, "GET", "/api/health/backups", None).await;
    assert!(answer["uncovered"].is_null() && answer["data"].as_array().map(Vec::len) == Some(5), "{answer}");
}

/// The databases that nobody backs up, of one source.
async fn uncovered(cluster: &Cluster, source: &str) -> Vec<String> {
    let answer = health(cluster, &cluster.admin_key, "").await;
    let gaps = answer["uncovered"].as_array().expect("told").clone();
    let of_source =
        gaps.iter().filter(|gap| gap["sourceId"] == source).flat_map(|gap| gap["databases"].as_array().expect("names"));
    of_source.map(|name| name.as_str().expect("a name").to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_no_job_covers_is_told_once_a_test_or_a_run_has_seen_it() {
    let cluster = Cluster::build().workers(1).env("DBACKUP_METRICS_LISTEN", "127.0.0.1:0").start().await;
    let shop = PostgresSource::empty().await;
    let forgotten = unique("forgotten");
    sql("postgres", &format!("create database {forgotten}")).await;
    let source = cluster.source("postgres", shop.config()).await;
    assert_eq!(uncovered(&cluster, &source).await, std::slice::from_ref(&shop.database), "no job uses the source");
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "expectEverySeconds": 3_600 })).await;
    assert!(uncovered(&cluster, &source).await.is_empty(), "nobody has looked");
    cluster.backup(&job).await;
    until("the run has seen it", SOON, || async {
        uncovered(&cluster, &source).await.contains(&forgotten).then_some(())
    })
    .await;
    let gaps = uncovered(&cluster, &source).await;
    assert!(!gaps.contains(&shop.database) && !gaps.contains(&"postgres".to_owned()), "{gaps:?}");
    let (status, answer) = cluster.request("GET", "/api/health/backups?fail=uncovered", None).await;
    assert_eq!(
        (status, health(&cluster, &cluster.admin_key, "").await["status"].as_str()),
        (503, Some("degraded")),
        "{answer}"
    );
    let slug =
        cluster.ok("GET", &format!("/api/sources/{source}"), None).await["slug"].as_str().expect("a slug").to_owned();
    until("the metric counts it", SOON, || async {
        (cluster.told("dbackup_source_uncovered_databases", &[("source", &slug)]).await >= Some(1.0)).then_some(())
    })
    .await;

    // Another source of the same server, with a job, covers it for both.
    let config = json!({ "host": "127.0.0.1", "port": postgres_port(), "username": shop.role, "password": PASSWORD, "databases": [forgotten] });
    let other = cluster.source("postgres", config).await;
    assert!(uncovered(&cluster, &source).await.contains(&forgotten), "a source alone covers nothing");
    cluster.job(&other, &[&destination], json!({})).await;
    assert!(!uncovered(&cluster, &source).await.contains(&forgotten));
    sql("postgres", &format!("drop database {forgotten}")).await;

    let shop = MariadbSource::empty();
    let forgotten = unique("forgotten");
    mariadb("mysql", &format!("create database {forgotten}; grant all on {forgotten}.* to {}@'%'", shop.user));
    let source = cluster.source("mariadb", shop.config()).await;
    cluster.job(&source, &[&destination], json!({})).await;
    let tested = cluster.ok("POST", &format!("/api/sources/{source}/test"), None).await;
    assert_eq!(tested["ok"], true, "{tested}");
    until("the test has seen it", SOON, || async {
        (uncovered(&cluster, &source).await == [forgotten.clone()]).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn expect_every_seconds_is_between_a_minute_and_366_days_or_null_and_audited() {
    let cluster = Cluster::build().workers(1).start().await;
    let job = new_job(&cluster, "shop", json!({})).await;
    let path = format!("/api/jobs/{job}");
    for (value, status) in
        [(json!(59), 422), (json!(31_622_401), 422), (json!(60), 200), (json!(31_622_400), 200), (json!("daily"), 400)]
    {
        let (said, answer) = cluster.request("PUT", &path, Some(json!({ "expectEverySeconds": value }))).await;
        assert_eq!(said, status, "{value}: {answer}");
        if status == 422 {
            assert_eq!(answer["fields"][0]["field"], "expectEverySeconds", "{answer}");
        }
    }
    let listed = cluster.ok("GET", "/api/jobs", None).await;
    assert_eq!(listed[0]["expectEverySeconds"], 31_622_400);
    let event =
        cluster.text("select details::text from audit_log where action = 'job.update' order by seq desc limit 1").await;
    assert!(event.contains("expectEverySeconds"), "{event}");
    // What a version before took stays, and does not block another change.
    age(&cluster, "update jobs set expect_every_seconds = 5").await;
    let changed = cluster.ok("PUT", &path, Some(json!({ "name": "Shop" }))).await;
    assert_eq!((&changed["expectEverySeconds"], id(&changed)), (&json!(5), job));
    let cleared = cluster.ok("PUT", &path, Some(json!({ "expectEverySeconds": null }))).await;
    assert!(cleared["expectEverySeconds"].is_null());
}
