//! The encryption key is rotated while the cluster runs.

use common::seal::SealKey;
use serde_json::{Value, json};

use crate::{
    encryption::key_file,
    harness::{Cluster, SOON, binary, hooks::Hooks, source::PostgresSource},
    restores::empty_database,
};

const FIRST: &str = "DBACKUP_ENCRYPTION_KEY";
const OTHER: &str = "DBACKUP_OTHER_ENCRYPTION_KEY";

/// `dbackup key-rotate` with these keys: its exit status, and what it printed.
fn rotate(cluster: &Cluster, first: &str, other: Option<&str>) -> (Option<i32>, String) {
    let mut command = cluster.command(&["key-rotate"]);
    command.env_remove(OTHER).env(FIRST, first);
    if let Some(other) = other {
        command.env(OTHER, other);
    }
    let output = command.output().expect("dbackup runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).expect("UTF-8"))
}

/// A run of a job on a source that was made just now.
async fn backs_up(cluster: &Cluster, source: &str) {
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(source, &[&destination], json!({})).await;
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!(ended["status"], "Success", "{ended:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_encryption_key_is_rotated_by_rolling_restarts_and_every_process_opens_every_secret_meanwhile() {
    let mut cluster = Cluster::start().await;
    let (old, new) = (cluster.env()[FIRST].clone(), SealKey::generate());
    let instance = cluster.text("select instance from encryption_canary").await;
    let mut sources = Vec::new();
    let source = PostgresSource::with_rows(10).await;
    // Old alone, old first, new first: two neighbours of this row run side by side in a rolling restart.
    for keys in [[&old, &new], [&new, &old]] {
        sources.push(cluster.source("postgres", source.config()).await);
        cluster.set_env(FIRST, Some(keys[0]));
        cluster.set_env(OTHER, Some(keys[1]));
        for at in 0..2 {
            cluster.restart_api(at).await;
            cluster.restart_worker(at).await;
            sources.push(cluster.source("postgres", source.config()).await);
            for source in &sources {
                backs_up(&cluster, source).await;
            }
        }
        // What a container's probe asks, in whichever pass.
        let health = cluster.command(&["health"]).output().expect("dbackup runs");
        assert!(health.status.success(), "{}", String::from_utf8_lossy(&health.stderr));
    }
    let hooks = Hooks::start().await;
    // A restore of an encrypted backup waits meanwhile.
    let (key, recipient) = key_file(&cluster.scratch);
    let (destination, _) = cluster.local_destination().await;
    let more = json!({ "encryption": { "recipients": [recipient] } });
    let backup = cluster.backup(&cluster.job(&sources[0], &[&destination], more).await).await;
    cluster.set_env(FIRST, Some(&old));
    cluster.set_env(OTHER, Some(&new));
    cluster.restart_api(0).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let path = format!("/api/executions/{}/restore", backup["id"].as_str().expect("an id"));
    let identity = std::fs::read_to_string(&key).expect("text");
    let into = empty_database(&source).await;
    // By the process that seals with the old key.
    let ask = async |path: &str, body: Value| {
        let request = cluster.http.post(format!("{}{path}", cluster.url(0))).bearer_auth(&cluster.admin_key);
        request.json(&body).send().await.expect("answers").json::<Value>().await.expect("JSON")
    };
    let answer = ask(&path, json!({ "into": into, "identity": identity })).await;
    let hook = ask("/api/webhooks", json!({ "name": "On call", "url": hooks.url })).await;
    let hook = hook["data"]["id"].as_str().expect("an id").to_owned();
    cluster.set_env(FIRST, Some(&new));
    cluster.set_env(OTHER, Some(&old));
    cluster.restart_api(0).await;
    let (status, text) = rotate(&cluster, &new, None);
    assert_eq!(status, Some(2), "half of a rotation: {text}");
    assert!(text.contains(OTHER) || text.contains("not the encryption key"), "{text}");
    let (status, text) = rotate(&cluster, &new, Some(&old));
    assert_eq!(status, Some(0), "{text}");
    assert!(!text.contains("sealed 0 values"), "{text}");
    assert_eq!(rotate(&cluster, &new, Some(&old)).1, "sealed 0 values anew with DBACKUP_ENCRYPTION_KEY\n");
    assert_eq!(cluster.count("select count(*) from audit_log where action = 'encryption_key.rotate'").await, 1);

    cluster.set_env(OTHER, None);
    for at in 0..2 {
        cluster.restart_api(at).await;
        cluster.restart_worker(at).await;
    }
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    let restored = cluster.ended(answer["executionId"].as_str().expect("an id"), SOON).await;
    assert_eq!(restored["status"], "Success", "{restored:#}");
    source.assert_same(&into).await;
    let tested = cluster.ok("POST", &format!("/api/webhooks/{hook}/test"), None).await;
    assert_eq!(tested["ok"], true, "{tested}");
    for source in &sources {
        backs_up(&cluster, source).await;
    }
    assert_eq!(
        cluster.text("select instance from encryption_canary").await,
        instance,
        "the counters in Redis are lost"
    );
    let refused = std::process::Command::new(binary("dbackup-worker")).envs(cluster.env()).env(FIRST, &old).output();
    let refused = refused.expect("it runs");
    assert_eq!(refused.status.code(), Some(2), "the old key opens nothing any more");
}
