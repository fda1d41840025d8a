//! What a test asks of its cluster, and how things are made in it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use common::{
    api_key::{self, KeyDraft},
    permission::PermissionSet,
};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;

use super::{Cluster, SOON, audit, id, unique, until};

impl Cluster {
    /// A new key with these permissions.
    pub async fn key(&self, permissions: &[&str]) -> String {
        self.scoped_key(permissions, None).await
    }

    /// A new key that sees only these jobs.
    pub async fn scoped_key(&self, permissions: &[&str], jobs: Option<Vec<common::id::JobId>>) -> String {
        let mut conn = self.pool.acquire().await.expect("a connection");
        let permissions = PermissionSet::parse(permissions).expect("permissions");
        let new = KeyDraft { name: "test".to_owned(), permissions, jobs, ..KeyDraft::default() };
        api_key::create(&mut conn, &new, None).await.expect("a key").1.expose().to_owned()
    }

    /// A request with the administrator's key to one of the API processes, in turn.
    pub async fn request(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        self.request_as(&self.admin_key, method, path, body).await
    }

    /// A request with another key.
    pub async fn request_as(&self, key: &str, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let api = usize::try_from(uuid::Uuid::now_v7().as_u128() % self.apis.len() as u128).expect("small");
        let method: reqwest::Method = method.parse().expect("a method");
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.url(api))).bearer_auth(key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        let status = response.status().as_u16();
        let text = response.text().await.expect("a body");
        (
            status,
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{method} {path} answered {status} {text}: {e}")),
        )
    }

    /// A request that must succeed; gives `data`.
    pub async fn ok(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.request(method, path, body).await;
        assert!(status < 300, "{method} {path}: {status} {answer}");
        answer.get("data").cloned().unwrap_or(answer)
    }

    /// One page of a list: the ids on it and the path of the next, if there is one.
    pub async fn page(&self, path: &str) -> (Vec<String>, Option<String>) {
        let request = self.http.get(format!("{}{path}", self.url(0))).bearer_auth(&self.admin_key);
        let response = request.send().await.unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(response.status(), 200, "{path}");
        let link = response.headers().get("link").map(|link| link.to_str().expect("text").to_owned());
        let next = link.map(|link| link.trim_start_matches('<').split('>').next().expect("a URL").to_owned());
        let body: Value = response.json().await.expect("JSON");
        // Jobs are a bare array.
        let rows = if path.starts_with("/api/jobs?") || path == "/api/jobs" { &body } else { &body["data"] };
        let rows = rows.as_array().unwrap_or_else(|| panic!("{path}: no rows in {body}"));
        // What is told about a job has no id of its own.
        let id_of =
            |row: &Value| row["jobId"].as_str().filter(|_| row["id"].is_null()).map_or_else(|| id(row), str::to_owned);
        (rows.iter().map(id_of).collect(), next)
    }

    /// Makes a source; gives its id.
    pub async fn source(&self, engine: &str, config: Value) -> String {
        let body = json!({ "name": unique("source"), "engine": engine, "config": config });
        id(&self.ok("POST", "/api/sources", Some(body)).await)
    }

    /// Makes a local destination in a folder of its own, tested; gives its id and root.
    pub async fn local_destination(&self) -> (String, PathBuf) {
        let root = self.scratch.join("backups").join(unique("store"));
        std::fs::create_dir(&root).expect("a folder");
        (self.local_destination_at(&root).await, root)
    }

    /// Makes a local destination in a folder, tested; gives its id.
    pub async fn local_destination_at(&self, root: &Path) -> String {
        let body = json!({ "name": unique("store"), "kind": "local", "config": { "root": root } });
        let id = id(&self.ok("POST", "/api/destinations", Some(body)).await);
        let tested = self.ok("POST", &format!("/api/destinations/{id}/test"), None).await;
        assert_eq!(tested["ok"], true, "{tested}");
        id
    }

    /// Makes a job; `more` overrides. Gives its id.
    pub async fn job(&self, source: &str, destinations: &[&str], more: Value) -> String {
        let mut body =
            json!({ "name": unique("job"), "sourceId": source, "destinationIds": destinations, "maxAttempts": 1 });
        for (name, value) in more.as_object().expect("an object") {
            body[name] = value.clone();
        }
        id(&self.ok("POST", "/api/jobs", Some(body)).await)
    }

    /// Triggers a job; gives the execution's id.
    pub async fn trigger(&self, job: &str) -> String {
        let answer = self.ok("POST", &format!("/api/jobs/{job}/run"), None).await;
        answer["executionId"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    }

    /// An execution with its log.
    pub async fn execution(&self, id: &str) -> Value {
        self.ok("GET", &format!("/api/executions/{id}?includeLogs=true"), None).await
    }

    /// Waits for an execution's end.
    pub async fn ended(&self, id: &str, limit: Duration) -> Value {
        until(&format!("execution {id} ends"), limit, || async {
            let execution = self.execution(id).await;
            matches!(execution["status"].as_str(), Some("Success" | "Failed")).then_some(execution)
        })
        .await
    }

    /// Waits for an execution in a status.
    pub async fn in_status(&self, id: &str, status: &str, limit: Duration) -> Value {
        until(&format!("execution {id} is {status}"), limit, || async {
            let execution = self.execution(id).await;
            (execution["status"] == status).then_some(execution)
        })
        .await
    }

    /// Triggers, waits and demands Success.
    pub async fn backup(&self, job: &str) -> Value {
        let execution = self.ended(&self.trigger(job).await, SOON).await;
        assert_eq!(execution["status"], "Success", "{execution:#}");
        execution
    }

    /// One number from the cluster's database.
    pub async fn count(&self, query: &str) -> i64 {
        audit::Audited::number(self, query).await
    }

    /// One text from the cluster's database.
    pub async fn text(&self, query: &str) -> String {
        sqlx::query_scalar(AssertSqlSafe(query.to_owned()))
            .fetch_one(&self.pool)
            .await
            .unwrap_or_else(|e| panic!("{query}: {e}"))
    }
}
