//! What tracing costs: triggers through an API process that samples and exports every one, beside one that exports nothing,
//! in turn on one database.

#![allow(clippy::disallowed_methods, reason = "it looks into the database")]

#[path = "../tests/e2e/harness/mod.rs"]
#[allow(dead_code)]
mod harness;
#[allow(dead_code)]
mod load;
#[allow(dead_code)]
mod report;
mod turns;

use std::{
    io::Write,
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use harness::{Cluster, history::with_job};
use load::{CLIENTS, forget_pending, lift_caps, rate, request};
use nix::sys::socket::{MsgFlags, recv};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use report::Report;
use turns::quartile;

/// Length of one turn; how many pairs of processes there are one after the other, since how a process falls out (its memory,
/// its connections) is worth more than what is looked for; and how many rounds of four turns each pair takes.
const TURN: Duration = Duration::from_millis(500);
const PAIRS: usize = 10;
const ROUNDS: usize = 10;
/// Of how many batches the collector looks into one.
const LOOK: u32 = 500;
/// Triggers a second that tracing may cost: a twentieth.
const AIM: f64 = 0.95;

/// What came to the collector.
#[derive(Default)]
struct Came {
    bytes: AtomicU64,
    /// Bytes and spans of what it has looked into.
    looked_bytes: AtomicU64,
    looked_spans: AtomicU64,
}

/// A collector that is as light as can be, since it shares the machine with what is measured: threads that wait until a
/// whole body is there, and look into one of five hundred.
fn collector() -> (String, Arc<Came>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let came = Arc::new(Came::default());
    let counting = came.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let counting = counting.clone();
            std::thread::spawn(move || take(&stream, &counting));
        }
    });
    (endpoint, came)
}

/// Reads what is there, or with `MSG_WAITALL` as much as there is room for; how much came, 0 at the end.
fn receive(stream: &TcpStream, into: &mut [u8], flags: MsgFlags) -> usize {
    recv(stream.as_raw_fd(), into, flags).unwrap_or(0)
}

fn take(mut stream: &TcpStream, came: &Came) {
    let (mut head, mut body, mut number) = (vec![0; 4 << 10], Vec::new(), 0_u32);
    loop {
        // The exporter writes the head first: it is looked at, and then taken, so that the body is read in one piece.
        let end = loop {
            let there = receive(stream, &mut head, MsgFlags::MSG_PEEK);
            if there == 0 {
                return;
            }
            if let Some(at) = memchr::memmem::find(&head[..there], b"\r\n\r\n") {
                break at + 4;
            }
        };
        receive(stream, &mut head[..end], MsgFlags::MSG_WAITALL);
        let text = std::str::from_utf8(&head[..end]).expect("text").to_ascii_lowercase();
        let length = text.split("\r\n").find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
        let length: usize = length.parse().expect("a length");
        // The bodies that are not looked into stay where they are: the kernel need not copy them to let go of them.
        let look = number % LOOK == 1;
        let flags = if look { MsgFlags::MSG_WAITALL } else { MsgFlags::MSG_WAITALL | MsgFlags::MSG_TRUNC };
        body.resize(length, 0);
        assert_eq!(receive(stream, &mut body, flags), length, "a whole body");
        if look {
            let request = ExportTraceServiceRequest::decode(&body[..]).expect("OTLP");
            let spans: usize = request.resource_spans.iter().flat_map(|r| &r.scope_spans).map(|s| s.spans.len()).sum();
            came.looked_bytes.fetch_add(length as u64, Ordering::Relaxed);
            came.looked_spans.fetch_add(spans as u64, Ordering::Relaxed);
        }
        number += 1;
        came.bytes.fetch_add(length as u64, Ordering::Relaxed);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").expect("answers");
    }
}

/// Two API processes, the one that exports nothing and the one that is traced, in place of those there are.
async fn fresh_pair(cluster: &mut Cluster, endpoint: &str, traced_first: bool) -> [String; 2] {
    cluster.apis.clear();
    for traced in [traced_first, !traced_first] {
        cluster.set_env("OTEL_EXPORTER_OTLP_ENDPOINT", traced.then_some(endpoint));
        cluster.add_api().await;
    }
    [usize::from(traced_first), usize::from(!traced_first)].map(|at| cluster.url(at).to_owned())
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut report = Report::new(
        "What tracing costs",
        &format!(
            "One API process exports nothing, another samples every request and exports it over OTLP (HTTP, protobuf) to a \
         collector on the same machine. In each of {ROUNDS} rounds on one database the one, the other twice, and the one again \
         take {} s each; the ratio is that of a round. {PAIRS} pairs of processes do so one after the other. A trigger makes \
         four spans: the request, auth, rate limit, enqueue.",
            TURN.as_secs_f64()
        ),
    );
    let (endpoint, came) = collector();
    let mut cluster = Cluster::build().workers(1).limit(0).start().await;
    let job = with_job(&cluster).await;
    cluster.workers.clear();
    lift_caps(&cluster).await;
    let trigger = request(&cluster, "POST", &format!("/api/jobs/{job}/run"));
    let (mut without, mut traced, mut ratios, mut pairs) = (vec![], vec![], vec![], vec![]);
    let (mut triggers, mut bytes) = (0.0, 0);
    for pair in 0..PAIRS {
        let urls = fresh_pair(&mut cluster, &endpoint, pair % 2 == 0).await;
        let mut of_pair = Vec::new();
        // The first of each is slower: connections, caches, the first pages of the tables.
        for url in &urls {
            rate(url, &trigger, Duration::from_secs(1)).await;
        }
        let before = came.bytes.load(Ordering::Relaxed);
        for round in 0..ROUNDS {
            let rates = turns::round(round, async |which| rate(&urls[which], &trigger, TURN).await).await;
            forget_pending(&cluster).await;
            triggers += rates[1] * 2.0 * TURN.as_secs_f64();
            of_pair.push(rates[1] / rates[0]);
            without.push(rates[0]);
            traced.push(rates[1]);
        }
        bytes += came.bytes.load(Ordering::Relaxed) - before;
        pairs.push(quartile(&mut of_pair.clone(), 2));
        ratios.append(&mut of_pair);
    }
    report.line(format!("| triggers/s, {CLIENTS} connections | without | every one traced | ratio |"));
    report.line("| --- | ---: | ---: | ---: |");
    for (name, at) in [("a quarter of the rounds below", 1), ("median", 2), ("a quarter above", 3)] {
        let [without, traced, ratio] = [&mut without, &mut traced, &mut ratios].map(|values| quartile(values, at));
        report.line(format!("| {name} | {without:.0} | {traced:.0} | {ratio:.3} |"));
    }
    let ratio = quartile(&mut ratios, 2);
    let looked = [&came.looked_bytes, &came.looked_spans].map(|n| n.load(Ordering::Relaxed));
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    let (size, bytes) = (looked[0] as f64 / looked[1].max(1) as f64, bytes as f64);
    let each = bytes / size / triggers;
    report.line("");
    report.line(format!(
        "Median of the ratios: {ratio:.3} (aim: at least {AIM:.2}); of a pair alone from {:.3} to {:.3}. The collector took \
         {each:.1} spans of {size:.0} bytes for each trigger.",
        quartile(&mut pairs, 0),
        quartile(&mut pairs, 4),
    ));
    report.write();
    if ratio >= AIM { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
