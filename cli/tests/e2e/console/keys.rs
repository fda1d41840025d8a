//! API keys by the console.

use std::time::Duration;

use serde_json::json;

use super::signed_in;
use crate::harness::{Cluster, SOON, until};

/// What a process may remember of a key is half a second old; the promise is one.
const REVOKED: Duration = Duration::from_secs(1);

async fn status(cluster: &Cluster, key: &str) -> u16 {
    cluster.request_as(key, "GET", "/api/jobs", None).await.0
}

async fn until_status(cluster: &Cluster, key: &str, wanted: u16) {
    until(&format!("the key gets {wanted}"), REVOKED, || async {
        (status(cluster, key).await == wanted).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_shown_once_used_disabled_rotated_and_deleted() {
    let cluster = Cluster::build().workers(0).start().await;
    let browser = signed_in(&cluster, &["jobs:read", "history:read", "api-keys:read", "api-keys:write"]).await;
    browser.go("/access/api-keys/new").await;
    let offered = browser.js("return [...document.querySelectorAll('[name=permissions]')].map((i) => i.value)").await;
    assert_eq!(
        offered,
        json!(["jobs:read", "history:read", "api-keys:read", "api-keys:write"]),
        "nobody grants what they do not hold"
    );
    let grouped = "return [...document.querySelector('.options').children].map((part) => part.innerText.trim())";
    assert_eq!(
        browser.js(grouped).await,
        json!(["Jobs", "jobs:read", "History", "history:read", "API keys", "api-keys:read", "api-keys:write"])
    );
    browser.field("name", "ci").await;
    browser.click("[name=permissions][value='jobs:read']").await;
    browser.js("const e = document.querySelector('[name=expiresAt]'); e.value = e.options[1].value").await;
    browser.press("Make the key").await;
    let key = browser.until("the key is shown", "return document.getElementById('secret')?.textContent").await;
    let key = key.as_str().expect("text").to_owned();
    assert_eq!(status(&cluster, &key).await, 200);
    browser.allow_clipboard().await;
    browser.press("Copy the key").await;
    browser.until_text("Copied.").await;
    assert_eq!(browser.copied().await, key);
    browser.press("I have stored it").await;
    browser.until_path("/access/api-keys").await;
    browser.until_text("ci").await;
    assert!(!browser.js("return document.documentElement.outerHTML").await.to_string().contains(&key), "once");

    let days = "select extract(day from expires_at - created_at)::bigint from api_keys where name = 'ci'";
    assert!((29..=30).contains(&cluster.count(days).await), "'In 30 days' was chosen");
    let cell = |label: &str| {
        format!(
            "const row = [...document.querySelectorAll('[data-key-row]')].find((row) => row.querySelector('th').innerText === 'ci'); \
             return row.querySelector('[data-label=\"{label}\"]').innerText"
        )
    };
    assert_ne!(browser.js(&cell("Expires")).await, "never");
    until("its last use is shown", SOON, || async {
        browser.go("/access/api-keys").await;
        browser.js(&cell("Last use")).await.as_str().is_some_and(|text| text.ends_with("127.0.0.1")).then_some(())
    })
    .await;

    browser.click("[aria-label='Disable ci']").await;
    browser.until_text("The key is disabled").await;
    until_status(&cluster, &key, 401).await;
    browser.click("[aria-label='Enable ci']").await;
    browser.until_text("The key is enabled again.").await;
    until_status(&cluster, &key, 200).await;

    browser.click("[aria-label='More for ci']").await;
    browser.press("Rotate").await;
    browser.press("Rotate the key").await;
    let fresh = browser.until("the new secret is shown", "return document.getElementById('secret')?.textContent").await;
    let fresh = fresh.as_str().expect("text").to_owned();
    browser.press("I have stored it").await;
    assert_ne!(fresh, key);
    until_status(&cluster, &fresh, 200).await;
    browser.click("[aria-label='More for ci']").await;
    browser.press("Delete").await;
    browser.press("Delete the key").await;
    browser.until_text("The key is deleted.").await;
    until_status(&cluster, &fresh, 401).await;
    browser.assert_clean().await;
}
