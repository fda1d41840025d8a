//! A dump of a large database by a worker, beside the same by hand: `pg_dump -Fc -Z0 | zstd -3`. Both in one run on
//! one PostgreSQL, so that the ratios hold on any machine; then both encrypted. `DBACKUP_BENCH_MB` sets the size, 2048 by
//! default.

#![allow(clippy::disallowed_methods, reason = "it starts the tools by hand")]

#[path = "../tests/e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;
mod report;

use std::{
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use harness::{Cluster, Process, postgres_url, source::PostgresSource, sql};
use nix::sys::resource::{UsageWho, getrusage};
use report::Report;
use serde_json::json;

/// The promise: a worker's peak with one run.
const MOST_MEMORY_MIB: f64 = 96.0;

struct Measured {
    wall: f64,
    cpu: f64,
    stored_mib: f64,
}

/// CPU seconds of a process and of its children that ended.
fn cpu_of(process: &Process) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).expect("it runs");
    let fields: Vec<f64> =
        stat.rsplit_once(") ").expect("stat").1.split(' ').map(|f| f.parse().unwrap_or(0.0)).collect();
    // utime, stime, cutime, cstime in clock ticks, of which Linux has 100 a second.
    fields[11..15].iter().sum::<f64>() / 100.0
}

fn peak_mib(process: &Process) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("it runs");
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

fn by_hand(source: &PostgresSource, file: &std::path::Path, recipient: Option<&str>) -> Measured {
    let children = || {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("answers");
        let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
        seconds(usage.user_time()) + seconds(usage.system_time())
    };
    let (began, cpu) = (Instant::now(), children());
    let encrypt = recipient.map(|recipient| format!(" | age -r {recipient}")).unwrap_or_default();
    let script = format!(
        "pg_dump -Fc -Z0 '{}' | zstd -q -3{encrypt} > '{}' && sync '{1}'",
        postgres_url(&source.database),
        file.display()
    );
    assert!(Command::new("bash").args(["-o", "pipefail", "-c", &script]).status().expect("bash runs").success());
    let stored = std::fs::metadata(file).expect("a file").len() as f64 / f64::from(1 << 20);
    Measured { wall: began.elapsed().as_secs_f64(), cpu: children() - cpu, stored_mib: stored }
}

async fn by_worker(cluster: &Cluster, job: &str) -> Measured {
    let cpu = cpu_of(&cluster.workers[0]);
    let ended = cluster.ended(&cluster.trigger(job).await, Duration::from_secs(1800)).await;
    assert_eq!(ended["status"], "Success", "{ended:#}");
    Measured {
        wall: ended["duration"].as_f64().expect("a duration") / 1000.0,
        cpu: cpu_of(&cluster.workers[0]) - cpu,
        stored_mib: ended["size"].as_f64().expect("a size") / f64::from(1 << 20),
    }
}

/// Of a new identity, which nobody keeps.
fn recipient() -> String {
    let output =
        Command::new("bash").args(["-c", "age-keygen 2>/dev/null | age-keygen -y"]).output().expect("bash runs");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

#[tokio::main]
async fn main() -> ExitCode {
    let megabytes: u32 = std::env::var("DBACKUP_BENCH_MB").map_or(2048, |v| v.parse().expect("a number"));
    let cluster = Cluster::build().workers(1).real_times().start().await;
    let source = PostgresSource::empty().await;
    // Half noise, half text: it compresses about as real tables do. 1 KiB a row.
    sql(
        &source.database,
        &format!(
            "create unlogged table item as
         select i as id, repeat('order ' || i % 1000 || ' of the shop; ', 16) as note,
                (select string_agg(md5((i * 31 + k)::text), '') from generate_series(1, 18) k) as noise
           from generate_series(1, {megabytes} * 1024) i;
         alter table item owner to {}",
            source.role
        ),
    )
    .await;
    let (destination, _) = cluster.local_destination().await;
    let held = cluster.source("postgres", source.config()).await;
    let job = cluster.job(&held, &[&destination], json!({})).await;
    let recipient = recipient();
    let encryption = json!({ "encryption": { "recipients": [recipient] } });
    let encrypted = cluster.job(&held, &[&destination], encryption).await;

    let mut report = Report::new(
        "A dump of a large database",
        &format!(
            "{megabytes} MiB, half text and half noise, dumped by a worker to a local folder and by hand \
             (`pg_dump -Fc -Z0 | zstd -3`), in turn, three times; and the same encrypted (`| age -r`)."
        ),
    );
    report.line("| run | wall s | CPU s | stored MiB | MiB/s of the dump |");
    report.line("| --- | ---: | ---: | ---: | ---: |");
    let (mut worker, mut hand, mut worker_age, mut hand_age) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // In turn, so that a cache that warms up favours neither.
    for round in 1..=3 {
        let file = cluster.scratch.join("by-hand.zst");
        for (name, measured, all) in [
            ("pg_dump, zstd by hand", by_hand(&source, &file, None), &mut hand),
            ("worker", by_worker(&cluster, &job).await, &mut worker),
            ("pg_dump, zstd, age by hand", by_hand(&source, &file, Some(&recipient)), &mut hand_age),
            ("worker, encrypted", by_worker(&cluster, &encrypted).await, &mut worker_age),
        ] {
            report.line(format!(
                "| {name}, round {round} | {:.1} | {:.1} | {:.0} | {:.0} |",
                measured.wall,
                measured.cpu,
                measured.stored_mib,
                f64::from(megabytes) / measured.wall
            ));
            all.push(measured);
        }
    }
    let median = |all: &[Measured], of: fn(&Measured) -> f64| {
        let mut values: Vec<f64> = all.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let ratio = |one: &[Measured], other: &[Measured], of: fn(&Measured) -> f64| median(one, of) / median(other, of);
    let peak = peak_mib(&cluster.workers[0]);
    report.line("");
    report.line(format!(
        "Worker to by hand, medians: wall {:.2}, CPU {:.2}, stored {:.3}; encrypted: wall {:.2}, CPU {:.2}. Peak memory of the worker (VmHWM): {peak:.1} MiB, promised under {MOST_MEMORY_MIB} MiB.",
        ratio(&worker, &hand, |m| m.wall),
        ratio(&worker, &hand, |m| m.cpu),
        ratio(&worker, &hand, |m| m.stored_mib),
        ratio(&worker_age, &hand_age, |m| m.wall),
        ratio(&worker_age, &hand_age, |m| m.cpu)
    ));
    report.write();
    if peak < MOST_MEMORY_MIB { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
