//! Sources that do not answer as they should, and secrets that stay secret.

use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::harness::{
    Cluster, SOON,
    held::Held,
    mariadb_port, postgres_url,
    process::Process,
    proxy::{Mode, Proxy},
    source::{MariadbSource, PASSWORD, PostgresSource},
    until,
};

async fn failed_run(cluster: &Cluster, engine: &str, config: Value) -> Value {
    let (destination, root) = cluster.local_destination().await;
    let job = cluster.job(&cluster.source(engine, config).await, &[&destination], json!({})).await;
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!(ended["status"], "Failed", "{ended:#}");
    assert!(crate::harness::files(&root).is_empty());
    ended
}

fn with(mut config: Value, field: &str, value: Value) -> Value {
    config[field] = value;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_source_is_told_so_that_a_person_can_act() {
    let cluster = Cluster::start().await;
    let (postgres, mariadb) = (PostgresSource::empty().await.config(), MariadbSource::with_rows(1).config());
    // Port 1 of this machine refuses.
    for (engine, config) in [("postgres", &postgres), ("mariadb", &mariadb)] {
        for (field, value, code, hint) in [
            ("password", json!("wrong"), "source_auth", "Check username and password"),
            ("databases", json!(["no_such_database"]), "database_missing", "no_such_database"),
            ("port", json!(1), "source_unreachable", "Check host and port"),
            ("host", json!("no-such-host.invalid"), "source_unreachable", "Check host and port"),
        ] {
            let ended = failed_run(&cluster, engine, with(config.clone(), field, value)).await;
            assert_eq!(ended["errorCode"], code, "{engine} {field}: {ended:#}");
            assert!(ended["error"].as_str().is_some_and(|e| e.contains(hint)), "{engine} {field}: {ended:#}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_not_read_everything_is_told_which_rights_are_missing() {
    let cluster = Cluster::start().await;
    let mariadb = MariadbSource::with_rows(1);
    crate::harness::source::mariadb("mysql", &format!("revoke select on mysql.proc from {}@'%'", mariadb.user));
    let postgres = PostgresSource::with_rows(1).await;
    crate::harness::sql(&postgres.database, "alter table item owner to postgres").await;
    for (engine, config, hint) in
        [("mariadb", mariadb.config(), "SELECT on mysql.proc"), ("postgres", postgres.config(), "pg_read_all_data")]
    {
        let ended = failed_run(&cluster, engine, config).await;
        assert_eq!(ended["errorCode"], "source_denied", "{engine}: {ended:#}");
        assert!(ended["error"].as_str().is_some_and(|e| e.contains(hint)), "{engine}: {ended:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_mariadb_user_may_not_see_is_not_left_out_without_a_word() {
    let cluster = Cluster::start().await;
    let source = MariadbSource::with_rows(1);
    let (destination, _) = cluster.local_destination().await;
    let source_id = cluster.source("mariadb", source.config()).await;
    let job = cluster.job(&source_id, &[&destination], json!({})).await;
    let log = cluster.backup(&job).await["logs"].to_string();
    assert!(!log.contains("may lack"), "this user sees everything: {log}");

    let (database, user) = (&source.database, &source.user);
    let narrow = format!(
        "revoke all on {database}.* from {user}@'%'; revoke select on mysql.proc from {user}@'%';
         grant select, show view, event on {database}.* to {user}@'%'"
    );
    crate::harness::source::mariadb("mysql", &narrow);
    let log = cluster.backup(&job).await["logs"].to_string();
    assert!(log.contains("may lack triggers (right TRIGGER) and routines"), "{log}");
    let tested = cluster.ok("POST", &format!("/api/sources/{source_id}/test"), None).await;
    assert!(tested["message"].as_str().is_some_and(|m| m.contains("may lack triggers")), "{tested}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_somebody_holds_fails_the_attempt_in_time_and_is_tried_again() {
    let cluster = Cluster::build().env("DBACKUP_LOCK_WAIT_SECONDS", 1).start().await;
    let source = PostgresSource::with_rows(1).await;
    let mut holder = PgConnection::connect(&postgres_url(&source.database)).await.expect("connects");
    sqlx::raw_sql("begin; lock table item in access exclusive mode").execute(&mut holder).await.expect("locks");
    let ended = failed_run(&cluster, "postgres", source.config()).await;
    assert_eq!(ended["errorCode"], "source_locked", "{ended:#}");
    assert!(ended["error"].as_str().is_some_and(|e| e.contains("pg_locks")), "{ended:#}");

    let (destination, _) = cluster.local_destination().await;
    let job = cluster.source("postgres", source.config()).await;
    let job = cluster.job(&job, &[&destination], json!({ "maxAttempts": 3 })).await;
    let id = cluster.trigger(&job).await;
    until("an attempt failed", SOON, || async {
        let failures = format!("select failures::bigint from executions where id = '{id}'");
        (cluster.count(&failures).await >= 1).then_some(())
    })
    .await;
    sqlx::raw_sql("rollback").execute(&mut holder).await.expect("lets go");
    let ended = cluster.ended(&id, SOON).await;
    assert_eq!(ended["status"], "Success", "{ended:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_accepts_and_never_answers_does_not_hold_a_run_for_long() {
    let cluster = Cluster::start().await;
    let (postgres, mariadb) = (PostgresSource::empty().await, MariadbSource::with_rows(1));
    let silent = async |engine: &str, target: u16, config: Value| {
        let proxy = Proxy::start(target).await;
        proxy.set(Mode::Hold);
        let ended = failed_run(&cluster, engine, with(config, "port", json!(proxy.port))).await;
        assert_eq!(ended["errorCode"], "source_unreachable", "{engine}: {ended:#}");
        assert!(ended["error"].as_str().is_some_and(|e| e.contains("Check host and port")), "{engine}: {ended:#}");
    };
    tokio::join!(
        silent("postgres", postgres.port, postgres.config()),
        silent("mariadb", mariadb_port(), mariadb.config())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sources_test_is_carried_out_by_a_worker_of_its_pool_and_says_what_it_found() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(10).await;
    let good = cluster.source("postgres", source.config()).await;
    let tested = cluster.ok("POST", &format!("/api/sources/{good}/test"), None).await;
    assert!(
        tested["ok"] == true
            && tested["version"].is_string()
            && tested["message"].as_str().is_some_and(|m| m.contains("pg_dump")),
        "{tested}"
    );

    let bad = cluster.source("postgres", with(source.config(), "password", json!("wrong"))).await;
    let tested = cluster.ok("POST", &format!("/api/sources/{bad}/test"), None).await;
    assert!(
        tested["ok"] == false
            && tested["message"].as_str().is_some_and(|m| m.contains("password authentication failed")),
        "{tested}"
    );

    cluster.ok("PUT", &format!("/api/sources/{good}"), Some(json!({ "pool": "far-away" }))).await;
    let (status, answer) = cluster.request("POST", &format!("/api/sources/{good}/test"), None).await;
    assert_eq!((status, answer["code"].as_str()), (503, Some("no_worker")), "{answer}");
    assert!(answer["error"].as_str().is_some_and(|e| e.contains("far-away")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_workers_of_its_pool_run_a_source() {
    let mut cluster = Cluster::start().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    cluster.ok("PUT", &format!("/api/sources/{source}"), Some(json!({ "pool": "dmz" }))).await;
    let (destination, _) = cluster.local_destination().await;
    let id = cluster.trigger(&cluster.job(&source, &[&destination], json!({})).await).await;
    cluster
        .add_worker(&[("DBACKUP_POOLS", "office, dmz".to_owned()), ("DBACKUP_WORKER_NAME", "in-the-dmz".to_owned())])
        .await;
    let ended = cluster.ended(&id, SOON).await;
    assert!(ended["logs"].to_string().contains("in-the-dmz"), "{ended:#}");
    assert_eq!(ended["status"], "Success");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_in_no_answer_no_log_no_argument_and_not_readable_in_the_database() {
    let cluster = Cluster::build().env("RUST_LOG", "debug,h2=info,hyper=info").start().await;
    let secret = format!("top-{}", crate::harness::unique("secret"));
    let source = PostgresSource::with_rows(60_000).await;
    crate::harness::sql("postgres", &format!("alter role {} password '{secret}'", source.role)).await;
    let proxy = crate::harness::proxy::Proxy::start(source.port).await;
    let config = with(source.config_at(proxy.port), "password", json!(secret));
    let source_id = cluster.source("postgres", config).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source_id, &[&destination], json!({})).await;

    proxy.set(crate::harness::proxy::Mode::HoldAfter(1_000_000));
    let id = cluster.trigger(&job).await;
    proxy.passes(1_000_000).await;
    let children: Vec<_> = cluster.workers.iter().flat_map(Process::children).collect();
    assert!(!children.is_empty());
    for child in children {
        let arguments = std::fs::read(format!("/proc/{child}/cmdline")).expect("it runs");
        assert!(!String::from_utf8_lossy(&arguments).contains(&secret));
    }
    proxy.set(crate::harness::proxy::Mode::Pass);
    cluster.in_status(&id, "Success", SOON).await;

    let mut answers = String::new();
    for path in [
        "/api/sources".to_owned(),
        format!("/api/sources/{source_id}"),
        "/api/jobs".to_owned(),
        format!("/api/executions/{id}?includeLogs=true"),
    ] {
        answers += &cluster.request("GET", &path, None).await.1.to_string();
    }
    answers += &cluster
        .request("PUT", &format!("/api/sources/{source_id}"), Some(json!({ "name": "again" })))
        .await
        .1
        .to_string();
    answers += &cluster
        .request(
            "POST",
            "/api/sources",
            Some(json!({ "name": "", "engine": "postgres", "config": { "password": secret } })),
        )
        .await
        .1
        .to_string();
    assert!(answers.contains("********") && !answers.contains(&secret), "{answers}");
    let logs = cluster.logs();
    let own = cluster.env()["DBACKUP_ENCRYPTION_KEY"].as_str();
    for text in [secret.as_str(), own, &cluster.admin_key] {
        assert!(!logs.contains(text), "a secret is in the log");
    }
    let stored: String = sqlx::query_scalar("select string_agg(s::text, ' ') from (select * from sources) s")
        .fetch_one(&cluster.pool)
        .await
        .expect("rows");
    assert!(!stored.contains(&secret) && !stored.contains(&hex::encode(&secret)));
    let hashes: i64 = sqlx::query_scalar("select count(*) from api_keys where position($1::bytea in secret_hash) > 0")
        .bind(cluster.admin_key.as_bytes())
        .fetch_one(&cluster.pool)
        .await
        .expect("rows");
    assert_eq!(hashes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_with_the_mask_keeps_the_password_unless_the_address_changes() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(10).await;
    let id = cluster.source("postgres", source.config()).await;
    let path = format!("/api/sources/{id}");
    let shown = cluster.ok("GET", &path, None).await;
    assert_eq!(shown["config"]["password"], "********");
    cluster.ok("PUT", &path, Some(json!({ "config": shown["config"], "labels": { "env": "prod" } }))).await;
    let tested = cluster.ok("POST", &format!("{path}/test"), None).await;
    assert_eq!(tested["ok"], true, "the password was kept: {tested}");
    let (status, answer) =
        cluster.request("PUT", &path, Some(json!({ "config": { "host": "localhost", "password": "********" } }))).await;
    assert_eq!((status, answer["fields"][0]["field"].as_str()), (422, Some("config.password")), "{answer}");
    cluster.ok("PUT", &path, Some(json!({ "config": { "host": "localhost", "password": PASSWORD } }))).await;
    until("the new address works", SOON, || async {
        (cluster.ok("POST", &format!("{path}/test"), None).await["ok"] == true).then_some(())
    })
    .await;
}

/// Seconds until the kernel probes each silent connection of a process whose peer is expected to answer.
fn probes(pid: nix::unistd::Pid) -> Vec<u64> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its files").filter_map(|file| {
        let link = std::fs::read_link(file.ok()?.path()).ok()?;
        Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
    });
    let sockets: Vec<String> = links.collect();
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("its connections");
    let of_it = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    of_it
        .filter(|columns| columns.get(9).is_some_and(|inode| sockets.iter().any(|socket| socket == inode)))
        // Timer 2 is that of keepalive, in hundredths of a second.
        .filter_map(|columns| u64::from_str_radix(columns[5].strip_prefix("02:")?, 16).ok())
        .map(|hundredths| hundredths / 100)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_a_dump_that_goes_without_a_word_is_asked_for_after_a_minute_of_silence() {
    let cluster = Cluster::start().await;
    let held = Held::new(&cluster, json!({})).await;
    let run = held.run(&cluster).await;
    let tool = cluster.workers[cluster.busy_worker()].children()[0];
    let soon = until("its connection is silent", SOON, || async { probes(tool).first().copied() }).await;
    assert!(soon <= 60, "in {soon} s");
    held.proxy.set(Mode::Pass);
    assert_eq!(cluster.ended(&run, SOON).await["status"], "Success");
}
