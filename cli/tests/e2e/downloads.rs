//! Downloads of what lies in destinations, by the API.

use std::{fs::File, os::unix::fs::FileExt, path::Path, time::Duration};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{Cluster, SOON, s3::S3Server, source::PostgresSource, until};

/// A backup, and the address of its object and of its manifest.
async fn backup(cluster: &Cluster, destination: &str, rows: u32) -> (Value, [String; 2]) {
    let source = PostgresSource::with_rows(rows).await;
    let source = cluster.source("postgres", source.config()).await;
    let job = cluster.job(&source, &[destination], json!({ "compression": "none" })).await;
    let backup = cluster.backup(&job).await;
    let of = |manifest: bool| {
        let artifacts = backup["artifacts"].as_array().expect("artifacts");
        let one = artifacts.iter().find(|a| a["database"].is_null() == manifest).expect("one");
        let (execution, id) = (backup["id"].as_str().expect("an id"), one["id"].as_str().expect("an id"));
        format!("/api/executions/{execution}/artifacts/{id}/download")
    };
    let addresses = [of(false), of(true)];
    (backup, addresses)
}

/// Length of an object that is more than any buffer on the way takes.
const LONG: usize = 1 << 30;

/// Makes the object of a backup so long, without the time to write it.
async fn grown(cluster: &Cluster, backup: &Value, root: &Path) {
    let file = File::options().write(true).open(root.join(backup["path"].as_str().expect("a path"))).expect("opens");
    file.set_len(LONG as u64).expect("grows");
    let change = format!(
        "with grown as (update artifacts set size_bytes = {LONG} where database_name is not null returning 1) select count(*) from grown"
    );
    assert_eq!(cluster.count(&change).await, 1);
}

async fn get(cluster: &Cluster, api: usize, path: &str, headers: &[(&str, &str)]) -> reqwest::Response {
    let request = cluster.http.get(format!("{}{path}", cluster.url(api))).bearer_auth(&cluster.admin_key);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.send().await.expect("answers")
}

fn header<'a>(response: &'a reqwest::Response, name: &str) -> &'a str {
    response.headers().get(name).unwrap_or_else(|| panic!("{name}")).to_str().expect("text")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_is_the_stored_object_byte_for_byte_whole_or_from_where_it_broke_off() {
    let cluster = Cluster::start().await;
    let (destination, root) = cluster.local_destination().await;
    let (backup, [object, manifest]) = backup(&cluster, &destination, 20_000).await;
    let path = backup["path"].as_str().expect("a path");
    let stored = std::fs::read(root.join(path)).expect("a file");
    assert!(stored.len() > 1 << 20, "more than a few chunks");

    let whole = get(&cluster, 0, &object, &[]).await;
    assert_eq!(whole.status(), 200);
    let name = path.rsplit('/').next().expect("a name");
    assert_eq!(header(&whole, "content-disposition"), format!("attachment; filename=\"{name}\""));
    assert_eq!(header(&whole, "content-length"), stored.len().to_string());
    let etag = header(&whole, "etag").to_owned();
    let digest = Sha256::digest(&stored);
    assert_eq!(etag, format!("\"{}\"", hex::encode(digest)));
    let base64 = {
        use base64::Engine;
        base64::prelude::BASE64_STANDARD.encode(digest)
    };
    assert_eq!(header(&whole, "repr-digest"), format!("sha-256=:{base64}:"));
    assert!(whole.bytes().await.expect("bytes") == stored, "other bytes");

    // It goes on at the other API process.
    let rest = get(&cluster, 1, &object, &[("range", "bytes=1000000-"), ("if-range", &etag)]).await;
    assert_eq!(rest.status(), 206);
    assert_eq!(header(&rest, "content-range"), format!("bytes 1000000-{}/{}", stored.len() - 1, stored.len()));
    assert!(rest.bytes().await.expect("bytes") == stored[1_000_000..], "other bytes");
    let past = get(&cluster, 1, &object, &[("range", "bytes=999999999-")]).await;
    assert_eq!((past.status().as_u16(), header(&past, "content-range")), (416, &*format!("bytes */{}", stored.len())));
    let other = get(&cluster, 1, &object, &[("range", "bytes=0-9"), ("if-range", "\"other\"")]).await;
    assert_eq!(other.status(), 200, "it is not what was begun: all of it");
    let head = cluster.http.head(format!("{}{object}", cluster.url(0))).bearer_auth(&cluster.admin_key);
    let head = head.send().await.expect("answers");
    assert_eq!((head.status().as_u16(), header(&head, "content-length")), (200, &*stored.len().to_string()));

    let manifest: Value = get(&cluster, 1, &manifest, &[]).await.json().await.expect("JSON");
    assert_eq!(manifest["objects"][0]["storedSha256"], hex::encode(digest));
    let said = "select count(*) from audit_log where action = 'artifact.download'";
    assert!(cluster.count(said).await >= 4);
    // Of another execution, and of none.
    let execution = backup["id"].as_str().expect("an id");
    for unknown in [
        format!("/api/executions/{execution}/artifacts/nothing/download"),
        object.replace(execution, &uuid::Uuid::now_v7().to_string()),
    ] {
        assert_eq!(get(&cluster, 0, &unknown, &[]).await.status(), 404, "{unknown}");
    }
    let stranger = cluster.scoped_key(&["storage:download"], Some(vec![common::id::JobId::new()])).await;
    assert_eq!(cluster.request_as(&stranger, "GET", &object, None).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_not_what_was_stored_is_never_downloaded_whole() {
    let cluster = Cluster::start().await;
    let (destination, root) = cluster.local_destination().await;
    let (backup, [object, _]) = backup(&cluster, &destination, 20_000).await;
    let path = root.join(backup["path"].as_str().expect("a path"));
    let file = File::options().write(true).open(&path).expect("opens");
    file.write_all_at(b"!", 500_000).expect("writes");
    let response = get(&cluster, 0, &object, &[]).await;
    assert_eq!(response.status(), 200, "it shows itself at the end");
    assert!(response.bytes().await.is_err(), "it came whole");
    cluster.apis[0].0.says("its SHA-256 differs", SOON).await;
    file.set_len(400_000).expect("cuts");
    assert!(get(&cluster, 0, &object, &[]).await.bytes().await.is_err(), "it came whole");
    std::fs::remove_file(&path).expect("removes");
    let answer = get(&cluster, 0, &object, &[]).await;
    assert_eq!(answer.status(), 502);
    let answer: Value = answer.json().await.expect("JSON");
    assert_eq!(answer["code"], "object_missing");
    assert!(answer["error"].as_str().is_some_and(|e| e.contains("not there any more")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_ends_when_its_key_is_disabled() {
    let cluster = Cluster::start().await;
    let (destination, root) = cluster.local_destination().await;
    let (backup, [object, _]) = backup(&cluster, &destination, 10).await;
    grown(&cluster, &backup, &root).await;
    let made = cluster
        .ok("POST", "/api/api-keys", Some(json!({ "name": "reader", "permissions": ["storage:download"] })))
        .await;
    let key = made["key"].as_str().unwrap_or_else(|| panic!("{made}"));
    // Not from its beginning: what is whole is checked, and would end early by that.
    let request = cluster.http.get(format!("{}{object}", cluster.url(0))).bearer_auth(key).header("range", "bytes=1-");
    let mut response = request.send().await.expect("answers");
    let mut seen = response.chunk().await.expect("a chunk").expect("bytes").len();
    let id = made["id"].as_str().expect("an id");
    cluster.ok("PUT", &format!("/api/api-keys/{id}"), Some(json!({ "enabled": false }))).await;
    until("the key counts no more", SOON, || async {
        let request = cluster.http.get(format!("{}{object}", cluster.url(0))).bearer_auth(key);
        (request.send().await.expect("answers").status() == 401).then_some(())
    })
    .await;
    let broken = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => seen += chunk.len(),
            other => break other.is_err(),
        }
    };
    assert!(broken && seen < LONG, "{seen} bytes");

    // A process sends so many at once; those who wait take up nothing else.
    let mut many = Vec::new();
    while many.len() < 8 {
        many.push(get(&cluster, 1, &object, &[("range", "bytes=1-")]).await);
        assert_eq!(many.last().expect("one").status(), 206);
    }
    let refused = get(&cluster, 1, &object, &[("range", "bytes=1-")]).await;
    assert_eq!((refused.status().as_u16(), header(&refused, "retry-after")), (503, "5"));
    assert_eq!(refused.json::<Value>().await.expect("JSON")["code"], "too_many_downloads");
    many.pop();
    until("there is room again", SOON, || async {
        (get(&cluster, 1, &object, &[("range", "bytes=1-9")]).await.status() == 206).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_stops_sends_a_download_to_its_end() {
    let mut cluster = Cluster::start().await;
    let (destination, root) = cluster.local_destination().await;
    let (backup, [object, _]) = backup(&cluster, &destination, 10).await;
    grown(&cluster, &backup, &root).await;
    // Not from its beginning: what is whole is checked.
    let mut response = get(&cluster, 0, &object, &[("range", "bytes=1-")]).await;
    let mut seen = response.chunk().await.expect("a chunk").expect("bytes").len();
    cluster.apis[0].0.signal(Signal::SIGTERM);
    cluster.takes_no_connection(0).await;
    assert!(seen < LONG - 1, "it was over before the end began");
    while let Some(chunk) = response.chunk().await.unwrap_or_else(|error| panic!("cut after {seen} bytes: {error:?}")) {
        seen += chunk.len();
    }
    assert_eq!(seen, LONG - 1);
    let ended = cluster.apis[0].0.end(Duration::from_secs(5)).await;
    assert_eq!(ended.code(), Some(0), "{}", cluster.apis[0].0.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_in_a_bucket_is_downloaded_too() {
    let cluster = Cluster::start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), None).await;
    let body = json!({ "name": "bucket", "kind": "s3", "config": server.config() });
    let s3 = crate::harness::id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    // More than one request of a read.
    let (backup, [object, _]) = backup(&cluster, &s3, 150_000).await;
    let path = backup["path"].as_str().expect("a path");
    let stored = std::fs::read(server.file(&format!("nightly/{path}"))).expect("in the bucket");
    assert!(stored.len() > 9 << 20);
    let whole = get(&cluster, 0, &object, &[]).await.bytes().await.expect("bytes");
    assert!(whole == stored, "other bytes");
    let part = get(&cluster, 0, &object, &[("range", "bytes=8388600-8388700")]).await.bytes().await.expect("bytes");
    assert!(part == stored[8_388_600..=8_388_700], "other bytes");
}
