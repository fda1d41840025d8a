//! Webhooks by the console.

use serde_json::json;

use super::signed_in;
use crate::{
    harness::{
        Cluster, SOON,
        hooks::{Hooks, TOKEN},
    },
    trace::plain_job,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_is_made_with_its_secret_shown_once_tested_changed_and_deleted() {
    let cluster = Cluster::start().await;
    let hooks = Hooks::start().await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/settings/webhooks").await;
    browser.until_text("There is no webhook yet").await;
    browser.press("Make the first webhook").await;
    browser.until_path("/settings/webhooks/new").await;
    browser.field("name", "On call").await;
    browser.field("url", "hooks.example.com").await;
    browser.press("Make the webhook").await;
    browser.until_text("must be a URL").await;
    browser.assert_only(422).await;
    browser.field("url", &hooks.url).await;
    browser.click("[name=events][value=succeeded]").await;
    browser.press("Make the webhook").await;
    let secret = browser.until("the secret is shown", "return document.getElementById('secret')?.textContent").await;
    assert!(secret.as_str().is_some_and(|secret| secret.starts_with("whsec_")));
    browser.press("I have stored it").await;
    browser.until_text("failed, succeeded").await;
    let page = browser.js("return document.documentElement.outerHTML").await.to_string();
    assert!(!page.contains(secret.as_str().expect("text")) && !page.contains(TOKEN));

    browser.press("Test").await;
    browser.until_text("The test was delivered.").await;
    hooks.answer(&[500]);
    browser.press("Test").await;
    browser.until_text("The test was not delivered: it answers 500 Internal Server Error").await;
    browser.until_text("Fails").await;
    let job = plain_job(&cluster, json!({})).await;
    cluster.backup(&job).await;
    assert_eq!(hooks.receives(3, SOON).await[2].json()["type"], "execution.succeeded");

    browser.go("/settings/webhooks").await;
    browser.click("summary[aria-label='More for On call']").await;
    browser.press("Edit").await;
    browser
        .until(
            "the form is there",
            "return location.pathname.endsWith('/edit') && document.documentElement.dataset.ready === ''",
        )
        .await;
    browser.field("labels", "env=prod").await;
    browser.press("Save").await;
    browser.until_text("The webhook is saved.").await;
    browser.until_text("env=prod").await;
    browser.press("Test").await;
    hooks.receives(4, SOON).await;
    browser.click("summary[aria-label='More for On call']").await;
    browser.press("Delete").await;
    browser.press("Delete the webhook").await;
    browser.until_text("There is no webhook yet").await;
    browser.assert_clean().await;
}
