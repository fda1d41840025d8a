//! Coming in: the first start, signing in and out, a session that is renewed.

use std::time::{Duration, Instant};

use super::{Browser, sign_in, signed_in};
use crate::harness::{
    Cluster,
    people::{PASSWORD, user},
    source::{PASSWORD as SOURCE_PASSWORD, PostgresSource},
};

/// Promised from the first page to the first backup, with a person's own time left out.
const FIRST_BACKUP: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
async fn the_first_start_leads_from_the_token_to_a_first_backup_in_under_two_minutes() {
    let mut cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(100).await;
    let said =
        "there is no user yet: make the administrator with POST /api/setup and this token, or with dbackup user create";
    let token = cluster.apis[0].0.wait_for_field(said, "token").await;
    let browser = Browser::start(cluster.url(0)).await;
    let began = Instant::now();

    browser.go("/").await;
    assert_eq!(browser.path().await, "/setup");
    for (name, text) in [("token", token.as_str()), ("name", "ada"), ("displayName", "Ada"), ("password", PASSWORD)] {
        browser.field(name, text).await;
    }
    browser.press("Make the administrator").await;
    browser.until_text("To the first backup").await;

    browser.press("Add a source").await;
    browser.until_path("/sources/new").await;
    let port = source.port.to_string();
    for (name, text) in [
        ("name", "Shop"),
        ("config.host", "127.0.0.1"),
        ("config.port", port.as_str()),
        ("config.username", source.role.as_str()),
        ("config.password", SOURCE_PASSWORD),
        ("config.databases", source.database.as_str()),
    ] {
        browser.field(name, text).await;
    }
    browser.press("Save and test").await;
    browser.until_text("It works: 1 database(s)").await;

    browser.press("Add a destination").await;
    browser.until_path("/destinations/new").await;
    browser.field("name", "Folder").await;
    browser.field("config.root", &cluster.scratch.join("backups").display().to_string()).await;
    browser.press("Save and test").await;
    browser.until_text("It works: ").await;

    browser.press("Make a job").await;
    browser.until_path("/jobs/new").await;
    browser.field("name", "Shop daily").await;
    browser.press("Save the job").await;
    browser
        .until(
            "the table of jobs is there",
            "return location.pathname === '/jobs' && !!document.querySelector('table')",
        )
        .await;
    browser.press("Run").await;
    browser.until_path("/executions/").await;
    browser.until("the run succeeds", "return !!document.querySelector('#execution > .head .status.good')").await;
    assert!(began.elapsed() < FIRST_BACKUP, "{:?}", began.elapsed());

    let id = browser.path().await.trim_start_matches("/executions/").to_owned();
    let run = cluster.execution(&id).await;
    assert_eq!((run["status"].as_str(), run["jobName"].as_str()), (Some("Success"), Some("Shop daily")), "{run}");
    browser.go("/").await;
    assert!(!browser.text().await.contains("To the first backup"), "the way has been gone");
    browser.go("/setup").await;
    assert_ne!(browser.path().await, "/setup", "once");
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_comes_to_the_page_that_they_wanted_and_leaves_for_good() {
    let cluster = Cluster::build().workers(0).start().await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let browser = Browser::start(cluster.url(0)).await;
    browser.go("/jobs?q=shop").await;
    assert_eq!(browser.path().await, "/sign-in");
    sign_in(&browser, &name, "not the password").await;
    browser.until_text("Wrong name or password.").await;
    browser.assert_only(401).await;
    sign_in(&browser, &name, PASSWORD).await;
    browser.until("the wanted page is there", "return location.pathname + location.search === '/jobs?q=shop'").await;
    browser.until_path("/jobs").await;
    browser.press("Sign out").await;
    browser.until_path("/sign-in").await;
    browser.go("/jobs").await;
    assert_eq!(browser.path().await, "/sign-in");

    // Nor does the sign-in lead to another place.
    for elsewhere in ["//example.com/", "https://example.com/", "/\\example.com/", "javascript:alert(1)"] {
        browser.go(&format!("/sign-in?next={elsewhere}")).await;
        sign_in(&browser, &name, PASSWORD).await;
        browser.until_path("/").await;
        browser.until("somebody is signed in", "return 'signedIn' in document.body.dataset").await;
        let here = browser.js("return location.origin").await;
        assert_eq!(here.as_str(), Some(cluster.url(0)), "{elsewhere}");
        browser.press("Sign out").await;
        browser.until_path("/sign-in").await;
    }
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ran_out_is_renewed_and_the_page_that_was_wanted_comes() {
    let cluster = Cluster::build().workers(0).start().await;
    let browser = signed_in(&cluster, &["jobs:read"]).await;
    // As after fifteen minutes: the browser forgets the token, and keeps the refresh token.
    browser.cdp("Network.enable", serde_json::json!({})).await;
    let forget = serde_json::json!({ "name": "dbackup_session", "url": cluster.url(0) });
    browser.cdp("Network.deleteCookies", forget).await;
    browser.go("/jobs").await;
    browser.until("the wanted page is there", "return location.pathname === '/jobs'").await;
    browser.assert_clean().await;
}
