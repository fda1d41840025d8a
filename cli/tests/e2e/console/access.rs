//! People, their sessions and the audit log by the console; keys are in [`super::keys`].

use serde_json::json;

use super::{Browser, signed_in, signed_in_as};
use crate::harness::{
    Cluster, SOON,
    people::{PASSWORD, user},
    source, until,
};

/// The buttons and links in the row of a table that begins with a name.
async fn offered(browser: &Browser, name: &str) -> serde_json::Value {
    let script = format!(
        "const row = [...document.querySelectorAll('tbody tr')].find((row) => row.querySelector('th').innerText.startsWith('{name}')); \
         return [...row.querySelectorAll('button, a')].map((b) => b.textContent.trim())"
    );
    browser.js(&script).await
}

/// Waits until a browser is sent to the sign-in.
async fn until_signed_out(browser: &Browser) {
    until("the session is over", SOON, || async {
        browser.go("/access/sessions").await;
        (browser.path().await == "/sign-in").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_is_made_changed_switched_off_and_deleted() {
    let cluster = Cluster::build().workers(0).start().await;
    let browser = signed_in(&cluster, &["*"]).await;
    let users = "return location.pathname === '/access/users' && document.documentElement.dataset.ready === ''";
    browser.go("/access/users").await;
    browser.press("New user").await;
    browser.until_path("/access/users/new").await;
    browser.field("name", "Ada").await;
    browser.field("password", "short").await;
    browser.press("Save").await;
    browser.until_text("must have between 10 and 500 characters").await;
    browser.assert_only(422).await;
    browser.field("name", "ada").await;
    browser.field("displayName", "Ada L.").await;
    browser.field("password", PASSWORD).await;
    browser.click("[name=permissions][value='jobs:read']").await;
    browser.press("Save").await;
    browser.until("the people are there", users).await;
    browser.until_text("Ada L.").await;

    let theirs = signed_in_as(&cluster, 1, "ada").await;

    browser.click("[aria-label='Edit ada']").await;
    browser
        .until(
            "the form is there",
            "return location.pathname.endsWith('/edit') && document.documentElement.dataset.ready === ''",
        )
        .await;
    browser.field("displayName", "Ada Lovelace").await;
    browser.press("Save").await;
    browser.until("the people are there", users).await;
    browser.until_text("Ada Lovelace").await;

    browser.click("[aria-label='More for ada']").await;
    browser.press("Disable").await;
    browser.until_text("Their sessions end at once").await;
    browser.press("Disable the user").await;
    browser.until_text("The user is disabled").await;
    until_signed_out(&theirs).await;
    browser.click("[aria-label='More for ada']").await;
    browser.press("Enable").await;
    browser.until_text("The user is enabled.").await;
    browser.click("[aria-label='More for ada']").await;
    browser.press("Delete").await;
    browser.press("Delete the user").await;
    browser.until_text("The user is deleted.").await;
    assert_eq!(cluster.count("select count(*) from users where name = 'ada'").await, 0);
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_would_refuse_of_somebody_who_may_do_more_is_not_offered() {
    let cluster = Cluster::build().workers(0).start().await;
    let (_, above) = user(&cluster, &["*"]).await;
    let (_, beside) = user(&cluster, &["jobs:read"]).await;
    let key = |name: &str, permissions: &[&str]| json!({ "name": name, "permissions": permissions });
    for body in [key("above", &["*"]), key("beside", &["jobs:read"])] {
        cluster.ok("POST", "/api/api-keys", Some(body)).await;
    }
    let mine = ["jobs:read", "users:read", "users:write", "api-keys:read", "api-keys:write"];
    let browser = signed_in(&cluster, &mine).await;
    browser.go("/access/users").await;
    assert_eq!(offered(&browser, &beside).await, json!(["Edit", "Disable", "Delete"]));
    assert_eq!(offered(&browser, &above).await, json!(["Disable", "Delete"]));
    browser.go("/access/api-keys").await;
    assert_eq!(offered(&browser, "beside").await, json!(["Disable", "Rotate", "Delete"]));
    assert_eq!(offered(&browser, "above").await, json!(["Disable", "Delete"]));
    browser.click("[aria-label='Disable above']").await;
    browser.until_text("The key is disabled").await;
    browser
        .until(
            "and not enabled again by who may do less",
            "return !document.querySelector('[aria-label=\"Disable above\"]')",
        )
        .await;
    assert_eq!(offered(&browser, "above").await, json!(["Delete"]));
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_ended_from_another_browser() {
    let cluster = Cluster::build().workers(0).start().await;
    let (_, name) = user(&cluster, &["jobs:read"]).await;
    let browser = signed_in(&cluster, &["*"]).await;
    let theirs = signed_in_as(&cluster, 1, &name).await;
    browser.go("/access/sessions").await;
    browser.until_text("this one").await;
    browser.press("End").await;
    browser.until_text(&format!("End this session of {name}?")).await;
    browser.press("End the session").await;
    browser.until_text("The session is over.").await;
    until_signed_out(&theirs).await;
    browser.until("the row is gone", "return document.querySelectorAll('#sessions tbody tr').length === 1").await;
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_is_filtered_by_what_was_done() {
    let cluster = Cluster::build().workers(0).start().await;
    let job = source::job_without_workers(&cluster, json!({ "name": "Shop" })).await;
    cluster.trigger(&job).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/access/audit-log").await;
    let actions = "[...new Set([...document.querySelectorAll('tbody code')].map((c) => c.textContent).filter((text) => /^[a-z-]+[.][a-z-]+$/.test(text)))]";
    let all = browser.js(&format!("return {actions}.length")).await;
    assert!(all.as_u64() > Some(3), "{all} kinds of entries");
    browser.field("action", "execution.trigger").await;
    browser.press("Filter").await;
    browser.until("only that is shown", &format!("return location.search === '?action=execution.trigger' && JSON.stringify({actions}) === '[\"execution.trigger\"]'")).await;
    browser.until_text("Shop").await;
    browser.press("Show all").await;
    browser.until("all are shown", &format!("return location.search === '' && {actions}.length >= {all}")).await;
    browser.press("job.create").await;
    browser
        .until(
            "by its name too",
            &format!(
                "return location.search === '?action=job.create' && JSON.stringify({actions}) === '[\"job.create\"]'"
            ),
        )
        .await;
    browser.assert_clean().await;
}
