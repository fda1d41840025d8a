//! Rate limits: exact in any window over all API processes, and bounded while Redis is away.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use reqwest::Response;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{
    Builder, Cluster, SOON, postgres_port,
    proxy::{Mode, Proxy},
    redis::Redis,
    source::PostgresSource,
    until,
};

/// A cluster behind a proxy that is believed: the tests say who they are.
async fn behind_a_proxy(redis: &Redis) -> Cluster {
    counting(proxied(redis)).await
}

fn proxied(redis: &Redis) -> Builder {
    let builder = Cluster::build().workers(0).contract_limits();
    builder.env("DBACKUP_TRUSTED_PROXIES", "127.0.0.1").env("REDIS_URL", redis.url())
}

/// Starts it, and waits until Redis counts.
async fn counting(builder: Builder) -> Cluster {
    let cluster = builder.start().await;
    counted_in(&cluster, "redis").await;
    cluster
}

async fn counted_in(cluster: &Cluster, place: &str) {
    for (_, url) in &cluster.apis {
        until(&format!("{url} counts in {place}"), SOON, || async {
            // Of an address of its own, which costs the others nothing.
            let client = format!("198.51.100.{}", rand::random::<u8>());
            let request = cluster.http.get(format!("{url}/api/health")).header("x-forwarded-for", client);
            let answer: Value = request.send().await.ok()?.json().await.ok()?;
            (answer["rateLimits"] == place).then_some(())
        })
        .await;
    }
}

async fn call(cluster: &Cluster, api: usize, method: &str, path: &str, client: &str) -> Response {
    let request = cluster.http.request(method.parse().expect("a method"), format!("{}{path}", cluster.url(api)));
    request.bearer_auth(&cluster.admin_key).header("x-forwarded-for", client).send().await.expect("answers")
}

async fn set_limits(cluster: &Cluster, limits: Value) {
    sqlx::query(
        "insert into settings values ('rateLimit', $1) on conflict (name) do update set value = excluded.value",
    )
    .bind(limits)
    .execute(&cluster.pool)
    .await
    .expect("sets the limits");
    // Longer than any process may remember them.
    let changed = Instant::now();
    until("the limits act", SOON, || async { (changed.elapsed() > Duration::from_millis(700)).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contracts_limits_hold_over_two_processes_and_say_when_to_come_back() {
    let redis = Redis::start().await;
    let cluster = behind_a_proxy(&redis).await;
    for (method, path, limit) in [("GET", "/api/jobs", 100_usize), ("POST", "/api/jobs/nothing/run", 20)] {
        let calls = (0..limit + 30).map(|n| call(&cluster, n % 2, method, path, "192.0.2.1"));
        let answers = futures::future::join_all(calls).await;
        let refused: Vec<&Response> = answers.iter().filter(|a| a.status() == 429).collect();
        assert_eq!(answers.len() - refused.len(), limit, "{method}");
        let number =
            |answer: &Response, name: &str| answer.headers()[name].to_str().ok().and_then(|v| v.parse::<u64>().ok());
        for answer in &refused {
            assert_eq!(number(answer, "ratelimit-limit"), Some(limit as u64));
            assert_eq!(number(answer, "ratelimit-remaining"), Some(0));
            let wait = number(answer, "retry-after").expect("seconds");
            assert!((1..=60).contains(&wait) && number(answer, "ratelimit-reset") <= Some(60), "{wait}");
        }
    }
    let refused: Value = call(&cluster, 0, "GET", "/api/jobs", "192.0.2.1").await.json().await.expect("JSON");
    assert_eq!(
        (refused["code"].as_str(), refused["success"].as_bool()),
        (Some("rate_limited"), Some(false)),
        "{refused}"
    );
    // Others are not touched, an IPv6 client counts by its /64, and probes and the page of health are not counted here.
    assert_eq!(call(&cluster, 0, "GET", "/api/jobs", "192.0.2.2").await.headers()["ratelimit-remaining"], "99");
    assert_eq!(call(&cluster, 0, "GET", "/api/jobs", "2001:db8::1").await.headers()["ratelimit-remaining"], "99");
    assert_eq!(call(&cluster, 1, "GET", "/api/jobs", "2001:db8::ffff:1").await.headers()["ratelimit-remaining"], "98");
    assert_eq!(call(&cluster, 1, "GET", "/api/nowhere", "2001:db8::2").await.status(), 404);
    assert_eq!(call(&cluster, 1, "GET", "/api/jobs", "2001:db8::3").await.headers()["ratelimit-remaining"], "96");
    for path in ["/livez", "/readyz"] {
        let probes = futures::future::join_all((0..150).map(|n| call(&cluster, n % 2, "GET", path, "192.0.2.1"))).await;
        assert!(probes.iter().all(|p| p.status() == 200 && !p.headers().contains_key("ratelimit-limit")), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_counts_by_its_address_and_a_key_with_limits_of_its_own_by_itself() {
    let redis = Redis::start().await;
    let cluster = behind_a_proxy(&redis).await;
    set_limits(&cluster, json!({ "read": { "limit": 3 }, "write": { "limit": 100 } })).await;
    let with_key = async |key: &str, client: &str| {
        let request = cluster.http.get(format!("{}/api/jobs", cluster.url(0))).bearer_auth(key);
        request.header("x-forwarded-for", client).send().await.expect("answers").status().as_u16()
    };
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(with_key("dbm_wrong", "192.0.2.1").await);
    }
    assert_eq!(statuses, [401, 401, 401, 429]);
    let body = json!({ "name": "busy", "permissions": ["jobs:read"], "rateLimit": { "read": 5 } });
    let key = call_with_body(&cluster, "/api/api-keys", body).await["data"]["key"].as_str().expect("a key").to_owned();
    let mut statuses = Vec::new();
    for n in 0..6 {
        statuses.push(with_key(&key, &format!("192.0.2.{}", n % 2 + 1)).await);
    }
    assert_eq!(statuses, [200, 200, 200, 200, 200, 429], "its own limit, from whatever address");
    assert_eq!(with_key(&cluster.admin_key, "192.0.2.2").await, 200, "and the address is not charged for it");
}

async fn call_with_body(cluster: &Cluster, path: &str, body: Value) -> Value {
    let request = cluster.http.post(format!("{}{path}", cluster.url(0))).bearer_auth(&cluster.admin_key).json(&body);
    request.send().await.expect("answers").json().await.expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_limit_acts_on_every_process_at_once() {
    let redis = Redis::start().await;
    let cluster = behind_a_proxy(&redis).await;
    for limit in [5_u64, 2, 9] {
        cluster.ok("PATCH", "/api/settings", Some(json!({ "rateLimit": { "read": { "limit": limit } } }))).await;
        for api in 0..2 {
            until("the new limit is told", Duration::from_secs(1), || async {
                let answer = call(&cluster, api, "GET", "/api/jobs", "192.0.2.77").await;
                (answer.headers()["ratelimit-limit"] == limit.to_string().as_str()).then_some(())
            })
            .await;
        }
    }
}

/// An arrival of the recorded trace: when, from which client, at which process.
struct Arrival {
    at: Duration,
    client: usize,
    api: usize,
}

/// Bursts and pauses of three clients over twelve seconds, the same in every run.
fn trace() -> Vec<Arrival> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut arrivals = Vec::new();
    for client in 0..3 {
        let mut at = Duration::ZERO;
        while at < Duration::from_secs(12) {
            // A third of the time a burst, else up to half a second of silence.
            at += Duration::from_millis(if next(3) == 0 { next(500) } else { next(60) });
            let api = usize::try_from(next(2)).expect("small");
            arrivals.push(Arrival { at, client, api });
        }
    }
    arrivals.sort_by_key(|arrival| arrival.at);
    arrivals
}

const WINDOW_MICROS: i64 = 2_000_000;
const LIMIT: usize = 10;

/// What the documentation promises, decided from the times that Redis itself wrote down.
fn oracle(admitted: &[i64], at: i64) -> bool {
    admitted.iter().filter(|time| **time > at - WINDOW_MICROS).count() < LIMIT
}

#[tokio::test(flavor = "multi_thread")]
async fn every_decision_of_two_processes_on_a_recorded_trace_is_the_oracles() {
    let redis = Redis::start().await;
    let cluster = behind_a_proxy(&redis).await;
    set_limits(&cluster, json!({ "read": { "limit": LIMIT, "windowSeconds": 2 } })).await;
    let now = || {
        let text = redis.cli(&["time"]);
        let numbers: Vec<i64> = text.lines().filter_map(|line| line.parse().ok()).collect();
        numbers[0] * 1_000_000 + numbers[1]
    };
    let mut admitted: BTreeMap<usize, Vec<i64>> = BTreeMap::new();
    let (mut refused, mut unclear) = (0, 0);
    let began = tokio::time::Instant::now();
    for Arrival { at, client, api } in trace() {
        // The trace is the input: this waits for its next arrival.
        tokio::time::sleep_until(began + at).await;
        let address = format!("192.0.2.{}", client + 1);
        let before = now();
        let answer = call(&cluster, api, "GET", "/api/jobs", &address).await;
        let after = now();
        let log = admitted.entry(client).or_default();
        if answer.status() == 200 {
            let key = redis.cli(&["keys", &format!("*:limit:read:ip:{address}")]);
            let newest = redis.cli(&["zrange", key.trim(), "-1", "-1", "withscores"]);
            let time = newest.lines().nth(1).and_then(|t| t.parse::<f64>().ok()).expect("a score") as i64;
            assert!(
                (before..=after).contains(&time) && log.last().is_none_or(|last| *last < time),
                "{before} {time} {after}"
            );
            assert!(oracle(log, time), "let through at {time} after {log:?}");
            log.push(time);
        } else {
            assert_eq!(answer.status(), 429);
            refused += 1;
            // When exactly it was refused is known only between two looks at the clock.
            assert!(!oracle(log, before), "refused between {before} and {after} after {log:?}");
            unclear += usize::from(oracle(log, after));
        }
    }
    let passed: usize = admitted.values().map(Vec::len).sum();
    assert!(passed > 100 && refused > 50, "the trace is no trial: {passed} passed, {refused} refused");
    assert!(unclear * 10 < refused, "{unclear} of {refused} refusals could have gone either way");
}

struct Call {
    sent: Instant,
    answered: Instant,
    api: usize,
    status: u16,
}

/// Most calls that passed and lie wholly inside a window.
fn most_in_a_window(calls: &[&Call], window: Duration) -> usize {
    let inside = |start: Instant| calls.iter().filter(|c| c.sent >= start && c.answered <= start + window).count();
    calls.iter().map(|call| inside(call.sent)).max().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_nothing_fails_each_process_limits_by_itself_and_redis_decides_again_when_it_is_back() {
    const LIMIT: usize = 20;
    let window = Duration::from_secs(2);
    let mut redis = Redis::start().await;
    // The real time-out: what a dead Redis may cost a request.
    let cluster = counting(proxied(&redis).env("DBACKUP_REDIS_TIMEOUT_MS", 500)).await;
    set_limits(&cluster, json!({ "read": { "limit": LIMIT, "windowSeconds": 2 } })).await;
    let stop = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..4)
        .map(|n| {
            let (http, url, key, stop) =
                (cluster.http.clone(), cluster.url(n % 2).to_owned(), cluster.admin_key.clone(), stop.clone());
            tokio::spawn(async move {
                let mut calls = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let sent = Instant::now();
                    let request =
                        http.get(format!("{url}/api/jobs")).bearer_auth(&key).header("x-forwarded-for", "192.0.2.1");
                    let status = request.send().await.expect("answers").status().as_u16();
                    calls.push(Call { sent, answered: Instant::now(), api: n % 2, status });
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                calls
            })
        })
        .collect();
    let passed_for = async |time: Duration| {
        let begin = Instant::now();
        until("the load goes on", SOON, || async { (begin.elapsed() > time).then_some(()) }).await;
    };
    passed_for(window * 2).await;
    let killed = Instant::now();
    redis.kill();
    counted_in(&cluster, "process").await;
    let away = Instant::now();
    passed_for(window * 2).await;
    redis.bring_back().await;
    counted_in(&cluster, "redis").await;
    let back = Instant::now();
    passed_for(window * 3).await;
    stop.store(true, Ordering::Relaxed);
    let mut calls: Vec<Call> = Vec::new();
    for caller in callers {
        calls.extend(caller.await.expect("ends"));
    }

    assert!(calls.iter().all(|c| [200, 429].contains(&c.status)), "something else than 200 and 429 was answered");
    let passed = |from: Instant, to: Instant, api: Option<usize>| -> Vec<&Call> {
        let wanted = calls.iter().filter(|c| c.status == 200 && c.sent >= from && c.answered <= to);
        wanted.filter(|c| api.is_none_or(|api| c.api == api)).collect()
    };
    let (first, last) = (calls.iter().map(|c| c.sent).min().expect("calls"), Instant::now());
    assert_eq!(most_in_a_window(&passed(first, killed, None), window), LIMIT, "exact before");
    for api in 0..2 {
        let alone = most_in_a_window(&passed(away, back, Some(api)), window);
        assert!((LIMIT..2 * LIMIT).contains(&alone), "process {api} alone let {alone} through");
    }
    let again = most_in_a_window(&passed(back, last, None), window);
    assert!(again <= LIMIT && again > LIMIT / 2, "{again} after Redis was back");
    for (process, _) in &cluster.apis {
        assert_eq!(process.log().matches("Redis is away").count(), 1, "told once:\n{}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_redis_costs_three_requests_its_time_out_or_those_that_come_at_once_and_the_others_nothing() {
    let redis = Redis::start().await;
    let builder = Cluster::build().workers(0).rate_limits(json!({ "read": { "limit": 1_000_000 } }));
    // Long, so that a request that waits for it is told from one that does not.
    let cluster = builder.env("DBACKUP_REDIS_TIMEOUT_MS", 2_000).env("REDIS_URL", redis.url()).start().await;
    counted_in(&cluster, "redis").await;
    redis.freeze();
    let mut waited = 0;
    for _ in 0..50 {
        let began = Instant::now();
        assert_eq!(call(&cluster, 0, "GET", "/api/session", "192.0.2.1").await.status(), 200);
        waited += usize::from(began.elapsed() >= Duration::from_secs(2));
    }
    assert_eq!(waited, 3);
    redis.thaw();
    counted_in(&cluster, "redis").await;
    redis.freeze();
    let at_once = (0..50).map(|_| async {
        let began = Instant::now();
        assert_eq!(call(&cluster, 0, "GET", "/api/session", "192.0.2.1").await.status(), 200);
        began.elapsed()
    });
    let longest = join_all(at_once).await.into_iter().max().expect("some");
    assert!(longest < Duration::from_millis(3_500), "who is counted after others waits no longer: {longest:?}");
    redis.thaw();
}

/// Whether a process has taken all that its clients have sent: the kernel holds no byte for it.
fn has_read_everything(url: &str) -> bool {
    let port: u16 = url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    let sockets = std::fs::read_to_string("/proc/net/tcp").expect("proc");
    // Local address, remote address, state, and the bytes to send and to read: proc(5).
    let mut columns = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    columns.all(|c| !c[1].ends_with(&format!(":{port:04X}")) || c[4].ends_with(":00000000"))
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_arrive_together_are_counted_by_one_call_and_each_is_told_what_is_left_after_it() {
    const LIMIT: usize = 30;
    let redis = Redis::start().await;
    let cluster = counting(proxied(&redis).env("DBACKUP_REDIS_TIMEOUT_MS", 10_000)).await;
    set_limits(&cluster, json!({ "read": { "limit": LIMIT, "windowSeconds": 60 } })).await;
    let calls = || -> usize {
        let stats = redis.cli(&["info", "commandstats"]);
        let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls=")).expect("it was called");
        line.split(',').next().and_then(|calls| calls.parse().ok()).expect("a number")
    };
    let before = calls();
    redis.freeze();
    let mut sent = Vec::new();
    for (client, requests) in [("192.0.2.1", 2 * LIMIT), ("192.0.2.2", LIMIT)] {
        for n in 0..requests {
            let address = cluster.url(n % 2).trim_start_matches("http://");
            let mut stream = TcpStream::connect(address).await.expect("connects");
            let key = &cluster.admin_key;
            let head =
                format!("GET /api/session HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n");
            stream.write_all(format!("{head}X-Forwarded-For: {client}\r\n\r\n").as_bytes()).await.expect("writes");
            sent.push((client, stream));
        }
    }
    for (_, url) in &cluster.apis {
        until("every request has arrived", SOON, || async { has_read_everything(url).then_some(()) }).await;
    }
    redis.thaw();
    let answers = join_all(sent.into_iter().map(|(client, mut stream)| async move {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answers");
        let status = answer.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok()).expect("a status");
        let left = answer.lines().find_map(|line| line.strip_prefix("ratelimit-remaining: ")).expect("the header");
        (client, status, left.parse::<usize>().expect("a number"))
    }))
    .await;
    for (client, refused) in [("192.0.2.1", LIMIT), ("192.0.2.2", 0)] {
        let of = |wanted: u16| answers.iter().filter(move |(who, status, _)| (*who, *status) == (client, wanted));
        let mut left: Vec<_> = of(200).map(|(.., left)| *left).collect();
        left.sort_unstable();
        assert_eq!(left, (0..LIMIT).collect::<Vec<_>>(), "{client}: one for each that passed");
        let refusals: Vec<_> = of(429).map(|(.., left)| *left).collect();
        assert_eq!(refusals, vec![0; refused], "{client}");
    }
    // Of each process the first request by itself, one call for the others of each client, and as many for those that came
    // late since their process had to ask the database whether their key still counts.
    assert!(calls() - before <= 12, "{} calls for {} requests", calls() - before, answers.len());
}

async fn waiting_execution(cluster: &Cluster) -> String {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let root = cluster.scratch.join("backups");
    let destination = json!({ "name": "d", "kind": "local", "config": { "root": root } });
    let destination = crate::harness::id(&cluster.ok("POST", "/api/destinations", Some(destination)).await);
    cluster.trigger(&cluster.job(&source, &[&destination], json!({})).await).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_over_the_limit_is_held_until_it_fits_and_refused_only_after_twenty_seconds() {
    let redis = Redis::start().await;
    let cluster = behind_a_proxy(&redis).await;
    let poll = format!("/api/executions/{}", waiting_execution(&cluster).await);
    set_limits(&cluster, json!({ "read": { "limit": 4, "windowSeconds": 3 } })).await;
    let began = Instant::now();
    let polls = futures::future::join_all((0..12).map(|n| call(&cluster, n % 2, "GET", &poll, "192.0.2.1"))).await;
    assert!(polls.iter().all(|answer| answer.status() == 200), "held, not refused");
    assert!(began.elapsed() >= Duration::from_secs(6), "the limit was exceeded: {:?}", began.elapsed());
    assert_eq!(call(&cluster, 0, "GET", "/api/jobs", "192.0.2.1").await.status(), 429, "other reads are not held");

    set_limits(&cluster, json!({ "read": { "limit": 1, "windowSeconds": 3600 } })).await;
    assert_eq!(call(&cluster, 0, "GET", "/api/jobs", "192.0.2.2").await.status(), 200);
    let began = Instant::now();
    let refused = call(&cluster, 1, "GET", &poll, "192.0.2.2").await;
    assert_eq!(refused.status(), 429);
    let held = began.elapsed();
    assert!((Duration::from_secs(19)..Duration::from_secs(23)).contains(&held), "held for {held:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_over_the_limit_is_refused_at_once_and_no_key_of_theirs_is_looked_up() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(postgres_port()).await;
    let cluster = counting(proxied(&redis).database_at(proxy.port)).await;
    set_limits(&cluster, json!({ "read": { "limit": 3, "windowSeconds": 60 } })).await;
    let unknown = async || {
        let key = common::api_key::PlainKey::generate();
        let request = cluster.http.get(format!("{}/api/executions/x", cluster.url(0))).bearer_auth(key.expose());
        let began = Instant::now();
        (request.header("x-forwarded-for", "192.0.2.1").send().await.expect("answers").status(), began.elapsed())
    };
    for _ in 0..3 {
        assert_eq!(unknown().await.0, 401);
    }
    // A poll, which would be held for 20 s if it were of somebody.
    let (status, took) = unknown().await;
    assert!(status == 429 && took < Duration::from_secs(5), "{status} after {took:?}");
    // Who calls is known for half a second; a question to the database would not be answered within this time.
    until("it is refused without a question", SOON, || async {
        assert_eq!(call(&cluster, 0, "GET", "/api/jobs", "192.0.2.2").await.status(), 200);
        proxy.set(Mode::Hold);
        let (status, took) = unknown().await;
        proxy.set(Mode::Pass);
        (status == 429 && took < Duration::from_secs(1)).then_some(())
    })
    .await;
    // Somebody whose key is known is let in from there all the same, as far as its own limit goes.
    assert_eq!(call(&cluster, 0, "GET", "/api/jobs", "192.0.2.3").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_near_its_limit_gets_its_polls_answered_later_but_the_end_at_once() {
    let redis = Redis::start().await;
    let cluster = behind_a_proxy(&redis).await;
    let id = waiting_execution(&cluster).await;
    let poll = format!("/api/executions/{id}");
    set_limits(&cluster, json!({ "read": { "limit": 10, "windowSeconds": 60 }, "write": { "limit": 100 } })).await;
    let began = Instant::now();
    assert_eq!(call(&cluster, 0, "GET", &poll, "192.0.2.1").await.status(), 200);
    let quick = began.elapsed();
    // Seven of ten: kept back for seventeen seconds, unless the run ends.
    for _ in 0..6 {
        assert_eq!(call(&cluster, 0, "GET", "/api/jobs", "192.0.2.1").await.status(), 200);
    }
    let began = Instant::now();
    let polled = tokio::spawn({
        let request = cluster.http.get(format!("{}{poll}", cluster.url(1))).bearer_auth(&cluster.admin_key);
        request.header("x-forwarded-for", "192.0.2.1").send()
    });
    let cancelled = async {
        until("the poll is kept back", SOON, || async {
            (began.elapsed() > quick + Duration::from_secs(1)).then_some(())
        })
        .await;
        assert!(!polled.is_finished(), "answered at once");
        call(&cluster, 0, "POST", &format!("{poll}/cancel"), "192.0.2.3").await
    };
    assert_eq!(cancelled.await.status(), 200);
    let answer = polled.await.expect("joins").expect("answers").json::<Value>().await.expect("JSON");
    assert_eq!(answer["data"]["outcome"], "Cancelled", "{answer}");
    assert!(began.elapsed() < quick + Duration::from_secs(4), "the end was not told at once: {:?}", began.elapsed());
}
