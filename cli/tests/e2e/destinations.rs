//! Destinations: S3, full, read-only, unmounted, and names that would leave the folder.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use axum::{
    extract::Request,
    http::{Method, StatusCode},
    response::IntoResponse,
};
use serde_json::{Value, json};

use crate::harness::{
    Cluster, SOON, as_root, files,
    proxy::{Mode, Proxy},
    s3::{S3Server, SECRET_KEY},
    source::PostgresSource,
    until,
};

/// What a backup needs, and no more: not list, not get, not delete.
const PUT_AND_ABORT: &[&str] =
    &["PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload"];

async fn s3_destination(cluster: &Cluster, config: Value) -> String {
    let made = cluster
        .ok("POST", "/api/destinations", Some(json!({ "name": "bucket", "kind": "s3", "config": config })))
        .await;
    let id = crate::harness::id(&made);
    let tested = cluster.ok("POST", &format!("/api/destinations/{id}/test"), None).await;
    assert_eq!(tested["ok"], true, "{tested}");
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_takes_a_backup_of_several_parts_beside_a_local_folder_and_it_restores() {
    let cluster = Cluster::start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), None).await;
    // Incompressible: three parts of 8 MiB.
    let source = PostgresSource::with_rows(200_000).await;
    let (local, root) = cluster.local_destination().await;
    let s3 = s3_destination(&cluster, server.config()).await;
    let job = cluster
        .job(&cluster.source("postgres", source.config()).await, &[&s3, &local], json!({ "compression": "none" }))
        .await;
    let execution = cluster.backup(&job).await;
    assert!(execution["size"].as_u64() > Some(17 << 20), "{execution:#}");
    let path = execution["path"].as_str().expect("a path");
    let (here, there) = (
        std::fs::read(root.join(path)).expect("local"),
        std::fs::read(server.file(&format!("nightly/{path}"))).expect("in the bucket"),
    );
    assert!(here == there, "the copies differ");
    assert_eq!(server.objects().len(), 2, "{:?}", server.objects());
    assert_eq!(server.open_uploads(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_by_virtual_host_restores() {
    let root = std::env::temp_dir().join(crate::harness::unique("virtual"));
    let server = S3Server::start(root.clone(), None).await;
    // No name server here knows backups.s3.test: a proxy is asked for it, and the server is its own proxy.
    let cluster = Cluster::build().env("http_proxy", format!("http://127.0.0.1:{}", server.port)).start().await;
    let source = PostgresSource::with_rows(500).await;
    let mut config = server.config();
    config["endpoint"] = json!("http://s3.test");
    config["pathStyle"] = json!(false);
    let s3 = s3_destination(&cluster, config).await;
    let job = cluster.job(&cluster.source("postgres", source.config()).await, &[&s3], json!({})).await;
    let execution = cluster.backup(&job).await;
    let file = server.file(&format!("nightly/{}", execution["path"].as_str().expect("a path")));
    source.assert_same(&source.restore(&file).await).await;
    std::fs::remove_dir_all(root).expect("removes");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rights_to_put_and_to_abort_suffice_for_s3() {
    let cluster = Cluster::start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), Some(PUT_AND_ABORT)).await;
    let source = PostgresSource::with_rows(500).await;
    let s3 = s3_destination(&cluster, server.config()).await;
    let job = cluster.job(&cluster.source("postgres", source.config()).await, &[&s3], json!({})).await;
    cluster.backup(&job).await;
    assert_eq!((server.objects().len(), server.open_uploads().len()), (2, 0));
}

/// A run into S3 that a proxy holds when parts of it are uploaded.
pub async fn held_upload(cluster: &Cluster, server: &S3Server) -> (Proxy, String) {
    let source = PostgresSource::with_rows(250_000).await;
    let proxy = Proxy::start(source.port).await;
    let s3 = s3_destination(cluster, server.config()).await;
    let job = cluster
        .job(&cluster.source("postgres", source.config_at(proxy.port)).await, &[&s3], json!({ "compression": "none" }))
        .await;
    proxy.set(Mode::HoldAfter(20_000_000));
    let id = cluster.trigger(&job).await;
    until("parts are uploaded", SOON, || async { (!server.parts().is_empty()).then_some(()) }).await;
    (proxy, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_run_leaves_no_object_and_no_open_upload_in_s3_also_with_put_and_abort_rights_alone() {
    // One that sweeps, so that the aborts can be counted: two may do it twice.
    let cluster = Cluster::build().workers(1).start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), Some(PUT_AND_ABORT)).await;
    let (proxy, id) = held_upload(&cluster, &server).await;
    // One of the destination's test.
    let aborts = server.aborts();
    proxy.set(Mode::Cut);
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!(ended["status"], "Failed", "{ended:#}");
    assert_eq!((server.objects(), server.open_uploads()), (vec![], vec![]));
    // A part that was on its way may have come after the abort.
    assert_eq!(server.aborts() - aborts, 1);
    a_minute_later(&cluster).await;
    assert_eq!(server.aborts() - aborts, 2);
}

/// A store may be completing an upload for as long as minutes when its client is lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_store_completes_although_it_was_aborted_goes_with_the_second_sweep() {
    const ALSO_DELETE: &[&str] = &[
        "CreateMultipartUpload",
        "UploadPart",
        "CompleteMultipartUpload",
        "PutObject",
        "AbortMultipartUpload",
        "DeleteObjects",
    ];
    let cluster = Cluster::build().workers(1).start().await;
    for (rights, folder) in [(None, "all"), (Some(ALSO_DELETE), "no-read")] {
        let server = S3Server::start(cluster.scratch.join(folder), rights).await;
        let (proxy, id) = held_upload(&cluster, &server).await;
        proxy.set(Mode::Cut);
        assert_eq!(cluster.ended(&id, SOON).await["status"], "Failed");
        let aborted = "select path from staged_objects where swept_at is not null";
        let path = until("its upload is aborted", SOON, || async {
            sqlx::query_scalar::<_, String>(aborted).fetch_optional(&cluster.pool).await.expect("answers")
        })
        .await;
        let late = server.file(&format!("nightly/{path}"));
        std::fs::create_dir_all(late.parent().expect("a folder")).expect("makes");
        std::fs::write(&late, "completed late").expect("writes");
        assert_eq!(server.objects().len(), 1);
        a_minute_later(&cluster).await;
        assert_eq!(server.objects(), Vec::<PathBuf>::new(), "{folder}");
    }
}

/// Moves what was swept once into the past instead of waiting, until the second sweep has ended the record.
async fn a_minute_later(cluster: &Cluster) {
    let moved =
        "update staged_objects set swept_at = swept_at - interval '61 seconds', written_by = pg_current_xact_id()";
    until("its record is gone", SOON, || async {
        sqlx::query(moved).execute(&cluster.pool).await.expect("moves");
        (cluster.count("select count(*) from staged_objects").await == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_worker_left_open_in_s3_is_aborted_from_the_record_alone() {
    let mut cluster = Cluster::start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), Some(PUT_AND_ABORT)).await;
    let (proxy, id) = held_upload(&cluster, &server).await;
    let victim = cluster.busy_worker();
    cluster.workers[victim].kill().await;
    proxy.set(Mode::Pass);
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!((ended["status"].as_str(), ended["attempt"].as_i64()), (Some("Success"), Some(2)), "{ended:#}");
    until("the open upload is aborted", SOON, || async { server.open_uploads().is_empty().then_some(()) }).await;
    // Once more after a minute, which is moved and not waited for; then nothing is left to be done, though this key may
    // delete nothing.
    a_minute_later(&cluster).await;
    assert_eq!(server.objects().len(), 2, "{:?}", server.objects());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_s3_secret_fails_with_what_to_do_and_is_not_shown() {
    let cluster = Cluster::start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), None).await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let mut config = server.config();
    config["secretAccessKey"] = json!("wrong-secret");
    let body = json!({ "name": "bad", "kind": "s3", "config": config });
    let id = crate::harness::id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    let tested = cluster.ok("POST", &format!("/api/destinations/{id}/test"), None).await;
    assert!(tested["ok"] == false, "{tested}");
    assert!(tested["message"].as_str().is_some_and(|m| m.contains("check accessKeyId, secretAccessKey")), "{tested}");
    let (local, root) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&local, &id], json!({ "maxAttempts": 3 })).await;
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!((ended["errorCode"].as_str(), ended["attempt"].as_i64()), (Some("store_denied"), Some(1)), "{ended:#}");
    assert!(ended["error"].as_str().is_some_and(|e| e.contains("destination 'bad'")), "{ended:#}");
    assert_eq!(files(&root), Vec::<PathBuf>::new(), "left in the destination that works");
    for text in [ended.to_string(), tested.to_string(), cluster.logs()] {
        assert!(!text.contains(SECRET_KEY) && !text.contains("wrong-secret"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_of_a_bucket_is_masked_and_sealed_and_not_sent_to_another_endpoint() {
    let cluster = Cluster::start().await;
    let server = S3Server::start(cluster.scratch.join("s3"), None).await;
    let path = format!("/api/destinations/{}", s3_destination(&cluster, server.config()).await);
    let shown = cluster.ok("GET", &path, None).await;
    assert_eq!(shown["config"]["secretAccessKey"], "********");
    let list = cluster.ok("GET", "/api/destinations", None).await;
    let changed = cluster.ok("PUT", &path, Some(json!({ "name": "again", "config": shown["config"] }))).await;
    let stored: String = sqlx::query_scalar("select string_agg(d::text, ' ') from (select * from destinations) d")
        .fetch_one(&cluster.pool)
        .await
        .expect("rows");
    for text in [shown.to_string(), list.to_string(), changed.to_string(), stored, cluster.logs()] {
        assert!(!text.contains(SECRET_KEY) && !text.contains(&hex::encode(SECRET_KEY)), "{text}");
    }
    let tested = cluster.ok("POST", &format!("{path}/test"), None).await;
    assert_eq!(tested["ok"], true, "the secret was kept: {tested}");
    let body = json!({ "config": { "endpoint": "http://127.0.0.1:1", "secretAccessKey": "********" } });
    let (status, answer) = cluster.request("PUT", &path, Some(body)).await;
    assert_eq!((status, answer["fields"][0]["field"].as_str()), (422, Some("config.secretAccessKey")), "{answer}");
}

/// A file system of its own; unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(path: &Path, options: &str) -> Self {
        std::fs::create_dir_all(path).expect("a folder");
        as_root("mount", &["-t", "tmpfs", "-o", options, "tmpfs", &path.display().to_string()]);
        Self(path.to_owned())
    }

    fn remount(&self, options: &str) {
        as_root("mount", &["-o", &format!("remount,{options}"), &self.0.display().to_string()]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).stderr(std::process::Stdio::null()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_destination_fails_the_run_and_leaves_nothing_in_any_destination() {
    let cluster = Cluster::start().await;
    let mount = Mount::tmpfs(&cluster.scratch.join("small"), "size=1m,mode=777");
    let small = cluster.local_destination_at(&mount.0).await;
    let (large, large_root) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(60_000).await.config()).await;
    let job = cluster.job(&source, &[&large, &small], json!({ "maxAttempts": 3 })).await;
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!((ended["errorCode"].as_str(), ended["attempt"].as_i64()), (Some("disk_full"), Some(1)), "{ended:#}");
    assert!(ended["error"].as_str().is_some_and(|e| e.contains("free space")), "{ended:#}");
    assert_eq!((files(&mount.0), files(&large_root)), (vec![], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_destination_fails_with_what_to_do() {
    let cluster = Cluster::start().await;
    let mount = Mount::tmpfs(&cluster.scratch.join("readonly"), "size=10m,mode=777");
    let destination = cluster.local_destination_at(&mount.0).await;
    mount.remount("ro");
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let ended =
        cluster.ended(&cluster.trigger(&cluster.job(&source, &[&destination], json!({})).await).await, SOON).await;
    assert_eq!(ended["errorCode"], "read_only", "{ended:#}");
    assert!(ended["error"].as_str().is_some_and(|e| e.contains("remount it writable")), "{ended:#}");
    assert_eq!(files(&mount.0), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmounted_destination_gets_no_byte_and_its_test_does_not_bless_the_empty_folder() {
    let cluster = Cluster::start().await;
    let root = cluster.scratch.join("mounted");
    let mount = Mount::tmpfs(&root, "size=10m,mode=777");
    let destination = cluster.local_destination_at(&root).await;
    drop(mount);
    until("it is unmounted", SOON, || async {
        std::fs::read_dir(&root).expect("a folder").next().is_none().then_some(())
    })
    .await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let ended =
        cluster.ended(&cluster.trigger(&cluster.job(&source, &[&destination], json!({})).await).await, SOON).await;
    assert!(ended["error"].as_str().is_some_and(|e| e.contains("is the mount missing?")), "{ended:#}");
    let tested = cluster.ok("POST", &format!("/api/destinations/{destination}/test"), None).await;
    assert_eq!(tested["ok"], false, "{tested}");
    assert!(
        std::fs::read_dir(&root).expect("a folder").next().is_none(),
        "something was written under the missing mount"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_outside_the_allowed_ones_is_refused_also_through_a_link() {
    let cluster = Cluster::start().await;
    let outside = std::env::temp_dir().join(crate::harness::unique("outside"));
    std::fs::create_dir(&outside).expect("a folder");
    let link = cluster.scratch.join("link");
    std::os::unix::fs::symlink(&outside, &link).expect("a link");
    for root in [&outside, &link] {
        let made = cluster
            .ok("POST", "/api/destinations", Some(json!({ "name": "x", "kind": "local", "config": { "root": root } })))
            .await;
        let tested = cluster.ok("POST", &format!("/api/destinations/{}/test", crate::harness::id(&made)), None).await;
        assert!(
            tested["ok"] == false && tested["message"].as_str().is_some_and(|m| m.contains("DBACKUP_LOCAL_PATHS")),
            "{tested}"
        );
    }
    assert_eq!(files(&outside), Vec::<PathBuf>::new());
    std::fs::remove_dir(outside).expect("removes");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_name_of_a_job_or_database_leaves_the_destinations_folder() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::empty().await;
    let nasty = format!("../../{}'\"\n;x", crate::harness::unique("evil")).replace('\n', "");
    crate::harness::sql(
        "postgres",
        &format!("create database \"{}\" owner {}", nasty.replace('"', "\"\""), source.role),
    )
    .await;
    let mut config = source.config();
    config["databases"] = json!([nasty]);
    let source_id = cluster.source("postgres", config).await;
    let (destination, root) = cluster.local_destination().await;
    for name in
        ["../../../tmp/evil", "a/b\\c", "quote ' and \" and `x`", "line\nbreak", "..", "-rf", "$(touch /tmp/evil)"]
    {
        let job = cluster.job(&source_id, &[&destination], json!({ "name": name })).await;
        let execution = cluster.backup(&job).await;
        assert_eq!(execution["jobName"], name);
        let path = execution["path"].as_str().expect("a path");
        assert!(
            root.join(path).is_file() && Path::new(path).components().count() == 2 && !path.contains(".."),
            "{path}"
        );
    }
    assert_eq!(files(&root).len(), 14);
    for slug in ["../x", "a/b", "..", ".", "A", "x\n", ""] {
        let body = json!({ "name": "x", "slug": slug, "sourceId": source_id, "destinationIds": [destination] });
        let (status, answer) = cluster.request("POST", "/api/jobs", Some(body)).await;
        assert_eq!((status, answer["fields"][0]["field"].as_str()), (422, Some("slug")), "{slug:?}: {answer}");
    }
}

/// An S3 server that says of every upload that it could not be completed. It was all the same, where `kept`; `size` is what
/// has been sent.
async fn forgetful(size: Arc<AtomicU64>, kept: Arc<AtomicBool>) -> u16 {
    let upload = move |request: Request| async move {
        let (parts, body) = request.into_parts();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let body = axum::body::to_bytes(body, usize::MAX).await.expect("a body");
        let xml = |text: &str| ([("etag", "\"x\"")], text.to_owned()).into_response();
        match parts.method {
            Method::POST if query.starts_with("uploads") => xml(
                "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId></InitiateMultipartUploadResult>",
            ),
            Method::POST => (StatusCode::BAD_REQUEST, "<Error><Code>RequestTimeout</Code></Error>").into_response(),
            Method::PUT if query.contains("partNumber") => {
                size.fetch_add(body.len() as u64, Ordering::SeqCst);
                xml("")
            }
            Method::HEAD if kept.load(Ordering::SeqCst) => {
                let size = size.load(Ordering::SeqCst).to_string();
                let headers = [
                    ("content-length", size.as_str()),
                    ("etag", "\"x\""),
                    ("last-modified", "Tue, 24 Nov 2026 00:00:00 GMT"),
                ];
                headers.into_response()
            }
            Method::HEAD => StatusCode::NOT_FOUND.into_response(),
            _ => xml(""),
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let app = axum::Router::new().fallback(upload);
    tokio::spawn(async move { axum::serve(listener, app).await });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_was_completed_although_the_answer_says_otherwise_is_a_backup() {
    let cluster = Cluster::start().await;
    let (size, kept) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(true)));
    let port = forgetful(size.clone(), kept.clone()).await;
    let config = json!({
        "bucket": "b", "endpoint": format!("http://127.0.0.1:{port}"), "region": "us-east-1", "accessKeyId": "x",
        "secretAccessKey": "x", "pathStyle": true
    });
    let s3 = s3_destination(&cluster, config).await;
    let source = cluster.source("postgres", PostgresSource::with_rows(500).await.config()).await;
    let job = cluster.job(&source, &[&s3], json!({ "maxAttempts": 1 })).await;
    cluster.backup(&job).await;
    assert!(size.swap(0, Ordering::SeqCst) > 0);
    // And one that is not there is none.
    kept.store(false, Ordering::SeqCst);
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!((&ended["status"], &ended["errorCode"]), (&json!("Failed"), &json!("store_failed")), "{ended:#}");
    assert!(ended["error"].as_str().is_some_and(|e| e.contains("could not complete an upload")), "{ended:#}");
}
