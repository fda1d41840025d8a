//! The overview, and the cluster with what can be done about it.

use serde_json::json;

use super::{is_size, signed_in};
use crate::harness::{
    Cluster, SOON,
    held::{HELD_AFTER, Held},
    proxy::Mode,
    source::{PostgresSource, job_without_workers},
    until,
};

/// What the tile with a label says.
fn tile(label: &str) -> String {
    format!(
        "return [...document.querySelectorAll('.tile')].find((t) => t.querySelector('.tile-label').textContent === '{label}').querySelector('.tile-value').textContent.trim()"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_overview_tells_what_runs_waits_failed_comes_next_and_is_stored_and_stays_live() {
    let cluster = Cluster::build().limit(1).start().await;
    let (destination, _) = cluster.local_destination().await;
    let good = cluster.source("postgres", PostgresSource::with_rows(100).await.config()).await;
    let mut config = PostgresSource::empty().await.config();
    config["databases"] = json!(["no_such_database"]);
    let bad = cluster.source("postgres", config).await;
    let good = cluster.job(&good, &[&destination], json!({ "name": "Good" })).await;
    let bad = cluster.job(&bad, &[&destination], json!({ "name": "Bad" })).await;
    let planned = |name: &str, schedule: &str| json!({ "name": name, "schedule": schedule });
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    cluster.job(&source, &[&destination], planned("Yearly", "@yearly")).await;
    cluster.job(&source, &[&destination], planned("Hourly", "@hourly")).await;
    for _ in 0..2 {
        cluster.backup(&good).await;
    }
    assert_eq!(cluster.ended(&cluster.trigger(&bad).await, SOON).await["status"], "Failed");
    let stored = cluster.count("select sum(size_bytes)::bigint from artifacts").await;

    let browser = signed_in(&cluster, &["*"]).await;
    assert_eq!(browser.js(&tile("Running")).await, "0 of 1 slots");
    assert_eq!(browser.js(&tile("Success over 30 days")).await, "66.6 %");
    let bars = browser.js("return document.querySelector('.bars').getAttribute('aria-label')").await;
    assert_eq!(bars, "2 backups ended well in 30 days, 1 failed");
    let last = browser.js("return [...document.querySelectorAll('.bars title')].at(-1).textContent").await;
    assert!(last.as_str().is_some_and(|day| day.ends_with(": 2 good, 1 failed")), "today is the last: {last}");
    let shown = browser.js(&tile("Stored")).await;
    assert!(is_size(&shown, stored), "{shown} of {stored} bytes");
    let rows = "return [...document.querySelectorAll('ul.rows')].map((list) => [...list.children].map((row) => row.firstElementChild.textContent))";
    assert_eq!(browser.js(rows).await, json!([["Bad"], ["Hourly", "Yearly"]]), "failures, and what comes next first");

    // One runs, one waits; the page hears of both.
    let held = Held::new(&cluster, json!({ "name": "Held" })).await;
    held.run(&cluster).await;
    cluster.trigger(&good).await;
    let active = "return JSON.stringify([...document.querySelectorAll('[data-execution]')].map((row) => [row.querySelector('th').innerText, row.dataset.status]))";
    let wanted = json!([["Held", "Running"], ["Good", "Pending"]]).to_string();
    browser.until("both are shown", &format!("{active} === '{wanted}'")).await;
    browser.until("the slot is taken", &(tile("Running") + " === '1 of 1 slots'")).await;
    browser.until("one waits", &(tile("Waiting") + " === '1'")).await;
    browser.until_text("all 1 slots are in use (maxConcurrentJobs)").await;
    browser
        .until("how far it is", "return Number(document.querySelector('[data-status=Running] progress')?.value) > 0")
        .await;
    held.proxy.set(Mode::Pass);
    browser.until_text("Nothing runs or waits.").await;
    browser.until("the success is that of now", &(tile("Success over 30 days") + " === '80.0 %'")).await;
    let stored = cluster.count("select sum(size_bytes)::bigint from artifacts").await;
    let shown = browser.js(&tile("Stored")).await;
    assert!(is_size(&shown, stored), "{shown} of {stored} bytes");
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_while_the_page_was_asked_for_is_not_lost_with_the_older_page() {
    let cluster = Cluster::build().start().await;
    let held = Held::new(&cluster, json!({ "name": "Held" })).await;
    let browser = signed_in(&cluster, &["*"]).await;
    held.proxy.set(Mode::Hold);
    cluster.trigger(&held.job).await;
    browser.until("it is shown", "return !!document.querySelector('[data-status=Running] progress')").await;

    // The page as it is now arrives when it is old.
    let late = "const real = window.fetch;
        window.fetch = async (path, ...more) => {
            const response = await real(path, ...more);
            if (path !== location.pathname) return response;
            const text = await response.text();
            window.asked = true;
            await new Promise((resolve) => { window.arrive = resolve });
            return new Response(text);
        };";
    browser.js(late).await;
    cluster.trigger(&held.job).await;
    browser.until("the page is asked for", "return window.asked").await;
    held.proxy.set(Mode::HoldAfter(HELD_AFTER));
    let progress = "return Number(document.querySelector('[data-status=Running] progress')?.value) > 0";
    browser.until("how far it is", progress).await;
    browser.js("window.arrive()").await;
    browser.until("the page has arrived", "return !!document.querySelector('[data-status=Pending]')").await;
    assert_eq!(browser.js(progress).await, true, "how far it is is known still");
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_shows_its_slots_and_a_worker_is_cordoned_and_uncordoned() {
    let cluster = Cluster::build().workers(1).start().await;
    let held = Held::new(&cluster, json!({ "name": "Held" })).await;
    held.run(&cluster).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/settings/cluster").await;
    let slot = "return [...document.querySelectorAll('tr[data-status=Running] > *')].slice(0, 4).map((cell) => cell.innerText.trim())";
    let worker = cluster.ok("GET", "/api/cluster", None).await["workers"][0].clone();
    let name = worker["name"].as_str().expect("a name").to_owned();
    assert_eq!(browser.js(slot).await, json!(["1", "Held", name, "Dumping"]));
    browser.until_text("1 of ").await;
    let cordoned = async || cluster.ok("GET", "/api/cluster", None).await["workers"][0]["cordoned"].clone();
    browser.press("Cordon").await;
    browser.until_text("It claims nothing more. What it runs goes on.").await;
    browser.until_text("Cordoned").await;
    assert_eq!(cordoned().await, true);
    let waiting = cluster.trigger(&held.job).await;
    held.proxy.set(Mode::Pass);
    browser.until_text("No run is under way.").await;
    browser.until("why it waits is told", "return !!document.querySelector('tr[data-status=Pending] [data-label=Because]')?.innerText.includes('cordoned')").await;
    browser.press("Uncordon").await;
    browser.until_text("It claims again.").await;
    let why = "destination 'nas': is the mount missing?";
    sqlx::query("update workers set out_of_reach = jsonb_build_object(gen_random_uuid(), $1::text)")
        .bind(why)
        .execute(&cluster.pool)
        .await
        .expect("updates");
    browser.go("/settings/cluster").await;
    browser.until_text(why).await;
    assert_eq!(cordoned().await, false);
    assert_eq!(cluster.ended(&waiting, SOON).await["status"], "Success");
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rate_limits_are_changed_and_hold_and_nothing_new_is_claimed_while_it_is_paused() {
    let cluster = Cluster::build().workers(1).rate_limits(json!({})).start().await;
    let browser = signed_in(&cluster, &["*"]).await;
    let job = job_without_workers(&cluster, json!({})).await;
    browser.go("/settings/system").await;
    browser.field("rateLimit.write.limit", "0").await;
    browser.press("Save").await;
    browser
        .until(
            "the error is beside its field",
            "return !document.querySelector('[data-field=\"rateLimit.write.limit\"] .error').hidden",
        )
        .await;
    browser.assert_only(422).await;
    let limits = [("read", 501, 61), ("write", 777, 60), ("signIn", 21, 63)];
    for (name, limit, seconds) in limits {
        browser.field(&format!("rateLimit.{name}.limit"), &limit.to_string()).await;
        browser.field(&format!("rateLimit.{name}.windowSeconds"), &seconds.to_string()).await;
    }
    browser.click("[name=paused]").await;
    browser.press("Save").await;
    browser.until_text("Saved. It holds from now on.").await;
    let stored = cluster.ok("GET", "/api/settings", None).await["rateLimit"].clone();
    for (name, limit, seconds) in limits {
        assert_eq!(stored[name], json!({ "limit": limit, "windowSeconds": seconds }), "{name}");
    }
    let id = cluster.trigger(&job).await;
    until("the new limit is told", SOON, || async {
        let key = cluster.key(&["jobs:read"]).await;
        let request = reqwest::Client::new().delete(format!("{}/api/jobs/none", cluster.url(1))).bearer_auth(key);
        let limit = request.send().await.expect("answers").headers().get("ratelimit-limit")?.to_str().ok()?.to_owned();
        (limit == "777").then_some(())
    })
    .await;
    browser.go("/settings/cluster").await;
    browser.until_text("Nothing new is claimed").await;
    assert_eq!(cluster.execution(&id).await["waitingFor"]["reason"], "paused");
    browser.assert_clean().await;
}
