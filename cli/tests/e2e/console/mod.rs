//! The web console in a headless Chromium: people press the buttons, and what the buttons promise is looked up behind
//! them. Every test demands that the browser's console has nothing to complain of.

mod browser;

mod access;
mod entrance;
mod executions;
mod jobs;
mod keys;
mod overview;
mod pages;
mod settings;
mod trigger;
mod webhooks;

use browser::Browser;

use crate::harness::{
    Cluster,
    people::{PASSWORD, user},
};

/// A browser in which somebody with these permissions has signed in.
async fn signed_in(cluster: &Cluster, permissions: &[&str]) -> Browser {
    let (_, name) = user(cluster, permissions).await;
    signed_in_as(cluster, 0, &name).await
}

/// A browser at an API process in which a user of the tests has signed in.
async fn signed_in_as(cluster: &Cluster, api: usize, name: &str) -> Browser {
    let browser = Browser::start(cluster.url(api)).await;
    browser.go("/sign-in").await;
    sign_in(&browser, name, PASSWORD).await;
    browser
        .until(
            "the overview is there",
            "return location.pathname === '/' && document.documentElement.dataset.ready === ''",
        )
        .await;
    browser
}

/// Whether a size on a page is so many bytes: three digits and a unit.
fn is_size(shown: &serde_json::Value, size: i64) -> bool {
    let Some((number, unit)) = shown.as_str().and_then(|text| text.split_once(' ')) else { return false };
    let scale = match unit {
        "MB" => 1e6,
        "kB" => 1e3,
        _ => 1.0,
    };
    number.parse::<f64>().is_ok_and(|number| (number * scale - size as f64).abs() <= scale / 2.0)
}

/// Fills in the sign-in and sends it.
async fn sign_in(browser: &Browser, name: &str, password: &str) {
    browser.field("name", name).await;
    browser.field("password", password).await;
    browser.press("Sign in").await;
}
