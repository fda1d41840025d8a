//! The API trigger: what the dialog shows is what the tests of the samples run, and it works as it stands there.

use serde_json::json;
use thirtyfour::Key;

use super::signed_in;
use crate::{
    harness::{Cluster, SOON, source::PostgresSource, until},
    samples::{Script, run},
};

#[tokio::test(flavor = "multi_thread")]
async fn the_curl_of_the_dialog_triggers_its_job_in_a_shell_with_a_key_made_there_for_that_job_alone() {
    let cluster = Cluster::start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let job = cluster.job(&source, &[&destination], json!({ "name": "Shop" })).await;
    let other = cluster.job(&source, &[&destination], json!({ "name": "Other" })).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/jobs").await;
    browser.click("[aria-label='API trigger of Shop']").await;
    browser.until("the dialog is open", "return !!document.querySelector('dialog.sheet[open]')").await;
    browser.press("Make a key for this job").await;
    let key = browser.until("the key is shown", "return document.getElementById('made-key').textContent").await;
    let key = key.as_str().expect("text").to_owned();

    let made = cluster.ok("GET", "/api/api-keys", None).await;
    let made = made.as_array().expect("keys").iter().find(|made| made["name"] == "Trigger of Shop").expect("the key");
    assert_eq!((&made["permissions"], &made["jobIds"]), (&json!(["jobs:execute", "history:read"]), &json!([job])));
    assert_eq!(cluster.request_as(&key, "POST", &format!("/api/jobs/{other}/run"), None).await.0, 404);

    // All of them are those that the tests of the samples run.
    let samples = api::samples::of(cluster.url(0), &key, &job);
    for sample in &samples {
        let text = browser.js(&format!("return document.getElementById('code-{}').textContent", sample.id)).await;
        assert_eq!(text.as_str(), Some(sample.text.as_str()), "{}", sample.id);
        for (name, value) in &sample.variables {
            let shown =
                browser.js(&format!("return document.getElementById('var-{}-{name}').textContent", sample.id)).await;
            assert_eq!(shown.as_str(), Some(value.as_str()), "{name}");
        }
    }
    let facts = "return [...document.querySelectorAll('dialog[open] .urls dd')].map((fact) => fact.innerText.trim().replace(/\\s+/g, ' '))";
    let server = cluster.url(0);
    assert_eq!(
        browser.js(facts).await,
        json!([
            format!("POST {server}/api/jobs/{job}/run"),
            format!("GET {server}/api/executions/EXECUTION_ID"),
            "jobs:execute history:read"
        ])
    );
    let tabs = browser.js("return [...document.querySelectorAll('[role=tab]')].map((t) => t.textContent)").await;
    assert_eq!(tabs, json!(samples.iter().map(|sample| sample.title).collect::<Vec<_>>()));

    // Copied, and said where it is heard: outside a modal dialog it would not be.
    browser.allow_clipboard().await;
    browser.js("document.querySelector('dialog[open] [data-copy=code-curl]').click()").await;
    browser
        .until(
            "the copy is told",
            "return document.querySelector('dialog[open] #notice.shown')?.textContent === 'Copied.'",
        )
        .await;
    let copied = browser.copied().await;
    assert_eq!(
        Some(copied.as_str()),
        Some(samples.iter().find(|sample| sample.id == "curl").expect("curl").text.as_str())
    );

    // Each has its button to be copied by.
    let of_sample = samples.iter().flat_map(|sample| {
        let variables = sample.variables.iter().map(|(name, _)| format!("var-{}-{name}", sample.id));
        variables.chain([format!("code-{}", sample.id)])
    });
    let names: Vec<String> =
        ["trigger-url", "poll-url", "made-key"].map(str::to_owned).into_iter().chain(of_sample).collect();
    let buttons = "return [...document.querySelectorAll('dialog[open] [data-copy]')].map((b) => b.dataset.copy)";
    assert_eq!(browser.js(buttons).await, json!(names));
    for name in names {
        let wanted = browser.js(&format!("return document.getElementById('{name}').textContent")).await;
        browser.js(&format!("document.querySelector('dialog[open] [data-copy=\"{name}\"]').click()")).await;
        until(&format!("{name} is copied"), SOON, || async { (browser.copied().await == wanted).then_some(()) }).await;
    }

    // Pasted into a shell.
    let curl = browser.js("return document.getElementById('code-curl').textContent").await;
    let output = run(Script::shell(curl.as_str().expect("text"))).await;
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let execution = answer["executionId"].as_str().unwrap_or_else(|| panic!("{answer}"));
    let ended = cluster.ended(execution, SOON).await;
    assert_eq!((ended["status"].as_str(), ended["jobId"].as_str()), (Some("Success"), Some(job.as_str())), "{ended}");
    assert_eq!(ended["trigger"]["label"], "Trigger of Shop");

    // The row behind the dialog is shown anew, and with it the link that opened the dialog.
    browser.until("the table says so", "return document.getElementById('jobs').innerText.includes('Success')").await;

    // By keyboard: the arrow goes to the next tab, Escape back to where it was opened.
    browser.click("#tab-curl").await;
    browser.keys(Key::Right).await;
    assert_eq!(browser.js("return document.activeElement.id").await, "tab-bash");
    assert_eq!(browser.js("return document.getElementById('sample-bash').checkVisibility()").await, true);
    browser.keys(Key::Escape).await;
    browser
        .until(
            "the focus is back",
            "return document.activeElement.getAttribute('aria-label') === 'API trigger of Shop'",
        )
        .await;
    browser.assert_clean().await;
}
