//! A receiver of webhooks, which answers as it is told.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde_json::Value;

use super::until;

/// A message that came.
#[derive(Clone, Debug)]
pub struct Told {
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body, byte for byte.
    pub body: String,
}

impl Told {
    /// A header as text.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("{name}")).to_str().expect("text")
    }

    /// The body.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }
}

#[derive(Default)]
struct Inner {
    told: Vec<Told>,
    hangs: bool,
    answers: VecDeque<StatusCode>,
}

/// Somebody who is told.
#[derive(Clone)]
pub struct Hooks {
    /// Where, with a secret in the path.
    pub url: String,
    inner: Arc<Mutex<Inner>>,
}

/// Stands in the path of [`Hooks::url`].
pub const TOKEN: &str = "T0K3N-in-the-path";

impl Hooks {
    /// One that takes everything.
    pub async fn start() -> Self {
        let inner: Arc<Mutex<Inner>> = Arc::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let url = format!("http://{}/{TOKEN}", listener.local_addr().expect("an address"));
        let router = Router::new().fallback(take).with_state(inner.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, inner }
    }

    /// Answers so to what comes next, and takes what comes after that.
    pub fn answer(&self, answers: &[u16]) {
        let answers = answers.iter().map(|status| StatusCode::from_u16(*status).expect("a status"));
        self.inner.lock().expect("unpoisoned").answers.extend(answers);
    }

    /// Takes a message and never answers.
    pub fn hang(&self) {
        self.inner.lock().expect("unpoisoned").hangs = true;
    }

    /// What came.
    pub fn told(&self) -> Vec<Told> {
        self.inner.lock().expect("unpoisoned").told.clone()
    }

    /// What came, when so much has.
    pub async fn receives(&self, count: usize, limit: Duration) -> Vec<Told> {
        let what = format!("{count} messages");
        until(&what, limit, || async { Some(self.told()).filter(|told| told.len() >= count) }).await
    }
}

/// Every answer names another address, for whoever takes it for a redirect.
async fn take(
    State(inner): State<Arc<Mutex<Inner>>>,
    headers: HeaderMap,
    body: String,
) -> (StatusCode, [(&'static str, &'static str); 1]) {
    let (hangs, answer) = {
        let mut inner = inner.lock().expect("unpoisoned");
        inner.told.push(Told { headers, body });
        (inner.hangs, inner.answers.pop_front().unwrap_or(StatusCode::NO_CONTENT))
    };
    if hangs { std::future::pending().await } else { (answer, [("location", "/elsewhere")]) }
}
