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

/// Fills in the sign-in and sends it.
async fn sign_in(browser: &Browser, name: &str, password: &str) {
    browser.field("name", name).await;
    browser.field("password", password).await;
    browser.press("Sign in").await;
}
