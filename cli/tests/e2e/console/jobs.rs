//! Jobs, sources and destinations: forms and tables.

use serde_json::{Value, json};
use thirtyfour::Key;

use super::{Browser, is_size, signed_in};
use crate::{
    encryption::key_file,
    harness::{
        Cluster, SOON,
        source::{PASSWORD, PostgresSource},
        until,
    },
    restores::empty_database,
};

/// Whether the browser is on the table of jobs, and its script listens.
const JOBS: &str = "return location.pathname === '/jobs' && document.documentElement.dataset.ready === ''";

/// The error that stands beside a field.
async fn error_of(browser: &Browser, field: &str) -> String {
    let script = format!(
        "const e = document.querySelector('[data-field=\"{field}\"] .error'); return e && !e.hidden && e.textContent"
    );
    browser.until(&format!("an error stands beside {field}"), &script).await.as_str().expect("text").to_owned()
}

/// A job with its source and its destination; gives the three ids.
async fn some_job(cluster: &Cluster, name: &str) -> (String, String, String) {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "name": name, "schedule": "@daily" })).await;
    (source, destination, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_made_with_errors_beside_its_fields_then_found_cloned_changed_paused_and_deleted() {
    let cluster = Cluster::start().await;
    let (source, destination, _) = some_job(&cluster, "Other").await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/jobs/new").await;
    browser.press("Save the job").await;
    assert_eq!(error_of(&browser, "name").await, "is required");
    browser.field("name", "Shop daily").await;
    browser.field("schedule", "at night").await;
    browser.press("Save the job").await;
    assert!(error_of(&browser, "schedule").await.contains("cron"), "{}", browser.text().await);
    assert_eq!(browser.js("return document.activeElement.name").await, "schedule", "the reader is taken there");
    browser.assert_only(422).await;
    browser.field("schedule", "30 2 * * *").await;
    browser.field("expectEverySeconds", "59").await;
    browser.press("Save the job").await;
    assert!(error_of(&browser, "expectEverySeconds").await.contains("60"), "{}", browser.text().await);
    browser.assert_only(422).await;
    browser.field("expectEverySeconds", "86400").await;
    browser.press("Save the job").await;
    browser.until("the jobs are there", JOBS).await;
    browser.until_text("Shop daily").await;
    let job = cluster.ok("GET", "/api/jobs/shop-daily", None).await;
    assert_eq!(
        (job["sourceId"].as_str(), job["destinationIds"][0].as_str(), job["schedule"].as_str()),
        (Some(source.as_str()), Some(destination.as_str()), Some("30 2 * * *"))
    );
    assert_eq!(job["expectEverySeconds"], 86_400);

    browser.field("q", "daily").await;
    browser.keys(Key::Enter).await;
    browser
        .until(
            "one job fits",
            "return location.search === '?q=daily' && document.querySelectorAll('tbody tr').length === 1",
        )
        .await;
    browser.click("summary[aria-label='More for Shop daily']").await;
    browser.press("Clone").await;
    browser.until_path("/jobs/new").await;
    browser.press("Save the job").await;
    browser.until("the jobs are there", JOBS).await;
    browser.until_text("Copy of Shop daily").await;
    let copy = cluster.ok("GET", "/api/jobs/copy-of-shop-daily", None).await;
    for same in ["sourceId", "destinationIds", "schedule", "expectEverySeconds", "timezone", "overlap", "compression"] {
        assert_eq!(copy[same], job[same], "{same}");
    }

    // A change sends what was changed: the audit log has the names.
    browser.click("summary[aria-label='More for Shop daily']").await;
    browser.press("Edit").await;
    browser.until_path("/jobs/").await;
    browser.field("schedule", "").await;
    browser.press("Save").await;
    browser.until_text("The job is saved.").await;
    assert_eq!(cluster.ok("GET", "/api/jobs/shop-daily", None).await["schedule"], Value::Null);
    let fields = cluster
        .text("select details ->> 'fields' from audit_log where action = 'job.update' order by seq desc limit 1")
        .await;
    assert_eq!(fields, "[\"schedule\"]");

    browser.until("the jobs are there", JOBS).await;
    browser.click("summary[aria-label='More for Copy of Shop daily']").await;
    browser.press("Pause").await;
    until("the job is paused", SOON, || async {
        (cluster.ok("GET", "/api/jobs/copy-of-shop-daily", None).await["enabled"] == false).then_some(())
    })
    .await;
    // The list does not change under a menu that is open, so not before it shows what was done.
    let resumes =
        "return [...document.querySelectorAll('button')].some((button) => button.textContent.trim() === 'Resume')";
    browser.until("the list shows it paused", resumes).await;
    browser.click("summary[aria-label='More for Copy of Shop daily']").await;
    browser.press("Resume").await;
    browser.until_text("Its schedule is on again.").await;
    assert_eq!(cluster.ok("GET", "/api/jobs/copy-of-shop-daily", None).await["enabled"], true);
    browser.assert_clean().await;
    deletes_what_was_meant(&cluster, &browser).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_encrypted_by_its_form_and_its_backup_restored_by_the_page_with_the_identity() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(100).await;
    let held = cluster.source("postgres", source.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&held, &[&destination], json!({ "name": "Shop" })).await;
    let (key, recipient) = key_file(&cluster.scratch);
    let browser = signed_in(&cluster, &["*"]).await;
    let edit = async || {
        browser.go(&format!("/jobs/{job}/edit")).await;
        browser.click("details.section summary").await;
    };
    edit().await;
    browser.field("encryption.recipients", "age1nobody").await;
    browser.press("Save").await;
    assert!(error_of(&browser, "encryption.recipients").await.contains("not an age recipient"));
    browser.assert_only(422).await;
    browser.field("encryption.recipients", &recipient).await;
    browser.press("Save").await;
    browser.until_text("The job is saved.").await;
    let encryption = async || cluster.ok("GET", &format!("/api/jobs/{job}"), None).await["encryption"].clone();
    assert_eq!(encryption().await, json!({ "recipients": [recipient] }));

    let backup = cluster.backup(&job).await;
    let into = empty_database(&source).await;
    browser.go(&format!("/executions/{}", backup["id"].as_str().expect("an id"))).await;
    browser.until_text("age, for 1 recipient").await;
    browser.press("Restore").await;
    let there = "return location.pathname.endsWith('/restore') && document.documentElement.dataset.ready === ''";
    browser.until("the form of the restore is there", there).await;
    browser.field("into", &into).await;
    browser.press("Restore").await;
    assert_eq!(error_of(&browser, "identity").await, "is required");
    let text = std::fs::read_to_string(&key).expect("text");
    // As a person copies it: the whole file, of which a field keeps one line.
    browser.field("identity", &text.replace('\n', "")).await;
    browser.press("Restore").await;
    browser.until_text("Success").await;
    source.assert_same(&into).await;

    edit().await;
    browser.field("encryption.recipients", "").await;
    browser.press("Save").await;
    browser.until_text("The job is saved.").await;
    assert_eq!(encryption().await, Value::Null);
    browser.assert_clean().await;
}

async fn deletes_what_was_meant(cluster: &Cluster, browser: &Browser) {
    for (answer, status) in [("Cancel", 200), ("Delete the job", 404)] {
        browser.click("summary[aria-label='More for Copy of Shop daily']").await;
        browser.press("Delete").await;
        browser.until_text("Its history and its stored backups stay.").await;
        browser.press(answer).await;
        browser.until("the question is gone", "return !document.getElementById('confirm').open").await;
        if status == 404 {
            browser.until_text("The job is deleted.").await;
        }
        assert_eq!(cluster.request("GET", "/api/jobs/copy-of-shop-daily", None).await.0, status, "{answer}");
    }
    assert_eq!(cluster.request("GET", "/api/jobs/shop-daily", None).await.0, 200);
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_jobs_tells_what_is_backed_up_when_and_how_it_went_last() {
    let cluster = Cluster::start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(100).await.config()).await;
    let more = json!({ "name": "Shop", "schedule": "30 2 * * *", "timezone": "Europe/Berlin" });
    let id = cluster.job(&source, &[&destination], more).await;
    let run = cluster.backup(&id).await;
    let job = cluster.ok("GET", &format!("/api/jobs/{id}"), None).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/jobs").await;
    let cell = async |label: &str| {
        browser.js(&format!("return document.querySelector('tbody [data-label=\"{label}\"]').innerText.trim()")).await
    };
    let time = async |label: &str| {
        browser.js(&format!("return document.querySelector('tbody [data-label=\"{label}\"] time').dateTime")).await
    };
    assert!(cell("Source").await.as_str().is_some_and(|text| text.ends_with(" PostgreSQL")), "the engine");
    assert_eq!(cell("Schedule").await, "30 2 * * * Europe/Berlin");
    assert_eq!(cell("Newest run").await, "Success");
    assert_eq!(
        (time("Next run").await, time("Last started").await),
        (job["nextRunAt"].clone(), job["lastRunAt"].clone())
    );
    let (shown, size) = (cell("Last size").await, run["size"].as_i64().expect("a size"));
    assert!(is_size(&shown, size), "{shown} of {size} bytes");
    let icon = "return document.querySelector('[data-dialog] use').getAttribute('href').split('#')[1]";
    assert_eq!(browser.js(icon).await, "webhook");
    browser.assert_clean().await;
}

/// Goes from the page of a thing to its form.
async fn edit(browser: &Browser) {
    browser.press("Edit").await;
    browser
        .until(
            "the form is there",
            "return location.pathname.endsWith('/edit') && document.documentElement.dataset.ready === ''",
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_does_not_work_says_so_and_a_stored_password_stays_out_of_the_page() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::empty().await;
    let mut config = source.config();
    config["databases"] = json!(["no_such_database"]);
    let id = cluster.source("postgres", config).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go(&format!("/sources/{id}")).await;
    browser.press("Test the connection").await;
    browser.until_text("It does not work: ").await;
    browser.until_text("no_such_database").await;
    edit(&browser).await;
    assert!(!browser.js("return document.documentElement.outerHTML").await.to_string().contains(PASSWORD));
    browser.field("config.databases", &source.database).await;
    browser.press("Save and test").await;
    browser.until_text("It works: ").await;

    // Another address needs the password again.
    edit(&browser).await;
    browser.field("config.host", "localhost").await;
    browser.press("Save and test").await;
    assert!(error_of(&browser, "config.password").await.contains("must be given anew"));
    browser.assert_only(422).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_and_a_destination_say_which_jobs_use_them_and_where_they_are() {
    let cluster = Cluster::start().await;
    let (source, destination, _) = some_job(&cluster, "Shop").await;
    let (other, _, _) = some_job(&cluster, "Other").await;
    let browser = signed_in(&cluster, &["*"]).await;
    let users = "return [...document.querySelectorAll('.plain-list li')].map((job) => job.textContent)";
    for (page, names) in [
        (format!("/sources/{source}"), json!(["Shop"])),
        (format!("/destinations/{destination}"), json!(["Shop"])),
        (format!("/sources/{other}"), json!(["Other"])),
    ] {
        browser.go(&page).await;
        assert_eq!(browser.js(users).await, names, "{page}");
    }
    let places = "return [...document.querySelectorAll('[data-label=Where]')].map((place) => place.textContent)";
    browser.go("/sources").await;
    assert_eq!(browser.js(places).await, json!(["127.0.0.1", "127.0.0.1"]));
    let bucket = json!({ "bucket": "backups", "endpoint": "https://s3.example.com", "accessKeyId": "a", "secretAccessKey": "b" });
    cluster.ok("POST", "/api/destinations", Some(json!({ "name": "Bucket", "kind": "s3", "config": bucket }))).await;
    browser.go("/destinations").await;
    let places = browser.js(places).await;
    assert!(places.as_array().expect("places").contains(&json!("backups https://s3.example.com")), "{places}");
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_forms_of_connections_are_those_that_the_api_describes() {
    let cluster = Cluster::build().workers(0).start().await;
    let browser = signed_in(&cluster, &["*"]).await;
    for (list, page) in [("/api/engines", "/sources/new"), ("/api/destination-kinds", "/destinations/new")] {
        let described = cluster.ok("GET", list, None).await;
        for what in described.as_array().expect("a list") {
            let id = what["id"].as_str().expect("an id");
            browser.go(&format!("{page}?what={id}")).await;
            let shown = browser.js("const text = (i, css) => i.closest('.field').querySelector(css)?.textContent ?? '';
                return [...document.querySelectorAll('[name^=\"config.\"]')].map((i) => [i.name.slice(7), i.dataset.type, i.type === 'password', i.required,
                    text(i, 'label').replace(' optional', ''), text(i, '.help'),
                    i.dataset.type === 'choice' ? [...i.options].map((o) => o.value) : []]).sort()").await;
            let mut wanted: Vec<Value> = what["fields"]
                .as_array()
                .expect("fields")
                .iter()
                .map(|field| {
                    let options: Vec<&Value> =
                        field["options"].as_array().expect("options").iter().map(|o| &o["value"]).collect();
                    json!([
                        field["name"],
                        field["type"],
                        field["type"] == "secret",
                        field["required"],
                        field["label"],
                        field["help"],
                        options
                    ])
                })
                .collect();
            wanted.sort_by_key(Value::to_string);
            assert_eq!(shown, json!(wanted), "{id}");
        }
    }
    browser.assert_clean().await;
}
