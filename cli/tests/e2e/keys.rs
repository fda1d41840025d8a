//! API keys over REST and on the command line.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::harness::{Cluster, SOON, id, source::PostgresSource, until};

/// A key may be remembered by a process for half a second; the promise is one.
const REVOKED: Duration = Duration::from_secs(1);

async fn made(cluster: &Cluster, body: Value) -> (String, String) {
    let key = cluster.ok("POST", "/api/api-keys", Some(body)).await;
    (id(&key), key["key"].as_str().expect("the secret, once").to_owned())
}

async fn status(cluster: &Cluster, api: usize, key: &str, path: &str) -> (u16, Value) {
    let response =
        cluster.http.get(format!("{}{path}", cluster.url(api))).bearer_auth(key).send().await.expect("answers");
    (response.status().as_u16(), response.json().await.expect("JSON"))
}

async fn refused_everywhere(cluster: &Cluster, key: &str, code: &str) {
    let everywhere = (0..cluster.apis.len()).map(|api| async move {
        until(&format!("process {api} refuses the key as {code}"), REVOKED, || async {
            let (status, answer) = status(cluster, api, key, "/api/jobs").await;
            (status == 401 && answer["code"] == code).then_some(())
        })
        .await;
    });
    futures::future::join_all(everywhere).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_disabled_rotated_expired_or_deleted_is_refused_by_every_process_within_a_second() {
    let cluster = Cluster::build().workers(0).start().await;
    let use_everywhere = async |key: &str| {
        for api in 0..2 {
            assert_eq!(status(&cluster, api, key, "/api/jobs").await.0, 200);
        }
    };
    let body = json!({ "name": "ci", "permissions": ["jobs:read"] });

    let (disabled, key) = made(&cluster, body.clone()).await;
    use_everywhere(&key).await;
    cluster.ok("PUT", &format!("/api/api-keys/{disabled}"), Some(json!({ "enabled": false }))).await;
    refused_everywhere(&cluster, &key, "key_disabled").await;
    cluster.ok("PUT", &format!("/api/api-keys/{disabled}"), Some(json!({ "enabled": true }))).await;
    until("the key counts again", REVOKED, || async {
        (status(&cluster, 1, &key, "/api/jobs").await.0 == 200).then_some(())
    })
    .await;

    let (rotated, old) = made(&cluster, body.clone()).await;
    use_everywhere(&old).await;
    let answer = cluster.ok("POST", &format!("/api/api-keys/{rotated}/rotate"), None).await;
    refused_everywhere(&cluster, &old, "key_rotated").await;
    use_everywhere(answer["key"].as_str().expect("the new secret")).await;

    let (deleted, key) = made(&cluster, body.clone()).await;
    use_everywhere(&key).await;
    cluster.ok("DELETE", &format!("/api/api-keys/{deleted}"), None).await;
    refused_everywhere(&cluster, &key, "key_invalid").await;

    // Ends that come by themselves: nothing tells a process of them, and it remembers the keys.
    let (expiring, key) = made(&cluster, body.clone()).await;
    let (fading, old) = made(&cluster, body).await;
    let soon = cluster.text("select to_char((clock_timestamp() + interval '3 seconds') at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MSZ')").await;
    cluster.ok("PUT", &format!("/api/api-keys/{expiring}"), Some(json!({ "expiresAt": soon }))).await;
    cluster.ok("POST", &format!("/api/api-keys/{fading}/rotate"), Some(json!({ "graceSeconds": 3 }))).await;
    // A process forgets everything when it learns of a change: only what is used after that is remembered.
    let changed = Instant::now();
    until("every process remembers both", SOON, || async {
        use_everywhere(&key).await;
        use_everywhere(&old).await;
        (changed.elapsed() > Duration::from_millis(700)).then_some(())
    })
    .await;
    for (over, key, code) in [("expires_at", &key, "key_expired"), ("previous_until", &old, "key_rotated")] {
        // The key that was rotated first lost its old secret at once.
        let query = format!(
            "select count(*) from api_keys where name = 'ci' and {over} <= clock_timestamp() and id::text in ('{expiring}', '{fading}')"
        );
        until("the key's time comes", Duration::from_secs(6), || async {
            (cluster.count(&query).await == 1).then_some(())
        })
        .await;
        refused_everywhere(&cluster, key, code).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_keeps_its_old_secret_for_the_grace_period_and_not_the_one_before() {
    let cluster = Cluster::build().workers(0).start().await;
    let (key, first) = made(&cluster, json!({ "name": "ci", "permissions": ["jobs:read"] })).await;
    let rotate = async || {
        let path = format!("/api/api-keys/{key}/rotate");
        let answer = cluster.ok("POST", &path, Some(json!({ "graceSeconds": 3600 }))).await;
        assert!(answer["previousSecretUntil"].is_string(), "{answer}");
        answer["key"].as_str().expect("the new secret").to_owned()
    };
    let second = rotate().await;
    for key in [&first, &second] {
        assert_eq!(status(&cluster, 0, key, "/api/jobs").await.0, 200);
    }
    let third = rotate().await;
    refused_everywhere(&cluster, &first, "key_invalid").await;
    for key in [&second, &third] {
        assert_eq!(status(&cluster, 1, key, "/api/jobs").await.0, 200);
    }
    // The grace ends by the database's clock: moved, not waited for.
    sqlx::query("update api_keys set previous_until = clock_timestamp() where previous_hash is not null")
        .execute(&cluster.pool)
        .await
        .expect("updates");
    refused_everywhere(&cluster, &second, "key_rotated").await;
    assert_eq!(status(&cluster, 0, &third, "/api/jobs").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_shown_once_and_is_in_no_list_no_log_and_not_in_the_database() {
    let cluster = Cluster::build().workers(0).start().await;
    let (key, secret) = made(&cluster, json!({ "name": "ci", "permissions": ["jobs:read"] })).await;
    for path in ["/api/api-keys".to_owned(), format!("/api/api-keys/{key}"), "/api/audit".to_owned()] {
        let answer = cluster.ok("GET", &path, None).await.to_string();
        assert!(!answer.contains(&secret[8..]), "{path}: {answer}");
    }
    let listed = cluster.ok("GET", &format!("/api/api-keys/{key}"), None).await;
    assert_eq!(listed["hint"].as_str(), Some(&secret[..8]), "{listed}");
    assert!(!cluster.logs().contains(&secret[8..]), "the secret is in a log");
    let rows = cluster.text("select string_agg(k::text, ' ') from api_keys k").await;
    assert!(!rows.contains(&secret[8..]), "{rows}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_grants_what_they_do_not_hold() {
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let (mine, other) = (
        cluster.job(&source, &[&destination], json!({})).await,
        cluster.job(&source, &[&destination], json!({})).await,
    );
    let (_, keeper) = made(
        &cluster,
        json!({ "name": "keeper", "permissions": ["api-keys:read", "api-keys:write", "jobs:read"], "jobIds": [mine],
                "networks": ["127.0.0.0/8"], "expiresAt": "2099-01-01T00:00:00Z" }),
    )
    .await;
    let fits = json!({ "name": "x", "permissions": ["jobs:read"], "jobIds": [mine], "networks": ["127.0.0.1"],
                       "expiresAt": "2098-01-01T00:00:00Z" });
    let create = async |change: Value| {
        let mut body = fits.clone();
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        cluster.request_as(&keeper, "POST", "/api/api-keys", Some(body)).await
    };
    assert_eq!(create(json!({})).await.0, 201);
    for (change, field) in [
        (json!({ "permissions": ["jobs:execute"] }), "permissions"),
        (json!({ "permissions": ["*"] }), "permissions"),
        (json!({ "jobIds": null }), "jobIds"),
        (json!({ "networks": ["0.0.0.0/0"] }), "networks"),
        (json!({ "networks": null }), "networks"),
        (json!({ "expiresAt": null }), "expiresAt"),
        (json!({ "expiresAt": "2100-01-01T00:00:00Z" }), "expiresAt"),
    ] {
        let (status, answer) = create(change.clone()).await;
        assert_eq!((status, answer["code"].as_str()), (403, Some("grant_exceeds")), "{change}: {answer}");
        assert_eq!(answer["fields"][0]["field"], field, "{change}: {answer}");
    }
    let (status, answer) = create(json!({ "jobIds": [other] })).await;
    assert_eq!(
        (status, answer["fields"][0]["field"].as_str()),
        (422, Some("jobIds.0")),
        "a job it does not see: {answer}"
    );

    // Nor by the back door: the administrator's key rotated, enabled or changed.
    let (strong, _) = made(&cluster, json!({ "name": "strong", "permissions": ["*"] })).await;
    for (method, path, body) in [
        ("POST", format!("/api/api-keys/{strong}/rotate"), json!({})),
        ("PUT", format!("/api/api-keys/{strong}"), json!({ "enabled": true })),
        ("PUT", format!("/api/api-keys/{strong}"), json!({ "name": "mine now" })),
    ] {
        let (status, answer) = cluster.request_as(&keeper, method, &path, Some(body.clone())).await;
        assert_eq!((status, answer["code"].as_str()), (403, Some("grant_exceeds")), "{method} {path} {body}: {answer}");
    }
    // What was found leaked must be stopped by whoever is there.
    let off = Some(json!({ "enabled": false }));
    assert_eq!(cluster.request_as(&keeper, "PUT", &format!("/api/api-keys/{strong}"), off).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_refused_outside_its_networks_and_the_headers_of_strangers_do_not_help() {
    let cluster = Cluster::build().workers(0).start().await;
    let inside =
        made(&cluster, json!({ "name": "in", "permissions": ["jobs:read"], "networks": ["127.0.0.0/8", "::1"] }))
            .await
            .1;
    let outside =
        made(&cluster, json!({ "name": "out", "permissions": ["jobs:read"], "networks": ["192.0.2.0/24"] })).await.1;
    assert_eq!(status(&cluster, 0, &inside, "/api/jobs").await.0, 200);
    for header in ["x-forwarded-for", "forwarded"] {
        let value = if header == "forwarded" { "for=192.0.2.1" } else { "192.0.2.1" };
        let request =
            cluster.http.get(format!("{}/api/jobs", cluster.url(0))).bearer_auth(&outside).header(header, value);
        let response = request.send().await.expect("answers");
        assert_eq!(response.status(), 403, "{header}");
        let answer: Value = response.json().await.expect("JSON");
        assert_eq!(answer["code"], "network_not_allowed", "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_listed_found_changed_and_tell_their_last_use() {
    let cluster = Cluster::build().workers(0).start().await;
    let mut names = BTreeSet::new();
    for n in 0..5 {
        names.insert(made(&cluster, json!({ "name": format!("key {n}"), "permissions": ["jobs:read"] })).await.0);
    }
    let (mut seen, mut next) = (Vec::new(), Some("/api/api-keys?limit=2&name=KEY".to_owned()));
    while let Some(path) = next {
        let (page, after) = cluster.page(&path).await;
        seen.extend(page);
        next = after;
    }
    assert_eq!((seen.len(), seen.iter().cloned().collect()), (5, names));

    let (key, secret) = made(&cluster, json!({ "name": "used", "permissions": ["jobs:read"] })).await;
    let path = format!("/api/api-keys/{key}");
    assert!(cluster.ok("GET", &path, None).await["lastUsedAt"].is_null());
    assert_eq!(status(&cluster, 0, &secret, "/api/jobs").await.0, 200);
    let used = until("its use is recorded", Duration::from_secs(15), || async {
        let key = cluster.ok("GET", &path, None).await;
        key["lastUsedAt"].is_string().then_some(key)
    })
    .await;
    assert_eq!(used["lastUsedAddress"], "127.0.0.1", "{used}");
    let changed = cluster.ok("PUT", &path, Some(json!({ "name": "renamed", "rateLimit": { "read": 7 } }))).await;
    assert_eq!(
        (changed["name"].as_str(), changed["rateLimit"]["read"].as_i64(), changed["permissions"][0].as_str()),
        (Some("renamed"), Some(7), Some("jobs:read")),
        "{changed}"
    );
    for (body, field) in [
        (json!({ "name": "x" }), "permissions"),
        (json!({ "name": "x", "permissions": [] }), "permissions"),
        (json!({ "name": "x", "permissions": ["jobs:fly"] }), "permissions"),
        (json!({ "name": "", "permissions": ["*"] }), "name"),
        (json!({ "name": "x", "permissions": ["*"], "networks": ["nowhere"] }), "networks.0"),
        (json!({ "name": "x", "permissions": ["*"], "jobIds": ["no-such-job"] }), "jobIds.0"),
        (json!({ "name": "x", "permissions": ["*"], "rateLimit": { "read": 0 } }), "rateLimit.read"),
    ] {
        let (status, answer) = cluster.request("POST", "/api/api-keys", Some(body.clone())).await;
        assert_eq!((status, answer["fields"][0]["field"].as_str()), (422, Some(field)), "{body}: {answer}");
    }
    assert_eq!(cluster.request("GET", "/api/api-keys/nonsense", None).await.0, 404);
}

/// `dbackup key …`.
fn dbackup_key(cluster: &Cluster, args: &[&str]) -> (Option<i32>, String, String) {
    cluster.dbackup(&[&["key"], args].concat(), "")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_makes_lists_rotates_disables_and_deletes_keys() {
    let cluster = Cluster::build().workers(0).start().await;
    let run = |args: &[&str]| dbackup_key(&cluster, args);
    let (code, first, said) =
        run(&["create", "--name", "deploy", "--permission", "jobs:read", "--expires-in-days", "30"]);
    assert_eq!((code, said.as_str()), (Some(0), ""), "nothing but the key is printed");
    let first = first.trim_end().to_owned();
    assert_eq!(status(&cluster, 0, &first, "/api/jobs").await.0, 200);

    let (code, list, _) = run(&["list"]);
    assert!(
        code == Some(0) && list.contains("deploy") && list.contains(&first[..8]) && !list.contains(&first),
        "{list}"
    );
    let listed = cluster.ok("GET", "/api/api-keys?name=deploy", None).await;
    assert!(listed[0]["expiresAt"].is_string(), "{listed}");
    let key = id(&listed[0]);

    let (code, second, _) = run(&["rotate", &key]);
    let second = second.trim_end().to_owned();
    assert_eq!(code, Some(0));
    refused_everywhere(&cluster, &first, "key_rotated").await;
    assert_eq!(status(&cluster, 1, &second, "/api/jobs").await.0, 200);
    assert_eq!(run(&["disable", &key]).0, Some(0));
    refused_everywhere(&cluster, &second, "key_disabled").await;
    assert_eq!(run(&["enable", &key]).0, Some(0));
    assert_eq!(run(&["delete", &key]).0, Some(0));
    refused_everywhere(&cluster, &second, "key_invalid").await;
    let (code, _, said) = run(&["delete", &key]);
    assert!(code == Some(1) && said.contains("no key"), "{code:?} {said}");
    let actions = cluster
        .text("select string_agg(action, ' ' order by seq) from audit_log where actor_kind = 'Administrator'")
        .await;
    assert_eq!(actions, "api-key.create api-key.rotate api-key.update api-key.update api-key.delete");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_binds_a_key_to_jobs_and_networks_and_grants_a_grace() {
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let mine = cluster.job(&source, &[&destination], json!({ "slug": "mine" })).await;
    cluster.job(&source, &[&destination], json!({})).await;
    let create = ["create", "--name", "bound", "--permission", "jobs:read", "--job", "mine"];
    let make = |more: &[&str]| dbackup_key(&cluster, &[&create[..], more].concat());

    let (code, key, _) = make(&["--network", "127.0.0.0/8", "--network", "::1"]);
    assert_eq!(code, Some(0));
    let (allowed, jobs) = status(&cluster, 0, key.trim_end(), "/api/jobs").await;
    assert_eq!((allowed, jobs.as_array().map(|j| j.iter().map(id).collect())), (200, Some(vec![mine])));
    let (_, elsewhere, _) = make(&["--network", "192.0.2.0/24"]);
    let (refused, answer) = status(&cluster, 0, elsewhere.trim_end(), "/api/jobs").await;
    assert_eq!((refused, answer["code"].as_str()), (403, Some("network_not_allowed")), "{answer}");

    let listed = id(&cluster.ok("GET", "/api/api-keys?name=bound", None).await[0]);
    let (code, second, _) = dbackup_key(&cluster, &["rotate", &listed, "--grace-seconds", "3600"]);
    assert_eq!(code, Some(0));
    for key in [&key, &second] {
        assert_eq!(status(&cluster, 1, key.trim_end(), "/api/jobs").await.0, 200);
    }
    for (more, said) in [
        (["--job", "no-such-job"], "no job"),
        (["--network", "nowhere"], "network"),
        (["--permission", "jobs:fly"], "jobs:fly"),
    ] {
        let (code, printed, complained) = make(&more);
        assert!(code != Some(0) && printed.is_empty() && complained.contains(said), "{more:?}: {code:?} {complained}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::async_yields_async, reason = "a change goes on while the next is sent")]
async fn a_key_that_is_disabled_stays_so_when_somebody_renames_it_at_the_same_time() {
    let cluster = Cluster::build().workers(0).start().await;
    let (key, secret) = made(&cluster, json!({ "name": "ci", "permissions": ["jobs:read"] })).await;
    let path = format!("/api/api-keys/{key}");
    // Both changes are under way before either is made: they wait for a lock of the test.
    let lock = async || {
        let mut lock = cluster.pool.begin().await.expect("begins");
        let locked = sqlx::query("select from api_keys where id::text = $1 for update").bind(&key);
        locked.execute(&mut *lock).await.expect("locks");
        lock
    };
    let waits = async |changes| crate::changes::waits(&cluster, changes).await;
    let change = async |body: Value| {
        let (url, http, admin) = (format!("{}{path}", cluster.url(0)), cluster.http.clone(), cluster.admin_key.clone());
        tokio::spawn(async move { http.put(url).bearer_auth(admin).json(&body).send().await })
    };
    let locked = lock().await;
    let disabled = change(json!({ "enabled": false })).await;
    waits(1).await;
    let renamed = change(json!({ "name": "renamed" })).await;
    waits(2).await;
    locked.commit().await.expect("commits");
    for answer in [disabled, renamed] {
        assert_eq!(answer.await.expect("joins").expect("answers").status(), 200);
    }
    let now = cluster.ok("GET", &path, None).await;
    assert_eq!((now["name"].as_str(), now["enabled"].as_bool()), (Some("renamed"), Some(false)), "{now}");
    refused_everywhere(&cluster, &secret, "key_disabled").await;

    // Nor does the command line say that it disabled a key which somebody's change has kept enabled.
    cluster.ok("PUT", &path, Some(json!({ "enabled": true }))).await;
    let locked = lock().await;
    let renamed = change(json!({ "name": "renamed again" })).await;
    waits(1).await;
    let mut disable = cluster.command(&["key", "disable", &key]).spawn().expect("dbackup runs");
    waits(2).await;
    locked.commit().await.expect("commits");
    assert_eq!(renamed.await.expect("joins").expect("answers").status(), 200);
    assert!(disable.wait().expect("ends").success());
    let now = cluster.ok("GET", &path, None).await;
    assert_eq!((now["name"].as_str(), now["enabled"].as_bool()), (Some("renamed again"), Some(false)), "{now}");
}
