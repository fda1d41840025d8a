//! What the proxy answers by itself, and what it must not do again.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Mutex,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    harness::{audit::Audited, until},
    outages,
    project::{A_WHILE, Project, docker},
};

/// Clients whose trigger may be under way when an API process is killed.
const CLIENTS: usize = 32;
/// Kills of each API process.
const ROUNDS: usize = 3;

/// A request whose body does not come to its end is refused in the form of the API.
pub async fn refuses_in_the_form_of_the_api(project: &Project) {
    let answer = raw(project, "POST /api/jobs HTTP/1.1\r\nHost: late\r\nContent-Length: 10\r\n\r\n{").await;
    let (head, body) = answer.split_once("\r\n\r\n").expect("a body");
    assert!(head.starts_with("HTTP/1.1 408 ") && head.contains("content-type: application/json"), "{head}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {body}"));
    assert_eq!((body["success"].as_bool(), body["code"].as_str()), (Some(false), Some("timeout")), "{body}");
}

async fn raw(project: &Project, request: &str) -> String {
    let mut stream = TcpStream::connect(project.url.trim_start_matches("http://")).await.expect("connects");
    stream.write_all(request.as_bytes()).await.expect("writes");
    let mut answer = String::new();
    tokio::time::timeout(A_WHILE, stream.read_to_string(&mut answer)).await.expect("ends").expect("reads");
    answer
}

/// A trigger that was sent is not sent again by the proxy when its API process dies: it fails, and the client knows.
pub async fn repeats_no_trigger(project: &Project, source: &str, local: &str) {
    let job = project.make_job(source, local).await;
    let counts = Arc::new(Mutex::new((0_i64, 0_i64)));
    let (stop, clients) = (CancellationToken::new(), TaskTracker::new());
    for _ in 0..CLIENTS {
        let (project, job, counts, stop) = (project.clone(), job.clone(), counts.clone(), stop.clone());
        clients.spawn(async move {
            while !stop.is_cancelled() {
                // Without an Idempotency-Key, so that a second one would be a second run.
                let answer = project.request("POST", &format!("/api/jobs/{job}/run"), None).send().await;
                let status = answer.map_or(0, |answer| answer.status().as_u16());
                let mut counts = counts.lock().await;
                match status {
                    200 => counts.0 += 1,
                    // No process was reached.
                    503 => {}
                    _ => counts.1 += 1,
                }
            }
        });
    }
    for _ in 0..ROUNDS {
        for container in project.containers("api").await {
            let before = counts.lock().await.0;
            let more = async || (counts.lock().await.0 > before + 100).then_some(());
            until("triggers pass", A_WHILE, more).await;
            docker(&["kill", "--signal", "KILL", &container]).await;
            docker(&["start", &container]).await;
            project.healthy(&container).await;
        }
    }
    stop.cancel();
    clients.close();
    clients.wait().await;
    let (passed, failed) = *counts.lock().await;
    let runs = project.number(&format!("select count(*) from executions where job_id = '{job}'")).await;
    assert!(failed > 0, "no trigger was under way at any of the kills");
    assert!(runs >= passed, "{passed} triggers were acknowledged and {runs} runs are there");
    assert!(
        runs <= passed + failed,
        "{passed} passed, {failed} failed, and {runs} runs are there: some were sent twice"
    );
    outages::cancel_waiting(project, &job).await;
    println!("  {passed} triggers passed, {failed} failed, {runs} runs");
}
