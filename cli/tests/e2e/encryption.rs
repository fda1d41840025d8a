//! Encryption with age: backups that the public tools open, and that nobody else does.

use std::{path::Path, process::Command};

use common::execution::claim;
use serde_json::{Value, json};

use crate::{
    harness::{
        Cluster, SOON, files,
        source::{MariadbSource, PostgresSource, holds, job_without_workers, mariadb, shell},
        unique, until,
    },
    restores::{empty_database, refused},
};

/// A key file as `age-keygen` writes it, and its recipient.
pub fn key_file(folder: &Path) -> (String, String) {
    let file = folder.join(unique("key"));
    let output = Command::new("age-keygen").arg("-o").arg(&file).output().expect("age-keygen runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new("age-keygen").arg("-y").arg(&file).output().expect("age-keygen runs");
    let recipient = String::from_utf8(output.stdout).expect("text").trim().to_owned();
    (file.to_str().expect("text").to_owned(), recipient)
}

/// A job whose backups are for these; gives its id, and where they lie.
async fn job(cluster: &Cluster, source: &PostgresSource, to: &[&str], more: Value) -> (String, std::path::PathBuf) {
    let source = cluster.source("postgres", source.config()).await;
    let (destination, root) = cluster.local_destination().await;
    let mut all = json!({ "encryption": { "recipients": to } });
    all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    (cluster.job(&source, &[&destination], all).await, root)
}

fn manifest(root: &Path) -> Value {
    let file = files(root).into_iter().find(|f| f.extension().is_some_and(|e| e == "json")).expect("a manifest");
    serde_json::from_slice(&std::fs::read(root.join(file)).expect("a file")).expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_public_tools_open_an_encrypted_backup_with_the_identity_of_any_recipient_and_with_no_other() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(30_000).await;
    let [(one, first), (other, second), (strange, _)] = [(); 3].map(|()| key_file(&cluster.scratch));
    for (compression, ending, unpack) in
        [("zstd", ".dump.zst.age", "zstd -dc"), ("gzip", ".dump.gz.age", "gzip -dc"), ("none", ".dump.age", "cat")]
    {
        let more = json!({ "compression": compression });
        let (job, root) = job(&cluster, &source, &[&first, &second], more).await;
        assert_eq!(
            cluster.ok("GET", &format!("/api/jobs/{job}"), None).await["encryption"],
            json!({ "recipients": [first, second] })
        );
        let backup = cluster.backup(&job).await;
        let path = backup["path"].as_str().expect("a path");
        assert!(path.ends_with(ending), "{path}");
        let file = root.join(path);
        for key in [&one, &other] {
            let open = format!("open() {{ age -d -i '{key}' \"$1\" | {unpack}; }}; open");
            source.assert_same(&source.restore_by(&open, &file).await).await;
        }
        let denied = Command::new("age").args(["-d", "-i", &strange, "-o", "/dev/null"]).arg(&file).output();
        assert!(!denied.expect("age runs").status.success(), "a stranger opens it");
        let stored = std::fs::read(&file).expect("a file");
        assert!(stored.starts_with(b"age-encryption.org/v1\n") && !stored.windows(5).any(|w| w == b"PGDMP"));

        let manifest = manifest(&root);
        assert_eq!(
            (&manifest["formatVersion"], &manifest["recipients"], &manifest["compression"]),
            (&json!(2), &json!([first, second]), &json!(compression))
        );
        let object = &manifest["objects"][0];
        let sum = |script: &str| {
            let output = shell(&format!("{script} | sha256sum")).stdout;
            String::from_utf8(output).expect("text").split(' ').next().expect("a sum").to_owned()
        };
        assert_eq!(object["storedSha256"], sum(&format!("cat '{}'", file.display())));
        assert_eq!(object["plainSha256"], sum(&format!("age -d -i '{one}' '{}' | {unpack}", file.display())));
        assert_eq!(backup["size"], stored.len());
        let of_artifacts: Vec<_> =
            backup["artifacts"].as_array().expect("a list").iter().map(|a| &a["recipients"]).collect();
        assert!(of_artifacts.contains(&&json!([first, second])), "{backup:#}");
        assert!(of_artifacts.contains(&&Value::Null), "the manifest is for everybody: {backup:#}");

        cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "encryption": null }))).await;
        let plain = cluster.backup(&job).await;
        assert!(plain["path"].as_str().is_some_and(|path| !path.ends_with(".age")), "{plain:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_backup_is_restored_with_its_identity_which_is_nowhere_to_be_found_afterwards() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(20_000).await;
    let [(key, recipient), (strange, _)] = [(); 2].map(|()| key_file(&cluster.scratch));
    let [identity, stranger] = [&key, &strange].map(|file| std::fs::read_to_string(file).expect("text"));
    let (job, _) = job(&cluster, &source, &[&recipient], json!({})).await;
    let backup = cluster.backup(&job).await;
    let path = format!("/api/executions/{}/restore", backup["id"].as_str().expect("an id"));
    let into = empty_database(&source).await;
    for (given, says) in [
        (Value::Null, "is required"),
        (json!(stranger), "does not open"),
        (json!("hunter2"), "holds no age identity"),
        (json!("AGE-SECRET-KEY-1QQQQ"), "with a mistake in it"),
    ] {
        let (status, answer) = cluster.request("POST", &path, Some(json!({ "into": into, "identity": given }))).await;
        let problem = &answer["fields"][0];
        assert_eq!((status, &problem["field"]), (422, &json!("identity")), "{answer}");
        assert!(problem["message"].as_str().is_some_and(|text| text.contains(says)), "{answer}");
        assert!(
            !answer.to_string().contains("AGE-SECRET-KEY-1Q") && !answer.to_string().contains("hunter2"),
            "{answer}"
        );
    }
    // While it waits it is sealed.
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let answer = cluster.ok("POST", &path, Some(json!({ "into": into, "identity": identity }))).await;
    let id = answer["executionId"].as_str().expect("an id").to_owned();
    let held = "select count(*) from restores where sealed_identity is not null";
    assert_eq!(cluster.count(held).await, 1);
    let secret = identity.lines().last().expect("a line");
    assert!(holds(&cluster.database, &recipient) && !holds(&cluster.database, secret), "it is there to be read");
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!(ended["status"], "Success", "{ended:#}");
    source.assert_same(&into).await;
    until("it is erased", SOON, || async { (cluster.count(held).await == 0).then_some(()) }).await;
    assert!(!ended.to_string().contains(secret) && !cluster.logs().contains(secret));
    assert!(!holds(&cluster.database, secret), "it is in the log of the run, or of the audit");
    // What is erased cannot be used once more.
    let (status, answer) = cluster.request("POST", &format!("/api/executions/{id}/retry"), None).await;
    assert_eq!((status, &answer["code"]), (409, &json!("identity_required")), "{answer}");
    // A restore that is cancelled while it waits leaves none either.
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let answer = cluster.ok("POST", &path, Some(json!({ "identity": identity }))).await;
    assert_eq!(cluster.count(held).await, 1);
    let id = answer["executionId"].as_str().expect("an id");
    cluster.ok("POST", &format!("/api/executions/{id}/cancel"), None).await;
    until("it is erased", SOON, || async { (cluster.count(held).await == 0).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_backup_of_mariadb_comes_back_by_the_command_and_a_damaged_one_touches_nothing() {
    let cluster = Cluster::start().await;
    let source = MariadbSource::with_rows(5_000);
    let (key, recipient) = key_file(&cluster.scratch);
    let held = cluster.source("mariadb", source.config()).await;
    let (destination, root) = cluster.local_destination().await;
    let more = json!({ "encryption": { "recipients": [recipient] } });
    let job = cluster.job(&held, &[&destination], more).await;
    let backup = cluster.backup(&job).await;
    let into = unique("restored");
    mariadb("mysql", &format!("grant all on {into}.* to {u}@'%'; grant super on *.* to {u}@'%'", u = source.user));
    let restore = |identity: &str| {
        let mut command = cluster.command(&["restore", backup["id"].as_str().expect("an id"), "--into", &into]);
        command
            .args(["--identity", identity])
            .env("DBACKUP_URL", cluster.url(0))
            .env("DBACKUP_API_KEY", &cluster.admin_key);
        let output = command.output().expect("dbackup runs");
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let (status, said) = restore("/nowhere/key");
    assert!(status == Some(2) && said.contains("/nowhere/key"), "{status:?} {said}");
    let (status, said) = restore(&key);
    assert_eq!(status, Some(0), "{said}");
    source.assert_same(&into);

    let file = root.join(backup["path"].as_str().expect("a path"));
    let mut bytes = std::fs::read(&file).expect("a file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).expect("writes");
    let identity = std::fs::read_to_string(&key).expect("text");
    let body = json!({ "into": into, "overwrite": true, "identity": identity });
    refused(&cluster, &backup, body, "backup_damaged", "the target was not touched").await;
    source.assert_same(&into);
}

#[tokio::test(flavor = "multi_thread")]
async fn recipients_that_are_none_are_refused_by_name_and_a_secret_among_them_is_not_repeated() {
    let cluster = Cluster::build().workers(0).start().await;
    let (key, recipient) = key_file(&cluster.scratch);
    let secret = std::fs::read_to_string(&key).expect("text").lines().last().expect("a line").to_owned();
    let job = job_without_workers(&cluster, json!({ "encryption": { "recipients": [recipient] } })).await;
    let path = format!("/api/jobs/{job}");
    for (recipients, field, says) in [
        (json!([]), "encryption.recipients", "between 1 and 16"),
        (json!([recipient, "ssh-ed25519 AAAA"]), "encryption.recipients[1]", "is not an age recipient"),
        (json!([recipient, recipient.to_uppercase()]), "encryption.recipients[1]", "is listed twice"),
        (json!([secret]), "encryption.recipients[0]", "must stay secret"),
    ] {
        let body = json!({ "encryption": { "recipients": recipients } });
        let (status, answer) = cluster.request("PUT", &path, Some(body)).await;
        let problem = &answer["fields"][0];
        assert_eq!((status, &problem["field"]), (422, &json!(field)), "{answer}");
        assert!(problem["message"].as_str().is_some_and(|text| text.contains(says)), "{answer}");
        assert!(!answer.to_string().contains(&secret));
    }
    let (status, answer) = cluster.request("PUT", &path, Some(json!({ "encryption": { "to": [recipient] } }))).await;
    assert_eq!(status, 400, "{answer}");
    // Whatever else changes, it stays encrypted.
    let changed = cluster.ok("PUT", &path, Some(json!({ "name": "Other" }))).await;
    assert_eq!(changed["encryption"]["recipients"], json!([recipient]));
    assert!(!cluster.logs().contains(&secret));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_the_version_before_gets_nothing_that_is_encrypted() {
    let cluster = Cluster::build().workers(0).start().await;
    let (_, recipient) = key_file(&cluster.scratch);
    let job = job_without_workers(&cluster, json!({ "encryption": { "recipients": [recipient] } })).await;
    let id = cluster.trigger(&job).await;
    let mut conn = cluster.pool.acquire().await.expect("connects");
    let before =
        "select count(*) from claim_executions_v5(gen_random_uuid(), 'old', '{default}', '{postgres}', 600000, 4)";
    assert_eq!(cluster.count(before).await, 0, "it would store it for everybody to read");
    let claims = claim::claim(&mut conn, &crate::harness::claimant(), std::time::Duration::from_secs(600), 4).await;
    assert_eq!(claims.expect("claims")[0].execution.to_string(), id);
    // Without encryption it is anybody's.
    cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "encryption": null, "overlap": "allow" }))).await;
    cluster.trigger(&job).await;
    assert_eq!(cluster.count(before).await, 1);
}
