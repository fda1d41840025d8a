//! `dbackup status`: the cluster at a glance, from its database.

use std::{collections::BTreeMap, fmt::Write, path::PathBuf};

use common::{
    cluster::{self, Cluster, HeldSlot},
    db::{ANSWER_TIMEOUT, StartError},
    worker::{Worker, WorkerState},
};
use serde_json::json;

use crate::instance::Instance;

/// Flags of `dbackup status`.
#[derive(clap::Args)]
pub struct StatusArgs {
    /// Print what GET /api/cluster answers under `data`, as JSON
    #[arg(long)]
    json: bool,
}

/// Prints the limit, the queue, the workers and every slot in use.
pub async fn run(data: Option<PathBuf>, args: StatusArgs) -> Result<(), StartError> {
    let instance = Instance::open(data)?;
    let look = async |conn: &mut sqlx::PgConnection| {
        let queue = cluster::queue(conn).await?;
        Cluster::look(conn, queue).await
    };
    let cluster = instance.db.within(ANSWER_TIMEOUT, look).await?;
    match args.json {
        true => println!("{:#}", json!(cluster)),
        false => print!("{}", table(&cluster)),
    }
    Ok(())
}

fn table(cluster: &Cluster) -> String {
    let mut text = String::new();
    let paused = if cluster.paused { ", paused: nothing is claimed" } else { "" };
    let _ = writeln!(text, "slots    {} of {} in use{paused}", cluster.slots_used, cluster.max_concurrent_jobs);
    let _ = writeln!(text, "queue    {}", queue(cluster));
    let workers: Vec<Vec<String>> = cluster.workers.iter().map(worker).collect();
    text += &aligned(
        "no workers",
        &["WORKER", "STATE", "SLOTS", "POOLS", "ENGINES", "VERSION", "HOST", "SINCE", "LAST SEEN"],
        &workers,
    );
    text += &out_of_reach(&cluster.workers);
    text += &aligned("no tools", &["TOOL", "VERSION", "PATH", "WORKERS"], &tools(&cluster.workers));
    let slots: Vec<Vec<String>> = cluster.slots.iter().map(slot).collect();
    text += &aligned("no runs", &["SLOT", "EXECUTION", "JOB", "WORKER", "STAGE", "PROGRESS", "AGE", "LEASE"], &slots);
    text
}

fn queue(cluster: &Cluster) -> String {
    let queue = &cluster.queue;
    let Some(oldest) = queue.oldest_wait_ms else { return "empty".to_owned() };
    let later = queue.pending - queue.due;
    let later = if later > 0 { format!(" ({later} of them for a retry)") } else { String::new() };
    let pools: Vec<String> = queue.pools.iter().map(|pool| format!("{} {}", pool.pool, pool.pending)).collect();
    format!("{} waiting{later}, the oldest for {}; by pool: {}", queue.pending, seconds(oldest), pools.join(", "))
}

fn worker(worker: &Worker) -> Vec<String> {
    let state = match worker.state {
        WorkerState::Active => "active",
        WorkerState::Draining => "draining",
        WorkerState::Stopped => "stopped",
        WorkerState::Gone => "gone",
    };
    let time = |at: chrono::DateTime<chrono::Utc>| at.format("%Y-%m-%d %H:%M:%S").to_string();
    vec![
        worker.name.clone(),
        if worker.cordoned { format!("{state}, cordoned") } else { state.to_owned() },
        format!("{}/{}", worker.slots.used, worker.slots.total),
        worker.pools.join(","),
        if worker.engines.is_empty() { "none".to_owned() } else { worker.engines.join(",") },
        worker.version.clone(),
        worker.host.clone(),
        time(worker.since),
        time(worker.last_seen_at),
    ]
}

/// What workers cannot serve; a line for each source or destination, so that it can be read whole.
fn out_of_reach(workers: &[Worker]) -> String {
    let mut text = String::new();
    for worker in workers {
        for (id, why) in worker.out_of_reach.iter() {
            let _ = write!(text, "\n{} leaves {id} to others: {}\n", worker.name, why.replace('\n', " "));
        }
    }
    text
}

/// Workers that have the same tool share a line, so that one that lags behind shows.
fn tools(workers: &[Worker]) -> Vec<Vec<String>> {
    let mut tools: BTreeMap<[&str; 3], Vec<&str>> = BTreeMap::new();
    for worker in workers {
        for tool in worker.tools.iter() {
            tools.entry([&tool.name, &tool.version, &tool.path]).or_default().push(&worker.name);
        }
    }
    let line = |(tool, workers): ([&str; 3], Vec<&str>)| {
        tool.into_iter().map(str::to_owned).chain([workers.join(",")]).collect()
    };
    tools.into_iter().map(line).collect()
}

fn slot(slot: &HeldSlot) -> Vec<String> {
    vec![
        slot.slot.to_string(),
        slot.execution_id.map(|id| id.to_string()).unwrap_or_default(),
        slot.job_name.clone().unwrap_or_default(),
        slot.worker.clone(),
        slot.stage.clone(),
        format!("{} %", slot.progress),
        seconds(slot.age_ms),
        if slot.expires_in_ms < 0 { "ran out".to_owned() } else { seconds(slot.expires_in_ms) },
    ]
}

fn seconds(ms: i64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}

/// Rows under their titles, each column as wide as its widest cell.
fn aligned(none: &str, titles: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return format!("\n{none}\n");
    }
    let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
    let lines = || std::iter::once(&titles).chain(rows);
    let width = |column: usize| lines().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let mut text = String::from("\n");
    for line in lines() {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}
