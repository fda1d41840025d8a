//! What goes wrong around the workers: a network, Redis, an API process, PostgreSQL; and what is done on purpose, a
//! rolling restart.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::json;
use tokio::process::Command;

use crate::{
    harness::{audit::Audited, readme, until},
    load::Load,
    project::{A_WHILE, Project, compose, docker, project_name},
    shape,
    stages::Stage,
};

/// Dump tools of a container: how many run, and how many are frozen. Those that are gone and not yet waited for are
/// neither.
async fn tools(container: &str) -> (usize, usize) {
    let processes = docker(&["top", container, "-eo", "pid,stat,comm"]).await;
    let states: Vec<_> = processes
        .lines()
        .filter(|line| line.contains("pg_dump"))
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter(|state| !state.starts_with('Z'))
        .collect();
    let frozen = states.iter().filter(|state| state.starts_with('T')).count();
    (states.len() - frozen, frozen)
}

async fn running_tools(container: &str) -> usize {
    tools(container).await.0
}

/// Those of all workers.
async fn all_tools(project: &Project) -> (usize, usize) {
    let mut all = (0, 0);
    for service in ["worker", "worker-skewed"] {
        for container in project.containers(service).await {
            let (running, frozen) = tools(&container).await;
            all = (all.0 + running, all.1 + frozen);
        }
    }
    all
}

/// A worker without PostgreSQL, but with its source, stops its dump before anybody takes over.
pub async fn cut_off(project: &Project, local: &str) {
    let stage = Stage::dumping(project, local).await;
    for _ in 0..3 {
        let (execution, worker) = stage.hold_one(project).await;
        let container = project.container_of(&worker).await;
        until("it dumps", A_WHILE, || async { (running_tools(&container).await > 0).then_some(()) }).await;
        let before = project.leases_ended(&execution).await;
        let network = format!("{}_backend", project_name());
        docker(&["network", "disconnect", &network, &container]).await;
        let cut = Instant::now();
        until("its dump is stopped", A_WHILE, || async { (running_tools(&container).await == 0).then_some(()) }).await;
        let stopped = cut.elapsed();
        let taken = project.leases_ended(&execution).await - before;
        assert_eq!(taken, 0, "the run was taken over while its old dump still ran, {stopped:?} after the cut");
        until("somebody takes over", A_WHILE, || async {
            (project.leases_ended(&execution).await > before).then_some(())
        })
        .await;
        println!(
            "  dump stopped after {:.1} s, taken over after {:.1} s",
            stopped.as_secs_f64(),
            cut.elapsed().as_secs_f64()
        );
        stage.open();
        docker(&["network", "connect", &network, &container]).await;
        let end = project.ended(&execution).await;
        assert!(end.is_success() && end.rescues == 1, "{execution} ended so: {end:?}");
        project.healthy(&container).await;
    }
}

/// Without Redis nothing fails, neither when it goes nor when it comes back.
pub async fn without_redis(project: &Project, job: &str, rate: u32) {
    let load = Load::at_rate(project, job, rate);
    acknowledged(&load, 20).await;
    compose(&["stop", "redis"]).await;
    until("each process limits by itself", A_WHILE, || async { (rate_limits(project).await != "redis").then_some(()) })
        .await;
    acknowledged(&load, 40).await;
    compose(&["start", "redis"]).await;
    until("Redis counts again", A_WHILE, || async { (rate_limits(project).await == "redis").then_some(()) }).await;
    acknowledged(&load, 20).await;
    let tally = load.end().await;
    assert_eq!((tally.failed(), tally.refused()), (Vec::new(), 0), "requests failed");
    println!("  {} triggers, none failed", tally.acknowledged());
}

/// Waits for so many further acknowledgements.
async fn acknowledged(load: &Load, more: usize) {
    let before = load.tally.acknowledged();
    until("triggers are acknowledged", A_WHILE, || async {
        (load.tally.acknowledged() >= before + more).then_some(())
    })
    .await;
}

async fn rate_limits(project: &Project) -> String {
    let answer = project.request("GET", "/api/health", None).send().await.expect("answers");
    let health: serde_json::Value = answer.json().await.expect("JSON");
    health["rateLimits"].as_str().unwrap_or_default().to_owned()
}

/// An API process is killed under load: only what was under way on it fails, and the repeated triggers make no second
/// run.
pub async fn killed_api(project: &Project, source: &str, local: &str) {
    const CLIENTS: usize = 16;
    let job = project.make_job(source, local).await;
    let load = Load::at_once(project, &job, CLIENTS);
    let (mut triggers, mut failed) = (0, 0);
    acknowledged(&load, 100).await;
    for container in project.containers("api").await {
        let before = load.tally.failed().len();
        docker(&["kill", "--signal", "KILL", &container]).await;
        acknowledged(&load, 100).await;
        docker(&["start", &container]).await;
        project.healthy(&container).await;
        acknowledged(&load, 100).await;
        let failures = load.tally.failed();
        let under_way = failures.len() - before;
        assert!(under_way <= CLIENTS, "more than what was under way failed: {failures:#?}");
        // What the dead process could not be sent goes to the other one.
        let unsent = failures.iter().any(|failure| failure.contains("unavailable")) || load.tally.refused() > 0;
        assert!(!unsent, "requests were refused that were not under way: {failures:#?}");
        failed += under_way;
    }
    let tally = load.end().await;
    triggers += tally.acknowledged();
    let runs = project.number(&format!("select count(*) from executions where job_id = '{job}'")).await;
    assert_eq!(usize::try_from(runs), Ok(triggers), "a repeated trigger made a second run, or one was lost");
    println!("  {triggers} triggers by {CLIENTS} clients, {failed} failed once, {runs} runs");
    cancel_waiting(project, &job).await;
}

/// More are triggered than a small machine runs: those that never began are not waited for.
pub async fn cancel_waiting(project: &Project, job: &str) {
    // What runs when it is cancelled counts as a failure.
    project.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let query =
        format!("select id::text from executions where job_id = '{job}' and status = 'Pending' and attempt = 0");
    let waiting = project.texts(query).await;
    let cancel = async |execution: String| {
        let path = format!("/api/executions/{execution}/cancel");
        project.request("POST", &path, None).send().await.expect("answers");
    };
    futures::stream::iter(waiting).for_each_concurrent(16, cancel).await;
    project.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
}

/// README's `roll`, as it is pasted from there, of these services.
async fn roll(services: &str) {
    let script = readme::roll().replace("in api worker;", &format!("in {services};"));
    let output = Command::new("bash").args(["-c", &format!("{script}\nroll")]).output().await.expect("bash runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Every API and worker container is replaced, one by one, as the README says: nothing fails, and what is given back
/// counts against nothing.
pub async fn rolling_restart(project: &Project, stage: &Stage, source: &str, local: &str, rate: u32) {
    let before = project.number("select coalesce(max(seq), 0) from executions").await;
    let job = project.make_job(source, local).await;
    let (held, _) = stage.hold_one(project).await;
    let load = Load::at_rate(project, &job, rate);
    let waiting = Load::waiting(project, &held, 4);
    acknowledged(&load, 20).await;
    let all = async || {
        let mut all = Vec::new();
        for service in ["api", "worker", "worker-skewed"] {
            all.extend(project.containers(service).await);
        }
        all
    };
    // More than the Compose file says: a roll keeps the number.
    shape::scale("worker", 4).await;
    let before_it = all().await;
    roll("api worker").await;
    roll("worker-skewed").await;
    let after_it = all().await;
    assert!(after_it.len() == before_it.len() && after_it.iter().all(|now| !before_it.contains(now)), "{after_it:?}");
    let replaced = before_it.len();
    shape::scale("worker", 3).await;
    let tally = load.end().await;
    stage.open();
    let end = project.ended(&held).await;
    let waited = waiting.end().await;
    assert_eq!((waited.failed(), waited.refused()), (Vec::new(), 0), "clients that waited were not answered");
    assert!(waited.acknowledged() > 0, "nobody waited");
    assert!(end.is_success(), "{held} ended so: {end:?}");
    assert_eq!((tally.failed(), tally.refused()), (Vec::new(), 0), "requests failed");
    let attempts = project.number(&format!("select attempt::bigint from executions where id = '{held}'")).await;
    assert!(attempts > 1, "no run was given back");
    let runs = project.number(&format!("select count(*) from executions where job_id = '{job}'")).await;
    assert_eq!(usize::try_from(runs), Ok(tally.acknowledged()), "triggers were lost, or doubled");
    println!("  {replaced} containers, {runs} triggers, none failed; a run was given back {} times", attempts - 1);
    cancel_waiting(project, &job).await;
    drained(project).await;
    let counted = format!(
        "select e.id || ': ' || e.failures || ' failures, ' || e.rescues || ' rescues;'
                || coalesce((select string_agg(' ' || l.at || ' ' || l.message, ';' order by l.seq) from execution_logs l where l.execution_id = e.id), '')
           from executions e where e.seq > {before} and (e.failures > 0 or e.rescues > 0)"
    );
    assert_eq!(project.texts(counted).await, Vec::<String>::new(), "a restart was counted against a run");
}

/// Until nothing waits and nothing runs.
pub async fn drained(project: &Project) {
    until("every execution ends", Duration::from_secs(1_200), || async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        (project.number("select count(*) from executions where ended_at is null").await == 0).then_some(())
    })
    .await;
}

/// PostgreSQL restarts: the API holds or refuses with Retry-After, and nobody has to do anything.
pub async fn restarted_postgres(project: &Project, job: &str, rate: u32) {
    let load = Load::at_rate(project, job, rate);
    acknowledged(&load, 20).await;
    compose(&["restart", "postgres"]).await;
    acknowledged(&load, 40).await;
    let tally = load.end().await;
    assert_eq!(tally.failed(), Vec::<String>::new(), "a failure that is no 503 with Retry-After");
    println!("  {} triggers, {} requests refused with Retry-After", tally.acknowledged(), tally.refused());
    drained(project).await;
}

/// PostgreSQL is away for a minute while five dumps run: they are frozen, revived, and end well.
pub async fn stopped_postgres(project: &Project, local: &str, job: &str, rate: u32) {
    project.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 10 }))).await;
    let mut stages = Vec::new();
    for _ in 0..5 {
        stages.push(Stage::dumping(project, local).await);
    }
    let mut held = Vec::new();
    for stage in &stages {
        held.push(stage.hold_one(project).await.0);
    }
    let load = Load::at_rate(project, job, rate);
    acknowledged(&load, 20).await;
    compose(&["stop", "postgres"]).await;
    let stopped = Instant::now();
    // No process is ready, and yet it is they who answer: they know what is wrong.
    let answer = project.request("GET", "/api/jobs", None).send().await.expect("answers");
    let answer: serde_json::Value = answer.json().await.expect("JSON");
    assert_eq!(answer["code"], "database_away", "{answer}");
    until("every dump is frozen", A_WHILE, || async {
        let (running, frozen) = all_tools(project).await;
        (running == 0 && frozen >= 5).then_some(())
    })
    .await;
    let after = stopped.elapsed();
    tokio::time::sleep_until((stopped + Duration::from_secs(60)).into()).await;
    let (running, frozen) = all_tools(project).await;
    assert!(running == 0 && frozen >= 5, "{running} run and {frozen} are frozen after a minute");
    compose(&["start", "postgres"]).await;
    acknowledged(&load, 40).await;
    stages.iter().for_each(Stage::open);
    let mut ends = Vec::new();
    for execution in &held {
        ends.push(project.ended(execution).await);
    }
    let tally = load.end().await;
    assert_eq!(tally.failed(), Vec::<String>::new(), "a failure that is no 503 with Retry-After");
    assert!(ends.iter().all(|end| end.is_success() && end.rescues == 0), "the five dumps ended so: {ends:#?}");
    for execution in &held {
        let attempts =
            project.number(&format!("select attempt::bigint from executions where id = '{execution}'")).await;
        assert_eq!(attempts, 1, "{execution} was given back, and began anew");
    }
    println!("  {frozen} dumps were frozen {:.1} s after the stop", after.as_secs_f64());
    println!("  {} triggers, {} requests refused with Retry-After", tally.acknowledged(), tally.refused());
    drained(project).await;
}
