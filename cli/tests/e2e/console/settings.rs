//! Settings, and what a person may not do.

use serde_json::json;
use thirtyfour::Key;

use super::signed_in;
use crate::harness::{
    Cluster, SOON,
    source::{PostgresSource, job_without_workers},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_waits_says_why_and_begins_at_once_when_the_limit_is_raised() {
    let cluster = Cluster::build().limit(0).start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let id = cluster.trigger(&job).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/settings/cluster").await;
    browser.until_text("all 0 slots are in use (maxConcurrentJobs)").await;
    browser.press("System").await;
    browser.until_path("/settings/system").await;
    browser.field("maxConcurrentJobs", "1001").await;
    browser.press("Save").await;
    browser.until_text("must be between 0 and 1000").await;
    browser.assert_only(422).await;
    browser.field("maxConcurrentJobs", "2").await;
    browser.press("Save").await;
    browser.until_text("Saved. It holds from now on.").await;
    assert_eq!(cluster.ok("GET", "/api/settings", None).await["maxConcurrentJobs"], 2);
    assert_eq!(cluster.ended(&id, SOON).await["status"], "Success");
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_links_to_its_trace_where_the_setting_says() {
    let cluster = Cluster::build().workers(0).start().await;
    let job = job_without_workers(&cluster, json!({})).await;
    let id = cluster.trigger(&job).await;
    let trace = cluster.execution(&id).await["traceId"].as_str().expect("a trace").to_owned();
    let browser = signed_in(&cluster, &["*"]).await;
    let link = "return [...document.querySelectorAll('.facts a')].map((a) => a.href)";
    let links = async |template: &str| {
        browser.go("/settings/system").await;
        browser.field("traceUrlTemplate", template).await;
        browser.press("Save").await;
        browser.until_text("Saved. It holds from now on.").await;
        browser.go(&format!("/executions/{id}")).await;
        browser.js(link).await
    };
    assert_eq!(
        links("https://jaeger.example/trace/{traceId}").await,
        json!([format!("https://jaeger.example/trace/{trace}")])
    );
    assert_eq!(links("").await, json!([]));
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_is_shown_nothing_that_they_may_not_do() {
    let cluster = Cluster::build().workers(0).start().await;
    job_without_workers(&cluster, json!({ "name": "Shop" })).await;
    let browser = signed_in(&cluster, &["jobs:read", "settings:read"]).await;
    let links = "return [...document.querySelectorAll('nav a')].map((a) => a.getAttribute('href'))";
    browser.go("/jobs").await;
    assert_eq!(
        browser.js(links).await,
        json!(["/", "/jobs", "/access/sessions", "/settings/system", "/settings/webhooks"])
    );
    let offered = browser.js("return [...document.querySelectorAll('main button, main a, main summary')].map((b) => b.textContent.trim())").await;
    assert_eq!(offered, json!(["API Trigger"]), "no run, no edit, no source, no history");
    browser.click("[data-dialog]").await;
    browser.until_text("from whoever may make one").await;
    browser.keys(Key::Escape).await;
    browser.go("/settings/system").await;
    assert_eq!(browser.js("return document.querySelectorAll('main form').length").await, 0);
    browser.assert_clean().await;
    browser.go("/sources").await;
    browser.until_text("your user lacks the permission sources:read").await;
    browser.assert_only(403).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_its_reader_may_not_end_has_no_button_for_it() {
    let cluster = Cluster::build().workers(0).start().await;
    let ends = "return document.querySelectorAll('[data-api^=\"DELETE /api/sessions/\"]').length";
    let (reader, _other) = (signed_in(&cluster, &["users:read"]).await, signed_in(&cluster, &[]).await);
    reader.go("/access/sessions").await;
    assert_eq!(reader.js("return document.querySelectorAll('#sessions tbody tr').length").await, 2);
    assert_eq!(reader.js(ends).await, 0);
    let writer = signed_in(&cluster, &["users:read", "users:write"]).await;
    writer.go("/access/sessions").await;
    assert_eq!(writer.js(ends).await, 2, "those of both others");
    reader.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_is_cut_shorter_is_asked_for_and_a_longer_one_is_not() {
    let cluster = Cluster::build().workers(0).start().await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/settings/system").await;
    let stored =
        "select coalesce((select (value #>> '{}')::int from settings where name = 'keepLogsDays'), -1)::bigint";
    browser.field("keepLogsDays", "400").await;
    browser.field("keepExecutionsDays", "1000").await;
    browser.press("Save").await;
    browser.until_text("Saved. It holds from now on.").await;
    assert_eq!(cluster.count(stored).await, 400);
    assert_eq!(cluster.ok("GET", "/api/settings", None).await["keepExecutionsDays"], 1000);
    browser.field("keepLogsDays", "7").await;
    browser.press("Save").await;
    browser.until_text("are deleted for good").await;
    assert_eq!(cluster.count(stored).await, 400, "it was sent before the answer");
    browser.press("Delete what is older").await;
    crate::harness::until("it is stored", SOON, || async { (cluster.count(stored).await == 7).then_some(()) }).await;
    browser.assert_clean().await;
}
