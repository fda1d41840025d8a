//! Every page: for a screen reader, a keyboard and a weak eye, on a phone, in the light and in the dark. With the
//! variable `DBACKUP_PICTURES` set to a folder, a picture of each is left there.

use std::path::PathBuf;

use serde_json::json;
use thirtyfour::Key;

use super::{Browser, signed_in};
use crate::{
    harness::{Cluster, SOON, held::Held, hooks::Hooks, source::PostgresSource, until},
    webhooks::webhook,
};

const CHECKS: &str = include_str!("checks.js");

/// Where the next steps of an empty page are.
const OFFERED: &str =
    "return [...document.querySelectorAll('.empty a, .steps a')].map((step) => step.getAttribute('href'))";

/// A cluster in which everything that a page shows is there: a backup, a failure, a run that goes on and one that waits, a
/// key, a worker that misses a mount.
async fn lively() -> (Cluster, Held, Vec<(&'static str, String)>) {
    let mut cluster = Cluster::start().await;
    let (destination, _) = cluster.local_destination().await;
    let shop = PostgresSource::with_rows(2_000).await;
    let mut config = shop.config();
    let make = async |name: &str, config: serde_json::Value| {
        let body = json!({ "name": name, "engine": "postgres", "config": config });
        crate::harness::id(&cluster.ok("POST", "/api/sources", Some(body)).await)
    };
    let source = make("Shop database", config.clone()).await;
    config["databases"] = json!(["no_such_database"]);
    let broken = make("Old shop", config).await;
    let more = json!({ "name": "Shop daily", "schedule": "30 2 * * *", "timezone": "Europe/Berlin" });
    let job = cluster.job(&source, &[&destination], more).await;
    let failing =
        cluster.job(&broken, &[&destination], json!({ "name": "Old shop weekly", "schedule": "@weekly" })).await;
    let good = cluster.backup(&job).await;
    let failed = cluster.ended(&cluster.trigger(&failing).await, SOON).await;
    let body = json!({ "name": "ci", "permissions": ["jobs:execute", "history:read"], "jobIds": [job] });
    cluster.ok("POST", "/api/api-keys", Some(body)).await;
    let held = Held::new(&cluster, json!({ "name": "Large shop" })).await;
    let running = held.run(&cluster).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 0 }))).await;
    let waiting = cluster.trigger(&job).await;
    let (_, batch) = cluster.request("POST", "/api/runs", Some(json!({ "jobs": [job, failing] }))).await;
    let batch = batch["executionId"].as_str().expect("an id").to_owned();
    let hooks = Hooks::start().await;
    let more = json!({ "events": ["failed", "cancelled"], "labels": { "env": "prod" } });
    let (hook, _) = webhook(&cluster, &hooks, more).await;
    let (person, _) = crate::harness::people::user(&cluster, &["jobs:read"]).await;
    // A worker that misses the mount.
    let elsewhere = cluster.scratch.join("elsewhere").display().to_string();
    let hindered = ("DBACKUP_WORKER_NAME", "backup-3".to_owned());
    cluster.add_worker(&[hindered, ("DBACKUP_LOCAL_PATHS", elsewhere)]).await;
    let id = |run: &serde_json::Value| run["id"].as_str().expect("an id").to_owned();
    let pages = vec![
        ("overview", "/".to_owned()),
        ("jobs", "/jobs".to_owned()),
        ("job-form", format!("/jobs/{job}/edit")),
        ("trigger", format!("/jobs/{job}/trigger")),
        ("executions", "/executions".to_owned()),
        ("execution", format!("/executions/{}", id(&good))),
        ("restore-form", format!("/executions/{}/restore", id(&good))),
        ("execution-failed", format!("/executions/{}", id(&failed))),
        ("execution-running", format!("/executions/{running}")),
        ("execution-waiting", format!("/executions/{waiting}")),
        ("execution-batch", format!("/executions/{batch}")),
        ("sources", "/sources".to_owned()),
        ("source-form", "/sources/new".to_owned()),
        ("source", format!("/sources/{source}")),
        ("source-edit", format!("/sources/{source}/edit")),
        ("destinations", "/destinations".to_owned()),
        ("destination-form", "/destinations/new?what=s3".to_owned()),
        ("destination", format!("/destinations/{destination}")),
        ("destination-edit", format!("/destinations/{destination}/edit")),
        ("api-keys", "/access/api-keys".to_owned()),
        ("api-key-form", "/access/api-keys/new".to_owned()),
        ("users", "/access/users".to_owned()),
        ("user-form", "/access/users/new".to_owned()),
        ("user-edit", format!("/access/users/{person}/edit")),
        ("sessions", "/access/sessions".to_owned()),
        ("audit-log", "/access/audit-log".to_owned()),
        ("system", "/settings/system".to_owned()),
        ("cluster", "/settings/cluster".to_owned()),
        ("webhooks", "/settings/webhooks".to_owned()),
        ("webhook-form", "/settings/webhooks/new".to_owned()),
        ("webhook-edit", format!("/settings/webhooks/{hook}/edit")),
    ];
    (cluster, held, pages)
}

/// Looks at the page that the browser is on in every way.
async fn check(browser: &Browser, name: &str) {
    let mut grounds = Vec::new();
    for (way, dark, width, height) in [
        ("light", false, 1280, 900),
        ("dark", true, 1240, 900),
        ("tablet", false, 820, 1180),
        ("phone", false, 390, 844),
    ] {
        browser.look(dark, width, height).await;
        // What is folded is read too.
        browser.js("for (const more of document.querySelectorAll('main details:not(.menu)')) more.open = true").await;
        let problems = browser.js(CHECKS).await;
        assert_eq!(problems, json!([]), "{name} ({way}):\n{problems:#}");
        grounds.push(browser.js("return getComputedStyle(document.body).backgroundColor").await);
        if let Some(folder) = std::env::var_os("DBACKUP_PICTURES") {
            browser.picture(&PathBuf::from(folder).join(format!("{name}-{way}.png"))).await;
        }
    }
    assert!(grounds[0] != grounds[1] && grounds[0] == grounds[3], "{name} is as light in the dark: {grounds:?}");
    browser.assert_clean().await;
}

/// The policy of a page lets nothing in but files of this service, and nothing that stands in the page itself.
async fn assert_strict(browser: &Browser, name: &str) {
    let policy = "return fetch(location.href).then((page) => page.headers.get('content-security-policy'))";
    let policy = browser.js(policy).await;
    let policy = policy.as_str().unwrap_or_else(|| panic!("{name} has no policy"));
    let directives: Vec<Vec<&str>> = policy.split(';').map(|part| part.split_whitespace().collect()).collect();
    for directive in &directives {
        assert!(directive[1..].iter().all(|from| ["'self'", "'none'"].contains(from)), "{name}: {directive:?}");
    }
    for (directive, from) in
        [("default-src", "'none'"), ("frame-ancestors", "'none'"), ("base-uri", "'none'"), ("form-action", "'self'")]
    {
        assert!(directives.contains(&vec![directive, from]), "{name}: {directive} is not {from} in {policy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_can_be_read_by_everybody_fits_a_phone_and_breaks_no_rule_of_its_own() {
    let (cluster, _held, pages) = lively().await;
    let browser = signed_in(&cluster, &["*"]).await;
    for (name, path) in &pages {
        browser.go(path).await;
        if name.starts_with("execution-") || *name == "execution" {
            browser.until("its log has been asked for", "return !document.getElementById('log') || document.querySelectorAll('#log li').length > 0 || !!document.querySelector('#execution[data-status=Pending]')").await;
        }
        check(&browser, name).await;
        assert_strict(&browser, name).await;
    }
    // What went wrong, and a form with errors beside its fields.
    browser.go("/jobs/none/edit").await;
    browser.until_text("Not Found").await;
    browser.assert_only(404).await;
    check(&browser, "error").await;
    browser.go("/jobs/new").await;
    browser.field("name", "Night").await;
    browser.field("schedule", "at night").await;
    browser.press("Save the job").await;
    browser
        .until("an error is shown", "return [...document.querySelectorAll('.error')].some((error) => !error.hidden)")
        .await;
    browser.assert_only(422).await;
    check(&browser, "form-with-errors").await;
    // Each page of the table was looked at, but for those that only differ in what they make.
    let seen = |route: &str| {
        let fits = |path: &str| {
            let path = path.split('?').next().expect("a path");
            let (route, path): (Vec<&str>, Vec<&str>) = (route.split('/').collect(), path.split('/').collect());
            route.len() == path.len() && route.iter().zip(path).all(|(r, p)| *r == p || (*r == "{id}" && p != "new"))
        };
        pages.iter().any(|(_, path)| fits(path))
    };
    let unseen: Vec<&str> = api::ui::pages().iter().map(|page| page.path).filter(|path| !seen(path)).collect();
    let known = ["/setup", "/sign-in", "/jobs/new", "/assets/{version}/{*file}"];
    assert_eq!(unseen, known);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_empty_pages_the_dialogs_and_the_entrance_can_be_read_by_everybody_too() {
    let cluster = Cluster::build().workers(0).start().await;
    let browser = Browser::start(cluster.url(0)).await;
    browser.go("/setup").await;
    check(&browser, "setup").await;
    drop(browser);
    let browser = signed_in(&cluster, &["*"]).await;
    // What is not there yet is said, with where the next step is.
    for (name, path, says, next) in [
        ("empty-overview", "/", "To the first backup", "/sources/new"),
        ("empty-jobs", "/jobs", "There is no job yet", "/sources/new"),
        ("empty-search", "/jobs?q=shop", "No job has “shop” in its name", "/jobs"),
        ("empty-executions", "/executions", "Nothing has run yet", "/jobs"),
        ("empty-filter", "/executions?status=Failed", "Nothing fits these filters", "/executions"),
        ("empty-sources", "/sources", "There is no source yet", "/sources/new"),
        ("empty-destinations", "/destinations", "There is no destination yet", "/destinations/new"),
        ("empty-cluster", "/settings/cluster", "No worker runs", ""),
        ("empty-audit", "/access/audit-log?action=no.such", "No entry of no.such", "/access/audit-log"),
    ] {
        browser.go(path).await;
        browser.until_text(says).await;
        if !next.is_empty() {
            assert_eq!(browser.js(OFFERED).await, json!([next]), "{name}");
        }
        check(&browser, name).await;
    }
    // By keyboard: the first stop skips to the content.
    browser.go("/sources").await;
    browser.keys(Key::Tab).await;
    assert_eq!(browser.js("return document.activeElement.textContent").await, "Skip to the content");
    browser.keys(Key::Enter).await;
    browser.until("the focus is in the content", "return document.activeElement.id === 'main'").await;
    browser.keys(Key::Tab + Key::Enter).await;
    browser.until_path("/sources/new").await;

    // On a phone the navigation is behind a button.
    browser.go("/").await;
    browser.look(false, 390, 844).await;
    let shown = "return document.querySelector('nav a').checkVisibility()";
    assert_eq!(browser.js(shown).await, false);
    browser.click(".menu-button").await;
    browser.until("the navigation is shown", shown).await;
    check_dialogs(&cluster, &browser).await;
    // The key of the tests is the only one.
    browser.go("/access/api-keys").await;
    browser.click("[aria-label='More for test']").await;
    browser.press("Delete").await;
    browser.press("Delete the key").await;
    browser.until_text("There is no API key yet").await;
    let enough = "/access/api-keys/new?permissions=jobs:execute,history:read";
    assert_eq!(browser.js(OFFERED).await, json!([enough]));
    check(&browser, "empty-keys").await;
    browser.look(false, 1280, 900).await;
    browser.press("Sign out").await;
    browser.until_path("/sign-in").await;
    check(&browser, "sign-in").await;
}

async fn check_dialogs(cluster: &Cluster, browser: &Browser) {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    browser.go(&format!("/sources/{source}")).await;
    browser.press("Delete").await;
    browser.until("the question is asked", "return document.getElementById('confirm').open").await;
    assert_eq!(browser.js("return document.activeElement.textContent").await, "Cancel", "Enter destroys nothing");
    check(browser, "confirm").await;
    browser.press("Cancel").await;
    let body = json!({ "name": "Store", "kind": "local", "config": { "root": cluster.scratch } });
    let destination = crate::harness::id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    cluster.job(&source, &[&destination], json!({ "name": "Shop" })).await;
    browser.look(false, 1280, 900).await;
    browser.go("/jobs").await;
    browser.click("[data-dialog]").await;
    browser.until("the dialog is open", "return !!document.querySelector('dialog.sheet[open]')").await;
    check(browser, "trigger-dialog").await;
    browser.press("Close").await;
    until("the dialog is gone", SOON, || async {
        (browser.js("return document.querySelectorAll('dialog.sheet').length").await == 0).then_some(())
    })
    .await;
    browser.look(false, 1280, 900).await;
}
