//! `dbackup up`: everything in one process on a private PostgreSQL.

use std::{
    collections::BTreeMap,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::seal::SealKey;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::harness::{Process, SOON, binary, source::PostgresSource, unique, until};

/// A data folder; its PostgreSQL ends with it.
struct Data(PathBuf);

impl Data {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(unique("up"));
        std::fs::create_dir(&folder).expect("a folder");
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).expect("opens it");
        Self(folder)
    }

    fn postmaster(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.0.join("pg/postmaster.pid")).ok()?;
        text.lines().next()?.parse().ok().map(Pid::from_raw)
    }

    fn up(&self, port: u16) -> Process {
        self.up_with(port, &[])
    }

    fn up_with(&self, port: u16, extra: &[(&str, String)]) -> Process {
        let folder = self.0.to_str().expect("text");
        let listen = format!("127.0.0.1:{port}");
        let env: BTreeMap<String, String> = [("DBACKUP_LEASE_MS", "3000"), ("DBACKUP_TICKER_MS", "300")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        Process::start("dbackup", &["--data", folder, "up", "--listen", &listen, "--workers", "2"], &env, extra)
    }

    fn dbackup(&self, args: &[&str]) -> String {
        let output = Command::new(binary("dbackup")).arg("--data").arg(&self.0).args(args).output().expect("runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        if let Some(pid) = self.postmaster() {
            let _ = kill(pid, Signal::SIGQUIT);
            let end = std::time::Instant::now() + Duration::from_secs(10);
            while self.postmaster().is_some() && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A program that ends with the test, also when it fails.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

struct Client {
    http: reqwest::Client,
    url: String,
    key: String,
}

impl Client {
    async fn ready(port: u16) -> Self {
        let client = Self { http: reqwest::Client::new(), url: format!("http://127.0.0.1:{port}"), key: String::new() };
        until("readyz", Duration::from_secs(60), || async {
            let answer = client.http.get(format!("{}/readyz", client.url)).send().await;
            answer.is_ok_and(|a| a.status() == 200).then_some(())
        })
        .await;
        client
    }

    async fn send(&self, method: &str, path: &str, body: Value) -> Value {
        let method: reqwest::Method = method.parse().expect("a method");
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.url)).bearer_auth(&self.key);
        if !body.is_null() {
            request = request.json(&body);
        }
        let response = request.send().await.expect("answers");
        let (status, body) = (response.status(), response.json::<Value>().await.expect("JSON"));
        assert!(status.is_success(), "{method} {path}: {status} {body}");
        body.get("data").cloned().unwrap_or(body)
    }

    /// A job on a database of the test server, into the instance's own folder.
    async fn job(&self, data: &Path, source: &PostgresSource) {
        self.send("POST", "/api/sources", json!({ "name": "shop", "engine": "postgres", "config": source.config() }))
            .await;
        self.send(
            "POST",
            "/api/destinations",
            json!({ "name": "disk", "kind": "local", "config": { "root": data.join("backups") } }),
        )
        .await;
        assert_eq!(self.send("POST", "/api/destinations/disk/test", Value::Null).await["ok"], true);
        self.send("POST", "/api/jobs", json!({ "name": "daily", "sourceId": "shop", "destinationIds": ["disk"] }))
            .await;
    }

    async fn backup(&self) -> Value {
        let run = self.send("POST", "/api/jobs/daily/run", Value::Null).await;
        let path = format!("/api/executions/{}?includeLogs=true", run["executionId"].as_str().expect("an id"));
        let path = &path;
        let ended = until("the backup ends", SOON, || async move {
            let execution = self.send("GET", path, Value::Null).await;
            execution["endedAt"].is_string().then_some(execution)
        })
        .await;
        assert_eq!(ended["status"], "Success", "{ended:#}");
        ended
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn up_serves_backs_up_and_stops_with_its_postgres_and_keeps_its_folder_private() {
    let (data, port) = (Data::new(), free_port());
    let metrics = free_port();
    let mut up = data.up_with(port, &[("DBACKUP_METRICS_LISTEN", format!("127.0.0.1:{metrics}"))]);
    let mut client = Client::ready(port).await;
    let key = data.dbackup(&["key", "create", "--name", "ci", "--permission", "*"]);
    assert_eq!(key.lines().count(), 1, "the key stands alone: {key}");
    client.key = key.trim().to_owned();
    client.job(&data.0, &PostgresSource::with_rows(100).await).await;
    client.backup().await;
    assert_eq!(data.dbackup(&["health"]).trim(), "healthy");
    let page = client.http.get(format!("http://127.0.0.1:{metrics}/metrics")).send().await.expect("answers");
    let page = page.text().await.expect("a page");
    let of_all = [
        "http_requests_total{",
        "job_paused{backup_job=\"daily\"} 0",
        "claimed_executions_total 1",
        "worker_concurrency 8",
    ];
    assert!(
        of_all.iter().all(|of_it| page.contains(&format!("dbackup_{of_it}"))),
        "one page for all of the process: {page}"
    );

    let mode = |name: &str| std::fs::metadata(data.0.join(name)).expect("exists").mode() & 0o777;
    assert_eq!((mode("run"), mode("pg"), mode("dbackup.env")), (0o700, 0o700, 0o600));
    let lines: Vec<String> = up.log().lines().filter(|l| l.contains("http://")).map(str::to_owned).collect();
    assert_eq!(lines.len(), 1, "one line with the address: {lines:?}");

    let postmaster = data.postmaster().expect("it runs");
    let env = std::fs::read_to_string(data.0.join("dbackup.env")).expect("the secrets");
    let url = env.lines().find_map(|l| l.strip_prefix("DATABASE_URL='")).expect("a URL").trim_end_matches('\'');
    let asked = Command::new("psql").args(["-XAtq", url, "-c", "show listen_addresses"]).output().expect("psql runs");
    assert_eq!((asked.status.code(), String::from_utf8_lossy(&asked.stdout).as_ref()), (Some(0), "\n"), "{asked:?}");
    if nix::unistd::geteuid().is_root() {
        let postgres = nix::unistd::User::from_name("postgres").expect("answers").expect("the package's user");
        let owner = std::fs::metadata(format!("/proc/{postmaster}")).expect("it runs").uid();
        assert_eq!(owner, postgres.uid.as_raw(), "not as postgres");
    }
    up.signal(Signal::SIGTERM);
    assert_eq!(up.end(Duration::from_secs(30)).await.code(), Some(0), "{}", up.log());
    assert!(kill(postmaster, None).is_err(), "PostgreSQL outlived dbackup up");
}

#[tokio::test(flavor = "multi_thread")]
async fn up_survives_kill_9_and_adopts_the_postgres_that_was_left_running() {
    let (data, port) = (Data::new(), free_port());
    let mut first = data.up(port);
    let mut client = Client::ready(port).await;
    client.key = data.dbackup(&["key", "create", "--name", "ci", "--permission", "*"]).trim().to_owned();
    client.job(&data.0, &PostgresSource::with_rows(100).await).await;
    client.backup().await;
    let postmaster = data.postmaster().expect("it runs");
    first.kill().await;
    assert!(kill(postmaster, None).is_ok(), "PostgreSQL died with it");

    let mut second = data.up(port);
    Client::ready(port).await;
    assert_eq!(data.postmaster(), Some(postmaster), "another PostgreSQL was started");
    client.backup().await;
    second.signal(Signal::SIGTERM);
    assert_eq!(second.end(Duration::from_secs(30)).await.code(), Some(0), "{}", second.log());
    until("the adopted PostgreSQL stops too", SOON, || async { kill(postmaster, None).is_err().then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_joins_by_the_env_file_and_a_second_up_on_the_folder_is_refused() {
    let (data, port) = (Data::new(), free_port());
    let _up = data.up(port);
    let mut client = Client::ready(port).await;
    client.key = data.dbackup(&["key", "create", "--name", "ci", "--permission", "*"]).trim().to_owned();

    let script = format!(
        "set -a; . '{}/dbackup.env'; DBACKUP_POOLS=far exec '{}' --worker-name joined",
        data.0.display(),
        binary("dbackup-worker").display()
    );
    let _worker = Killed(
        Command::new("bash")
            .args(["-c", &script])
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("bash runs"),
    );
    client.job(&data.0, &PostgresSource::with_rows(100).await).await;
    client.send("PUT", "/api/sources/shop", json!({ "pool": "far" })).await;
    let ended = client.backup().await;
    assert!(ended["logs"].to_string().contains("joined"), "{ended:#}");

    let mut second = data.up(free_port());
    let status = second.end(SOON).await;
    assert!(
        status.code() == Some(2) && second.log().contains("another dbackup up runs"),
        "{status:?} {}",
        second.log()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_of_an_instance_in_a_folder_is_rotated_too() {
    let data = Data::new();
    let port = free_port();
    let mut up = data.up(port);
    up.says("DBackup listens", SOON).await;
    let key = data.dbackup(&["key", "create", "--name", "admin", "--permission", "*"]);
    let source = PostgresSource::with_rows(10).await;
    let (http, url) = (reqwest::Client::new(), format!("http://127.0.0.1:{port}"));
    let body = json!({ "name": "Shop", "engine": "postgres", "config": source.config() });
    let made = http.post(format!("{url}/api/sources")).bearer_auth(key.trim()).json(&body).send().await;
    assert_eq!(made.expect("answers").status(), 201);
    up.signal(Signal::SIGTERM);
    up.end(SOON).await;

    let file = data.0.join("dbackup.env");
    let text = std::fs::read_to_string(&file).expect("text");
    let old = text.lines().find_map(|line| line.strip_prefix("DBACKUP_ENCRYPTION_KEY='")?.strip_suffix('\''));
    let (old, new) = (old.expect("a key").to_owned(), SealKey::generate());
    std::fs::write(&file, text.replace(&old, &new)).expect("writes");
    let other = [("DBACKUP_OTHER_ENCRYPTION_KEY", old)];
    let mut up = data.up_with(port, &other);
    up.says("DBackup listens", SOON).await;
    let rotated = Command::new(binary("dbackup")).arg("--data").arg(&data.0).arg("key-rotate").envs(other).output();
    let rotated = rotated.expect("runs");
    assert!(rotated.status.success(), "{}", String::from_utf8_lossy(&rotated.stderr));
    up.signal(Signal::SIGTERM);
    up.end(SOON).await;

    let mut up = data.up(port);
    up.says("DBackup listens", SOON).await;
    let tested = http.post(format!("{url}/api/sources/shop/test")).bearer_auth(key.trim()).send().await;
    let tested: Value = tested.expect("answers").json().await.expect("JSON");
    assert_eq!(tested["data"]["ok"], true, "{tested}");
    up.signal(Signal::SIGTERM);
    up.end(SOON).await;
}
