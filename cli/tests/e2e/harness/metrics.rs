//! The pages of metrics of the cluster's processes, and Prometheus's own tool and server to judge them.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use super::{Cluster, Process, SOON, unique, until};

/// A scraped page.
pub struct Page(pub String);

impl Page {
    /// The sum of all samples of this name that have these labels; `None` without one.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let of_it = |line: &&str| {
            let rest = line.strip_prefix(name)?;
            let named = rest.starts_with(['{', ' ']);
            let has = |(name, value): &(&str, &str)| rest.contains(&format!("{name}=\"{value}\""));
            (named && labels.iter().all(has)).then_some(())
        };
        let values: Vec<f64> = self
            .0
            .lines()
            .filter(|line| of_it(line).is_some())
            .map(|line| {
                let sample = line.split(" # ").next().expect("a sample");
                let value = sample.rsplit(' ').next().expect("a value");
                value.parse().unwrap_or_else(|_| panic!("no number: {line}"))
            })
            .collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// How many series there are.
    pub fn series(&self) -> usize {
        self.0.lines().filter(|line| !line.starts_with('#')).count()
    }

    /// The traces that the exemplars of a metric name.
    pub fn traces(&self, name: &str) -> Vec<String> {
        let of_it = self.0.lines().filter(|line| line.starts_with(name));
        let exemplars = of_it.filter_map(|line| line.split(" # {trace_id=\"").nth(1));
        exemplars.map(|rest| rest.split('"').next().expect("an id").to_owned()).collect()
    }
}

impl Cluster {
    /// Where a process serves its metrics.
    pub fn metrics_address(process: &Process) -> String {
        let log = process.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut served = lines.filter(|line| line["fields"]["message"] == "metrics are served");
        let line = served.next().unwrap_or_else(|| panic!("no page of metrics: {log}"));
        line["fields"]["address"].as_str().expect("an address").to_owned()
    }

    /// What a process tells, in the older form.
    pub async fn metrics(&self, process: &Process) -> Page {
        self.metrics_as(process, "text/plain").await.1
    }

    /// What a process tells whoever accepts this, after its content type.
    pub async fn metrics_as(&self, process: &Process, accept: &str) -> (String, Page) {
        let url = format!("http://{}/metrics", Self::metrics_address(process));
        let answer = self.http.get(url).header("accept", accept).send().await.expect("the page answers");
        assert_eq!(answer.status(), 200);
        let content_type = answer.headers()["content-type"].to_str().expect("text").to_owned();
        (content_type, Page(answer.text().await.expect("a page")))
    }

    /// What the first API process says of a metric.
    pub async fn told(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.metrics(&self.apis[0].0).await.value(name, labels)
    }

    /// The sum over all workers.
    pub async fn told_by_workers(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let mut sum = 0.0;
        for worker in &self.workers {
            sum += self.metrics(worker).await.value(name, labels).unwrap_or(0.0);
        }
        sum
    }
}

/// Runs Prometheus's own tool on an input; it must find nothing.
pub fn promtool(args: &[&str], input: &str) -> String {
    let mut command = Command::new("promtool");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool is installed: run make setup");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("writes");
    let output = child.wait_with_output().expect("ends");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "promtool {args:?}: {said}\n{input}");
    said
}

/// Where the files of the observability profile are.
pub fn profile(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.observability").join(file)
}

/// A Prometheus with the profile's own configuration, but for how it finds the processes; killed when dropped.
pub struct Prometheus {
    child: Child,
    folder: PathBuf,
    url: String,
    http: reqwest::Client,
}

impl Prometheus {
    /// Starts it on processes of this machine.
    pub async fn start(cluster: &Cluster) -> Self {
        let folder = std::env::temp_dir().join(unique("prometheus"));
        std::fs::create_dir(&folder).expect("a folder");
        let mut config = std::fs::read_to_string(profile("prometheus.yml")).expect("the configuration");
        let apis: Vec<String> = cluster.apis.iter().map(|(api, _)| Cluster::metrics_address(api)).collect();
        let workers: Vec<String> = cluster.workers.iter().map(Cluster::metrics_address).collect();
        for (name, targets) in [("api", apis), ("worker", workers)] {
            let discovery = format!("dns_sd_configs: [{{ names: [{name}], type: A, port: 9464 }}]");
            assert!(config.contains(&discovery), "{config}");
            config = config.replace(&discovery, &format!("static_configs: [{{ targets: {targets:?} }}]"));
        }
        for every in ["scrape_interval: 15s", "evaluation_interval: 15s"] {
            assert!(config.contains(every), "{config}");
            config = config.replace(every, &every.replace("15s", "1s"));
        }
        std::fs::write(folder.join("prometheus.yml"), config).expect("writes");
        std::fs::copy(profile("rules.yml"), folder.join("rules.yml")).expect("copies");
        let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
        let log = std::fs::File::create(folder.join("log")).expect("a log");
        let child = Command::new("setpriv")
            .args(["--pdeathsig=KILL", "--", "prometheus", "--enable-feature=exemplar-storage"])
            .arg(format!("--config.file={}", folder.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("prometheus is installed: run make setup");
        let server = Self { child, folder, url: format!("http://127.0.0.1:{port}"), http: cluster.http.clone() };
        until("Prometheus is ready", SOON, || async {
            let answer = server.http.get(format!("{}/-/ready", server.url)).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
        server
    }

    /// What its API answers under `data`.
    pub async fn ask(&self, path: &str, query: &[(&str, &str)]) -> Value {
        let mut url = url::Url::parse(&format!("{}{path}", self.url)).expect("a URL");
        url.query_pairs_mut().extend_pairs(query);
        let answer: Value =
            self.http.get(url.clone()).send().await.expect("answers").json().await.expect("Prometheus speaks JSON");
        assert_eq!(answer["status"], "success", "{url}: {answer}");
        answer["data"].clone()
    }

    /// What it has now for a query.
    pub async fn query(&self, query: &str) -> Vec<Value> {
        let data = self.ask("/api/v1/query", &[("query", query)]).await;
        data["result"].as_array().unwrap_or_else(|| panic!("{query}: {data}")).clone()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.folder.join("log")).unwrap_or_default());
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
