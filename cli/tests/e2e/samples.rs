//! The client samples, as the console shows them, with the real tools: each for a run that succeeds, one that fails and
//! one that somebody else cancels meanwhile. The contract's own are unmodified but for URL, key and job.

use std::{
    collections::BTreeSet,
    process::{Command, Output},
    time::Duration,
};

use api::samples::Sample;
use serde_json::json;

use crate::harness::{Cluster, SOON, binary, postgres::OwnPostgres, source::PostgresSource, unique, until};

/// What a sample is to do: a program and its arguments, variables and standard input.
#[derive(Clone)]
pub struct Script {
    program: String,
    args: Vec<String>,
    variables: Vec<(&'static str, String)>,
}

impl Script {
    /// A text for a shell.
    pub fn shell(text: &str) -> Self {
        Self { program: "bash".to_owned(), args: vec!["-c".to_owned(), text.to_owned()], variables: Vec::new() }
    }

    /// With what the sample asks to be set where it runs.
    fn with(self, sample: &Sample) -> Self {
        Self { variables: sample.variables.clone(), ..self }
    }
}

/// A sample as the console shows it.
fn shown(id: &str, url: &str, key: &str, job: &str) -> Sample {
    let found = api::samples::of(url, key, job).into_iter().find(|sample| sample.id == id);
    found.unwrap_or_else(|| panic!("there is no sample {id}"))
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
    Script::shell(&shown("bash", url, key, job).text)
}

/// With the program where a shell finds it.
fn by_dbackup(url: &str, key: &str, job: &str) -> Script {
    let program = binary("dbackup");
    let path =
        format!("{}:{}", program.parent().expect("a folder").display(), std::env::var("PATH").unwrap_or_default());
    Script { variables: vec![("PATH", path)], ..Script::shell(&shown("cli", url, key, job).text) }
}

fn python(url: &str, key: &str, job: &str) -> Script {
    let args = vec!["-c".to_owned(), shown("python", url, key, job).text];
    Script { program: "python3".to_owned(), args, variables: Vec::new() }
}

fn pre_deploy(url: &str, key: &str, job: &str) -> Script {
    let sample = shown("compose", url, key, job);
    Script::shell(&sample.text).with(&sample)
}

/// The lines of the `script:` of the pipeline, as its runner would run them; what is to be installed is.
fn gitlab(url: &str, key: &str, job: &str) -> Script {
    let sample = shown("gitlab", url, key, job);
    let (_, script) = sample.text.split_once("  script:\n    - |\n").expect("a script");
    let lines: Vec<&str> =
        script.lines().map(|line| line.strip_prefix("      ").expect("a line of the script")).collect();
    Script { program: "sh".to_owned(), args: vec!["-ec".to_owned(), lines.join("\n")], variables: Vec::new() }
        .with(&sample)
}

/// The playbook with its three variables filled in.
fn ansible(url: &str, key: &str, job: &str) -> Script {
    let tools = std::env::var("DBACKUP_TOOLS").expect("DBACKUP_TOOLS is not set: run the tests with make test");
    let playbook = shown("ansible", url, key, job).text;
    let text = format!(
        "file=$(mktemp --suffix=.yml)\ntrap 'rm \"$file\"' EXIT\ncat >\"$file\" <<'PLAYBOOK'\n{playbook}PLAYBOOK\n\
         '{tools}/bin/ansible-playbook' \"$file\"\n"
    );
    let variables = vec![("ANSIBLE_HOME", std::env::temp_dir().join("dbackup-ansible").display().to_string())];
    Script { variables, ..Script::shell(&text) }
}

/// The `run:` blocks of the workflow, as its runner would run them: `bash -e`, with an output file between them.
fn github_steps(url: &str, key: &str, job: &str) -> Script {
    let sample = shown("github", url, key, job);
    let workflow = sample.text;
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
    let secrets: Vec<String> = sample.variables.iter().map(|(name, _)| format!("${{{{ secrets.{name} }}}}")).collect();
    assert_eq!(secrets[2], "${{ secrets.DBACKUP_JOB_ID }}");
    let values = [(secrets[0].as_str(), url, 1), (secrets[1].as_str(), key, 1)];
    let trigger = fill(steps[0].clone(), &[values[0], values[1], (secrets[2].as_str(), job, 1)]);
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

type Client = fn(&str, &str, &str) -> Script;

/// What a sample says at each end.
struct Words {
    success: &'static str,
    failure: &'static str,
    /// Whether it shows the error, too.
    shows_error: bool,
}

async fn sample_follows_a_run_to_each_of_its_ends(sample: Client, words: Words) {
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
async fn the_command_line_follows_a_run_to_its_success_failure_and_cancel() {
    let words = Words { success: "Status: Success", failure: "Backup failed: ", shows_error: true };
    sample_follows_a_run_to_each_of_its_ends(by_dbackup, words).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_script_follows_a_run_to_its_success_failure_and_cancel() {
    let words = Words { success: "Status: Success", failure: "Backup failed: ", shows_error: true };
    sample_follows_a_run_to_each_of_its_ends(python, words).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_job_of_the_pipeline_follows_a_run_to_its_success_failure_and_cancel() {
    let words = Words { success: "Status: Success", failure: "Backup failed: ", shows_error: true };
    sample_follows_a_run_to_each_of_its_ends(gitlab, words).await;
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
