//! Webhooks: who is told of the ends of runs, and that nobody else learns where.

use std::{process::Command, time::Duration};

use serde_json::{Value, json};

use crate::{
    harness::{
        Cluster, SOON,
        held::Held,
        hooks::{Hooks, TOKEN, Told},
        id,
        proxy::Mode,
        source::{PostgresSource, holds, job_without_workers},
        until,
    },
    trace::plain_job,
};

/// Makes a webhook; gives its id and its secret.
pub async fn webhook(cluster: &Cluster, hooks: &Hooks, more: Value) -> (String, String) {
    let mut body = json!({ "name": "On call", "url": hooks.url });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let made = cluster.ok("POST", "/api/webhooks", Some(body)).await;
    (id(&made), made["secret"].as_str().expect("a secret").to_owned())
}

/// What is still to be told.
const LEFT: &str = "select count(*) from webhook_deliveries";

const ALL: [&str; 3] = ["failed", "cancelled", "succeeded"];

/// Whether a message is signed with a secret, by somebody else's reading of the standard.
fn is_signed(told: &Told, secret: &str) -> bool {
    let script = "import base64, hashlib, hmac, os, sys
key = base64.b64decode(os.environ['SECRET'].removeprefix('whsec_'))
signed = (os.environ['ID'] + '.' + os.environ['AT'] + '.' + os.environ['BODY']).encode()
mine = 'v1,' + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
sys.exit(0 if hmac.compare_digest(mine, os.environ['SIGNATURE']) else 1)";
    let status = Command::new("python3")
        .args(["-c", script])
        .env("SECRET", secret)
        .env("ID", told.header("webhook-id"))
        .env("AT", told.header("webhook-timestamp"))
        .env("BODY", &told.body)
        .env("SIGNATURE", told.header("webhook-signature"))
        .status();
    status.expect("python3 runs").success()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_end_of_a_run_is_told_however_it_ends_signed_and_within_its_trace() {
    let mut cluster = Cluster::start().await;
    let hooks = Hooks::start().await;
    let (_, secret) = webhook(&cluster, &hooks, json!({ "events": ALL })).await;
    let mut ends = Vec::new();

    let job = plain_job(&cluster, json!({ "labels": { "env": "prod" } })).await;
    let backup = cluster.backup(&job).await;
    ends.push((id(&backup), "execution.succeeded"));
    // The source's database is gone: it fails.
    let gone = PostgresSource::empty().await;
    let source = cluster
        .source("postgres", {
            let mut c = gone.config();
            c["databases"] = json!(["nowhere"]);
            c
        })
        .await;
    let (destination, _) = cluster.local_destination().await;
    let failing = cluster.job(&source, &[&destination], json!({})).await;
    let failed = cluster.ended(&cluster.trigger(&failing).await, SOON).await;
    assert_eq!(failed["status"], "Failed", "{failed:#}");
    ends.push((id(&failed), "execution.failed"));
    // A restore into what is not empty.
    let answer = cluster.ok("POST", &format!("/api/executions/{}/restore", id(&backup)), Some(json!({}))).await;
    ends.push((
        cluster.ended(answer["executionId"].as_str().expect("an id"), SOON).await["id"]
            .as_str()
            .expect("an id")
            .to_owned(),
        "execution.failed",
    ));
    // One that waits is cancelled, and one is not started in time.
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let waiting = cluster.trigger(&job).await;
    cluster.ok("POST", &format!("/api/executions/{waiting}/cancel"), None).await;
    ends.push((waiting, "execution.cancelled"));
    let late = cluster.ok("POST", &format!("/api/jobs/{job}/run"), Some(json!({ "startWithinSeconds": 1 }))).await;
    let late = late["executionId"].as_str().expect("an id").to_owned();
    cluster.ended(&late, SOON).await;
    ends.push((late, "execution.failed"));
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    // One is cancelled, and its worker dies before it hears of it: the API processes close it, and a later worker tells.
    let held = Held::new(&cluster, json!({})).await;
    let running = held.run(&cluster).await;
    until("the others are told", SOON, || async { (cluster.count(LEFT).await == 0).then_some(()) }).await;
    for worker in &mut cluster.workers {
        worker.kill().await;
    }
    cluster.ok("POST", &format!("/api/executions/{running}/cancel"), None).await;
    assert_eq!(cluster.ended(&running, SOON).await["outcome"], "Cancelled");
    held.proxy.set(Mode::Pass);
    ends.push((running, "execution.cancelled"));
    assert_eq!((hooks.told().len(), cluster.count(LEFT).await), (ends.len() - 1, 1), "nobody is there to tell");
    cluster.add_worker(&[]).await;

    let told = hooks.receives(ends.len(), SOON).await;
    assert_eq!(told.len(), ends.len(), "each once: {told:#?}");
    for (execution, kind) in &ends {
        let of: Vec<_> = told.iter().filter(|told| told.json()["data"]["id"] == *execution).collect();
        let [one] = of[..] else { panic!("{execution} was told {} times", of.len()) };
        let (message, now) = (one.json(), cluster.execution(execution).await);
        assert_eq!(message["type"], *kind, "{message:#}");
        for same in [
            "jobId",
            "jobName",
            "status",
            "outcome",
            "error",
            "errorCode",
            "endedAt",
            "size",
            "labels",
            "traceId",
            "trigger",
        ] {
            assert_eq!(message["data"][same], now[same], "{same} of {message:#}");
        }
        assert!(is_signed(one, &secret), "{one:?}");
        assert!(!is_signed(one, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"));
        assert_eq!(Some(one.header("traceparent").split('-').nth(1).expect("a trace")), now["traceId"].as_str());
        let at: i64 = one.header("webhook-timestamp").parse().expect("a number");
        assert!((chrono::Utc::now().timestamp() - at).abs() < 300);
    }
    let ids: std::collections::BTreeSet<_> = told.iter().map(|told| told.header("webhook-id")).collect();
    assert_eq!(ids.len(), told.len());
    until("all of it is recorded", SOON, || async { (cluster.count(LEFT).await == 0).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_taken_is_told_again_under_the_same_id_until_it_is_a_day_old() {
    let cluster = Cluster::build().env("DBACKUP_METRICS_LISTEN", "127.0.0.1:0").start().await;
    let hooks = Hooks::start().await;
    hooks.answer(&[500, 302, 410]);
    let (hook, _) = webhook(&cluster, &hooks, json!({ "events": ["succeeded"] })).await;
    let job = plain_job(&cluster, json!({})).await;
    cluster.backup(&job).await;
    let told = hooks.receives(4, SOON).await;
    let ids: Vec<_> = told.iter().map(|told| told.header("webhook-id").to_owned()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert!(told.iter().all(|told| told.body == told.body && told.json()["data"]["status"] == "Success"));
    let path = format!("/api/webhooks/{hook}");
    let shown = until("it is recorded", SOON, || async {
        let shown = cluster.ok("GET", &path, None).await;
        (shown["pending"] == 0 && shown["lastDeliveredAt"].is_string()).then_some(shown)
    })
    .await;
    assert_eq!(shown["lastError"], "it answers 410 Gone", "{shown:#}");
    let counted = |result: &'static str| {
        let cluster = &cluster;
        async move { cluster.told_by_workers("dbackup_webhook_deliveries_total", &[("result", result)]).await }
    };
    assert_eq!((counted("delivered").await, counted("failed").await, counted("given_up").await), (1.0, 3.0, 0.0));
    assert!(cluster.logs().contains("a redirect, which is not followed"));

    hooks.answer(&[500; 40]);
    let before = hooks.told().len();
    cluster.backup(&job).await;
    hooks.receives(before + 1, SOON).await;
    // What is recorded in the same moment would count neither as young nor as old, and be tried again a minute later.
    until("the first failure is recorded", SOON, || async {
        (cluster.count("select count(*) from webhook_deliveries where error is not null").await == 1).then_some(())
    })
    .await;
    let old = "update webhook_deliveries set created_at = created_at - interval '25 hours'";
    sqlx::query(old).execute(&cluster.pool).await.expect("updates");
    until("it is given up", SOON, || async { (counted("given_up").await == 1.0).then_some(()) }).await;
    assert_eq!(cluster.count(LEFT).await, 0);
    assert!(cluster.logs().contains("given up"));
    assert!(!cluster.logs().contains(TOKEN), "the address is a secret");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_hears_only_of_the_events_and_labels_that_it_names_and_of_nothing_while_it_is_off() {
    let cluster = Cluster::start().await;
    let [all, prod] = [Hooks::start().await, Hooks::start().await];
    let (first, _) = webhook(&cluster, &all, json!({ "events": ["failed", "succeeded", "failed"] })).await;
    webhook(&cluster, &prod, json!({ "events": ["succeeded"], "labels": { "env": "prod" } })).await;
    let job = plain_job(&cluster, json!({})).await;
    let run = async |env: &str| {
        let answer = cluster
            .ok("POST", &format!("/api/jobs/{job}/run"), Some(json!({ "labels": { "env": env, "x": "y" } })))
            .await;
        cluster.ended(answer["executionId"].as_str().expect("an id"), SOON).await
    };
    run("test").await;
    let told = run("prod").await;
    all.receives(2, SOON).await;
    let of_prod = prod.receives(1, SOON).await;
    assert_eq!((of_prod.len(), of_prod[0].json()["data"]["id"].clone()), (1, told["id"].clone()));
    // Switched off with something to tell.
    all.answer(&[500; 40]);
    let before = all.told().len();
    run("test").await;
    all.receives(before + 1, SOON).await;
    let path = format!("/api/webhooks/{first}");
    let off = cluster.ok("PUT", &path, Some(json!({ "enabled": false }))).await;
    assert_eq!(
        (&off["enabled"], &off["pending"], &off["events"]),
        (&json!(false), &json!(0), &json!(["failed", "succeeded"]))
    );
    run("test").await;
    assert_eq!(cluster.count(LEFT).await, 0);
    let (status, answer) = cluster.request("DELETE", &path, None).await;
    assert_eq!((status, cluster.request("GET", &path, None).await.0), (200, 404), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_ends_though_its_webhook_is_deleted_at_the_same_moment() {
    let cluster = Cluster::build().workers(0).start().await;
    let hooks = Hooks::start().await;
    webhook(&cluster, &hooks, json!({ "events": ["cancelled"] })).await;
    let id = cluster.trigger(&job_without_workers(&cluster, json!({})).await).await;
    let mut deleting = cluster.pool.begin().await.expect("begins");
    sqlx::query("delete from webhooks").execute(&mut *deleting).await.expect("deletes");
    let path = format!("/api/executions/{id}/cancel");
    let release = async {
        let waits =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        until("the end waits", SOON, || async { (cluster.count(waits).await > 0).then_some(()) }).await;
        deleting.commit().await.expect("commits");
    };
    let (answer, ()) = tokio::join!(cluster.request("POST", &path, None), release);
    assert_eq!(answer.0, 200, "{}", answer.1);
    assert_eq!(cluster.count(LEFT).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_never_answers_keeps_nobody_else_waiting() {
    let cluster = Cluster::build().workers(1).start().await;
    let [silent, quick] = [Hooks::start().await, Hooks::start().await];
    silent.hang();
    webhook(&cluster, &silent, json!({ "events": ["cancelled"] })).await;
    webhook(&cluster, &quick, json!({ "events": ["cancelled"] })).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let job = plain_job(&cluster, json!({})).await;
    let cancelled = async || {
        let id = cluster.trigger(&job).await;
        cluster.ok("POST", &format!("/api/executions/{id}/cancel"), None).await;
    };
    for n in 1..=12 {
        cancelled().await;
        // A try takes ten seconds at most: nothing waits for one.
        quick.receives(n, Duration::from_secs(5)).await;
    }
    assert!(silent.told().len() <= 8, "four at once: {}", silent.told().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_says_what_the_address_answers_and_a_new_secret_signs_at_once() {
    let cluster = Cluster::start().await;
    let hooks = Hooks::start().await;
    let (hook, first) = webhook(&cluster, &hooks, json!({})).await;
    let path = format!("/api/webhooks/{hook}");
    let test = async || cluster.ok("POST", &format!("{path}/test"), None).await;
    assert_eq!(test().await, json!({ "ok": true, "error": null }));
    let told = hooks.told();
    assert!(told[0].json()["type"] == "test" && told[0].json()["data"].is_null() && is_signed(&told[0], &first));
    hooks.answer(&[403]);
    assert_eq!(test().await, json!({ "ok": false, "error": "it answers 403 Forbidden" }));
    assert_eq!(hooks.told().len(), 2, "a test is tried once");

    let rotated = cluster.ok("POST", &format!("{path}/rotate"), None).await;
    let second = rotated["secret"].as_str().expect("a secret");
    assert_ne!(second, first);
    test().await;
    let told = hooks.told();
    assert!(is_signed(&told[2], second) && !is_signed(&told[2], &first));
    // Another address keeps the secret, and nobody is there.
    cluster.ok("PUT", &path, Some(json!({ "url": format!("http://127.0.0.1:9/{TOKEN}") }))).await;
    let answer = test().await;
    let error = answer["error"].as_str().expect("an error");
    assert!(error.to_lowercase().contains("refused") && !error.contains(TOKEN), "{answer}");
    cluster.ok("PUT", &path, Some(json!({ "url": hooks.url, "name": "Other" }))).await;
    test().await;
    assert!(is_signed(hooks.told().last().expect("one"), second));
    assert_eq!(cluster.count(LEFT).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_cannot_be_is_refused_and_a_good_one_is_a_secret_from_then_on() {
    let cluster = Cluster::build().workers(0).start().await;
    let hooks = Hooks::start().await;
    for (more, field) in [
        (json!({ "url": "hooks.example.com" }), "url"),
        (json!({ "url": "ftp://hooks.example.com/x" }), "url"),
        (json!({ "url": "https://user:pass@hooks.example.com/" }), "url"),
        (json!({ "url": null }), "url"),
        (json!({ "name": "" }), "name"),
        (json!({ "events": [] }), "events"),
    ] {
        let mut body = json!({ "name": "On call", "url": hooks.url });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let (status, answer) = cluster.request("POST", "/api/webhooks", Some(body)).await;
        assert_eq!((status, &answer["fields"][0]["field"]), (422, &json!(field)), "{more} {answer}");
        assert!(!answer.to_string().contains("user:pass"), "{answer}");
    }
    let (status, answer) = cluster
        .request("POST", "/api/webhooks", Some(json!({ "name": "x", "url": hooks.url, "events": ["started"] })))
        .await;
    assert!(status == 400 && answer.to_string().contains("events"), "{answer}");

    let (hook, secret) = webhook(&cluster, &hooks, json!({})).await;
    let shown = cluster.ok("GET", &format!("/api/webhooks/{hook}"), None).await;
    let origin = hooks.url.strip_suffix(TOKEN).expect("it ends so");
    assert_eq!((&shown["url"], &shown["events"]), (&json!(format!("{origin}…")), &json!(["failed"])), "{shown:#}");
    let listed = cluster.ok("GET", "/api/webhooks", None).await;
    let audit = cluster.ok("GET", "/api/audit", None).await;
    assert!(audit.to_string().contains("webhook.create"));
    for text in [shown.to_string(), listed.to_string(), audit.to_string(), cluster.logs()] {
        assert!(!text.contains(TOKEN) && !text.contains(&secret), "{text}");
    }

    assert!(
        holds(&cluster.database, "On call") && !holds(&cluster.database, TOKEN) && !holds(&cluster.database, &secret)
    );

    // Nobody hears of what they may not see.
    let job = job_without_workers(&cluster, json!({})).await;
    let body = || Some(json!({ "name": "x", "url": hooks.url }));
    let blind = cluster.key(&["settings:read", "settings:write"]).await;
    let (status, answer) = cluster.request_as(&blind, "POST", "/api/webhooks", body()).await;
    assert_eq!((status, &answer["code"]), (403, &json!("permission_missing")), "{answer}");
    let jobs = Some(vec![job.parse().expect("an id")]);
    let scoped = cluster.scoped_key(&["settings:read", "settings:write", "history:read"], jobs).await;
    for (method, path) in [("POST", "/api/webhooks".to_owned()), ("PUT", format!("/api/webhooks/{hook}"))] {
        let (status, answer) = cluster.request_as(&scoped, method, &path, body()).await;
        assert_eq!((status, &answer["code"]), (403, &json!("job_scoped")), "{method} {answer}");
    }
}
