//! `dbackup` as an administrator uses it, and where every program takes its settings from.

use std::{
    collections::BTreeMap,
    process::{Command, Output},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::json;
use sqlx::{Connection, PgConnection};

use crate::harness::{
    Cluster, Process, SOON, binary, postgres_port, postgres_url,
    proxy::{Mode, Proxy},
    readme::README,
    source::{PostgresSource, psql},
    sql, unique, until,
};

fn dbackup(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(binary("dbackup"));
    command.env_clear().envs(env.iter().copied()).args(args).output().expect("it runs")
}

/// Exit status, standard output and standard error.
fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn key_create_prints_the_key_alone_and_it_holds_what_was_asked_and_no_more() {
    let cluster = Cluster::build().workers(0).start().await;
    let env = [("DATABASE_URL", cluster.env()["DATABASE_URL"].as_str())];
    let create = |permissions: &[&str]| {
        let flags = permissions.iter().flat_map(|p| ["--permission", p]);
        said(&dbackup(&["key", "create", "--name", "ci"].into_iter().chain(flags).collect::<Vec<_>>(), &env))
    };
    let (status, stdout, stderr) = create(&["jobs:read", "history:read"]);
    assert_eq!((status, stderr.as_str()), (Some(0), ""));
    let key = stdout.strip_suffix('\n').expect("a line");
    assert!(key.starts_with("dbm_") && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{stdout:?}");
    assert_eq!(cluster.request_as(key, "GET", "/api/jobs", None).await.0, 200);
    assert_eq!(cluster.request_as(key, "GET", "/api/executions", None).await.0, 200);
    assert_eq!(cluster.request_as(key, "GET", "/api/sources", None).await.0, 403);

    let (_, all, _) = create(&["*"]);
    assert_eq!(cluster.request_as(all.trim(), "GET", "/api/settings", None).await.0, 200);

    let (status, stdout, stderr) = create(&["jobs:reed"]);
    assert_eq!((status, stdout.as_str(), stderr.lines().count()), (Some(2), "", 1), "{stderr}");
    assert!(stderr.contains("--permission") && stderr.contains("jobs:read"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_by_its_exit_status_what_is_wrong() {
    let cluster = Cluster::build().workers(0).start().await;
    let (url, key) = (cluster.env()["DATABASE_URL"].as_str(), cluster.env()["DBACKUP_ENCRYPTION_KEY"].as_str());
    let healthy = (Some(0), "healthy\n".to_owned(), String::new());
    assert_eq!(said(&dbackup(&["health"], &[("DATABASE_URL", url), ("DBACKUP_ENCRYPTION_KEY", key)])), healthy);
    assert_eq!(said(&dbackup(&["health"], &[("DATABASE_URL", url)])), healthy);
    // Of a process, without a word about the database.
    assert_eq!(said(&dbackup(&["health", "--api", cluster.url(0)], &[])), healthy);

    // Not a packet comes back from this one: the health check of a container would be killed after 10 s, and not say why.
    let database = Proxy::start(postgres_port()).await;
    let silent = cluster.database_url_at(database.port);
    database.set(Mode::Hold);
    let wrong = common::seal::SealKey::generate();
    let (nowhere, empty) = (postgres_url("no_such_database"), unique("no-instance"));
    for (args, env, status, words) in [
        (vec!["health"], vec![("DATABASE_URL", url), ("DBACKUP_ENCRYPTION_KEY", &wrong)], 2, "DBACKUP_ENCRYPTION_KEY"),
        (vec!["health"], vec![("DATABASE_URL", &nowhere)], 1, "no_such_database"),
        (vec!["health"], vec![("DATABASE_URL", "postgres://127.0.0.1:1/x")], 1, "DATABASE_URL"),
        (vec!["health", "--worker"], vec![("DATABASE_URL", &silent)], 1, "did not answer within 8000 ms"),
        (vec!["health"], vec![], 2, "--data"),
        (vec!["health", "--api", "http://127.0.0.1:1"], vec![], 1, "127.0.0.1:1 does not answer"),
        (vec!["health", "--api", "https://127.0.0.1"], vec![], 2, "--api"),
        (vec!["--data", &empty, "health"], vec![("DATABASE_URL", url)], 2, "is not an instance"),
    ] {
        let (code, stdout, stderr) = said(&dbackup(&args, &env));
        assert_eq!(
            (code, stdout.as_str(), stderr.lines().count()),
            (Some(status), "", 1),
            "{args:?} {env:?}: {stderr}"
        );
        assert!(stderr.contains(words), "{args:?} {env:?}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_probe_of_a_worker_fails_while_the_worker_hangs_and_before_there_is_one() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let env = [("DATABASE_URL", cluster.env()["DATABASE_URL"].clone())];
    let probe =
        || said(&dbackup(&["health", "--worker"], &env.each_ref().map(|(name, value)| (*name, value.as_str()))));
    let (status, _, stderr) = probe();
    assert_eq!(status, Some(1));
    assert!(stderr.contains("no worker of ") && stderr.contains("within its lease"), "{stderr}");
    cluster.add_worker(&[]).await;
    until("it is healthy", SOON, || async { (probe().0 == Some(0)).then_some(()) }).await;
    cluster.workers[0].signal(Signal::SIGSTOP);
    until("it is not", SOON, || async { (probe().0 == Some(1)).then_some(()) }).await;
    cluster.workers[0].signal(Signal::SIGCONT);
    until("it is healthy again", SOON, || async { (probe().0 == Some(0)).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trigger_waits_through_a_network_that_breaks_and_makes_one_run() {
    let cluster = Cluster::build().limit(0).start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let port = cluster.url(0).rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    let network = Proxy::start(port).await;
    // The trigger arrives, and its answer is lost.
    network.set(Mode::HoldAfter(0));
    let env = BTreeMap::from([
        ("DBACKUP_URL".to_owned(), format!("http://127.0.0.1:{}", network.port)),
        ("DBACKUP_API_KEY".to_owned(), cluster.key(&["jobs:execute", "history:read"]).await),
    ]);
    let mut trigger = Process::start("dbackup", &["trigger", &job, "--log", "--label", "release=42"], &env, &[]);
    let count = "select count(*) from executions";
    until("it is triggered", SOON, || async { (cluster.count(count).await == 1).then_some(()) }).await;
    for said in ["Execution started: ", "Status: Pending"] {
        network.set(Mode::Cut);
        trigger.says("the instance does not answer", SOON).await;
        network.set(Mode::Pass);
        trigger.says(said, SOON).await;
    }
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 2 }))).await;
    assert_eq!(trigger.end(SOON).await.code(), Some(0), "{}", trigger.log());
    let log = trigger.log();
    assert!(log.contains("Status: Success | Progress: 100") && log.contains("pg_dump"), "{log}");
    assert_eq!(cluster.count(count).await, 1, "{log}");
    assert_eq!(cluster.text("select labels::text from executions").await, r#"{"release": "42"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn trigger_says_what_is_wrong_and_never_spins() {
    let cluster = Cluster::build().workers(0).start().await;
    let (url, key) = (cluster.url(0), cluster.key(&["history:read"]).await);
    for (args, env, status, words) in [
        (vec!["trigger", "shop"], vec![("DBACKUP_API_KEY", key.as_str())], 2, "--url"),
        (vec!["trigger", "shop", "--url", url], vec![], 2, "DBACKUP_API_KEY is not set"),
        (vec!["trigger", "shop", "--url", "ftp://127.0.0.1"], vec![("DBACKUP_API_KEY", &key)], 2, "--url"),
        (vec!["trigger", "shop", "--url", url, "--label", "x"], vec![("DBACKUP_API_KEY", &key)], 2, "NAME=VALUE"),
        (vec!["trigger", "shop", "--url", url], vec![("DBACKUP_API_KEY", "dbm_wrong")], 1, "invalid API key"),
        (
            vec!["trigger", "shop", "--url", url],
            vec![("DBACKUP_API_KEY", &key)],
            1,
            "lacks the permission jobs:execute",
        ),
        (vec!["trigger", "shop", "--url", url], vec![("DBACKUP_API_KEY", &cluster.admin_key)], 1, "Job not found"),
    ] {
        let (code, stdout, stderr) = said(&dbackup(&args, &env));
        assert_eq!((code, stdout.as_str()), (Some(status), ""), "{args:?}: {stderr}");
        assert!(stderr.contains(words) && !stderr.contains(&key), "{args:?}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_answer_of_an_instance_is_not_taken_for_one() {
    // Something that says yes to everything.
    let app = axum::Router::new().fallback(|| async { axum::Json(json!({})) });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move { axum::serve(listener, app).await });
    for args in
        [&["trigger", "shop", "--no-wait", "--url"][..], &["trigger", "shop", "--url"], &["restore", "x", "--url"]]
    {
        let args: Vec<&str> = args.iter().copied().chain([url.as_str()]).collect();
        let key = [("DBACKUP_API_KEY", "dbm_x")];
        let (code, stdout, stderr) = tokio::task::block_in_place(|| said(&dbackup(&args, &key)));
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{args:?}: {stderr}");
        assert!(stderr.contains("no executionId") && stderr.contains("--url"), "{args:?}: {stderr}");
    }
    let (code, _, stderr) =
        said(&dbackup(&["key", "create", "--name", "x", "--permission", "*", "--expires-in-days", "4294967295"], &[]));
    assert!(code == Some(2) && stderr.contains("--expires-in-days"), "{code:?} {stderr}");
}

/// A database as it was before a migration, and a connection to it.
async fn before_migration(version: i64) -> (String, PgConnection) {
    let database = unique("before");
    sql("postgres", &format!("create database {database}")).await;
    let mut conn = PgConnection::connect(&postgres_url(&database)).await.expect("connects");
    let mut before = sqlx::migrate!("../migrations");
    before.migrations.to_mut().retain(|migration| migration.version < version);
    before.run(&mut conn).await.expect("migrates");
    (database, conn)
}

fn migrating(database: &str) -> Process {
    let env = BTreeMap::from([("DATABASE_URL".to_owned(), postgres_url(database))]);
    Process::start("dbackup", &["migrate"], &env, &[])
}

/// How many locks of that table, held or waited for, are such.
fn locks_of_executions(database: &str, such: &str) -> String {
    let of = "relation = 'executions'::regclass
              and database = (select oid from pg_database where datname = current_database())";
    psql(database, &format!("select count(*) from pg_locks where {of} and {such}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_lets_others_go_on_while_it_waits_for_a_dump_of_the_database() {
    let (database, mut conn) = before_migration(17).await;
    // As pg_dump holds every table, for hours perhaps.
    sqlx::raw_sql("begin; lock table staged_objects in access share mode").execute(&mut conn).await.expect("locks");
    let mut migrate = migrating(&database);
    let mut other = PgConnection::connect(&postgres_url(&database)).await.expect("connects");
    let waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'relation'";
    until("it waits for the lock", SOON, || async { (psql(&database, waits) == "1\n").then_some(()) }).await;
    let begin = Instant::now();
    sqlx::query("delete from staged_objects").execute(&mut other).await.expect("goes on");
    assert!(begin.elapsed() < Duration::from_secs(5), "held for {:?}", begin.elapsed());
    migrate.says("is this database being dumped?", SOON).await;
    assert_eq!(locks_of_executions(&database, "mode = 'AccessExclusiveLock'"), "0\n", "between two tries");
    sqlx::raw_sql("rollback").execute(&mut conn).await.expect("lets go");
    assert_eq!(migrate.end(SOON).await.code(), Some(0), "{}", migrate.log());
    assert_eq!(psql(&database, "select count(*) from spent_refresh_tokens"), "0\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_asks_for_no_more_of_executions_while_it_holds_some_of_it_so_that_nobody_deadlocks_with_it() {
    let (database, mut conn) = before_migration(22).await;
    // A trigger in its midst: it has looked at a row, and is going to insert one.
    sqlx::raw_sql("begin; lock table executions in row share mode").execute(&mut conn).await.expect("locks");
    let mut migrate = migrating(&database);
    let locks =
        |granted: &str| locks_of_executions(&database, &format!("granted = {granted} and mode <> 'RowShareLock'"));
    until("it waits for the lock", SOON, || async { (locks("false") == "1\n").then_some(()) }).await;
    assert_eq!(locks("true"), "0\n", "it holds some of it meanwhile");
    sqlx::raw_sql("lock table executions in row exclusive mode; commit").execute(&mut conn).await.expect("goes on");
    assert_eq!(migrate.end(SOON).await.code(), Some(0), "{}", migrate.log());
    assert_eq!(psql(&database, "select to_regclass('executions_active_by_job') is null"), "t\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_brings_an_empty_database_up_to_date_and_may_be_repeated() {
    let database = unique("empty");
    sql("postgres", &format!("create database {database}")).await;
    let url = postgres_url(&database);
    for _ in 0..2 {
        assert_eq!(said(&dbackup(&["migrate"], &[("DATABASE_URL", &url)])).0, Some(0));
        assert_eq!(psql(&database, "select count(*) from executions, jobs, queue_gate"), "0\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_secret_may_come_from_a_file() {
    let cluster = Cluster::build().workers(0).start().await;
    let mut env = cluster.env().clone();
    for name in ["DATABASE_URL", "DBACKUP_ENCRYPTION_KEY", "REDIS_URL"] {
        let file = cluster.scratch.join(name);
        // As an editor or `echo` leaves it.
        std::fs::write(&file, format!("{}\n", env.remove(name).expect("a secret"))).expect("writes");
        env.insert(format!("{name}_FILE"), file.display().to_string());
    }
    let mut api = Process::start("dbackup-api", &["--listen", "127.0.0.1:0"], &env, &[]);
    let mut worker = Process::start("dbackup-worker", &[], &env, &[]);
    let address = api.wait_for_field("the API listens", "address").await;
    worker.wait_for_field("the worker claims executions", "worker").await;
    let answer = cluster.http.get(format!("http://{address}/api/health")).send().await.expect("answers");
    assert_eq!(answer.status(), 200);
    let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(said(&dbackup(&["health"], &env)).0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_wins_over_its_variable_and_every_flag_has_one() {
    let cluster = Cluster::build().workers(0).start().await;
    let variables = [("DBACKUP_CONCURRENCY", "3".to_owned()), ("DBACKUP_POOLS", "c".to_owned())];
    let by_variable = Process::start("dbackup-worker", &[], cluster.env(), &variables);
    by_variable.says(r#""concurrency":3,"pools":"[\"c\"]""#, SOON).await;
    let flags = ["--concurrency", "7", "--pools", "a,b"];
    let by_flag = Process::start("dbackup-worker", &flags, cluster.env(), &variables);
    by_flag.says(r#""concurrency":7,"pools":"[\"a\", \"b\"]""#, SOON).await;

    for program in [vec!["dbackup-api"], vec!["dbackup-worker"], vec!["dbackup", "up"]] {
        let output = Command::new(binary(program[0])).args(&program[1..]).arg("--help").output().expect("it runs");
        let help = String::from_utf8(output.stdout).expect("text");
        let lines: Vec<&str> = help.lines().collect();
        let starts: Vec<usize> = (0..lines.len()).filter(|n| lines[*n].trim_start().starts_with('-')).collect();
        assert!(starts.len() >= 7, "{help}");
        for (n, start) in starts.iter().enumerate() {
            let text = lines[*start..starts.get(n + 1).copied().unwrap_or(lines.len())].join("\n");
            let own = ["--help", "--version"].iter().any(|flag| text.contains(flag));
            let variable = text.split_once("[env: ").map(|(_, rest)| rest.split(['=', ']']).next().unwrap_or_default());
            let told =
                variable.is_some_and(|v| v.starts_with("DBACKUP_") && README.contains(&format!("| `{v}` | `--")));
            assert!(own || told, "not a variable, or not in the README's table: {program:?}: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_status_tells_a_mistake_from_a_database_that_is_away() {
    let cluster = Cluster::build().workers(0).start().await;
    let nowhere = postgres_url("no_such_database");
    let taken = cluster.url(0).trim_start_matches("http://").to_owned();
    let base: BTreeMap<String, String> = cluster.env().clone();
    for (program, name, value, status, words) in [
        ("dbackup-api", "DATABASE_URL", nowhere.as_str(), 1, "no_such_database"),
        ("dbackup-worker", "DATABASE_URL", nowhere.as_str(), 1, "no_such_database"),
        ("dbackup-api", "DBACKUP_LISTEN", taken.as_str(), 2, "DBACKUP_LISTEN"),
    ] {
        let mut process = Process::start(program, &[], &base, &[(name, value.to_owned())]);
        assert_eq!(process.end(SOON).await.code(), Some(status), "{program} {name}: {}", process.log());
        process.says(words, SOON).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn download_goes_on_where_it_broke_off_passes_a_damaged_copy_over_and_overwrites_nothing() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(30_000).await;
    let held = cluster.source("postgres", source.config()).await;
    let (first, one) = cluster.local_destination().await;
    let (second, _) = cluster.local_destination().await;
    let job = cluster.job(&held, &[&first, &second], json!({ "compression": "none" })).await;
    let backup = cluster.backup(&job).await;
    let id = backup["id"].as_str().expect("an id");
    let path = backup["path"].as_str().expect("a path");
    let stored = std::fs::read(one.join(path)).expect("a file");
    let name = path.rsplit('/').next().expect("a name");

    // The network breaks once in the midst.
    let port = url::Url::parse(cluster.url(0)).expect("a URL").port().expect("a port");
    let proxy = Proxy::start(port).await;
    proxy.set(Mode::HoldAfter(1_000_000));
    let folder = cluster.scratch.join("fetched");
    std::fs::create_dir(&folder).expect("a folder");
    let env = BTreeMap::from([
        ("PATH".to_owned(), std::env::var("PATH").expect("a path")),
        ("DBACKUP_URL".to_owned(), format!("http://127.0.0.1:{}", proxy.port)),
        ("DBACKUP_API_KEY".to_owned(), cluster.key(&["storage:download", "history:read"]).await),
    ]);
    let to = folder.to_str().expect("text");
    let mut download = Process::start("dbackup", &["download", id, "--to", to], &env, &[]);
    proxy.passes(1_000_000).await;
    proxy.set(Mode::Cut);
    download.says("the download broke off", SOON).await;
    proxy.set(Mode::Pass);
    assert_eq!(download.end(SOON).await.code(), Some(0), "{}", download.log());
    let log = download.log();
    let from: u64 = log
        .split_once("going on at byte ")
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("{log}"));
    assert!(from > 500_000, "{log}");
    assert!(std::fs::read(folder.join(name)).expect("a file") == stored, "other bytes");
    assert_eq!(crate::harness::files(&folder).len(), 2, "the object and its manifest");

    let key = env["DBACKUP_API_KEY"].clone();
    let run = |to: &std::path::Path, more: &[&str]| {
        let args = ["download", id, "--to", to.to_str().expect("text"), "--url", cluster.url(0)];
        let (code, _, stderr) = said(&dbackup(&[&args[..], more].concat(), &[("DBACKUP_API_KEY", key.as_str())]));
        (code, stderr)
    };
    let (code, said) = run(&folder, &[]);
    assert!(code == Some(1) && said.contains("nothing is overwritten"), "{said}");
    let other = cluster.scratch.join("fetched-again");
    std::fs::create_dir(&other).expect("a folder");
    let mut damaged = stored.clone();
    damaged[700_000] ^= 1;
    std::fs::write(one.join(path), damaged).expect("writes");
    let (code, said) = run(&other, &["--database", &source.database]);
    assert!(code == Some(0) && said.contains("its SHA-256 differs"), "{said}");
    assert!(std::fs::read(other.join(name)).expect("a file") == stored, "other bytes");
    assert_eq!(crate::harness::files(&other).len(), 1);
    let (code, said) = run(&other, &["--database", "nothing"]);
    assert!(code == Some(1) && said.contains("left no backup of 'nothing'"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn restore_waits_for_the_end_and_its_exit_status_says_how_it_was() {
    let cluster = Cluster::start().await;
    let source = PostgresSource::with_rows(100).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&cluster.source("postgres", source.config()).await, &[&destination], json!({})).await;
    let backup = cluster.backup(&job).await;
    let id = backup["id"].as_str().expect("an id");
    let key = cluster.key(&["storage:restore", "history:read"]).await;
    let restore = |more: &[&str]| {
        let args = ["restore", id, "--url", cluster.url(1), "--log"];
        let (code, out, err) = said(&dbackup(&[&args[..], more].concat(), &[("DBACKUP_API_KEY", key.as_str())]));
        (code, [out, err].concat())
    };
    let (code, said) = restore(&[]);
    assert!(code == Some(1) && said.contains("Restore failed: ") && said.contains("is not empty"), "{said}");
    let into = unique("restored");
    sql("postgres", &format!("create database {into} owner {}", source.role)).await;
    let (code, said) = restore(&["--database", &source.database, "--into", &into]);
    assert!(code == Some(0) && said.contains("Stage: Completed") && said.contains("bytes restored"), "{said}");
    source.assert_same(&into).await;
    let (code, _) = restore(&["--into", &into, "--overwrite"]);
    assert_eq!(code, Some(0));
}
