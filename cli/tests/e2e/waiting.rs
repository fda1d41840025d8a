//! Clients that wait: for an end, for events, for what is new in a log.

use std::{collections::BTreeSet, time::Duration};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::harness::{
    Cluster, SOON, id, postgres_port,
    proxy::{Mode, Proxy},
    source::PostgresSource,
    until,
};

/// A cluster where nothing runs yet, and a job.
async fn paused() -> (Cluster, String) {
    let cluster = Cluster::build().limit(0).start().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let (destination, _) = cluster.local_destination().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    (cluster, job)
}

async fn let_run(cluster: &Cluster) {
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 4 }))).await;
}

fn get(cluster: &Cluster, api: usize, path: &str) -> reqwest::RequestBuilder {
    cluster.http.get(format!("{}{path}", cluster.url(api))).bearer_auth(&cluster.admin_key)
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.timeout(Duration::from_secs(90)).send().await.expect("answers");
    (response.status().as_u16(), response.json().await.expect("JSON"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_with_the_run_on_every_process_and_otherwise_after_its_time() {
    let (cluster, job) = paused().await;
    let execution = cluster.trigger(&job).await;
    let began = Instant::now();
    let (status, pending) = answer(get(&cluster, 0, &format!("/api/executions/{execution}?wait=2"))).await;
    assert_eq!((status, pending["data"]["status"].as_str()), (200, Some("Pending")), "{pending}");
    assert!((2..6).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert_eq!(pending["data"]["queuePosition"], 1, "{pending}");

    let waits =
        (0..2).map(|api| tokio::spawn(answer(get(&cluster, api, &format!("/api/executions/{execution}?wait=60")))));
    let waits: Vec<_> = waits.collect();
    let_run(&cluster).await;
    for wait in waits {
        let (_, ended) = wait.await.expect("joins");
        let since_the_end =
            "select (extract(epoch from clock_timestamp() - max(ended_at)) * 1000)::bigint from executions";
        let late = cluster.count(since_the_end).await;
        assert!(late < 2_000, "a wait was answered {late} ms after the end");
        assert_eq!(ended["data"]["status"], "Success", "{ended}");
        assert_eq!(ended["data"]["artifacts"].as_array().map(Vec::len), Some(2), "{ended}");
    }
    assert!(began.elapsed() < Duration::from_secs(40), "the waits did not end with the run");

    let run = cluster.http.post(format!("{}/api/jobs/{job}/run", cluster.url(1))).bearer_auth(&cluster.admin_key);
    let (status, ran) = answer(run.json(&json!({ "wait": 60 }))).await;
    assert_eq!((status, ran["data"]["status"].as_str()), (200, Some("Success")), "{ran}");
    assert_eq!(ran["data"]["id"], ran["executionId"]);
    for (path, field) in
        [("?wait=61", "wait"), ("?wait=x", "wait"), ("?logsAfter=x", "logsAfter"), ("?includeLogs=x", "includeLogs")]
    {
        let (status, refused) = answer(get(&cluster, 0, &format!("/api/executions/{execution}{path}"))).await;
        assert_eq!((status, refused["fields"][0]["field"].as_str()), (400, Some(field)), "{path}: {refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_read_piece_by_piece_without_a_line_lost_or_twice() {
    let (cluster, job) = paused().await;
    let execution = cluster.trigger(&job).await;
    let_run(&cluster).await;
    let (mut pieces, mut cursor) = (Vec::new(), "0".to_owned());
    loop {
        let path = format!("/api/executions/{execution}?logsAfter={cursor}");
        let (_, piece) = answer(get(&cluster, pieces.len() % 2, &path)).await;
        let over = piece["data"]["status"] == "Success";
        pieces.extend(piece["data"]["logs"].as_array().expect("lines").iter().cloned());
        cursor = piece["data"]["logsCursor"].as_str().expect("a cursor").to_owned();
        assert_ne!(piece["data"]["status"], "Failed", "{piece}");
        if over {
            break;
        }
    }
    let whole = cluster.execution(&execution).await;
    assert_eq!(json!(pieces), whole["logs"]);
    assert!(pieces.len() >= 3, "{pieces:?}");
}

/// Server-sent events as they come.
struct Events {
    response: reqwest::Response,
    buffer: String,
}

#[derive(Debug, Clone, PartialEq)]
struct Event {
    name: String,
    id: String,
    data: Value,
}

impl Events {
    async fn open(cluster: &Cluster, api: usize, key: &str, path: &str, last: Option<&str>) -> Self {
        let mut request = cluster.http.get(format!("{}{path}", cluster.url(api))).bearer_auth(key);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = request.timeout(Duration::from_secs(90)).send().await.expect("answers");
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, buffer: String::new() }
    }

    /// The next event; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((block, rest)) = self.buffer.split_once("\n\n") {
                let field = |name: &str| {
                    let line = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
                    line.unwrap_or_default().to_owned()
                };
                let event = Event {
                    name: field("event"),
                    id: field("id"),
                    data: serde_json::from_str(&field("data")).unwrap_or_default(),
                };
                self.buffer = rest.to_owned();
                if event.name.is_empty() {
                    continue;
                }
                return Some(event);
            }
            let chunk = tokio::time::timeout(SOON, self.response.chunk()).await.expect("an event in time").ok()??;
            self.buffer.push_str(&String::from_utf8_lossy(&chunk));
        }
    }

    async fn all(mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_a_run_to_its_end_and_resume_where_they_broke_off() {
    let (cluster, job) = paused().await;
    let execution = cluster.trigger(&job).await;
    let path = format!("/api/executions/{execution}/events");
    let streams: Vec<_> = [0, 1].map(|api| (api, cluster.admin_key.clone())).into();
    let mut opened = Vec::new();
    for (api, key) in &streams {
        let mut events = Events::open(&cluster, *api, key, &path, None).await;
        let first = events.next().await.expect("the state at once");
        assert_eq!((first.name.as_str(), first.data["status"].as_str()), ("status", Some("Pending")), "{first:?}");
        opened.push(events);
    }
    let_run(&cluster).await;
    let mut told = Vec::new();
    for events in opened {
        told.push(events.all().await);
    }
    let whole = cluster.execution(&execution).await;
    for events in &told {
        let lines: Vec<&Value> = events.iter().filter(|e| e.name == "log").map(|e| &e.data).collect();
        assert_eq!(json!(lines), whole["logs"], "every line once, in order");
        let statuses: Vec<&str> =
            events.iter().filter(|e| e.name == "status").filter_map(|e| e.data["status"].as_str()).collect();
        assert_eq!(statuses.last(), Some(&"Success"), "{statuses:?}");
        assert_eq!(events.last().map(|e| e.name.as_str()), Some("end"));
        let ids: Vec<i64> = events.iter().map(|e| e.id.parse().expect("a number")).collect();
        assert!(ids.is_sorted(), "{ids:?}");
    }
    let lines: Vec<&Event> = told[0].iter().filter(|e| e.name == "log").collect();
    let again = Events::open(&cluster, 1, &cluster.admin_key, &path, Some(&lines[1].id)).await.all().await;
    let rest: Vec<&Event> = again.iter().filter(|e| e.name == "log").collect();
    assert_eq!(rest, lines[2..], "only what came after");
    assert_eq!(again.last().map(|e| e.name.as_str()), Some("end"));
    let request = get(&cluster, 0, &path).header("last-event-id", "x");
    assert_eq!(request.send().await.expect("answers").status(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_is_told_once_also_to_who_comes_late_and_when_a_run_ends_in_a_burst_of_them() {
    let (cluster, job) = paused().await;
    let execution = cluster.trigger(&job).await;
    let path = format!("/api/executions/{execution}/events");
    let write = async |lines: i32| {
        let insert = "insert into execution_logs (execution_id, at, level, stage, message)
                      select $1::text::uuid, clock_timestamp(), 'info', 'Queued', 'line ' || n from generate_series(1, $2) n";
        sqlx::query(insert).bind(&execution).bind(lines).execute(&cluster.pool).await.expect("writes lines");
    };
    let mut early = Events::open(&cluster, 0, &cluster.admin_key, &path, None).await;
    early.next().await.expect("the state at once");
    // The next look brings these to both, and who comes now has read them already.
    write(3).await;
    let late = Events::open(&cluster, 0, &cluster.admin_key, &path, None).await;
    while early.next().await.expect("goes on").data["message"] != "line 3" {}
    // More than one look brings.
    write(1_200).await;
    cluster.ok("POST", &format!("/api/executions/{execution}/cancel"), None).await;
    let whole = cluster.execution(&execution).await["logs"].as_array().expect("lines").clone();
    assert_eq!(whole.len(), 1_204, "and the cancel's own");
    for (events, lines) in [(late.all().await, &whole[..]), (early.all().await, &whole[3..])] {
        let told: Vec<&Value> = events.iter().filter(|e| e.name == "log").map(|e| &e.data).collect();
        assert_eq!(told.len(), lines.len());
        assert_eq!(json!(told), json!(lines), "every line once, in order");
        assert_eq!(events.last().map(|e| e.name.as_str()), Some("end"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_list_shows_each_change_of_the_executions_that_its_key_may_see_and_no_other() {
    let (cluster, mine) = paused().await;
    let source = cluster.ok("GET", "/api/sources", None).await[0]["slug"].as_str().expect("a slug").to_owned();
    let (destination, _) = cluster.local_destination().await;
    let other = cluster.job(&source, &[&destination], json!({})).await;
    let key = cluster.scoped_key(&["history:read"], Some(vec![mine.parse().expect("an id")])).await;
    let waiting = cluster.trigger(&mine).await;
    cluster.trigger(&other).await;
    // Somebody looks already, who has been told of both: what waits is new to nobody but the next.
    let mut others = Events::open(&cluster, 1, &cluster.admin_key, "/api/events", None).await;
    for _ in 0..2 {
        others.next().await.expect("what waits already");
    }
    let mut events = Events::open(&cluster, 1, &key, "/api/events", None).await;
    let first = events.next().await.expect("what waits already");
    assert_eq!((id(&first.data), first.data["status"].as_str()), (waiting.clone(), Some("Pending")));
    let_run(&cluster).await;
    let later = cluster.trigger(&mine).await;
    let mut ended = BTreeSet::new();
    while ended.len() < 2 {
        let event = events.next().await.expect("goes on");
        assert_eq!(event.data["jobId"].as_str(), Some(mine.as_str()), "not for this key: {event:?}");
        if event.data["status"] == "Success" {
            ended.insert(id(&event.data));
        }
    }
    assert_eq!(ended, [waiting, later].into());
}

/// Reads on until an event tells that its execution waits for this.
async fn tells(events: &mut Events, reason: &str) {
    loop {
        let event = events.next().await.expect("goes on");
        if event.data["waitingFor"]["reason"] == reason {
            assert_eq!(event.data["status"], "Pending", "{event:?}");
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_groups_tell_what_a_run_waits_for_also_when_only_that_changes() {
    let (cluster, job) = paused().await;
    let run = cluster.trigger(&job).await;
    let mut one = Events::open(&cluster, 0, &cluster.admin_key, &format!("/api/executions/{run}/events"), None).await;
    let mut all = Events::open(&cluster, 1, &cluster.admin_key, "/api/events", None).await;
    tokio::join!(tells(&mut one, "limit"), tells(&mut all, "limit"));
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    tokio::join!(tells(&mut one, "paused"), tells(&mut all, "paused"));
    let group = cluster.ok("POST", "/api/runs", Some(json!({ "jobs": [job] }))).await;
    let group = cluster.execution(group["executionId"].as_str().expect("an id")).await;
    assert_eq!((&group["type"], &group["waitingFor"]["reason"]), (&json!("Group"), &json!("paused")), "{group:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_and_streams_end_within_a_second_when_their_key_is_disabled() {
    let (cluster, job) = paused().await;
    let execution = cluster.trigger(&job).await;
    let made = json!({ "name": "x", "permissions": ["history:read"] });
    let made = cluster.ok("POST", "/api/api-keys", Some(made)).await;
    let (key, path) = (made["key"].as_str().expect("a key").to_owned(), format!("/api/executions/{execution}"));
    let mut streams = Vec::new();
    for (api, path) in [(0, format!("{path}/events")), (1, "/api/events".to_owned())] {
        let mut events = Events::open(&cluster, api, &key, &path, None).await;
        events.next().await.expect("the state at once");
        streams.push(events);
    }
    let wait = cluster.http.get(format!("{}{path}?wait=60", cluster.url(0))).bearer_auth(&key);
    let wait = tokio::spawn(answer(wait));
    until("the wait is registered", SOON, || async { (!wait.is_finished()).then_some(()) }).await;
    cluster.ok("PUT", &format!("/api/api-keys/{}", id(&made)), Some(json!({ "enabled": false }))).await;
    let disabled = Instant::now();
    for mut events in streams {
        while events.next().await.is_some() {}
    }
    let (status, refused) = wait.await.expect("joins");
    assert_eq!(status, 401, "{refused}");
    // What the process may remember, and one look.
    assert!(disabled.elapsed() < Duration::from_millis(1_500), "{:?}", disabled.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_stops_answers_those_who_wait_with_the_state_then() {
    let (mut cluster, job) = paused().await;
    let execution = cluster.trigger(&job).await;
    let wait = tokio::spawn(answer(get(&cluster, 0, &format!("/api/executions/{execution}?wait=60"))));
    let mut events =
        Events::open(&cluster, 0, &cluster.admin_key, &format!("/api/executions/{execution}/events"), None).await;
    events.next().await.expect("the state at once");
    cluster.apis[0].0.signal(Signal::SIGTERM);
    let told = Instant::now();
    let (status, state) = wait.await.expect("joins");
    assert_eq!((status, state["data"]["status"].as_str()), (200, Some("Pending")), "{state}");
    assert_eq!(events.next().await, None, "the stream ends too");
    assert_eq!(cluster.apis[0].0.end(SOON).await.code(), Some(0));
    // Ended by itself, not cut at the end of the time that requests under way get.
    assert!(told.elapsed() < Duration::from_secs(5), "{:?}", told.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_and_streams_end_when_the_right_to_them_is_taken_away_and_only_then() {
    let (cluster, job) = paused().await;
    let source = cluster.ok("GET", "/api/sources", None).await[0]["slug"].as_str().expect("a slug").to_owned();
    let (destination, _) = cluster.local_destination().await;
    let other = cluster.job(&source, &[&destination], json!({})).await;
    let execution = cluster.trigger(&job).await;
    let path = format!("/api/executions/{execution}");
    for change in
        [json!({ "permissions": ["jobs:read"] }), json!({ "jobIds": [other] }), json!({ "networks": ["192.0.2.0/24"] })]
    {
        let made = json!({ "name": "x", "permissions": ["history:read", "jobs:read"], "jobIds": [job] });
        let made = cluster.ok("POST", "/api/api-keys", Some(made)).await;
        let (key, key_path) = (made["key"].as_str().expect("a key").to_owned(), format!("/api/api-keys/{}", id(&made)));
        let mut streams = Vec::new();
        for (api, path) in [(0, format!("{path}/events")), (1, "/api/events".to_owned())] {
            let mut events = Events::open(&cluster, api, &key, &path, None).await;
            events.next().await.expect("the state at once");
            streams.push(events);
        }
        // What takes nothing from them leaves them alone.
        let more = json!({ "name": "renamed", "permissions": ["history:read"], "jobIds": null });
        cluster.ok("PUT", &key_path, Some(more)).await;
        let renamed = Instant::now();
        until("every process has asked anew", SOON, || async {
            (renamed.elapsed() > Duration::from_millis(1_200)).then_some(())
        })
        .await;
        for events in &mut streams {
            let next = tokio::time::timeout(Duration::from_millis(1), events.response.chunk()).await;
            assert!(!matches!(next, Ok(Ok(None) | Err(_))), "a stream ended for nothing");
        }
        let wait = cluster.http.get(format!("{}{path}?wait=30", cluster.url(0))).bearer_auth(&key);
        let wait = tokio::spawn(answer(wait));
        until("the wait is registered", SOON, || async { (!wait.is_finished()).then_some(()) }).await;
        cluster.ok("PUT", &key_path, Some(change.clone())).await;
        let taken = Instant::now();
        let ends = async {
            for mut events in streams {
                while events.next().await.is_some() {}
            }
            wait.await.expect("joins").0
        };
        let ended = tokio::time::timeout(Duration::from_secs(10), ends).await;
        let status = ended.unwrap_or_else(|_| panic!("{change}: it goes on"));
        assert!([401, 403, 404].contains(&status), "{change}: {status}");
        // What the process may remember, and one look.
        assert!(taken.elapsed() < Duration::from_millis(1_500), "{change}: {:?}", taken.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_database_away_a_poll_gets_the_last_known_state_or_is_held_for_twenty_seconds() {
    let proxy = Proxy::start(postgres_port()).await;
    let cluster = Cluster::build().workers(0).database_at(proxy.port).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let destination = json!({ "name": "d", "kind": "local", "config": { "root": cluster.scratch } });
    let destination = id(&cluster.ok("POST", "/api/destinations", Some(destination)).await);
    let execution = cluster.trigger(&cluster.job(&source, &[&destination], json!({})).await).await;
    let path = format!("/api/executions/{execution}");

    for query in ["", "?includeLogs=true", "?logsAfter=3"] {
        // Whoever calls is known for half a second; a poll that comes later is held until they can be asked for.
        let stale = until("a poll is answered from memory", SOON, || async {
            proxy.set(Mode::Pass);
            until("the state is known", SOON, || async {
                (answer(get(&cluster, 0, &path)).await.0 == 200).then_some(())
            })
            .await;
            proxy.set(Mode::Cut);
            let polled = tokio::spawn(answer(get(&cluster, 0, &format!("{path}{query}"))));
            let begin = Instant::now();
            until("it had its time", SOON, || async {
                (polled.is_finished() || begin.elapsed() > Duration::from_secs(2)).then_some(())
            })
            .await;
            proxy.set(Mode::Pass);
            let (status, state) = polled.await.expect("joins");
            assert_eq!(status, 200, "{query}: {state}");
            (state["stale"] == true).then_some(state)
        })
        .await;
        assert_eq!(stale["data"]["status"], "Pending", "{query}: {stale}");
        assert_eq!(stale["data"].get("logs").is_some(), !query.is_empty(), "{query}: {stale}");
    }

    // Process 1 knows nothing of it. Its connections were cut too, and each shows that at its first use.
    until("process 1 is back", SOON, || async { (answer(get(&cluster, 1, "/api/jobs")).await.0 == 200).then_some(()) })
        .await;
    proxy.set(Mode::Cut);
    let held = tokio::spawn(answer(get(&cluster, 1, &path)));
    let refused = tokio::spawn(answer(get(&cluster, 0, &format!("/api/executions/{}", uuid::Uuid::now_v7()))));
    let begin = Instant::now();
    until("it is held", SOON, || async { (begin.elapsed() > Duration::from_secs(18)).then_some(()) }).await;
    assert!(!held.is_finished() && !refused.is_finished(), "answered at once");
    let (status, answered) = refused.await.expect("joins");
    assert_eq!((status, answered["code"].as_str()), (503, Some("database_away")), "{answered}");
    assert!((19..27).contains(&begin.elapsed().as_secs()), "held for {:?}", begin.elapsed());
    let _ = held.await;
    let held = tokio::spawn(answer(get(&cluster, 1, &path)));
    let begin = Instant::now();
    until("it is held", SOON, || async { (begin.elapsed() > Duration::from_secs(2)).then_some(()) }).await;
    assert!(!held.is_finished(), "answered at once");
    proxy.set(Mode::Pass);
    let (status, state) = held.await.expect("joins");
    assert_eq!((status, state["data"]["status"].as_str(), state.get("stale")), (200, Some("Pending"), None), "{state}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_waits_on_one_process_share_its_looks_and_end_within_two_seconds_of_the_run() {
    let most = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit").1;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("raises the limit");
    let (cluster, job) = paused().await;
    let execution = cluster.trigger(&job).await;
    let path = format!("/api/executions/{execution}?wait=60");
    let waits: Vec<_> = (0..2_000)
        .map(|_| {
            let request = get(&cluster, 0, &path);
            tokio::spawn(async move { (answer(request).await, Instant::now()) })
        })
        .collect();
    // All are there when as many connections are.
    let api = cluster.apis[0].0.pid();
    until("every client is connected", SOON, || async {
        let files = std::fs::read_dir(format!("/proc/{api}/fd")).expect("its files").count();
        (files > 2_000).then_some(())
    })
    .await;
    // The first look is each client's own; after it, a second in which each asked by itself would be 2,000 and more.
    let asked = "select sum(xact_commit)::bigint from pg_stat_database where datname = current_database()";
    until("the waiting clients share a look", SOON, || async {
        let before = cluster.count(asked).await;
        let begin = Instant::now();
        until("a second passes", SOON, || async { (begin.elapsed() > Duration::from_secs(1)).then_some(()) }).await;
        (cluster.count(asked).await - before < 300).then_some(())
    })
    .await;

    cluster.ok("POST", &format!("/api/executions/{execution}/cancel"), None).await;
    let ended = Instant::now();
    for wait in waits {
        let ((status, body), at) = wait.await.expect("joins");
        assert_eq!((status, body["data"]["outcome"].as_str()), (200, Some("Cancelled")), "{body}");
        let late = at.saturating_duration_since(ended);
        assert!(late < Duration::from_secs(2), "an answer came after {late:?}");
    }
}
