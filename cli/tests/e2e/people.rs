//! People: the first administrator, users and what they may do.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Value, json};

use crate::harness::{
    Cluster, id,
    people::{Browser, PASSWORD, over_everywhere, user, with_administrator},
    source::PostgresSource,
    until,
};

#[tokio::test(flavor = "multi_thread")]
async fn the_first_administrator_is_made_once_with_the_token_from_the_log_of_any_process() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let token = cluster.apis[0].0.wait_for_field("there is no user yet: make the administrator with POST /api/setup and this token, or with dbackup user create", "token").await;
    let same = cluster.apis[1].0.wait_for_field("there is no user yet: make the administrator with POST /api/setup and this token, or with dbackup user create", "token").await;
    assert_eq!(token, same);
    let mut browser = Browser::new();
    let (status, answer) = browser.page(&cluster, 0, "POST", "/api/setup", Some(json!({ "token": token }))).await;
    assert_eq!((status, answer["fields"][0]["field"].as_str()), (400, Some("name")), "{answer}");
    let needed = browser.page(&cluster, 0, "GET", "/api/setup", None).await.1;
    assert_eq!(needed["data"]["needed"], true, "{needed}");
    let body = |token: &str, password: &str| json!({ "token": token, "name": "ada", "password": password });
    let (status, answer) = browser.page(&cluster, 0, "POST", "/api/setup", Some(body("guess", PASSWORD))).await;
    assert_eq!((status, answer["code"].as_str()), (403, Some("setup_token_wrong")), "{answer}");
    let (status, answer) = browser.page(&cluster, 0, "POST", "/api/setup", Some(body(&token, "short"))).await;
    assert_eq!((status, answer["fields"][0]["field"].as_str()), (422, Some("password")), "{answer}");
    // Each with a name of its own, so that only the token can be in the way.
    let both = (0..6).map(|n| {
        let (url, mut body) = (format!("{}/api/setup", cluster.url(n % 2)), body(&token, PASSWORD));
        body["name"] = json!(format!("ada{n}"));
        async move { Browser::new().call("POST", &url, Some(body), &[]).await }
    });
    let answers = futures::future::join_all(both).await;
    assert_eq!(answers.iter().filter(|(status, _)| *status == 201).count(), 1, "{answers:?}");
    assert!(answers.iter().all(|(status, _)| [201, 409].contains(status)), "{answers:?}");
    assert_eq!(cluster.count("select count(*) from users").await, 1);
    let first = cluster.text("select initcap(name) from users").await;
    let (status, signed_in) = browser.sign_in(&cluster, 1, &first, PASSWORD).await;
    assert_eq!(status, 200, "{signed_in}");
    let granted = signed_in["data"]["user"]["permissions"].as_array().map(Vec::len);
    assert_eq!(granted, Some(common::permission::Permission::ALL.len()));
    assert_eq!(browser.page(&cluster, 0, "GET", "/api/setup", None).await.1["data"]["needed"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_administrators_cannot_take_the_right_from_each_other_at_once() {
    let cluster = with_administrator().await;
    let one = id(&cluster.ok("GET", "/api/users", None).await[0]);
    let (two, _) = user(&cluster, &["*"]).await;
    // Both are under way before either is made: they wait for a lock of the test.
    let lock = locked_users(&cluster).await;
    let demote = json!({ "permissions": ["jobs:read"] });
    let sent = [
        waiting_change(&cluster, 1, &format!("/api/users/{one}"), demote.clone()).await,
        waiting_change(&cluster, 2, &format!("/api/users/{two}"), demote).await,
    ];
    lock.commit().await.expect("commits");
    let mut statuses = Vec::new();
    for answer in sent {
        statuses.push(answer.await.expect("joins"));
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 409]);
}

/// Keeps every change of a user waiting until it is committed.
async fn locked_users(cluster: &Cluster) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut lock = cluster.pool.begin().await.expect("begins");
    sqlx::query("select from users for update").execute(&mut *lock).await.expect("locks");
    lock
}

/// Sends a change and comes back when so many wait; gives its status.
async fn waiting_change(cluster: &Cluster, waiting: i64, path: &str, body: Value) -> tokio::task::JoinHandle<u16> {
    let url = format!("{}{path}", cluster.url(usize::try_from(waiting % 2).expect("small")));
    let request = cluster.http.put(url).bearer_auth(&cluster.admin_key).json(&body);
    let sent = tokio::spawn(async move { request.send().await.expect("answers").status().as_u16() });
    until("the change waits", Duration::from_secs(10), || async {
        let waits =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        (cluster.count(waits).await == waiting).then_some(())
    })
    .await;
    sent
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::async_yields_async, reason = "a change goes on while the next is sent")]
async fn a_person_who_is_disabled_stays_so_when_somebody_renames_them_at_the_same_time() {
    let cluster = with_administrator().await;
    let (user_id, _) = user(&cluster, &["jobs:read"]).await;
    let path = format!("/api/users/{user_id}");
    let lock = locked_users(&cluster).await;
    let sent = [
        waiting_change(&cluster, 1, &path, json!({ "enabled": false })).await,
        waiting_change(&cluster, 2, &path, json!({ "displayName": "Ada" })).await,
    ];
    lock.commit().await.expect("commits");
    for answer in sent {
        assert_eq!(answer.await.expect("joins"), 200);
    }
    let now = cluster.ok("GET", &path, None).await;
    assert_eq!((now["displayName"].as_str(), now["enabled"].as_bool()), (Some("Ada"), Some(false)), "{now}");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_made_changed_and_deleted_within_what_the_caller_holds_and_an_administrator_is_left() {
    let cluster = with_administrator().await;
    let keeper = cluster.key(&["users:read", "users:write", "jobs:read"]).await;
    let create = async |key: &str, body: Value| cluster.request_as(key, "POST", "/api/users", Some(body)).await;
    let (status, made) =
        create(&keeper, json!({ "name": "bob", "password": PASSWORD, "permissions": ["jobs:read"] })).await;
    assert_eq!(status, 201, "{made}");
    let bob = id(&made["data"]);
    for (body, status, field) in [
        (json!({ "name": "eve", "password": PASSWORD, "permissions": ["*"] }), 403, "permissions"),
        (json!({ "name": "Eve", "password": PASSWORD, "permissions": [] }), 422, "name"),
        (json!({ "name": "eve", "password": "short", "permissions": [] }), 422, "password"),
        (json!({ "name": "eve", "permissions": [] }), 422, "password"),
        (json!({ "name": "eve", "password": PASSWORD, "permissions": ["jobs:fly"] }), 422, "permissions"),
    ] {
        let (got, answer) = create(&keeper, body.clone()).await;
        assert_eq!((got, answer["fields"][0]["field"].as_str()), (status, Some(field)), "{body}: {answer}");
    }
    let (status, answer) = create(&keeper, json!({ "name": "bob", "password": PASSWORD, "permissions": [] })).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("name_taken")), "{answer}");

    // Somebody who may do more is not taken over, and can still be switched off; but not the last administrator.
    let (strong, _) = user(&cluster, &["*"]).await;
    for body in [
        json!({ "password": "taken over by me" }),
        json!({ "password": "taken over by me", "permissions": ["jobs:read"] }),
        json!({ "enabled": true }),
        json!({ "name": "mine" }),
    ] {
        let (status, answer) = cluster.request_as(&keeper, "PUT", &format!("/api/users/{strong}"), Some(body)).await;
        assert_eq!((status, answer["code"].as_str()), (403, Some("grant_exceeds")), "{answer}");
    }
    let off = Some(json!({ "enabled": false }));
    assert_eq!(cluster.request_as(&keeper, "PUT", &format!("/api/users/{strong}"), off.clone()).await.0, 200);
    let users = cluster.ok("GET", "/api/users", None).await;
    let last = users
        .as_array()
        .expect("users")
        .iter()
        .find(|u| u["enabled"] == true && u["permissions"].as_array().is_some_and(|p| p.len() > 5));
    let last = id(last.expect("an administrator"));
    for (method, body) in [("DELETE", None), ("PUT", off), ("PUT", Some(json!({ "permissions": ["jobs:read"] })))] {
        let (status, answer) = cluster.request(method, &format!("/api/users/{last}"), body).await;
        assert_eq!((status, answer["code"].as_str()), (409, Some("last_administrator")), "{method}: {answer}");
    }
    let bound = json!({ "name": "bound", "permissions": ["users:write", "jobs:read"], "networks": ["127.0.0.1"] });
    let bound = cluster.ok("POST", "/api/api-keys", Some(bound)).await["key"].as_str().expect("a key").to_owned();
    let (status, answer) =
        create(&bound, json!({ "name": "free", "password": PASSWORD, "permissions": ["jobs:read"] })).await;
    assert_eq!((status, answer["code"].as_str()), (403, Some("grant_exceeds")), "{answer}");
    cluster.ok("DELETE", &format!("/api/users/{bob}"), None).await;
    assert_eq!(cluster.request("GET", &format!("/api/users/{bob}"), None).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_no_administrator_among_the_users_they_are_changed_all_the_same() {
    let cluster = Cluster::build().workers(0).start().await;
    let (user_id, _) = user(&cluster, &["jobs:read"]).await;
    let path = format!("/api/users/{user_id}");
    let changed = cluster.ok("PUT", &path, Some(json!({ "displayName": "Ada" }))).await;
    assert_eq!(changed["displayName"], "Ada", "{changed}");
    cluster.ok("DELETE", &path, None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_a_person_triggers_is_manual_and_names_them_and_their_idempotency_keys_are_their_own() {
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let mut made = BTreeSet::new();
    let mut names = Vec::new();
    for n in 0..2 {
        let (_, name) = user(&cluster, &["jobs:execute", "history:read"]).await;
        let mut browser = Browser::new();
        browser.sign_in(&cluster, n, &name, PASSWORD).await;
        for api in 0..2 {
            let url = format!("{}/api/jobs/{job}/run", cluster.url(api));
            let headers = [("sec-fetch-site", "same-origin"), ("idempotency-key", "nightly")];
            let (status, answer) = browser.call("POST", &url, Some(json!({})), &headers).await;
            assert_eq!(status, 200, "{answer}");
            made.insert(answer["executionId"].as_str().expect("an id").to_owned());
        }
        names.push(name);
    }
    assert_eq!(made.len(), 2, "one for each person: {made:?}");
    for (execution, name) in made.iter().zip(&names) {
        let execution = cluster.execution(execution).await;
        assert_eq!(execution["trigger"], json!({ "type": "Manual", "label": name }), "{execution}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_changes_their_own_password_and_nobody_elses() {
    let cluster = with_administrator().await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let (mut here, mut there) = (Browser::new(), Browser::new());
    here.sign_in(&cluster, 0, &name, PASSWORD).await;
    there.sign_in(&cluster, 1, &name, PASSWORD).await;
    let change = |current: &str| Some(json!({ "current": current, "password": "a newer password" }));
    let (status, answer) = here.page(&cluster, 0, "POST", "/api/session/password", change("not this one")).await;
    assert_eq!((status, answer["fields"][0]["field"].as_str()), (422, Some("current")), "{answer}");
    assert_eq!(here.page(&cluster, 0, "POST", "/api/session/password", change(PASSWORD)).await.0, 200);
    over_everywhere(&cluster, &there).await;
    assert_eq!(there.sign_in(&cluster, 1, &name, PASSWORD).await.0, 401);
    assert_eq!(there.sign_in(&cluster, 1, &name, "a newer password").await.0, 200);
    let (status, answer) = cluster.request("POST", "/api/session/password", change(PASSWORD)).await;
    assert_eq!((status, answer["code"].as_str()), (403, Some("not_a_person")), "{answer}");
    // One's own sessions only, without the right to those of others.
    let (_, other) = user(&cluster, &["jobs:read"]).await;
    let mut stranger = Browser::new();
    let (_, answer) = stranger.sign_in(&cluster, 0, &other, PASSWORD).await;
    let path = format!("/api/sessions/{}", answer["data"]["sessionId"].as_str().expect("an id"));
    assert_eq!(there.page(&cluster, 0, "DELETE", &path, None).await.0, 404);
    let listed = there.page(&cluster, 0, "GET", "/api/sessions", None).await.1;
    let names: Vec<&str> =
        listed["data"].as_array().expect("sessions").iter().filter_map(|s| s["userName"].as_str()).collect();
    assert_eq!(names, [name.as_str()], "{listed}");
    assert_eq!(stranger.page(&cluster, 0, "DELETE", &path, None).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_makes_users_who_can_sign_in() {
    let cluster = Cluster::build().workers(0).start().await;
    let (code, said, _) =
        cluster.dbackup(&["user", "create", "--name", "ada", "--permission", "*"], &format!("{PASSWORD}\n"));
    assert_eq!((code, said.trim()), (Some(0), "ada: done"));
    let mut browser = Browser::new();
    assert_eq!(browser.sign_in(&cluster, 0, "ada", PASSWORD).await.0, 200);
    let (code, _, said) = cluster.dbackup(&["user", "create", "--name", "bob", "--permission", "*"], "short\n");
    assert!(code == Some(2) && said.contains("between 10 and 500"), "{code:?} {said}");
    let (code, _, said) = cluster.dbackup(&["user", "delete", "ada"], "");
    assert!(code == Some(1) && said.contains("another administrator"), "{code:?} {said}");
    assert_eq!(cluster.dbackup(&["user", "password", "ada"], "a newer password\n").0, Some(0));
    over_everywhere(&cluster, &browser).await;
    assert_eq!(browser.sign_in(&cluster, 1, "ada", "a newer password").await.0, 200);
    let bob = ["user", "create", "--name", "bob", "--permission", "jobs:read"];
    assert_eq!(cluster.dbackup(&bob, &format!("{PASSWORD}\n")).0, Some(0));
    let mut browser = Browser::new();
    assert_eq!(browser.sign_in(&cluster, 0, "bob", PASSWORD).await.0, 200);
    assert_eq!(cluster.dbackup(&["user", "disable", "bob"], "").0, Some(0));
    over_everywhere(&cluster, &browser).await;
    assert_eq!(browser.sign_in(&cluster, 1, "bob", PASSWORD).await.0, 401);
    assert_eq!(cluster.dbackup(&["user", "enable", "bob"], "").0, Some(0));
    assert_eq!(browser.sign_in(&cluster, 1, "bob", PASSWORD).await.0, 200);
    assert_eq!(cluster.dbackup(&["user", "delete", "bob"], "").0, Some(0));
    over_everywhere(&cluster, &browser).await;
    assert_eq!(cluster.dbackup(&["user", "rotate-signing-key"], "").0, Some(0));
    let actions = cluster
        .text("select string_agg(action, ' ' order by seq) from audit_log where actor_kind = 'Administrator'")
        .await;
    assert_eq!(
        actions, "user.create user.update user.create user.update user.update user.delete signing-key.rotate",
        "every change by the command line"
    );
    let (code, list, _) = cluster.dbackup(&["user", "list"], "");
    assert!(code == Some(0) && list.contains("ada") && list.contains("users:write"), "{list}");
}
