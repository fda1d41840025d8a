//! The contract's client samples with the real tools, unmodified but for URL, key and job: each for a run that
//! succeeds, one that fails and one that somebody else cancels meanwhile.

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use serde_json::json;

use crate::harness::{Cluster, SOON, postgres::OwnPostgres, source::PostgresSource, unique, until};

/// What a sample is to do: a program and its arguments, variables and standard input.
#[derive(Clone)]
pub struct Script {
    program: String,
    args: Vec<String>,
    variables: Vec<(&'static str, String)>,
}

fn sample(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/samples").join(name);
    std::fs::read_to_string(path).expect("the sample")
}

/// Replaces placeholders that occur exactly so often.
fn fill(mut text: String, values: &[(&str, &str, usize)]) -> String {
    for (placeholder, value, times) in values {
        assert_eq!(text.matches(placeholder).count(), *times, "{placeholder}");
        text = text.replace(placeholder, value);
    }
    text
}

/// The Bash script with nothing changed but its three variables.
pub fn bash(url: &str, key: &str, job: &str) -> Script {
    let text = fill(
        sample("trigger-and-wait.sh"),
        &[("dbm_your_api_key", key, 1), ("https://your-instance.com", url, 1), ("your-job-id", job, 1)],
    );
    Script { program: "bash".to_owned(), args: vec!["-c".to_owned(), text], variables: Vec::new() }
}

fn pre_deploy(url: &str, key: &str, job: &str) -> Script {
    let args = vec!["-c".to_owned(), sample("pre-deploy-backup.sh")];
    let values = [("DBACKUP_URL", url), ("DBACKUP_API_KEY", key), ("BACKUP_JOB_ID", job)];
    let variables = values.map(|(name, value)| (name, value.to_owned())).to_vec();
    Script { program: "bash".to_owned(), args, variables }
}

/// The playbook with its three variables given as extra ones, which is how Ansible overrides `vars`.
fn ansible(url: &str, key: &str, job: &str) -> Script {
    let tools = std::env::var("DBACKUP_TOOLS").expect("DBACKUP_TOOLS is not set: run the tests with make test");
    let values = json!({ "dbackup_url": url, "dbackup_api_key": key, "job_id": job });
    let playbook = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/samples/ansible-playbook.yml");
    let args = vec!["--extra-vars".to_owned(), values.to_string(), playbook.display().to_string()];
    let variables = vec![("ANSIBLE_HOME", std::env::temp_dir().join("dbackup-ansible").display().to_string())];
    Script { program: format!("{tools}/bin/ansible-playbook"), args, variables }
}

/// The `run:` blocks of the workflow, as its runner would run them: `bash -e`, with an output file between them.
fn github_steps(url: &str, key: &str, job: &str) -> Script {
    let workflow = sample("github-actions.yml");
    let mut steps: Vec<String> = Vec::new();
    let mut inside = false;
    for line in workflow.lines() {
        match line.strip_prefix("          ") {
            _ if line.trim() == "run: |" => {
                inside = true;
                steps.push(String::new());
            }
            Some(code) if inside => {
                let step = steps.last_mut().expect("a step");
                step.push_str(code);
                step.push('\n');
            }
            _ => inside = false,
        }
    }
    assert_eq!(steps.len(), 2, "{steps:?}");
    let values = [("${{ secrets.DBACKUP_URL }}", url, 1), ("${{ secrets.DBACKUP_API_KEY }}", key, 1)];
    let trigger = fill(steps[0].clone(), &[values[0], values[1], ("${{ secrets.DBACKUP_JOB_ID }}", job, 1)]);
    let wait = fill(steps[1].clone(), &values).replace("${{ steps.trigger.outputs.execution_id }}", "$EXECUTION");
    // A step's own shell, and the runner's hand-over of the output between the two.
    let runner = format!(
        "set -e\nGITHUB_OUTPUT=$(mktemp)\nexport GITHUB_OUTPUT\nbash -e <<'STEP'\n{trigger}STEP\n\
         EXECUTION=$(sed -n 's/^execution_id=//p' \"$GITHUB_OUTPUT\")\nrm \"$GITHUB_OUTPUT\"\nexport EXECUTION\nbash -e <<'STEP'\n{wait}STEP\n"
    );
    Script { program: "bash".to_owned(), args: vec!["-c".to_owned(), runner], variables: Vec::new() }
}

/// Runs a sample to its end.
pub async fn run(script: Script) -> Output {
    let run = move || {
        let mut command = Command::new(&script.program);
        command.args(&script.args).envs(script.variables.iter().map(|(name, value)| (*name, value)));
        command.output().unwrap_or_else(|e| panic!("{}: {e}", script.program))
    };
    tokio::task::spawn_blocking(run).await.expect("joins")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

type Sample = fn(&str, &str, &str) -> Script;

/// What a sample says at each end.
struct Words {
    success: &'static str,
    failure: &'static str,
    /// Whether it shows the error, too.
    shows_error: bool,
}

async fn sample_follows_a_run_to_each_of_its_ends(sample: Sample, words: Words) {
    let cluster = Cluster::start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = PostgresSource::with_rows(100).await;
    let good = cluster.job(&cluster.source("postgres", source.config()).await, &[&destination], json!({})).await;
    let mut config = source.config();
    config["databases"] = json!(["no_such_database"]);
    let bad = cluster.job(&cluster.source("postgres", config).await, &[&destination], json!({})).await;
    let key = cluster.key(&["jobs:execute", "history:read"]).await;

    let (succeeded, failed) =
        tokio::join!(run(sample(cluster.url(0), &key, &good)), run(sample(cluster.url(1), &key, &bad)));
    assert_eq!(succeeded.status.code(), Some(0), "{}", said(&succeeded));
    assert!(said(&succeeded).contains(words.success), "{}", said(&succeeded));
    assert_ne!(failed.status.code(), Some(0), "{}", said(&failed));
    assert!(said(&failed).contains(words.failure), "{}", said(&failed));
    assert!(!words.shows_error || said(&failed).contains("no_such_database"), "{}", said(&failed));

    // Nothing is claimed any more, and somebody else cancels what the sample waits for.
    cluster.ok("PATCH", "/api/settings", Some(json!({ "maxConcurrentJobs": 0 }))).await;
    let waiting = tokio::spawn(run(sample(cluster.url(0), &key, &good)));
    let execution = until("its run waits", SOON, || async {
        let list = cluster.ok("GET", "/api/executions?status=Pending", None).await;
        list[0]["id"].as_str().map(str::to_owned)
    })
    .await;
    cluster.ok("POST", &format!("/api/executions/{execution}/cancel"), None).await;
    let cancelled = tokio::time::timeout(SOON, waiting).await.expect("it ends, and does not spin").expect("joins");
    assert_ne!(cancelled.status.code(), Some(0), "{}", said(&cancelled));
    assert!(said(&cancelled).contains(words.failure), "{}", said(&cancelled));
    assert!(!words.shows_error || said(&cancelled).contains("cancelled on request by"), "{}", said(&cancelled));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bash_script_follows_a_run_to_its_success_failure_and_cancel() {
    let words = Words { success: "Backup completed successfully!", failure: "Backup failed: ", shows_error: true };
    sample_follows_a_run_to_each_of_its_ends(bash, words).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ansible_playbook_follows_a_run_to_its_success_failure_and_cancel() {
    let words = Words { success: "failed=0", failure: "Backup failed: ", shows_error: true };
    sample_follows_a_run_to_each_of_its_ends(ansible, words).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_steps_of_the_workflow_follow_a_run_to_its_success_failure_and_cancel() {
    let words = Words { success: "Status=Success", failure: "::error::Backup failed: ", shows_error: true };
    sample_follows_a_run_to_each_of_its_ends(github_steps, words).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pre_deploy_script_follows_a_run_to_its_success_failure_and_cancel() {
    let words = Words {
        success: "Backup complete — safe to deploy",
        failure: "Backup failed — aborting deploy!",
        shows_error: false,
    };
    sample_follows_a_run_to_each_of_its_ends(pre_deploy, words).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_scripts_from_one_address_all_succeed_though_postgresql_stops_for_fifteen_seconds() {
    let mut server = OwnPostgres::start().await;
    // The reads have the contract's limit of a hundred a minute; thirty triggers at once need more writes.
    let builder =
        Cluster::build().on(server.url("postgres")).rate_limits(json!({ "write": { "limit": 100 } })).limit(2);
    let cluster = builder.start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(10).await.config()).await;
    let job = cluster
        .job(&source, &[&destination], json!({ "name": unique("thirty"), "maxAttempts": 5, "overlap": "allow" }))
        .await;
    let key = cluster.key(&["jobs:execute", "history:read"]).await;
    // No slot while they come, so that every one of them still polls when the database stops.
    sqlx::query("update queue_gate set max_concurrency = 0").execute(&cluster.pool).await.expect("sets the limit");
    let scripts: Vec<_> = (0..30).map(|n| tokio::spawn(run(bash(cluster.url(n % 2), &key, &job)))).collect();
    until("all are triggered", SOON, || async {
        (cluster.count("select count(*) from executions").await == 30).then_some(())
    })
    .await;
    sqlx::query("update queue_gate set max_concurrency = 2").execute(&cluster.pool).await.expect("sets the limit");
    until("some have ended", SOON, || async {
        (cluster.count("select count(*) from executions where ended_at is not null").await > 2).then_some(())
    })
    .await;
    server.stop().await;
    // How long it is away is what this test is about.
    tokio::time::sleep(Duration::from_secs(15)).await;
    server.bring_back().await;
    let mut ended = BTreeSet::new();
    for (n, script) in scripts.into_iter().enumerate() {
        let output = tokio::time::timeout(Duration::from_secs(120), script).await.expect("it ends").expect("joins");
        assert_eq!(output.status.code(), Some(0), "script {n}: {}", said(&output));
        ended.insert(said(&output).lines().nth(1).unwrap_or_default().to_owned());
    }
    assert_eq!(ended.len(), 30, "an execution for each: {ended:?}");
}
