//! The API: who may do what, what is refused and how, and what a list shows.

use std::{collections::BTreeSet, time::Duration};

use api::auth::Access;
use common::permission::Permission;
use serde_json::{Value, json};

use crate::harness::{Cluster, id, source::PostgresSource, until};

/// What nobody needs a key for; the list may only shrink.
const OPEN: [(&str, &str); 11] = [
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/api/health"),
    ("GET", "/api/openapi.json"),
    ("GET", "/api/docs"),
    ("GET", "/api/docs/"),
    ("GET", "/api/docs/{*file}"),
    ("GET", "/api/setup"),
    ("POST", "/api/setup"),
    ("POST", "/api/session"),
    ("POST", "/api/session/refresh"),
];

/// A path of the route table with an id that names nothing.
fn concrete(path: &str) -> String {
    path.replace("{id}", "0190a5b2-0000-7000-8000-000000000000")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_refuses_a_caller_without_a_key_and_one_without_its_permission() {
    let cluster = Cluster::build().workers(0).start().await;
    let mut seen = 0;
    for route in api::router::table() {
        let (method, path) = (route.method.as_str(), concrete(route.path));
        if route.access == Access::Open {
            assert!(OPEN.contains(&(method, route.path)), "{method} {} is open to everybody", route.path);
            continue;
        }
        let anonymous = cluster
            .http
            .request(route.method.clone(), format!("{}{path}", cluster.url(0)))
            .send()
            .await
            .expect("answers");
        assert_eq!(anonymous.status(), 401, "{method} {path}");
        assert!(anonymous.headers().contains_key("x-request-id"));
        seen += 1;
        let Access::Needs(needed) = route.access else {
            assert!(route.path.starts_with("/api/session"), "{method} {} is open to every key", route.path);
            continue;
        };

        let others: Vec<&str> = Permission::ALL.iter().filter(|p| **p != needed).map(|p| p.as_str()).collect();
        let (status, answer) = cluster.request_as(&cluster.key(&others).await, method, &path, Some(json!({}))).await;
        assert_eq!((status, answer["code"].as_str()), (403, Some("permission_missing")), "{method} {path}: {answer}");
        assert!(answer["error"].as_str().is_some_and(|e| e.contains(needed.as_str())), "{answer}");

        // The status alone: a stream of events does not end.
        let request = cluster.http.request(route.method.clone(), format!("{}{path}", cluster.url(0)));
        let request = request.bearer_auth(cluster.key(&[needed.as_str()]).await).json(&json!({}));
        let status = request.send().await.expect("answers").status().as_u16();
        assert!(![401, 403].contains(&status), "{method} {path} with its one permission: {status}");
    }
    assert!(seen >= 44, "the table has shrunk to {seen}");
}

/// Pages that nobody needs to sign in for; the list may only shrink.
const OPEN_PAGES: [&str; 3] = ["/setup", "/sign-in", "/assets/{version}/{*file}"];
/// Pages for everybody who is signed in, which show what their reader may see.
const PAGES_OF_EVERYBODY: [&str; 2] = ["/", "/access/sessions"];

#[tokio::test(flavor = "multi_thread")]
async fn every_page_sends_a_stranger_to_the_sign_in_and_refuses_a_reader_without_its_permission() {
    let cluster = Cluster::build().workers(0).start().await;
    let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().expect("a client");
    let get = async |path: &str, key: Option<String>| {
        let request = http.get(format!("{}{path}", cluster.url(0)));
        let response = key.into_iter().fold(request, |request, key| request.bearer_auth(key)).send().await;
        response.expect("answers")
    };
    let mut seen = 0;
    for page in api::ui::pages() {
        let path = concrete(page.path);
        if page.access == Access::Open {
            assert!(OPEN_PAGES.contains(&page.path), "{} is open to everybody", page.path);
            continue;
        }
        let stranger = get(&path, None).await;
        let wanted = format!("/sign-in?next={path}");
        let sent_to = stranger.headers()["location"].to_str().expect("text");
        assert_eq!((stranger.status().as_u16(), sent_to), (303, wanted.as_str()));
        seen += 1;
        let Access::Needs(needed) = page.access else {
            assert!(PAGES_OF_EVERYBODY.contains(&page.path), "{} is open to whoever is signed in", page.path);
            continue;
        };
        let others: Vec<&str> = Permission::ALL.iter().filter(|p| **p != needed).map(|p| p.as_str()).collect();
        let refused = get(&path, Some(cluster.key(&others).await)).await;
        assert_eq!(refused.status(), 403, "{path}");
        let policy = refused.headers()["content-security-policy"].to_str().expect("text").to_owned();
        assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"), "{policy}");
        let text = refused.text().await.expect("a page");
        assert!(text.contains("<main") && text.contains(needed.as_str()), "{text}");
        let admitted = get(&path, Some(cluster.key(&[needed.as_str()]).await)).await;
        assert!(
            [200, 404].contains(&admitted.status().as_u16()),
            "{path} with its one permission: {}",
            admitted.status()
        );
    }
    assert!(seen >= 23, "the console has shrunk to {seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_at_pages_uses_up_nothing_that_the_scripts_of_the_same_address_may_read() {
    let cluster = Cluster::build().workers(0).rate_limits(json!({ "read": { "limit": 3 } })).start().await;
    let get = async |path: &str| {
        let request = cluster.http.get(format!("{}{path}", cluster.url(0))).bearer_auth(&cluster.admin_key);
        request.send().await.expect("answers").status().as_u16()
    };
    for _ in 0..3 {
        assert_eq!(get("/jobs").await, 200);
    }
    assert_eq!(get("/sources").await, 429, "pages have a limit of their own");
    let file = api::ui::asset("app.css");
    for _ in 0..3 {
        assert_eq!(get("/api/jobs").await, 200);
        assert_eq!(get(&file).await, 200, "a file counts for nothing");
    }
    assert_eq!(get("/api/jobs").await, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_wrong_disabled_or_expired_is_refused_and_told_why() {
    let cluster = Cluster::build().workers(0).start().await;
    for (change, code) in [("enabled = false", "key_disabled"), ("expires_at = clock_timestamp()", "key_expired")] {
        let key = cluster.key(&["jobs:read"]).await;
        assert_eq!(cluster.request_as(&key, "GET", "/api/jobs", None).await.0, 200);
        let hash = <sha2::Sha256 as sha2::Digest>::digest(&key).to_vec();
        sqlx::query(sqlx::AssertSqlSafe(format!("update api_keys set {change} where secret_hash = $1")))
            .bind(hash)
            .execute(&cluster.pool)
            .await
            .expect("updates");
        for api in 0..2 {
            let answer = refused_within_a_second(&cluster, api, &key).await;
            assert_eq!((answer["code"].as_str(), answer["success"].as_bool()), (Some(code), Some(false)), "{answer}");
        }
    }
    let unknown = common::api_key::PlainKey::generate();
    for key in [unknown.expose(), "dbm_your_api_key", "x"] {
        assert_eq!(cluster.request_as(key, "GET", "/api/jobs", None).await.0, 401, "{key}");
    }
}

async fn refused_within_a_second(cluster: &Cluster, api: usize, key: &str) -> Value {
    until("the key is refused", Duration::from_secs(1), || async {
        let request = cluster.http.get(format!("{}/api/jobs", cluster.url(api))).bearer_auth(key);
        let response = request.send().await.expect("answers");
        if response.status() == 401 { Some(response.json().await.expect("JSON")) } else { None }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scoped_key_sees_and_triggers_only_its_jobs() {
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let (mine, other) = (
        cluster.job(&source, &[&destination], json!({})).await,
        cluster.job(&source, &[&destination], json!({})).await,
    );
    let others_run = cluster.trigger(&other).await;
    let key = cluster.scoped_key(&["*"], Some(vec![mine.parse().expect("an id")])).await;
    assert_eq!(cluster.request_as(&key, "POST", &format!("/api/jobs/{mine}/run"), None).await.0, 200);
    for (method, path) in [
        ("POST", format!("/api/jobs/{other}/run")),
        ("GET", format!("/api/jobs/{other}")),
        ("GET", format!("/api/executions/{others_run}")),
        ("POST", format!("/api/executions/{others_run}/cancel")),
    ] {
        assert_eq!(cluster.request_as(&key, method, &path, None).await.0, 404, "{method} {path}");
    }
    let (_, jobs) = cluster.request_as(&key, "GET", "/api/jobs", None).await;
    assert_eq!(jobs.as_array().map(|j| j.iter().map(id).collect::<Vec<_>>()), Some(vec![mine]));
    let (_, executions) = cluster.request_as(&key, "GET", "/api/executions", None).await;
    assert_eq!(executions["data"].as_array().map(Vec::len), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_destinations_and_jobs_are_made_read_changed_and_deleted_by_id_and_by_slug() {
    let cluster = Cluster::start().await;
    let config = PostgresSource::empty().await.config();
    let source = cluster
        .ok(
            "POST",
            "/api/sources",
            Some(json!({ "name": "Shop (prod)", "engine": "postgres", "config": config, "labels": { "env": "prod" } })),
        )
        .await;
    assert_eq!(source["slug"], "shop-prod");
    let second = cluster
        .ok("POST", "/api/sources", Some(json!({ "name": "Shop (prod)", "engine": "postgres", "config": config })))
        .await;
    assert_eq!(second["slug"], "shop-prod-2");
    let (status, answer) = cluster
        .request(
            "POST",
            "/api/sources",
            Some(json!({ "name": "x", "slug": "shop-prod", "engine": "postgres", "config": config })),
        )
        .await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("slug_taken")), "{answer}");

    let (destination, _) = cluster.local_destination().await;
    let job = cluster
        .ok(
            "POST",
            "/api/jobs",
            Some(json!({ "name": "Daily", "sourceId": "shop-prod", "destinationIds": [destination] })),
        )
        .await;
    assert_eq!(
        (job["sourceId"].as_str(), job["overlap"].as_str(), job["maxAttempts"].as_i64()),
        (source["id"].as_str(), Some("queue"), Some(3))
    );
    let changed = cluster.ok("PUT", "/api/jobs/daily", Some(json!({ "compression": "gzip" }))).await;
    assert_eq!((changed["compression"].as_str(), changed["name"].as_str()), (Some("gzip"), Some("Daily")));
    let (status, answer) = cluster.request("PUT", "/api/jobs/daily", Some(json!({ "retention": "x" }))).await;
    assert_eq!((status, answer["fields"][0]["field"].as_str()), (422, Some("retention")), "{answer}");
    for path in ["/api/sources/shop-prod".to_owned(), format!("/api/destinations/{destination}")] {
        let (status, answer) = cluster.request("DELETE", &path, None).await;
        assert_eq!((status, answer["code"].as_str()), (409, Some("in_use")), "{answer}");
    }
    let run = cluster.backup("daily").await;
    cluster.ok("DELETE", "/api/jobs/daily", None).await;
    assert_eq!(cluster.request("GET", "/api/jobs/daily", None).await.0, 404);
    let kept = cluster.execution(run["id"].as_str().expect("an id")).await;
    assert_eq!(
        (kept["jobName"].as_str(), kept["artifacts"].as_array().map(Vec::len)),
        (Some("Daily"), Some(2)),
        "history outlives its job"
    );
    cluster.ok("DELETE", "/api/sources/shop-prod", None).await;
    cluster.ok("DELETE", &format!("/api/destinations/{destination}"), None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_paged_by_cursor_and_an_insert_between_pages_shifts_nothing() {
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let mut triggered = Vec::new();
    for _ in 0..7 {
        triggered.push(cluster.trigger(&job).await);
    }
    let mut path = "/api/executions?limit=3&status=Pending".to_owned();
    let mut seen = Vec::new();
    loop {
        let (page, next) = cluster.page(&path).await;
        seen.extend(page);
        cluster.trigger(&job).await;
        let Some(next) = next else { break };
        path = next;
    }
    triggered.reverse();
    assert_eq!(seen, triggered, "newest first, each once");
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 7);
    assert_eq!(cluster.request("GET", "/api/executions?cursor=x", None).await.0, 400);
    assert_eq!(cluster.request("GET", "/api/executions?limit=0", None).await.0, 400);
}

/// The ids on every page, from the first to the one without a next.
async fn all_pages(cluster: &Cluster, first: &str) -> Vec<Vec<String>> {
    let (mut pages, mut next) = (Vec::new(), Some(first.to_owned()));
    while let Some(path) = next {
        let (page, after) = cluster.page(&path).await;
        pages.push(page);
        next = after;
    }
    pages
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_destinations_and_jobs_are_listed_in_pages_and_whole_without_a_limit() {
    let cluster = Cluster::build().limit(0).start().await;
    let config = PostgresSource::empty().await.config();
    for _ in 0..5 {
        let source = cluster.source("postgres", config.clone()).await;
        let body = json!({ "name": "d", "kind": "local", "config": { "root": cluster.scratch } });
        let destination = id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
        cluster.job(&source, &[&destination], json!({})).await;
    }
    for noun in ["sources", "destinations", "jobs"] {
        let whole = all_pages(&cluster, &format!("/api/{noun}")).await;
        assert_eq!(whole.iter().map(Vec::len).collect::<Vec<_>>(), [5], "{noun}");
        let pages = all_pages(&cluster, &format!("/api/{noun}?limit=2")).await;
        assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1], "{noun}");
        assert_eq!(pages.concat(), whole[0], "{noun}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn executions_are_listed_by_job_status_outcome_and_time() {
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let (one, two) = (
        cluster.job(&source, &[&destination], json!({ "slug": "one" })).await,
        cluster.job(&source, &[&destination], json!({})).await,
    );
    let (first, cancelled, last) =
        (cluster.trigger(&one).await, cluster.trigger(&one).await, cluster.trigger(&two).await);
    cluster.ok("POST", &format!("/api/executions/{cancelled}/cancel"), None).await;
    let since = cluster.execution(&last).await["queuedAt"].as_str().expect("a time").to_owned();
    for (query, wanted) in [
        ("".to_owned(), vec![&last, &cancelled, &first]),
        ("jobId=one".to_owned(), vec![&cancelled, &first]),
        (format!("jobId={two}"), vec![&last]),
        ("jobId=no-such-job".to_owned(), vec![]),
        ("status=Pending".to_owned(), vec![&last, &first]),
        ("outcome=Cancelled".to_owned(), vec![&cancelled]),
        ("jobId=one&status=Pending".to_owned(), vec![&first]),
        (format!("from={since}"), vec![&last]),
        (format!("to={since}"), vec![&cancelled, &first]),
    ] {
        let rows = cluster.ok("GET", &format!("/api/executions?{query}"), None).await;
        let ids: Vec<String> = rows.as_array().expect("rows").iter().map(id).collect();
        assert_eq!(ids.iter().collect::<Vec<_>>(), wanted, "{query}");
    }
    assert_eq!(cluster.request("GET", "/api/executions?status=Done", None).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_outside_its_range_changes_nothing_and_null_brings_the_default_back() {
    let cluster = Cluster::build().workers(0).start().await;
    let before = cluster.ok("GET", "/api/settings", None).await;
    for (name, least, most, default) in [
        ("maxConcurrentJobs", 0, 1000, 4),
        ("maxPendingPerJob", 1, 1_000_000, 100),
        ("maxPending", 1, 1_000_000, 10_000),
        ("keepLogsDays", 1, 36_500, 90),
        ("keepExecutionsDays", 1, 36_500, 365),
    ] {
        for bad in [least - 1, most + 1] {
            let (status, answer) =
                cluster.request("PATCH", "/api/settings", Some(json!({ name: bad, "paused": true }))).await;
            assert_eq!((status, answer["fields"][0]["field"].as_str()), (422, Some(name)), "{name} {bad}: {answer}");
        }
        assert_eq!(cluster.ok("GET", "/api/settings", None).await, before, "{name}");
        for good in [least, most] {
            cluster.ok("PATCH", "/api/settings", Some(json!({ name: good }))).await;
            assert_eq!(cluster.ok("GET", "/api/settings", None).await[name], good);
        }
        cluster.ok("PATCH", "/api/settings", Some(json!({ name: null }))).await;
        assert_eq!(cluster.ok("GET", "/api/settings", None).await[name], default);
    }
    for (body, field) in [
        (json!({ "maxConcurrentJobs": "4" }), "maxConcurrentJobs"),
        (json!({ "maxConcurrentJob": 4 }), "maxConcurrentJob"),
    ] {
        let (status, answer) = cluster.request("PATCH", "/api/settings", Some(body)).await;
        assert_eq!((status, answer["fields"][0]["field"].as_str()), (400, Some(field)), "{answer}");
    }
}
