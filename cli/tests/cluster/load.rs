//! Clients: they trigger at a fixed rate, repeat what failed under the same Idempotency-Key, and poll. And somebody who
//! changes the limit every second.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use reqwest::{Response, header::RETRY_AFTER};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::project::Project;

/// Pause before a failed request is repeated.
const AGAIN: Duration = Duration::from_millis(250);

/// What the clients saw.
#[derive(Default)]
pub struct Tally {
    /// Triggers that were acknowledged, or waits that were answered.
    acknowledged: AtomicUsize,
    /// 503 `database_away` with Retry-After: what the API says when its database is away.
    refused: AtomicUsize,
    /// Every other failure.
    failed: Mutex<Vec<String>>,
}

impl Tally {
    async fn failure(&self, what: &str, answer: Result<Response, reqwest::Error>) {
        let failed = match answer {
            Ok(answer) => {
                let (status, tells_when) = (answer.status(), answer.headers().contains_key(RETRY_AFTER));
                let body = answer.text().await.unwrap_or_default();
                let code = serde_json::from_str::<Value>(&body).map(|body| body["code"].clone()).unwrap_or_default();
                if status == 503 && tells_when && code == "database_away" {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                format!("{what}: {status} {body}")
            }
            Err(error) => format!("{what}: {error:?}"),
        };
        self.failed.lock().expect("not poisoned").push(failed);
    }

    /// How many triggers were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// How many requests were refused.
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }

    /// The failures.
    pub fn failed(&self) -> Vec<String> {
        self.failed.lock().expect("not poisoned").clone()
    }
}

/// Clients at work.
pub struct Load {
    /// What they saw so far.
    pub tally: Arc<Tally>,
    stop: CancellationToken,
    work: tokio::task::JoinHandle<()>,
}

impl Load {
    /// So many triggers of a job a second, each by a client of its own, which then polls once.
    pub fn at_rate(project: &Project, job: &str, rate: u32) -> Self {
        let (project, job, tally) = (project.clone(), job.to_owned(), Arc::new(Tally::default()));
        let (stop, counted) = (CancellationToken::new(), tally.clone());
        let stopped = stop.clone();
        let work = tokio::spawn(async move {
            let mut clock = tokio::time::interval(Duration::from_secs(1) / rate);
            let mut clients = JoinSet::new();
            while stopped.run_until_cancelled(clock.tick()).await.is_some() {
                let (project, job, tally) = (project.clone(), job.clone(), counted.clone());
                clients.spawn(async move {
                    let execution = trigger(&project, &job, &tally).await;
                    poll(&project, &execution, &tally).await;
                });
            }
            while let Some(client) = clients.join_next().await {
                client.expect("a client ends well");
            }
        });
        Self { tally, stop, work }
    }

    /// So many clients, each with the next trigger as soon as the one before is acknowledged.
    pub fn at_once(project: &Project, job: &str, clients: usize) -> Self {
        let job = job.to_owned();
        Self::each(project, clients, move |project, tally| {
            let job = job.clone();
            async move { drop(trigger(&project, &job, &tally).await) }
        })
    }

    /// So many clients that wait for the end of an execution, each again as soon as it is told that there is none yet.
    pub fn waiting(project: &Project, execution: &str, clients: usize) -> Self {
        let path = format!("/api/executions/{execution}?wait=60");
        Self::each(project, clients, move |project, tally| {
            let waits = project.request("GET", &path, None).send();
            async move {
                match waits.await {
                    Ok(answer) if answer.status() == 200 => {
                        tally.acknowledged.fetch_add(1, Ordering::Relaxed);
                    }
                    answer => tally.failure("a wait", answer).await,
                }
            }
        })
    }

    /// So many clients, each of which asks again and again.
    fn each<F: Future<Output = ()> + Send>(
        project: &Project,
        clients: usize,
        ask: impl Fn(Project, Arc<Tally>) -> F + Clone + Send + Sync + 'static,
    ) -> Self {
        let (stop, tally) = (CancellationToken::new(), Arc::new(Tally::default()));
        let mut work = JoinSet::new();
        for _ in 0..clients {
            let (project, ask, stop, tally) = (project.clone(), ask.clone(), stop.clone(), tally.clone());
            work.spawn(async move {
                while !stop.is_cancelled() {
                    ask(project.clone(), tally.clone()).await;
                }
            });
        }
        let work =
            tokio::spawn(async move { while work.join_next().await.transpose().expect("ends well").is_some() {} });
        Self { tally, stop, work }
    }

    /// Ends it, when every trigger is acknowledged.
    pub async fn end(self) -> Arc<Tally> {
        self.stop.cancel();
        self.work.await.expect("the clients end well");
        self.tally
    }
}

/// Triggers a job, again and again under one key until it is acknowledged; gives the execution's id.
async fn trigger(project: &Project, job: &str, tally: &Tally) -> String {
    let key = uuid::Uuid::now_v7().to_string();
    let path = format!("/api/jobs/{job}/run");
    loop {
        match project.request("POST", &path, None).header("Idempotency-Key", &key).send().await {
            Ok(answer) if answer.status() == 200 => {
                let answer: Value = answer.json().await.unwrap_or_default();
                if let Some(execution) = answer["executionId"].as_str() {
                    project.acknowledge(execution);
                    tally.acknowledged.fetch_add(1, Ordering::Relaxed);
                    return execution.to_owned();
                }
                tally.failed.lock().expect("not poisoned").push(format!("an answer was cut: {answer}"));
            }
            answer => tally.failure("a trigger", answer).await,
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn poll(project: &Project, execution: &str, tally: &Tally) {
    match project.request("GET", &format!("/api/executions/{execution}"), None).send().await {
        Ok(answer) if answer.status() == 200 => {}
        answer => tally.failure("a poll", answer).await,
    }
}

/// Changes the limit every second, between 1 and 10, until it is dropped.
pub struct Limits {
    work: tokio::task::JoinHandle<()>,
    changed: Arc<(AtomicUsize, AtomicUsize)>,
}

impl Limits {
    /// Begins.
    pub fn change(project: &Project, seed: u64) -> Self {
        let (project, changed) = (project.clone(), Arc::<(AtomicUsize, AtomicUsize)>::default());
        let counted = changed.clone();
        let work = tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            let mut clock = tokio::time::interval(Duration::from_secs(1));
            loop {
                clock.tick().await;
                let limit = json!({ "maxConcurrentJobs": random.random_range(1..=10) });
                counted.0.fetch_add(1, Ordering::Relaxed);
                // The database may be away just now.
                let answer = project.request("PATCH", "/api/settings", Some(limit)).send().await;
                if answer.is_ok_and(|answer| answer.status() == 200) {
                    counted.1.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { work, changed }
    }

    /// How often it was to be changed, and how often it was.
    pub fn so_far(&self) -> (usize, usize) {
        (self.changed.0.load(Ordering::Relaxed), self.changed.1.load(Ordering::Relaxed))
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        self.work.abort();
    }
}
