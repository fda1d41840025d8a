//! The audit log: every change, trigger and sign-in, with who and from where.

use serde_json::{Value, json};

use crate::harness::{Cluster, id, source::PostgresSource};

#[tokio::test(flavor = "multi_thread")]
async fn every_change_and_trigger_is_in_the_audit_log_with_who_from_where_and_the_request() {
    let cluster = Cluster::build().limit(0).start().await;
    let mut config = PostgresSource::empty().await.config();
    config["password"] = json!("s3cret-of-the-audit");
    let source = cluster.source("postgres", config.clone()).await;
    cluster.ok("PUT", &format!("/api/sources/{source}"), Some(json!({ "config": config, "name": "Shop" }))).await;
    let (destination, _) = cluster.local_destination().await;
    cluster.ok("PUT", &format!("/api/destinations/{destination}"), Some(json!({ "name": "Store" }))).await;
    let job = cluster.job(&source, &[&destination], json!({ "name": "Nightly" })).await;
    cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "compression": "gzip" }))).await;
    let request = cluster.http.post(format!("{}/api/jobs/{job}/run", cluster.url(1))).bearer_auth(&cluster.admin_key);
    let response = request.header("x-request-id", "the-trigger").send().await.expect("answers");
    let execution = response.json::<Value>().await.expect("JSON")["executionId"].as_str().expect("an id").to_owned();
    cluster.ok("POST", &format!("/api/executions/{execution}/cancel"), None).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPending": 77 }))).await;
    let group = cluster.ok("POST", "/api/runs", Some(json!({ "jobs": [job] }))).await;
    cluster
        .ok("POST", &format!("/api/executions/{}/cancel", group["executionId"].as_str().expect("an id")), None)
        .await;
    let key =
        id(&cluster.ok("POST", "/api/api-keys", Some(json!({ "name": "ci", "permissions": ["jobs:read"] }))).await);
    cluster.ok("POST", &format!("/api/api-keys/{key}/rotate"), None).await;
    cluster.ok("PUT", &format!("/api/api-keys/{key}"), Some(json!({ "enabled": false }))).await;
    for path in [
        format!("/api/api-keys/{key}"),
        format!("/api/jobs/{job}"),
        format!("/api/sources/{source}"),
        format!("/api/destinations/{destination}"),
    ] {
        cluster.ok("DELETE", &path, None).await;
    }
    let log = cluster.ok("GET", "/api/audit", None).await;
    let entries = log.as_array().expect("entries");
    let mut actions: Vec<&str> = entries.iter().filter_map(|e| e["action"].as_str()).collect();
    actions.reverse();
    assert_eq!(
        actions,
        [
            "source.create",
            "source.update",
            "destination.create",
            "destination.update",
            "job.create",
            "job.update",
            "execution.trigger",
            "execution.cancel",
            "settings.update",
            "execution.trigger",
            "execution.cancel",
            "api-key.create",
            "api-key.rotate",
            "api-key.update",
            "api-key.delete",
            "job.delete",
            "source.delete",
            "destination.delete",
        ]
    );
    for entry in entries {
        assert_eq!(
            (entry["actorKind"].as_str(), entry["actorName"].as_str(), entry["address"].as_str()),
            (Some("ApiKey"), Some("test"), Some("127.0.0.1")),
            "{entry}"
        );
        assert!(entry["requestId"].is_string() && entry["at"].is_string() && entry["actorId"].is_string(), "{entry}");
    }
    let trigger = cluster.ok("GET", &format!("/api/audit?targetId={execution}&action=execution.trigger"), None).await;
    assert_eq!(
        (trigger[0]["requestId"].as_str(), trigger[0]["targetName"].as_str()),
        (Some("the-trigger"), Some("Nightly"))
    );
    let update = cluster.ok("GET", "/api/audit?action=source.update", None).await;
    assert_eq!(update[0]["details"]["fields"], json!(["config", "name"]), "{update}");
    assert!(!log.to_string().contains("s3cret-of-the-audit"), "a secret is in the audit log");
    let first = cluster.ok("GET", "/api/audit?limit=1", None).await;
    assert_eq!(first[0]["action"], "destination.delete", "newest first");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sign_in_and_every_change_of_people_is_in_the_audit_log() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let said =
        "there is no user yet: make the administrator with POST /api/setup and this token, or with dbackup user create";
    let token = cluster.apis[0].0.wait_for_field(said, "token").await;
    let password = "correct horse battery";
    let http = reqwest::Client::new();
    let call = async |method: &str, path: &str, cookies: &str, body: Value| {
        let request = http.request(method.parse().expect("a method"), format!("{}{path}", cluster.url(0)));
        let request =
            request.header("sec-fetch-site", "same-origin").header("x-request-id", format!("the:{method}:{path}"));
        let response = request.header("cookie", cookies).json(&body).send().await.expect("answers");
        let set = response.headers().get_all("set-cookie").iter().filter_map(|c| c.to_str().ok()?.split(';').next());
        let cookies = set.collect::<Vec<_>>().join("; ");
        (response.status().as_u16(), cookies, response.json::<Value>().await.expect("JSON"))
    };
    let ada = |password: &str| json!({ "name": "ada", "password": password });
    let set_up = json!({ "token": token, "name": "ada", "password": password });
    assert_eq!(call("POST", "/api/setup", "", set_up).await.0, 201);
    assert_eq!(call("POST", "/api/session", "", ada("a wrong password")).await.0, 401);
    let (_, first, _) = call("POST", "/api/session", "", ada(password)).await;
    let (_, second, _) = call("POST", "/api/session/refresh", &first, json!({})).await;
    let body = json!({ "name": "bob", "password": password, "permissions": ["jobs:read"] });
    let (status, _, made) = call("POST", "/api/users", &second, body).await;
    assert_eq!(status, 201, "{made}");
    let bob = format!("/api/users/{}", id(&made["data"]));
    assert_eq!(call("PUT", &bob, &second, json!({ "password": "s3cret of the audit" })).await.0, 200);
    assert_eq!(call("DELETE", &bob, &second, json!({})).await.0, 200);
    let change = json!({ "current": password, "password": "s3cret of the audit" });
    assert_eq!(call("POST", "/api/session/password", &second, change).await.0, 200);
    let (_, third, _) = call("POST", "/api/session", "", ada("s3cret of the audit")).await;
    assert_eq!(call("DELETE", "/api/session", &third, json!({})).await.0, 200);

    let log = cluster.ok("GET", "/api/audit", None).await;
    let mut entries: Vec<&Value> = log.as_array().expect("entries").iter().collect();
    entries.reverse();
    let told: Vec<_> = entries
        .iter()
        .map(|e| ["action", "actorKind", "actorName", "requestId"].map(|field| e[field].as_str().unwrap_or_default()))
        .collect();
    let (put, delete) = (format!("the:PUT:{bob}"), format!("the:DELETE:{bob}"));
    assert_eq!(
        told,
        [
            ["user.set-up", "Anonymous", "ada", "the:POST:/api/setup"],
            ["session.refuse", "Anonymous", "ada", "the:POST:/api/session"],
            ["session.create", "User", "ada", "the:POST:/api/session"],
            ["session.renew", "Anonymous", "a refresh token", "the:POST:/api/session/refresh"],
            ["user.create", "User", "ada", "the:POST:/api/users"],
            ["user.update", "User", "ada", put.as_str()],
            ["user.delete", "User", "ada", delete.as_str()],
            ["user.update", "User", "ada", "the:POST:/api/session/password"],
            ["session.create", "User", "ada", "the:POST:/api/session"],
            ["session.delete", "User", "ada", "the:DELETE:/api/session"],
        ]
    );
    assert!(entries.iter().all(|e| e["address"] == "127.0.0.1"), "{log}");
    let text = log.to_string();
    for secret in [password, "s3cret of the audit", "a wrong password", token.as_str(), "argon2"] {
        assert!(!text.contains(secret), "{secret}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_change_and_a_failed_one_leave_no_entry_and_no_change_goes_without_one() {
    let cluster = Cluster::build().workers(0).start().await;
    let refused = [
        ("PATCH", "/api/settings", json!({ "maxPending": 0 })),
        ("POST", "/api/jobs", json!({ "name": "x", "sourceId": "nope", "destinationIds": [] })),
        ("POST", "/api/jobs/nothing/run", json!({})),
        ("DELETE", "/api/sources/nothing", json!({})),
    ];
    for (method, path, body) in refused {
        assert!(cluster.request(method, path, Some(body)).await.0 >= 400, "{method} {path}");
    }
    assert_eq!(cluster.count("select count(*) from audit_log").await, 0);
    // An entry that cannot be written takes its change with it.
    sqlx::query("alter table audit_log add constraint full_disk check (false) not valid")
        .execute(&cluster.pool)
        .await
        .expect("alters");
    let (status, _) = cluster.request("PATCH", "/api/settings", Some(json!({ "maxPending": 7 }))).await;
    assert_eq!(status, 500);
    assert_ne!(cluster.ok("GET", "/api/settings", None).await["maxPending"], 7);
}
