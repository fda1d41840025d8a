//! What docker-compose.yml promises of its containers, as Docker itself tells it, and what the proxy must let live.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};

use crate::{
    harness::until,
    project::{A_WHILE, BACKUPS, Project, compose, docker, project_name},
    stages::Stage,
};

/// A service, how many containers it has, and whether they run all the time.
const SERVICES: [(&str, usize, bool); 7] = [
    ("secrets", 1, false),
    ("postgres", 1, true),
    ("redis", 1, true),
    ("migrate", 1, false),
    ("api", 2, true),
    ("worker", 3, true),
    ("proxy", 1, true),
];
/// What each keeps, or may read: where it is mounted, the volume of the project, whether it may be written to. All workers
/// share the one volume of the backups.
const VOLUMES: [(&str, &str, &str, bool); 9] = [
    ("secrets", "/run/dbackup", "dbackup-secrets", true),
    ("secrets", "/run/postgres", "postgres-secrets", true),
    ("postgres", "/run/secrets", "postgres-secrets", false),
    ("postgres", "/var/lib/postgresql/data", "postgres", true),
    ("migrate", "/run/dbackup", "dbackup-secrets", false),
    ("api", "/run/dbackup", "dbackup-secrets", false),
    ("api", BACKUPS, "backups", false),
    ("worker", "/run/dbackup", "dbackup-secrets", false),
    ("worker", BACKUPS, "backups", true),
];
/// Public images that are built on, or run as they are: plain tags, so that the same files serve where none can be pulled.
const IMAGES: [&str; 5] =
    ["rust:1-slim-trixie", "debian:trixie-slim", "postgres:17-trixie", "redis:8-trixie", "haproxy:3.0-trixie"];
/// They begin as root, to take over folders. What serves in the end does not.
const BEGIN_AS_ROOT: [&str; 2] = ["secrets", "postgres"];
/// Longest wait that a client may ask for.
const WAIT: Duration = Duration::from_secs(60);
/// Longer than anything in the proxy that could cut an answer off.
const STREAM: Duration = Duration::from_secs(95);

/// Every container is confined as the file says, and none has a secret in its environment.
pub async fn confines(project: &Project) {
    let mut secrets = Vec::new();
    for (service, path) in [
        ("postgres", "/run/secrets/password"),
        ("api", "/run/dbackup/database-url"),
        ("api", "/run/dbackup/encryption-key"),
    ] {
        secrets.push(compose(&["exec", "-T", service, "cat", path]).await);
        let mode = compose(&["exec", "-T", service, "stat", "-c", "%a", path]).await;
        assert_eq!(mode, "600", "others may read {path}");
    }
    let mut wrong = images().await;
    for (service, count, lasts) in SERVICES {
        let containers = compose(&["ps", "--all", "--quiet", service]).await;
        let containers: Vec<&str> = containers.lines().collect();
        if containers.len() != count {
            wrong.push(format!("{service}: {} containers", containers.len()));
        }
        for container in containers {
            let about: Value = serde_json::from_str(&docker(&["inspect", container]).await).expect("JSON");
            wrong
                .extend(unconfined(service, lasts, &about[0], &secrets).into_iter().map(|w| format!("{service}: {w}")));
            if lasts {
                project.healthy(container).await;
                let users = docker(&["top", container, "-eo", "pid,uid,comm"]).await;
                let root = users.lines().skip(1).filter(|line| line.split_whitespace().nth(1) == Some("0"));
                wrong.extend(root.map(|line| format!("{service}: a process of root: {line}")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("  {} services confined as promised", SERVICES.len());
}

/// Every image is one of [`IMAGES`] or our own, and what our two hold.
async fn images() -> Vec<String> {
    let dockerfile = include_str!("../../../Dockerfile");
    let stages = dockerfile.lines().filter_map(|line| line.strip_prefix("FROM ")?.split(' ').next());
    let own = |image: &str| ["base", "build"].contains(&image) || image.starts_with("dbackup-");
    let services = compose(&["config", "--images"]).await;
    let strange = stages.chain(services.lines()).filter(|image| !own(image) && !IMAGES.contains(image));
    let mut wrong: Vec<String> =
        strange.map(|image| format!("an image of no plain tag that is known: {image}")).collect();
    if dockerfile.contains("# syntax=") {
        wrong.push("the Dockerfile asks for another syntax, which has to be pulled".to_owned());
    }
    let tools = "for tool in dbackup pg_dump mariadb-dump; do command -v $tool; done; true";
    for (service, holds) in [
        ("api", "/usr/local/bin/dbackup"),
        ("worker", "/usr/local/bin/dbackup\n/usr/bin/pg_dump\n/usr/bin/mariadb-dump"),
    ] {
        let found = compose(&["exec", "-T", service, "sh", "-c", tools]).await;
        if found != holds {
            wrong.push(format!("{service} holds {found}"));
        }
    }
    wrong
}

fn unconfined(service: &str, lasts: bool, about: &Value, secrets: &[String]) -> Vec<String> {
    let (host, config) = (&about["HostConfig"], &about["Config"]);
    let mut wrong = Vec::new();
    let mut must = |holds: bool, what: &str| {
        if !holds {
            wrong.push(what.to_owned());
        }
    };
    let has = |list: &Value, item: &str| list.as_array().is_some_and(|list| list.iter().any(|i| i == item));
    must(host["ReadonlyRootfs"] == true, "its root file system can be written to");
    must(host["Memory"].as_i64().is_some_and(|bytes| bytes > 0), "its memory has no limit");
    must(host["NanoCpus"].as_i64().is_some_and(|cpus| cpus > 0), "its processors have no limit");
    must(has(&host["CapDrop"], "ALL"), "it keeps capabilities");
    must(has(&host["SecurityOpt"], "no-new-privileges:true"), "it may gain privileges");
    must(host["RestartPolicy"]["Name"] == if lasts { "unless-stopped" } else { "no" }, "its restart policy");
    let user = config["User"].as_str().unwrap_or_default();
    must(BEGIN_AS_ROOT.contains(&service) || !["", "0", "root"].contains(&user), "it begins as root");
    if ["api", "worker", "postgres", "proxy"].contains(&service) {
        must(config["StopTimeout"] == 45, "its time to stop is not 45 s");
    }
    if service == "worker" {
        let keepalive = &host["Sysctls"]["net.ipv4.tcp_keepalive_time"];
        must(keepalive == "60", "a database that is lost in silence holds a run for two hours");
    }
    let environment = config["Env"].to_string();
    must(!secrets.iter().any(|secret| environment.contains(secret.as_str())), "a secret is in its environment");
    let mut volumes: Vec<_> =
        about["Mounts"].as_array().into_iter().flatten().filter(|m| m["Type"] == "volume").collect();
    volumes.sort_by_key(|mount| mount["Destination"].to_string());
    let found = volumes.iter().map(|mount| json!([mount["Destination"], mount["Name"], mount["RW"]]));
    let due = VOLUMES.iter().filter(|(of, ..)| *of == service);
    let due = due.map(|(_, at, name, writes)| json!([at, format!("{}_{name}", project_name()), writes]));
    must(found.eq(due), "its volumes");
    let sets = |variable: &str| has(&config["Env"], variable);
    must(service != "worker" || sets("DBACKUP_DRAIN_SECONDS=25"), "its drain is not 25 s");
    must(service != "api" || sets("DBACKUP_SHUTDOWN_DELAY_SECONDS=5"), "it serves less than 5 s after its signal");
    wrong
}

/// A client's wait and a stream of events outlive every time-out of the proxy, and what a client says of its own address
/// counts for nothing.
pub async fn proxied(project: &Project, stage: &Stage) {
    let (held, _) = stage.hold_one(project).await;
    let (waited, streamed) = tokio::join!(waits(project, &held), streams(project, &held));
    stage.open();
    assert!(project.ended(&held).await.is_success(), "a run that was held");
    let address = forged(project, &stage.job).await;
    believed(project, &stage.job).await;
    println!("  a client waited for {waited:.0?}, events came for {streamed:.0?}, a client's address is {address}");
}

async fn waits(project: &Project, execution: &str) -> Duration {
    let asked = Instant::now();
    let run = project.ok("GET", &format!("/api/executions/{execution}?wait={}", WAIT.as_secs()), None).await;
    assert_eq!(run["status"], "Running", "{run}");
    let waited = asked.elapsed();
    assert!(waited >= WAIT - Duration::from_secs(1), "answered after {waited:?}");
    waited
}

/// Of a run of which there is nothing new: between two comments the stream is silent.
async fn streams(project: &Project, execution: &str) -> Duration {
    let client = reqwest::Client::builder().build().expect("a client");
    let request = client.get(format!("{}/api/executions/{execution}/events", project.url)).bearer_auth(&project.key);
    let answer = request.send().await.expect("answers");
    assert_eq!(answer.status(), 200);
    let (opened, mut events) = (Instant::now(), answer.bytes_stream());
    while opened.elapsed() < STREAM {
        let event = tokio::time::timeout(A_WHILE, events.next()).await.expect("no event and no comment came");
        event.unwrap_or_else(|| panic!("the stream ended after {:?}", opened.elapsed())).expect("the stream broke");
    }
    opened.elapsed()
}

/// The address that the audit log has of a trigger whose client claims another.
async fn forged(project: &Project, job: &str) -> String {
    const CLAIMED: &str = "203.0.113.9";
    let request = project.request("POST", &format!("/api/jobs/{job}/run"), None).header("X-Forwarded-For", CLAIMED);
    let answer: Value = request.send().await.expect("answers").json().await.expect("JSON");
    let execution = project.accepted(answer);
    let address = address_of(project, &execution).await;
    let network = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}";
    for proxy in project.containers("proxy").await {
        let of_proxy = docker(&["inspect", "--format", network, &proxy]).await;
        assert!(!of_proxy.split_whitespace().any(|own| own == address), "the proxy's own address counts: {address}");
    }
    assert_ne!(address, CLAIMED, "a client may name its own address");
    address
}

async fn address_of(project: &Project, execution: &str) -> String {
    let entries = project.ok("GET", &format!("/api/audit?targetId={execution}"), None).await;
    entries[0]["address"].as_str().unwrap_or_else(|| panic!("{entries}")).to_owned()
}

/// A proxy in front of the project's own, which `.env` names: what it says of its client counts, and not what that says.
async fn believed(project: &Project, job: &str) {
    const CLIENT: &str = "203.0.113.9";
    let of_env = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is set by .dev/cluster-test"));
    let (network, address) = (format!("{}_front", project_name()), of_env("DBACKUP_UPSTREAM_PROXIES"));
    let image = docker(&["inspect", "--format", "{{.Config.Image}}", &project.containers("api").await[0]]).await;
    let request = format!(
        r"POST /api/jobs/{job}/run HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nX-Forwarded-For: 198.51.100.7, {CLIENT}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        project.key
    );
    let script = format!("exec 3<>/dev/tcp/proxy/3000; printf '{request}' >&3; cat <&3");
    let said = docker(&["run", "--rm", "--network", &network, "--ip", &address, &image, "bash", "-c", &script]).await;
    let (_, body) = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{said}"));
    let execution = project.accepted(serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {said}")));
    assert_eq!(address_of(project, &execution).await, CLIENT);
}

/// So many containers of a service.
pub async fn scale(service: &str, count: usize) {
    let flags = ["up", "--detach", "--no-deps", "--no-recreate", "--no-build", "--scale"];
    compose(&[&flags[..], &[&format!("{service}={count}"), service]].concat()).await;
}

/// `--scale worker=5`: two more take part, and go again.
pub async fn scales(project: &Project) {
    let active = async || {
        let cluster = project.ok("GET", "/api/cluster", None).await;
        cluster["workers"].as_array().into_iter().flatten().filter(|worker| worker["state"] == "Active").count()
    };
    let before = active().await;
    scale("worker", 5).await;
    until("two more workers take part", A_WHILE, || async { (active().await == before + 2).then_some(()) }).await;
    scale("worker", 3).await;
    until("they are gone", A_WHILE, || async { (active().await == before).then_some(()) }).await;
    println!("  {before} workers, {} with --scale worker=5, and {before} again", before + 2);
}

/// A process that dies by itself is started again, and serves.
pub async fn starts_again(project: &Project) {
    for service in ["api", "worker"] {
        let container = project.containers(service).await.remove(0);
        // `docker kill` would count as the will of its operator.
        let about =
            docker(&["inspect", "--format", "{{.State.Pid}} {{.Config.Image}} {{.RestartCount}}", &container]).await;
        let (pid, rest) = about.split_once(' ').expect("three words");
        let (image, restarts) = rest.split_once(' ').expect("three words");
        docker(&["run", "--rm", "--pid", "host", "--user", "0", image, "bash", "-c", &format!("kill -9 {pid}")]).await;
        let restarts: u32 = restarts.parse().expect("a number");
        until(&format!("a {service} is started again"), A_WHILE, || async {
            (project.restarts().await[&container] > restarts).then_some(())
        })
        .await;
        project.healthy(&container).await;
    }
    println!("  an API and a worker that died were started again");
}

/// The proxy learns of a third API process by its name alone: it serves when the first two are gone.
pub async fn finds_the_scaled(project: &Project) {
    let old = project.containers("api").await;
    scale("api", 3).await;
    for container in project.containers("api").await {
        project.healthy(&container).await;
    }
    for container in &old {
        docker(&["stop", container]).await;
    }
    let answer = project.request("GET", "/api/jobs", None).send().await.expect("answers");
    assert_eq!(answer.status(), 200, "only the new API process is there");
    for container in &old {
        docker(&["start", container]).await;
        project.healthy(container).await;
    }
    scale("api", 2).await;
    println!("  a third API process serves alone");
}

/// The clock of the one worker is an hour ahead, as what it logs shows, and the others' are right. Its monotonic clock is
/// left alone.
pub async fn skewed() {
    for (service, ahead) in [("worker", 0), ("worker-skewed", 3_600)] {
        let log = compose(&["logs", "--no-log-prefix", "--no-color", "--timestamps", service]).await;
        // Docker's time of a line, and the worker's own.
        let lines = log.lines().filter_map(|line| {
            let (docker, line) = line.trim_start_matches("\u{1b}[2K").split_once(' ')?;
            let said: Value = serde_json::from_str(line).ok()?;
            Some((docker.to_owned(), said["timestamp"].as_str()?.to_owned()))
        });
        let time = |text: &str| chrono::DateTime::parse_from_rfc3339(text).expect("a time");
        let clocks: Vec<i64> = lines.map(|(docker, worker)| (time(&worker) - time(&docker)).num_seconds()).collect();
        assert!(!clocks.is_empty(), "a {service} logs");
        assert!(clocks.iter().all(|clock| (clock - ahead).abs() < 30), "{service}: clocks are ahead by {clocks:?} s");
    }
    // What it measures time-outs by is right.
    let monotonic = "use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC); print int clock_gettime(CLOCK_MONOTONIC)";
    let read = async |environment: &[&str]| -> i64 {
        let command = [&["exec", "-T", "worker-skewed", "env"], environment, &["perl", "-e", monotonic]].concat();
        compose(&command).await.parse().expect("a number")
    };
    let (its, right) = (read(&[]).await, read(&["-u", "LD_PRELOAD"]).await);
    assert!((right - its).abs() < 30, "its monotonic clock is ahead by {} s", its - right);
    println!("  the clock of one worker is an hour ahead");
}
