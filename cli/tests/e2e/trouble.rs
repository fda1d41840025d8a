//! The API in trouble: a database that is away, clients that are slow.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{
    Cluster, SOON,
    otlp::Receiver,
    postgres::OwnPostgres,
    postgres_port,
    process::binary,
    proxy::{Mode, Proxy},
    redis::Redis,
    source::{PostgresSource, job_without_workers},
    until,
};

async fn ask(cluster: &Cluster, method: &str, path: &str, body: Option<Value>) -> (u16, Option<String>, Value) {
    let request = cluster.http.request(method.parse().expect("a method"), format!("{}{path}", cluster.url(0)));
    let response =
        request.bearer_auth(&cluster.admin_key).json(&body.unwrap_or(json!({}))).send().await.expect("answers");
    let retry = response.headers().get("retry-after").map(|v| v.to_str().expect("text").to_owned());
    (response.status().as_u16(), retry, response.json().await.expect("JSON"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_is_a_503_that_says_when_to_retry_and_it_comes_back_by_itself() {
    let mut server = OwnPostgres::start().await;
    let cluster = Cluster::build().workers(0).on(server.url("postgres")).start().await;
    let calls = [
        ("GET", "/api/jobs", None),
        ("GET", "/api/executions", None),
        ("POST", "/api/jobs/nothing/run", None),
        ("PATCH", "/api/settings", Some(json!({ "maxPending": 9 }))),
        ("GET", "/api/health", None),
        ("GET", "/readyz", None),
        ("POST", "/api/session", Some(json!({ "name": "ada", "password": "a wrong password" }))),
    ];
    server.stop().await;
    let answers = calls.iter().map(|(method, path, body)| ask(&cluster, method, path, body.clone()));
    for (call, (status, retry, answer)) in calls.iter().zip(futures::future::join_all(answers).await) {
        assert_eq!((status, answer["code"].as_str()), (503, Some("database_away")), "{call:?}: {answer}");
        assert!(retry.is_some_and(|seconds| seconds.parse::<u32>().is_ok()), "{call:?}: no Retry-After");
    }
    assert_eq!(ask(&cluster, "GET", "/livez", None).await.0, 200);
    server.bring_back().await;
    until("the same process answers again", SOON, || async {
        (ask(&cluster, "GET", "/api/jobs", None).await.0 == 200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_crash_of_the_database() {
    let mut server = OwnPostgres::start().await;
    let cluster = Cluster::build().workers(0).on(server.url("postgres")).start().await;
    let job = job_without_workers(&cluster, json!({ "overlap": "allow" })).await;
    // What does not wait for the log is written when this is over, long after the crash.
    for statement in ["alter system set wal_writer_delay = '10s'", "select pg_reload_conf()"] {
        sqlx::query(statement).execute(&cluster.pool).await.expect("it is set");
    }
    until("it is so", SOON, || async {
        let delay: String = sqlx::query_scalar("show wal_writer_delay").fetch_one(&cluster.pool).await.ok()?;
        (delay == "10s").then_some(())
    })
    .await;
    let acknowledged = futures::future::join_all((0..8).map(|_| cluster.trigger(&job))).await;
    server.crash();
    server.bring_back().await;
    for execution in acknowledged {
        let answer = until("it is known", SOON, || async {
            let (status, _, answer) = ask(&cluster, "GET", &format!("/api/executions/{execution}"), None).await;
            (status != 503).then_some((status, answer["data"]["status"].clone()))
        });
        assert_eq!(answer.await, (200, json!("Pending")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_database_that_hangs_many_requests_are_refused_as_soon_as_one() {
    let proxy = Proxy::start(postgres_port()).await;
    let cluster = Cluster::build().workers(0).database_at(proxy.port).start().await;
    assert_eq!(ask(&cluster, "GET", "/api/jobs", None).await.0, 200);
    proxy.set(Mode::Hold);
    let held = Instant::now();
    until("the process must ask who calls", SOON, || async {
        (held.elapsed() > Duration::from_millis(600)).then_some(())
    })
    .await;
    let began = Instant::now();
    let answers = (0..30).map(|_| async {
        let (status, retry, answer) = ask(&cluster, "GET", "/api/jobs", None).await;
        (status, retry.is_some(), answer["code"].as_str().map(str::to_owned), began.elapsed())
    });
    for (status, retry, code, after) in futures::future::join_all(answers).await {
        assert_eq!((status, retry, code.as_deref()), (503, true, Some("database_away")), "after {after:?}");
        // One question of at most five seconds, and a connection for it.
        assert!(after < Duration::from_secs(15), "{after:?}: one waited for the other");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_survives_an_outage_with_the_last_known_state_or_held_and_never_with_an_invented_end() {
    let server = OwnPostgres::start().await;
    let proxy = Proxy::start(server.port()).await;
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port);
    let cluster = Cluster::build().workers(1).limit(0).on(url).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let execution = cluster.trigger(&cluster.job(&source, &[&destination], json!({})).await).await;
    let path = format!("/api/executions/{execution}");
    assert_eq!(ask(&cluster, "GET", &path, None).await.0, 200);
    let waiting = tokio::spawn({
        let request = cluster.http.get(format!("{}{path}?wait=20", cluster.url(0))).bearer_auth(&cluster.admin_key);
        request.send()
    });
    // Its key was looked at a moment ago; the state can no longer be.
    assert_eq!(ask(&cluster, "GET", &path, None).await.0, 200);
    proxy.set(Mode::Cut);
    let (status, _, stale) = ask(&cluster, "GET", &path, None).await;
    assert_eq!((status, &stale["stale"], &stale["data"]["status"]), (200, &json!(true), &json!("Pending")), "{stale}");
    // Now the key, too, must be asked for: held, until the database is back.
    let began = Instant::now();
    let held = tokio::spawn({
        let request = cluster.http.get(format!("{}{path}", cluster.url(1))).bearer_auth(&cluster.admin_key);
        request.send()
    });
    until("it is held for a while", SOON, || async { (began.elapsed() > Duration::from_secs(2)).then_some(()) }).await;
    assert!(!held.is_finished(), "not held");
    proxy.set(Mode::Pass);
    let answer = held.await.expect("joins").expect("answers");
    assert_eq!(answer.status(), 200);
    let answer: Value = answer.json().await.expect("JSON");
    assert_eq!((&answer["stale"], &answer["data"]["status"]), (&Value::Null, &json!("Pending")), "{answer}");
    let waited = waiting.await.expect("joins").expect("answers");
    assert_eq!(waited.status(), 200, "whoever waits is not thrown out");

    // A wait that ends during an outage does not tell what was seen before it as if it were so now.
    let wait = cluster.http.get(format!("{}{path}?wait=6", cluster.url(0))).bearer_auth(&cluster.admin_key).send();
    let (wait, began) = (tokio::spawn(wait), Instant::now());
    until("it waits", SOON, || async { (began.elapsed() > Duration::from_secs(1)).then_some(()) }).await;
    proxy.set(Mode::Cut);
    let answer = wait.await.expect("joins").expect("answers");
    assert_eq!(answer.status(), 200);
    let answer: Value = answer.json().await.expect("JSON");
    assert_eq!((&answer["stale"], &answer["data"]["status"]), (&json!(true), &json!("Pending")), "{answer}");
}

async fn connection(cluster: &Cluster, text: &str) -> TcpStream {
    let address = cluster.url(0).trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&address).await.expect("connects");
    stream.write_all(text.replace("KEY", &cluster.admin_key).as_bytes()).await.expect("writes");
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_its_head_or_its_body_too_slowly_is_let_go() {
    let cluster = Cluster::build().workers(0).start().await;
    let began = Instant::now();
    let mut head = connection(&cluster, "GET /livez HTTP/1.1\r\nHost: x\r\n").await;
    let text = "POST /api/sources HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\nContent-Length: 100\r\n\r\n{";
    let mut body = connection(&cluster, text).await;
    let (mut nothing, mut answer) = (Vec::new(), vec![0; 4096]);
    let limit = Duration::from_secs(40);
    tokio::time::timeout(limit, head.read_to_end(&mut nothing))
        .await
        .expect("the head's connection is closed")
        .expect("reads");
    let read = tokio::time::timeout(limit, body.read(&mut answer))
        .await
        .expect("the body's request is answered")
        .expect("reads");
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\"code\":\"timeout\""), "{answer}");
    assert!(began.elapsed() >= Duration::from_secs(25), "a slow network must be given time: {:?}", began.elapsed());
    assert_eq!(ask(&cluster, "GET", "/livez", None).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_end_is_refused() {
    let cluster = Cluster::build().workers(0).start().await;
    let mut stream =
        connection(&cluster, &format!("GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n", "x".repeat(200_000))).await;
    let mut answer = Vec::new();
    // Closed with unread bytes in it, the connection may lose the answer; what counts is that it ends.
    let _ = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.expect("the connection is closed");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_the_security_headers_also_a_failure() {
    let cluster = Cluster::build().workers(0).start().await;
    for path in ["/livez", "/api/jobs", "/api/nowhere", "/api/setup", "/api/openapi.json", "/api/docs/"] {
        let response = cluster.http.get(format!("{}{path}", cluster.url(0))).send().await.expect("answers");
        let header =
            |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        assert_eq!(header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(header("x-frame-options"), "DENY", "{path}");
        assert_eq!(header("referrer-policy"), "no-referrer", "{path}");
        let policy = header("content-security-policy");
        assert!(
            policy.starts_with("default-src 'none'") && policy.contains("frame-ancestors 'none'"),
            "{path}: {policy}"
        );
        assert!(!header("x-request-id").is_empty() && !header("cache-control").is_empty(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_trigger_is_lost_when_an_api_process_and_redis_are_killed_and_a_retry_makes_no_second_run() {
    let mut redis = Redis::start().await;
    let mut cluster = Cluster::build().workers(0).env("REDIS_URL", redis.url()).start().await;
    let config = json!({ "host": "db.example.com", "username": "u", "databases": ["shop"] });
    let source = cluster.source("postgres", config).await;
    let body = json!({ "name": "d", "kind": "local", "config": { "root": cluster.scratch } });
    let destination = crate::harness::id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxPendingPerJob": 1000 }))).await;
    let send = |api: usize, n: usize| {
        let request = cluster.http.post(format!("{}/api/jobs/{job}/run", cluster.url(api)));
        let request = request.bearer_auth(&cluster.admin_key).header("Idempotency-Key", format!("trigger-{n}"));
        async move {
            let response = request.send().await.ok()?;
            assert_eq!(response.status(), 200, "neither a 429 nor a 5xx");
            let answer: Value = response.json().await.ok()?;
            Some(answer["executionId"].as_str().expect("an id").to_owned())
        }
    };
    let mut acknowledged = futures::future::join_all((0..100).map(|n| send(n % 2, n))).await;
    assert!(acknowledged.iter().all(Option::is_some), "all are answered while nothing is wrong");
    // The others are under way when the process dies: they wait for a lock of the test.
    let mut lock = cluster.pool.begin().await.expect("begins");
    sqlx::query("select from jobs for update").execute(&mut *lock).await.expect("locks");
    let triggers: Vec<_> = (100..300).map(|n| tokio::spawn(send(n % 2, n))).collect();
    until("both processes wait for the lock", SOON, || async {
        let waiting =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        (cluster.count(waiting).await == 2).then_some(())
    })
    .await;
    redis.kill();
    let retries: Vec<_> = (0..300).map(|n| send(1, n)).collect();
    cluster.apis[0].0.kill().await;
    lock.commit().await.expect("commits");
    for trigger in triggers {
        acknowledged.push(trigger.await.expect("joins"));
    }
    let lost = acknowledged.iter().filter(|answer| answer.is_none()).count();
    assert_eq!(lost, 100, "those of the process that died");
    let again = futures::future::join_all(retries).await;
    for (n, (first, again)) in acknowledged.iter().zip(&again).enumerate() {
        let again = again.as_ref().expect("the other process answers");
        assert!(
            first.as_ref().is_none_or(|first| first == again),
            "trigger {n} was acknowledged as {first:?} and is {again}"
        );
    }
    assert_eq!(cluster.count("select count(*) from executions").await, 300);
    assert_eq!(cluster.count("select count(*) from audit_log where action = 'execution.trigger'").await, 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_a_span_a_log_or_an_answer() {
    let receiver = Receiver::start().await;
    let mut cluster = Cluster::build()
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)
        .env("OTEL_BSP_SCHEDULE_DELAY", 100)
        .env("RUST_LOG", "debug")
        .start()
        .await;
    let source = PostgresSource::with_rows(10).await;
    let config = source.config();
    let password = config["password"].as_str().expect("a password").to_owned();
    let source = cluster.source("postgres", config).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    cluster.backup(&job).await;
    let key = cluster.ok("POST", "/api/api-keys", Some(json!({ "name": "x", "permissions": ["*"] }))).await;
    let key = key["key"].as_str().expect("a key").to_owned();
    assert_eq!(cluster.request_as(&key, "GET", "/api/jobs", None).await.0, 200);
    let people_password = "a secret of people";
    let user = json!({ "name": "ada", "password": people_password, "permissions": ["*"] });
    cluster.ok("POST", "/api/users", Some(user)).await;
    let body = json!({ "name": "ada", "password": people_password });
    let response =
        cluster.http.post(format!("{}/api/session", cluster.url(0))).json(&body).send().await.expect("answers");
    let cookies: Vec<String> =
        response.headers().get_all("set-cookie").iter().map(|v| v.to_str().expect("text").to_owned()).collect();
    let tokens: Vec<String> =
        cookies.iter().filter_map(|c| Some(c.split(';').next()?.split_once('=')?.1.to_owned())).collect();
    assert!(!response.text().await.expect("a body").contains(&tokens[1]), "a token is in the answer's body");
    let header = format!("dbackup_session={}", tokens[0]);
    let signed_in = cluster.http.get(format!("{}/api/session", cluster.url(1))).header("cookie", header).send().await;
    assert_eq!(signed_in.expect("answers").status(), 200);
    // A body that does not fit is quoted by no error.
    let (_, refused) = cluster
        .request("POST", "/api/users", Some(json!({ "name": "eve", "password": { "p": people_password } })))
        .await;
    assert!(!refused.to_string().contains(people_password), "{refused}");

    let encryption = cluster.env()["DBACKUP_ENCRYPTION_KEY"].clone();
    let secrets =
        [password.as_str(), &key[8..], people_password, &tokens[0], &tokens[1], &encryption, &cluster.admin_key[8..]];
    until("the spans arrive", SOON, || async {
        let names: Vec<String> = receiver.spans().into_iter().map(|s| s.span.name).collect();
        ["POST /api/session", "GET /api/session", "POST /api/api-keys", "dump", "verify", "attempt"]
            .iter()
            .all(|name| names.iter().any(|n| n == name))
            .then_some(())
    })
    .await;
    let spans = format!("{:?}", receiver.spans().into_iter().map(|s| s.span).collect::<Vec<_>>());
    for process in cluster.apis.iter_mut().map(|(process, _)| process) {
        process.says("answered", SOON).await;
    }
    let logs = cluster.logs();
    for secret in secrets {
        assert!(!spans.contains(secret), "a secret is in a span: {secret}");
        assert!(!logs.contains(secret), "a secret is in a log: {secret}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_nobody_waits_for_any_more_is_given_up_by_the_database() {
    let cluster = Cluster::build().workers(0).start().await;
    let url = crate::harness::postgres_url(&cluster.database).into();
    let db = common::db::Db::new(&url, "impatient", 2).expect("a URL");
    let long =
        db.within(Duration::from_millis(300), async |conn| sqlx::query("select pg_sleep(14)").execute(conn).await);
    assert!(matches!(long.await, Err(common::db::DbError::Timeout(_))));
    let asked = Instant::now();
    until("its session is gone", SOON, || async {
        let sessions =
            "select count(*) from pg_stat_activity where application_name = 'impatient' and query like '%pg_sleep%'";
        (cluster.count(sessions).await == 0).then_some(())
    })
    .await;
    assert!(asked.elapsed() < Duration::from_secs(8), "it went on for {:?}", asked.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_holds_up_no_request_and_no_stop() {
    let cluster = Cluster::build().workers(0).env("RUST_LOG", "debug").start().await;
    let mut api = Command::new(binary("dbackup-api"))
        .args(["--listen", "127.0.0.1:0"])
        .env_clear()
        .envs(cluster.env())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut log = BufReader::new(api.stderr.take().expect("piped"));
    let address = loop {
        let mut line = String::new();
        assert!(log.read_line(&mut line).expect("reads") > 0, "it ended");
        let line: Value = serde_json::from_str(&line).unwrap_or_default();
        if line["fields"]["message"] == "the API listens" {
            break line["fields"]["address"].as_str().expect("text").to_owned();
        }
    };
    // From here on nobody reads: the pipe holds 64 KiB, and each request says more than 300 bytes.
    for n in 0..1_000 {
        let asked = cluster.http.get(format!("http://{address}/api/jobs")).bearer_auth(&cluster.admin_key).send();
        let answer =
            tokio::time::timeout(SOON, asked).await.unwrap_or_else(|_| panic!("request {n} waits for the log"));
        assert_eq!(answer.expect("answers").status(), 200);
    }
    let pid = Pid::from_raw(i32::try_from(api.id()).expect("a small id"));
    kill(pid, Signal::SIGTERM).expect("signals");
    let status = until("it stops", SOON, || {
        let status = api.try_wait().expect("a status");
        async move { status }
    })
    .await;
    assert_eq!(status.code(), Some(0));
    let mut rest = String::new();
    log.read_to_string(&mut rest).expect("reads");
    let told = rest.matches("answered").count();
    assert!(told < 1_000, "the pipe was never full: {} bytes", rest.len());
}
