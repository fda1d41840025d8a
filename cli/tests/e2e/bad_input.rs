//! What is no request, or cannot be: it gets the envelope, names the field, and is never a failure of the service.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::Cluster;

/// The answer to a request whose headers announce two megabytes. The body is never sent: the answer comes without it,
/// and a connection that the server closes with unread bytes in it may lose the answer.
async fn announce_large_body(cluster: &Cluster) -> String {
    let address = cluster.url(0).trim_start_matches("http://").to_owned();
    let mut stream = tokio::net::TcpStream::connect(&address).await.expect("connects");
    let request = format!(
        "POST /api/sources HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {}\r\nContent-Length: 2097152\r\n\r\n",
        cluster.admin_key
    );
    stream.write_all(request.as_bytes()).await.expect("writes");
    let mut answer = vec![0; 64];
    let read = stream.read(&mut answer).await.expect("reads");
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_the_envelope_and_names_the_field() {
    let cluster = Cluster::build().workers(0).start().await;
    let post = async |path: &str, text: &str| {
        let response = cluster
            .http
            .post(format!("{}{path}", cluster.url(0)))
            .bearer_auth(&cluster.admin_key)
            .body(text.to_owned())
            .send()
            .await
            .expect("answers");
        let status = response.status().as_u16();
        let header = response.headers()["x-request-id"].to_str().expect("text").to_owned();
        let body: Value = response.json().await.expect("the envelope is JSON");
        assert_eq!(
            (body["success"].as_bool(), body["requestId"].as_str()),
            (Some(false), Some(header.as_str())),
            "{body}"
        );
        (
            status,
            body["fields"][0]["field"].as_str().unwrap_or_default().to_owned(),
            body["error"].as_str().expect("an error").to_owned(),
        )
    };
    let job = "/api/jobs/0190a5b2-0000-7000-8000-000000000000/run";
    let many = json!({ "name": "x", "sourceId": "x", "destinationIds": vec!["x"; 17] }).to_string();
    for (path, text, status, field) in [
        (job, "{", 400, "body"),
        (job, "[]", 400, "body"),
        (job, "{\"priority\": \"high\"}", 400, "priority"),
        (job, "{\"priority\": 99}", 422, "priority"),
        (job, "{\"prioritty\": 1}", 400, "prioritty"),
        (job, "{} x", 400, "body"),
        ("/api/sources", "{\"name\": \"x\"}", 400, "engine"),
        ("/api/sources", "{\"name\": \"x\", \"engine\": \"oracle\"}", 400, "engine"),
        (
            "/api/sources",
            "{\"name\": \"x\", \"engine\": \"postgres\", \"config\": {\"host\": \"h\", \"username\": \"u\", \"databases\": []}}",
            422,
            "config.databases",
        ),
        (
            "/api/sources",
            "{\"name\": \"x\", \"engine\": \"postgres\", \"config\": {\"host\": \"h\", \"port\": \"x\"}}",
            422,
            "config.port",
        ),
        (
            "/api/destinations",
            "{\"name\": \"x\", \"kind\": \"local\", \"config\": {\"root\": \"relative\"}}",
            422,
            "config.root",
        ),
        ("/api/jobs", "{\"name\": \"x\", \"sourceId\": \"nope\", \"destinationIds\": []}", 422, "sourceId"),
        ("/api/jobs", &many, 422, "destinationIds"),
        // What PostgreSQL cannot hold.
        ("/api/destinations", r#"{"name": "x", "kind": "local", "config": {"root": "/a\u0000"}}"#, 400, "config.root"),
        (job, r#"{"labels": {"a\u0000": "b"}}"#, 400, "labels"),
        (job, r#"{"labels": {"a": "\\u0000 of a \u0000"}}"#, 400, "labels.a"),
        (
            "/api/api-keys",
            r#"{"name": "x", "permissions": ["*"], "expiresAt": "-9999-01-01T00:00:00Z"}"#,
            422,
            "expiresAt",
        ),
    ] {
        let (got, named, error) = post(path, text).await;
        assert_eq!((got, named.as_str()), (status, field), "{path} {text}: {error}");
    }
    let (status, ..) = post(job, r#"{"labels": {"a": "\\u0000"}}"#).await;
    assert_eq!(status, 404, "a backslash is no NUL");
    for path in ["/api/executions?from=", "/api/executions?to=", "/api/audit?from="] {
        let (status, answer) = cluster.request("GET", &format!("{path}-9999-01-01T00:00:00Z"), None).await;
        assert_eq!((status, &answer["code"]), (400, &json!("malformed")), "{path} {answer}");
    }
    let (status, _, error) = post("/api/jobs/no-such-job/run", "").await;
    assert_eq!((status, error.as_str()), (404, "Job not found"));
    let (status, ..) = post("/api/jobs/%00%ff/run", "").await;
    assert_eq!(status, 404);
    assert_eq!(post("/api/nowhere", "").await.0, 404);
    assert_eq!(post("/livez", "").await.0, 405);
    assert!(announce_large_body(&cluster).await.starts_with("HTTP/1.1 413 "));
    for path in
        ["/api/executions/nonsense", "/api/executions/0190a5b2-0000-7000-8000-000000000000", "/api/jobs/nonsense"]
    {
        assert_eq!(cluster.request("GET", path, None).await.0, 404, "{path}");
    }
    assert_eq!(cluster.request("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 1001 }))).await.0, 422);
    assert_eq!(
        cluster.request("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 7 }))).await.1["data"]["maxConcurrentJobs"],
        7
    );
    assert_eq!(
        cluster.request("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": null }))).await.1["data"]["maxConcurrentJobs"],
        4
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nul_which_no_text_of_the_database_holds_is_bad_input() {
    let mut cluster = Cluster::build().workers(0).start().await;
    for path in [
        "/api/jobs?name=%00",
        "/api/jobs?label=a:%00",
        "/api/sources?name=x%00y",
        "/api/destinations?label=%00:b",
        "/api/api-keys?name=%00",
        "/api/users?name=%00",
        "/api/audit?action=%00",
        "/api/audit?targetId=%00",
    ] {
        let (status, answer) = cluster.request("GET", path, None).await;
        assert_eq!((status, answer["fields"][0]["field"].as_str()), (400, Some("query")), "{path}: {answer}");
    }
    let said =
        "there is no user yet: make the administrator with POST /api/setup and this token, or with dbackup user create";
    let token = cluster.apis[0].0.wait_for_field(said, "token").await;
    let body = json!({ "token": token, "name": "ada", "displayName": "a\u{0}b", "password": "correct horse battery" });
    let (status, answer) = cluster.request("POST", "/api/setup", Some(body)).await;
    assert_eq!((status, answer["fields"][0]["field"].as_str()), (400, Some("displayName")), "{answer}");
}
