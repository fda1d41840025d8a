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

/// Length of one turn, and how many rounds of four the two take.
const TURN: Duration = Duration::from_millis(500);
const ROUNDS: usize = 101;
/// Triggers a second that tracing may cost: a twentieth.
const AIM: f64 = 0.95;

/// What came to the collector.
#[derive(Default)]
struct Came {
    spans: AtomicU64,
    bytes: AtomicU64,
}

/// A collector that is as light as can be, since it shares the machine with what is measured: threads that wait until a
/// whole body is there, and look into the first of a connection and every fiftieth after it to count the spans by.
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
    let (mut head, mut body, mut each, mut number) = (vec![0; 4 << 10], Vec::new(), 0, 0_u32);
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
        let look = number.is_multiple_of(50);
        let flags = if look { MsgFlags::MSG_WAITALL } else { MsgFlags::MSG_WAITALL | MsgFlags::MSG_TRUNC };
        body.resize(length, 0);
        assert_eq!(receive(stream, &mut body, flags), length, "a whole body");
        if look {
            let request = ExportTraceServiceRequest::decode(&body[..]).expect("OTLP");
            let spans: usize = request.resource_spans.iter().flat_map(|r| &r.scope_spans).map(|s| s.spans.len()).sum();
            each = length / spans.max(1);
        }
        number += 1;
        came.bytes.fetch_add(length as u64, Ordering::Relaxed);
        came.spans.fetch_add((length / each.max(1)) as u64, Ordering::Relaxed);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").expect("answers");
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut report = Report::new(
        "What tracing costs",
        &format!(
            "One API process exports nothing, another samples every request and exports it over OTLP (HTTP, protobuf) to a \
         collector on the same machine. In each of {ROUNDS} rounds on one database the one, the other twice, and the one again \
         take {} s each; the ratio is that of a round. A trigger makes four spans: the request, auth, rate limit, enqueue.",
            TURN.as_secs_f64()
        ),
    );
    let (endpoint, came) = collector();
    let mut cluster = Cluster::build().workers(1).limit(0).start().await;
    let job = with_job(&cluster).await;
    cluster.workers.clear();
    cluster.apis.truncate(1);
    cluster.set_env("OTEL_EXPORTER_OTLP_ENDPOINT", Some(&endpoint));
    cluster.add_api().await;
    lift_caps(&cluster).await;
    let trigger = request(&cluster, "POST", &format!("/api/jobs/{job}/run"));
    // The first of each is slower: connections, caches, the first pages of the tables.
    for api in 0..2 {
        rate(cluster.url(api), &trigger, Duration::from_secs(1)).await;
    }
    let (mut without, mut traced, mut ratios, mut triggers) = (Vec::new(), Vec::new(), Vec::new(), 0.0);
    for round in 0..ROUNDS {
        let rates = turns::round(round, async |api| rate(cluster.url(api), &trigger, TURN).await).await;
        forget_pending(&cluster).await;
        triggers += rates[1] * 2.0 * TURN.as_secs_f64();
        ratios.push(rates[1] / rates[0]);
        without.push(rates[0]);
        traced.push(rates[1]);
    }
    report.line(format!("| triggers/s, {CLIENTS} connections | without | every one traced | ratio |"));
    report.line("| --- | ---: | ---: | ---: |");
    for (name, at) in [("a quarter of the rounds below", 1), ("median", 2), ("a quarter above", 3)] {
        let [without, traced, ratio] = [&mut without, &mut traced, &mut ratios].map(|values| quartile(values, at));
        report.line(format!("| {name} | {without:.0} | {traced:.0} | {ratio:.3} |"));
    }
    let ratio = quartile(&mut ratios, 2);
    let (spans, bytes) = (came.spans.load(Ordering::Relaxed), came.bytes.load(Ordering::Relaxed));
    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    let (each, size) = (spans as f64 / triggers, bytes as f64 / spans.max(1) as f64);
    report.line("");
    report.line(format!(
        "Median of the ratios: {ratio:.3} (aim: at least {AIM:.2}). The collector took {each:.1} spans of {size:.0} bytes for each trigger."
    ));
    report.write();
    if ratio >= AIM { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
