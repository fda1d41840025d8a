//! People: browsers, users, and what every process knows of their sessions.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Cluster, id, unique, until};

/// Password of the users that the tests make.
pub const PASSWORD: &str = "correct horse battery";
/// What a process may remember of a session is half a second old; the promise is one.
pub const REVOKED: Duration = Duration::from_secs(1);

/// A browser: it keeps cookies, and says where its page is from.
#[derive(Clone)]
pub struct Browser {
    http: reqwest::Client,
    /// What it keeps, by name.
    pub cookies: BTreeMap<String, String>,
    /// What the last answer set, with attributes.
    pub set: Vec<String>,
}

impl Browser {
    /// One without cookies.
    pub fn new() -> Self {
        Self { http: reqwest::Client::new(), cookies: BTreeMap::new(), set: Vec::new() }
    }

    /// Sends a request with its cookies and these headers, and keeps the cookies of the answer.
    pub async fn call(
        &mut self,
        method: &str,
        url: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> (u16, Value) {
        let mut request = self.http.request(method.parse().expect("a method"), url);
        let cookies: Vec<String> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if !cookies.is_empty() {
            request = request.header("cookie", cookies.join("; "));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("answers");
        let status = response.status().as_u16();
        self.set =
            response.headers().get_all("set-cookie").iter().map(|v| v.to_str().expect("text").to_owned()).collect();
        for cookie in &self.set {
            let (name, value) = cookie.split(';').next().and_then(|pair| pair.split_once('=')).expect("a pair");
            self.cookies.insert(name.to_owned(), value.to_owned());
        }
        (status, response.json().await.expect("JSON"))
    }

    /// From a page of the service.
    pub async fn page(
        &mut self,
        cluster: &Cluster,
        api: usize,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        let url = format!("{}{path}", cluster.url(api));
        self.call(method, &url, body, &[("sec-fetch-site", "same-origin")]).await
    }

    /// Signs in from a page of the service.
    pub async fn sign_in(&mut self, cluster: &Cluster, api: usize, name: &str, password: &str) -> (u16, Value) {
        self.page(cluster, api, "POST", "/api/session", Some(json!({ "name": name, "password": password }))).await
    }
}

/// Makes a user with [`PASSWORD`]; gives the id and the name.
pub async fn user(cluster: &Cluster, permissions: &[&str]) -> (String, String) {
    let name = unique("user");
    let body = json!({ "name": name, "password": PASSWORD, "permissions": permissions });
    (id(&cluster.ok("POST", "/api/users", Some(body)).await), name)
}

/// Somebody who may administer users, so that a test may take that from another.
pub async fn with_administrator() -> Cluster {
    let cluster = Cluster::build().workers(0).start().await;
    user(&cluster, &["*"]).await;
    cluster
}

/// Every process refuses the browser's session, within what is promised.
pub async fn over_everywhere(cluster: &Cluster, browser: &Browser) {
    for api in 0..2 {
        until(&format!("process {api} refuses the session"), REVOKED, || {
            let mut again = browser.clone();
            async move {
                let (status, answer) = again.page(cluster, api, "GET", "/api/session", None).await;
                (status == 401 && answer["code"] == "session_over").then_some(())
            }
        })
        .await;
    }
}

/// Has every process remember the session. It forgets everything when it learns of a change, such as the making of
/// the user: only what is used after that is remembered.
pub async fn remembered_everywhere(cluster: &Cluster, browser: &mut Browser) {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(700) {
        for api in 0..2 {
            assert_eq!(browser.page(cluster, api, "GET", "/api/jobs", None).await.0, 200);
        }
    }
}
