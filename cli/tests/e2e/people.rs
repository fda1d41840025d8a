//! People: the first administrator, sign-in, sessions, users.

use std::{
    collections::BTreeSet,
    io::Write,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::harness::{Cluster, binary, id, source::PostgresSource, unique, until};

const PASSWORD: &str = "correct horse battery";
/// What a process may remember of a session is half a second old; the promise is one.
const REVOKED: Duration = Duration::from_secs(1);

/// A browser: it keeps cookies, and says where its page is from.
struct Browser {
    http: reqwest::Client,
    cookies: std::collections::BTreeMap<String, String>,
    set: Vec<String>,
}

impl Browser {
    fn new() -> Self {
        Self { http: reqwest::Client::new(), cookies: Default::default(), set: Vec::new() }
    }

    async fn call(&mut self, method: &str, url: &str, body: Option<Value>, headers: &[(&str, &str)]) -> (u16, Value) {
        let mut request = self.http.request(method.parse().expect("a method"), url);
        let cookies: Vec<String> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if !cookies.is_empty() {
            request = request.header("cookie", cookies.join("; "));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("answers");
        let status = response.status().as_u16();
        self.set =
            response.headers().get_all("set-cookie").iter().map(|v| v.to_str().expect("text").to_owned()).collect();
        for cookie in &self.set {
            let (name, value) = cookie.split(';').next().and_then(|pair| pair.split_once('=')).expect("a pair");
            self.cookies.insert(name.to_owned(), value.to_owned());
        }
        (status, response.json().await.expect("JSON"))
    }

    /// From a page of the service.
    async fn page(
        &mut self,
        cluster: &Cluster,
        api: usize,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        let url = format!("{}{path}", cluster.url(api));
        self.call(method, &url, body, &[("sec-fetch-site", "same-origin")]).await
    }

    async fn sign_in(&mut self, cluster: &Cluster, api: usize, name: &str, password: &str) -> (u16, Value) {
        self.page(cluster, api, "POST", "/api/session", Some(json!({ "name": name, "password": password }))).await
    }
}

async fn user(cluster: &Cluster, permissions: &[&str]) -> (String, String) {
    let name = unique("user");
    let body = json!({ "name": name, "password": PASSWORD, "permissions": permissions });
    (id(&cluster.ok("POST", "/api/users", Some(body)).await), name)
}

/// Somebody who may administer users, so that a test may take that from another.
async fn with_administrator() -> Cluster {
    let cluster = Cluster::build().workers(0).start().await;
    user(&cluster, &["*"]).await;
    cluster
}

async fn over_everywhere(cluster: &Cluster, browser: &Browser) {
    for api in 0..2 {
        let mut again = Browser::new();
        again.cookies = browser.cookies.clone();
        until(&format!("process {api} refuses the session"), REVOKED, || {
            let mut again = Browser { http: again.http.clone(), cookies: again.cookies.clone(), set: Vec::new() };
            async move {
                let (status, answer) = again.page(cluster, api, "GET", "/api/session", None).await;
                (status == 401 && answer["code"] == "session_over").then_some(())
            }
        })
        .await;
    }
}

/// Has every process remember the session. It forgets everything when it learns of a change, such as the making of
/// the user: only what is used after that is remembered.
async fn remembered_everywhere(cluster: &Cluster, browser: &mut Browser) {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(700) {
        for api in 0..2 {
            assert_eq!(browser.page(cluster, api, "GET", "/api/jobs", None).await.0, 200);
        }
    }
}

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
async fn a_person_signs_in_works_on_every_process_and_signs_out() {
    let cluster = with_administrator().await;
    let (user_id, name) = user(&cluster, &["jobs:read", "settings:write", "settings:read"]).await;
    let mut browser = Browser::new();
    let (status, answer) = browser.sign_in(&cluster, 0, &name, PASSWORD).await;
    assert_eq!((status, answer["data"]["user"]["id"].as_str()), (200, Some(user_id.as_str())), "{answer}");
    assert!(!answer.to_string().contains("argon2"), "{answer}");
    assert_eq!(browser.set.len(), 2, "{:?}", browser.set);
    for cookie in &browser.set {
        assert!(cookie.contains("; HttpOnly") && cookie.contains("; SameSite=Strict"), "{cookie}");
    }
    let first = browser.cookies.clone();
    for api in 0..2 {
        assert_eq!(browser.page(&cluster, api, "GET", "/api/jobs", None).await.0, 200);
        let who = browser.page(&cluster, api, "GET", "/api/session", None).await.1;
        assert_eq!(who["data"]["name"].as_str(), Some(name.as_str()), "{who}");
    }
    let (status, answer) = browser.page(&cluster, 1, "GET", "/api/sources", None).await;
    assert_eq!((status, answer["code"].as_str()), (403, Some("permission_missing")), "{answer}");

    // Nor is anybody signed in by a page elsewhere.
    let credentials = Some(json!({ "name": name, "password": PASSWORD }));
    for headers in [("sec-fetch-site", "cross-site"), ("origin", "https://evil.example")] {
        let url = format!("{}/api/session", cluster.url(0));
        let (status, answer) = Browser::new().call("POST", &url, credentials.clone(), &[headers]).await;
        assert_eq!((status, answer["code"].as_str()), (403, Some("other_origin")), "{headers:?}: {answer}");
    }

    // A change must come from a page of this service.
    let (url, body) = (format!("{}/api/settings", cluster.url(0)), json!({ "maxPending": 77 }));
    let host = cluster.url(0).trim_start_matches("http://").to_owned();
    for (headers, status) in [
        (vec![], 403),
        (vec![("sec-fetch-site", "cross-site")], 403),
        (vec![("sec-fetch-site", "same-site")], 403),
        (vec![("origin", "https://evil.example")], 403),
        (vec![("sec-fetch-site", "same-origin")], 200),
        (vec![("origin", cluster.url(0)), ("host", host.as_str())], 200),
    ] {
        let (got, answer) = browser.call("PATCH", &url, Some(body.clone()), &headers).await;
        assert_eq!(got, status, "{headers:?}: {answer}");
    }

    let sessions = browser.page(&cluster, 0, "GET", "/api/sessions", None).await.1;
    assert_eq!(sessions["data"].as_array().map(Vec::len), Some(1), "{sessions}");
    assert_eq!(browser.page(&cluster, 0, "DELETE", "/api/session", None).await.0, 200);
    browser.cookies = first;
    over_everywhere(&cluster, &browser).await;
    let actions =
        cluster.text("select string_agg(action, ' ' order by seq) from audit_log where actor_kind = 'User'").await;
    assert_eq!(actions, "session.create settings.update settings.update session.delete");
}

#[tokio::test(flavor = "multi_thread")]
async fn cookies_are_secure_when_a_trusted_proxy_says_that_the_client_speaks_tls() {
    for (trusted, secure) in [("127.0.0.1", true), ("192.0.2.1", false)] {
        let cluster = Cluster::build().workers(0).env("DBACKUP_TRUSTED_PROXIES", trusted).start().await;
        let (_, name) = user(&cluster, &["*"]).await;
        let mut browser = Browser::new();
        let url = format!("{}/api/session", cluster.url(0));
        let body = json!({ "name": name, "password": PASSWORD });
        let headers =
            [("sec-fetch-site", "same-origin"), ("x-forwarded-proto", "https"), ("x-forwarded-for", "192.0.2.7")];
        assert_eq!(browser.call("POST", &url, Some(body), &headers).await.0, 200);
        assert!(browser.set.iter().all(|cookie| cookie.contains("; Secure") == secure), "{:?}", browser.set);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_over_on_every_process_within_a_second_when_it_is_revoked_or_its_person_is_switched_off() {
    let cluster = with_administrator().await;
    for end in ["revoke", "disable", "password", "delete"] {
        let (user_id, name) = user(&cluster, &["jobs:read"]).await;
        let mut browser = Browser::new();
        let (_, answer) = browser.sign_in(&cluster, 0, &name, PASSWORD).await;
        remembered_everywhere(&cluster, &mut browser).await;
        let session = answer["data"]["sessionId"].as_str().expect("an id");
        let path = format!("/api/users/{user_id}");
        match end {
            "revoke" => cluster.ok("DELETE", &format!("/api/sessions/{session}"), None).await,
            "disable" => cluster.ok("PUT", &path, Some(json!({ "enabled": false }))).await,
            "password" => cluster.ok("PUT", &path, Some(json!({ "password": "another password" }))).await,
            _ => cluster.ok("DELETE", &path, None).await,
        };
        over_everywhere(&cluster, &browser).await;
        let refresh = browser.page(&cluster, 1, "POST", "/api/session/refresh", None).await;
        assert_eq!(refresh.0, 401, "{end}: {}", refresh.1);
        if end == "disable" {
            cluster.ok("PUT", &path, Some(json!({ "enabled": true }))).await;
            let refresh = browser.page(&cluster, 1, "POST", "/api/session/refresh", None).await;
            assert_eq!(refresh.0, 401, "a session from before came back with its person: {}", refresh.1);
        }
    }
    // What is taken from a person is taken from their session.
    let (user_id, name) = user(&cluster, &["jobs:read"]).await;
    let mut browser = Browser::new();
    browser.sign_in(&cluster, 0, &name, PASSWORD).await;
    remembered_everywhere(&cluster, &mut browser).await;
    cluster.ok("PUT", &format!("/api/users/{user_id}"), Some(json!({ "permissions": ["settings:read"] }))).await;
    let begin = Instant::now();
    for api in 0..2 {
        while browser.page(&cluster, api, "GET", "/api/jobs", None).await.0 != 403 {
            assert!(begin.elapsed() < REVOKED, "the permission still counts on process {api}");
        }
    }
    assert_eq!(browser.page(&cluster, 1, "GET", "/api/settings", None).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_renewed_by_a_token_that_is_good_once_and_a_stolen_one_ends_it() {
    let cluster = with_administrator().await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let mut browser = Browser::new();
    browser.sign_in(&cluster, 0, &name, PASSWORD).await;
    let stolen = browser.cookies.clone();
    let other = browser
        .call("POST", &format!("{}/api/session/refresh", cluster.url(1)), None, &[("sec-fetch-site", "cross-site")])
        .await;
    assert_eq!((other.0, other.1["code"].as_str()), (403, Some("other_origin")));
    assert_eq!(browser.page(&cluster, 1, "POST", "/api/session/refresh", None).await.0, 200);
    assert_ne!(browser.cookies["dbackup_refresh"], stolen["dbackup_refresh"]);
    // Another window of the same browser, at the same moment.
    let mut window = Browser::new();
    window.cookies = stolen.clone();
    assert_eq!(window.page(&cluster, 0, "POST", "/api/session/refresh", None).await.0, 200);
    assert_eq!(window.cookies["dbackup_refresh"], stolen["dbackup_refresh"], "no second new token");
    // Later it is theft: time is moved, not waited for.
    sqlx::query("update sessions set renewed_at = renewed_at - interval '11 seconds'")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    let mut thief = Browser::new();
    thief.cookies = stolen;
    assert_eq!(thief.page(&cluster, 0, "POST", "/api/session/refresh", None).await.0, 401);
    over_everywhere(&cluster, &browser).await;
    assert_eq!(cluster.count("select count(*) from audit_log where action = 'session.stolen'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_name_gets_the_answer_and_the_time_of_a_wrong_password_and_no_name_is_written_down() {
    let cluster = with_administrator().await;
    let (off, disabled) = user(&cluster, &["jobs:read"]).await;
    cluster.ok("PUT", &format!("/api/users/{off}"), Some(json!({ "enabled": false }))).await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let secret_in_the_wrong_field = "my-password-in-the-name";
    let mut answers = Vec::new();
    let mut times = Vec::new();
    for (name, password) in [
        (name.as_str(), "a wrong password"),
        (secret_in_the_wrong_field, "a wrong password"),
        (disabled.as_str(), PASSWORD),
        ("No Such Name!", "a wrong password"),
    ] {
        let mut took = Vec::new();
        for _ in 0..5 {
            let mut browser = Browser::new();
            let begin = Instant::now();
            let (status, mut answer) = browser.sign_in(&cluster, 0, name, password).await;
            took.push(begin.elapsed());
            answer["requestId"] = Value::Null;
            answers.push((status, answer, browser.set.len()));
        }
        took.sort();
        times.push(took[2]);
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]) && answers[0].0 == 401, "{answers:?}");
    let (quickest, slowest) = (times.iter().min().expect("times"), times.iter().max().expect("times"));
    assert!(*slowest < *quickest * 3, "the time tells who exists: {times:?}");
    let log = cluster.ok("GET", "/api/audit?action=session.refuse", None).await.to_string();
    assert!(log.contains(&name) && !log.contains(secret_in_the_wrong_field), "{log}");
    assert!(!cluster.logs().contains(secret_in_the_wrong_field) && !cluster.logs().contains(PASSWORD));
}

#[tokio::test(flavor = "multi_thread")]
async fn five_sign_ins_a_minute_from_one_address_are_enough() {
    let cluster =
        Cluster::build().workers(0).contract_limits().env("DBACKUP_TRUSTED_PROXIES", "127.0.0.1").start().await;
    let (_, name) = user(&cluster, &["*"]).await;
    let mut statuses = Vec::new();
    for n in 0..7 {
        let url = format!("{}/api/session", cluster.url(n % 2));
        let body = json!({ "name": name, "password": "a wrong password" });
        statuses.push(Browser::new().call("POST", &url, Some(body), &[("x-forwarded-for", "192.0.2.1")]).await.0);
    }
    assert_eq!(statuses, [401, 401, 401, 401, 401, 429, 429]);
    let url = format!("{}/api/session", cluster.url(0));
    let body = json!({ "name": name, "password": PASSWORD });
    assert_eq!(Browser::new().call("POST", &url, Some(body), &[("x-forwarded-for", "192.0.2.2")]).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_signed_by_the_key_before_counts_after_a_rotation() {
    let cluster = with_administrator().await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let (mut before, mut after) = (Browser::new(), Browser::new());
    before.sign_in(&cluster, 0, &name, PASSWORD).await;
    assert_eq!(dbackup(&cluster, &["user", "rotate-signing-key"], "").0, Some(0));
    // From the moment that every process signs with the new key.
    let kid = |browser: &Browser| browser.cookies["dbackup_session"].split('.').next().expect("a header").to_owned();
    until("the new key signs", REVOKED, || {
        let (cluster, name) = (&cluster, name.clone());
        let old = kid(&before);
        async move {
            let mut browser = Browser::new();
            browser.sign_in(cluster, 1, &name, PASSWORD).await;
            (kid(&browser) != old).then_some(())
        }
    })
    .await;
    after.sign_in(&cluster, 1, &name, PASSWORD).await;
    for browser in [&mut before, &mut after] {
        for api in 0..2 {
            assert_eq!(browser.page(&cluster, api, "GET", "/api/jobs", None).await.0, 200);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_takes_a_token_of_a_new_key_that_it_has_not_heard_of() {
    let cluster = with_administrator().await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let mut before = Browser::new();
    before.sign_in(&cluster, 0, &name, PASSWORD).await;
    let quiet = Instant::now();
    until("process 0 must ask anew", REVOKED, || async {
        (quiet.elapsed() > Duration::from_millis(600)).then_some(())
    })
    .await;
    // Process 1 has asked just now, and need not ask again for half a second.
    assert_eq!(before.page(&cluster, 1, "GET", "/api/jobs", None).await.0, 200);
    let key = common::seal::SealKey::parse(&cluster.env()["DBACKUP_ENCRYPTION_KEY"]).expect("the key");
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    common::session::signing_keys(&mut conn, &key, true).await.expect("rotates");
    let mut after = Browser::new();
    after.sign_in(&cluster, 0, &name, PASSWORD).await;
    let kid = |browser: &Browser| browser.cookies["dbackup_session"].split('.').next().expect("a header").to_owned();
    assert_ne!(kid(&after), kid(&before), "the new key signs");
    assert_eq!(after.page(&cluster, 1, "GET", "/api/jobs", None).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_at_its_time_also_where_it_is_remembered() {
    let cluster = with_administrator().await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let mut browser = Browser::new();
    browser.sign_in(&cluster, 0, &name, PASSWORD).await;
    sqlx::query("update sessions set expires_at = clock_timestamp() + interval '3 seconds'")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    remembered_everywhere(&cluster, &mut browser).await;
    until("its time comes", Duration::from_secs(6), || async {
        (cluster.count("select count(*) from sessions where expires_at <= clock_timestamp()").await == 1).then_some(())
    })
    .await;
    over_everywhere(&cluster, &browser).await;
    assert_eq!(browser.page(&cluster, 1, "POST", "/api/session/refresh", None).await.0, 401);
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

fn dbackup(cluster: &Cluster, args: &[&str], input: &str) -> (Option<i32>, String, String) {
    let mut command = Command::new(binary("dbackup"));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).envs(cluster.env()).args(args);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("dbackup runs");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("writes");
    let output = child.wait_with_output().expect("ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_makes_users_who_can_sign_in() {
    let cluster = Cluster::build().workers(0).start().await;
    let (code, said, _) =
        dbackup(&cluster, &["user", "create", "--name", "ada", "--permission", "*"], &format!("{PASSWORD}\n"));
    assert_eq!((code, said.trim()), (Some(0), "ada: done"));
    let mut browser = Browser::new();
    assert_eq!(browser.sign_in(&cluster, 0, "ada", PASSWORD).await.0, 200);
    let (code, _, said) = dbackup(&cluster, &["user", "create", "--name", "bob", "--permission", "*"], "short\n");
    assert!(code == Some(2) && said.contains("between 10 and 500"), "{code:?} {said}");
    let (code, _, said) = dbackup(&cluster, &["user", "delete", "ada"], "");
    assert!(code == Some(1) && said.contains("another administrator"), "{code:?} {said}");
    assert_eq!(dbackup(&cluster, &["user", "password", "ada"], "a newer password\n").0, Some(0));
    over_everywhere(&cluster, &browser).await;
    assert_eq!(browser.sign_in(&cluster, 1, "ada", "a newer password").await.0, 200);
    let bob = ["user", "create", "--name", "bob", "--permission", "jobs:read"];
    assert_eq!(dbackup(&cluster, &bob, &format!("{PASSWORD}\n")).0, Some(0));
    let mut browser = Browser::new();
    assert_eq!(browser.sign_in(&cluster, 0, "bob", PASSWORD).await.0, 200);
    assert_eq!(dbackup(&cluster, &["user", "disable", "bob"], "").0, Some(0));
    over_everywhere(&cluster, &browser).await;
    assert_eq!(browser.sign_in(&cluster, 1, "bob", PASSWORD).await.0, 401);
    assert_eq!(dbackup(&cluster, &["user", "enable", "bob"], "").0, Some(0));
    assert_eq!(browser.sign_in(&cluster, 1, "bob", PASSWORD).await.0, 200);
    assert_eq!(dbackup(&cluster, &["user", "delete", "bob"], "").0, Some(0));
    over_everywhere(&cluster, &browser).await;
    assert_eq!(dbackup(&cluster, &["user", "rotate-signing-key"], "").0, Some(0));
    let actions = cluster
        .text("select string_agg(action, ' ' order by seq) from audit_log where actor_kind = 'Administrator'")
        .await;
    assert_eq!(
        actions, "user.create user.update user.create user.update user.update user.delete signing-key.rotate",
        "every change by the command line"
    );
    let (code, list, _) = dbackup(&cluster, &["user", "list"], "");
    assert!(code == Some(0) && list.contains("ada") && list.contains("users:write"), "{list}");
}
