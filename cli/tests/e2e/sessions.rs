//! Sign-in and sessions.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{
    Cluster,
    people::{Browser, PASSWORD, REVOKED, over_everywhere, remembered_everywhere, user, with_administrator},
    until,
};

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
async fn a_thief_who_renews_again_and_again_is_found_out_when_the_robbed_one_comes() {
    let cluster = with_administrator().await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let mut robbed = Browser::new();
    robbed.sign_in(&cluster, 0, &name, PASSWORD).await;
    let mut thief = Browser::new();
    thief.cookies = robbed.cookies.clone();
    for api in [1, 0, 1] {
        assert_eq!(thief.page(&cluster, api, "POST", "/api/session/refresh", None).await.0, 200);
    }
    assert_eq!(robbed.page(&cluster, 0, "POST", "/api/session/refresh", None).await.0, 401);
    over_everywhere(&cluster, &thief).await;
    assert_eq!(cluster.count("select count(*) from audit_log where action = 'session.stolen'").await, 1);
    assert_eq!(cluster.count("select count(*) from spent_refresh_tokens").await, 0, "they go with their session");
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
    assert_eq!(cluster.dbackup(&["user", "rotate-signing-key"], "").0, Some(0));
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
