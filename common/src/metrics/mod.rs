//! What this process counts of itself, and the page on which Prometheus reads it.
//!
//! One for the process, as its log is: what is counted passes through many hands, and nothing is decided by it. Every
//! label is bounded: by this program's own words, by its routes, or by the number of jobs, pools, sources and
//! destinations. No label holds what a client or a tool said, nor the name of a database.

mod known;
mod page;

use std::{fmt::Write, sync::LazyLock, time::Duration};

use opentelemetry::trace::TraceId;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{
        exemplar::{CounterWithExemplar, HistogramWithExemplars},
        family::Family,
        gauge::Gauge,
    },
    registry::Registry,
};

pub use page::{MetricsArgs, Role, serve};
pub use prometheus_client::metrics::counter::Counter;

use crate::telemetry::{TraceContext, span::SpanContext};

/// Seconds of an answer: from a look into memory to the longest wait of a client.
const ANSWER_SECONDS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
/// Seconds of a claim: one round trip, which waits for the gate.
const CLAIM_SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// Seconds that a run waits: from a claim at once to a night.
const WAIT_SECONDS: [f64; 15] =
    [0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1_800.0, 3_600.0, 7_200.0, 14_400.0, 43_200.0];
/// Seconds that a run takes: from a small database to a day.
const RUN_SECONDS: [f64; 15] = [
    1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0, 7_200.0, 14_400.0, 28_800.0, 57_600.0, 86_400.0,
];

/// The trace of an observation, for its exemplar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EncodeLabelSet)]
pub struct Trace {
    trace_id: Hex,
}

/// Becomes text when somebody reads it: an observation is one of very many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hex(TraceId);

impl EncodeLabelValue for Hex {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> std::fmt::Result {
        write!(encoder, "{}", self.0)
    }
}

impl Trace {
    /// Of a span, if its trace is kept.
    pub fn of(span: &SpanContext) -> Option<Self> {
        (span.is_valid() && span.is_sampled()).then(|| Self { trace_id: Hex(span.trace_id()) })
    }

    /// Of a stored context, if its trace is kept.
    pub fn stored(trace: &TraceContext) -> Option<Self> {
        Self::of(&trace.span())
    }
}

/// A histogram of seconds, its buckets' newest observations with their traces.
type Seconds<L> = Family<L, HistogramWithExemplars<Trace>, fn() -> HistogramWithExemplars<Trace>>;

/// Of a request.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    method: &'static str,
    route: &'static str,
    status: u16,
}

/// Of an answer's time.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answering {
    method: &'static str,
    route: &'static str,
}

/// Of a decision of the rate limiter.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Decided {
    class: &'static str,
    place: &'static str,
    decision: &'static str,
}

/// One word of this program's own.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Got {
    result: &'static str,
}

/// A kind of notification.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// What is backed up.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Of {
    engine: &'static str,
}

/// An attempt's end.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    engine: &'static str,
    outcome: &'static str,
}

/// Where bytes go.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Stored {
    engine: &'static str,
    kind: &'static str,
    destination: String,
}

/// Everything that this process counts.
#[derive(Debug)]
pub struct Metrics {
    requests: Family<Answered, CounterWithExemplar<Trace>>,
    answers: Seconds<Answering>,
    decisions: Family<Decided, Counter>,
    /// 1 while the rate limits of all API processes together cannot be had.
    pub limiter_fallback: Gauge,
    notices_sent: Family<Kind, Counter>,
    notices_received: Family<Kind, Counter>,
    /// Notifications that could not be sent; the others find out at their next poll.
    pub notices_failed: Counter,
    rescues: Family<Got, Counter>,
    /// Runs that were not started in time, ended by this process.
    pub expired: Counter,
    claims: Seconds<Got>,
    /// Executions that this process has claimed.
    pub claimed: Counter,
    waits: Seconds<Of>,
    runs: Seconds<Ended>,
    restores: Seconds<Ended>,
    restored: Family<Of, Counter>,
    /// Runs that this process has now.
    pub running: Gauge,
    /// Runs that this process may have.
    pub concurrency: Gauge,
    /// Heartbeats that were answered.
    pub heartbeats: Counter,
    /// Heartbeats that failed, or were not answered in time.
    pub heartbeats_missed: Counter,
    /// Runs that stood still because no heartbeat was acknowledged.
    pub freezes: Counter,
    /// Runs whose lease this process lost.
    pub leases_lost: Counter,
    dumped: Family<Of, Counter>,
    stored: Family<Stored, Counter>,
    deliveries: Family<Got, Counter>,
    /// Log lines of runs that were left out: the database is slower than a tool's chatter.
    pub lines_dropped: Counter,
}

/// The metrics of this process.
pub fn get() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);
    &METRICS
}

impl Metrics {
    fn new() -> Self {
        let metrics = Self {
            requests: Family::default(),
            answers: Family::new_with_constructor(|| HistogramWithExemplars::new(ANSWER_SECONDS.into_iter())),
            decisions: Family::default(),
            limiter_fallback: Gauge::default(),
            notices_sent: Family::default(),
            notices_received: Family::default(),
            notices_failed: Counter::default(),
            rescues: Family::default(),
            expired: Counter::default(),
            claims: Family::new_with_constructor(|| HistogramWithExemplars::new(CLAIM_SECONDS.into_iter())),
            claimed: Counter::default(),
            waits: Family::new_with_constructor(|| HistogramWithExemplars::new(WAIT_SECONDS.into_iter())),
            runs: Family::new_with_constructor(|| HistogramWithExemplars::new(RUN_SECONDS.into_iter())),
            restores: Family::new_with_constructor(|| HistogramWithExemplars::new(RUN_SECONDS.into_iter())),
            restored: Family::default(),
            running: Gauge::default(),
            concurrency: Gauge::default(),
            heartbeats: Counter::default(),
            heartbeats_missed: Counter::default(),
            freezes: Counter::default(),
            leases_lost: Counter::default(),
            dumped: Family::default(),
            stored: Family::default(),
            deliveries: Family::default(),
            lines_dropped: Counter::default(),
        };
        // The first of its kind must be seen as an increase: a series that begins with 1 has none.
        for result in ["requeued", "closed"] {
            let _ = metrics.rescues.get_or_create(&Got { result });
        }
        for result in ["delivered", "failed", "given_up"] {
            let _ = metrics.deliveries.get_or_create(&Got { result });
        }
        metrics
    }

    /// An answer was sent. `route` is a path of the route table, never what the client wrote.
    pub fn answered(&self, method: &str, route: &'static str, status: u16, took: Duration, trace: Option<Trace>) {
        let method = known_method(method);
        let answered = Answered { method, route, status };
        self.requests.get_or_create(&answered).inc_by(1, trace, None);
        self.answers.get_or_create(&Answering { method, route }).observe(took.as_secs_f64(), trace, None);
    }

    /// The rate limiter decided; `place` is where the counters are.
    pub fn decided(&self, class: &'static str, place: &'static str, allowed: bool) {
        let decision = if allowed { "allowed" } else { "refused" };
        self.decisions.get_or_create(&Decided { class, place, decision }).inc();
    }

    /// A notification was sent.
    pub fn notice_sent(&self, kind: &'static str) {
        self.notices_sent.get_or_create(&Kind { kind }).inc();
    }

    /// A notification came, this process's own too.
    pub fn notice_received(&self, kind: &'static str) {
        self.notices_received.get_or_create(&Kind { kind }).inc();
    }

    /// This process took back a run whose worker was lost: it waits again, or is closed.
    pub fn rescued(&self, closed: bool) {
        self.rescues.get_or_create(&Got { result: if closed { "closed" } else { "requeued" } }).inc();
    }

    /// A claim was answered with so many executions.
    pub fn claimed(&self, count: usize, took: Duration) {
        let result = if count > 0 { "claimed" } else { "empty" };
        self.claims.get_or_create(&Got { result }).observe(took.as_secs_f64(), None, None);
        self.claimed.inc_by(count as u64);
    }

    /// A run began its first attempt after such a wait.
    pub fn waited(&self, engine: &'static str, wait: Duration, trace: Option<Trace>) {
        self.waits.get_or_create(&Of { engine }).observe(wait.as_secs_f64(), trace, None);
    }

    /// An attempt of a restore ended; `outcome` is a word of this program's own.
    pub fn restore_ended(&self, engine: &'static str, outcome: &'static str, took: Duration, trace: Option<Trace>) {
        self.restores.get_or_create(&Ended { engine, outcome }).observe(took.as_secs_f64(), trace, None);
    }

    /// Counts stored bytes of databases that were restored.
    pub fn restored(&self, engine: &'static str) -> Counter {
        self.restored.get_or_create_owned(&Of { engine })
    }

    /// An attempt of a backup ended; `outcome` is a word of this program's own.
    pub fn ended(&self, engine: &'static str, outcome: &'static str, took: Duration, trace: Option<Trace>) {
        self.runs.get_or_create(&Ended { engine, outcome }).observe(took.as_secs_f64(), trace, None);
    }

    /// Counts the bytes that a dump tool writes.
    pub fn dumped(&self, engine: &'static str) -> Counter {
        self.dumped.get_or_create_owned(&Of { engine })
    }

    /// Counts the bytes that go to a destination: its kind, and its slug.
    pub fn stored(&self, engine: &'static str, kind: &'static str, destination: &str) -> Counter {
        self.stored.get_or_create_owned(&Stored { engine, kind, destination: destination.to_owned() })
    }

    /// A webhook was told of the end of a run, or was not, or will not be any more.
    pub fn delivery(&self, result: &'static str) {
        self.deliveries.get_or_create(&Got { result }).inc();
    }

    fn register(&self, registry: &mut Registry, role: Role) {
        if role != Role::Worker {
            self.register_api(registry);
        }
        if role != Role::Api {
            self.register_worker(registry);
        }
        let sent = "Notifications that this process has sent to all processes, by kind";
        registry.register("notifications_sent", sent, self.notices_sent.clone());
        let received = "Notifications that this process has received, its own too, by kind";
        registry.register("notifications_received", received, self.notices_received.clone());
        let failed = "Notifications that could not be sent; the others find out at their next poll";
        registry.register("notifications_failed", failed, self.notices_failed.clone());
        let rescues = "Runs whose worker was lost, taken back by this process: requeued, or closed";
        registry.register("rescues", rescues, self.rescues.clone());
        let expired = "Runs that were not started within startWithinSeconds, ended by this process";
        registry.register("expired_runs", expired, self.expired.clone());
    }

    fn register_api(&self, registry: &mut Registry) {
        registry.register("http_requests", "Requests by method, route and status", self.requests.clone());
        let seconds = "Time until the head of the answer; a wait of the client is in it";
        registry.register("http_request_duration_seconds", seconds, self.answers.clone());
        let decisions = "Decisions of the rate limiter by class, by where the counters are (redis, or process for each process its own), and by what it said";
        registry.register("rate_limit_decisions", decisions, self.decisions.clone());
        let fallback = "1 while Redis is configured and away, so that this process limits by itself";
        registry.register("rate_limit_fallback", fallback, self.limiter_fallback.clone());
    }

    fn register_worker(&self, registry: &mut Registry) {
        registry.register(
            "claim_duration_seconds",
            "Round trip of a claim, by whether it got anything",
            self.claims.clone(),
        );
        registry.register("claimed_executions", "Executions that this process has claimed", self.claimed.clone());
        let waits = "Time from the trigger of a run to the claim of its first attempt";
        registry.register("run_wait_seconds", waits, self.waits.clone());
        let runs = "Time of an attempt from its claim to its recorded end, by outcome";
        registry.register("run_duration_seconds", runs, self.runs.clone());
        let restores = "Time of an attempt of a restore from its claim to its recorded end, by outcome";
        registry.register("restore_duration_seconds", restores, self.restores.clone());
        let restored = "Stored bytes of databases that were restored, by engine";
        registry.register("restored_bytes", restored, self.restored.clone());
        registry.register("worker_runs", "Runs that this process has now", self.running.clone());
        registry.register("worker_concurrency", "Runs that this process may have at once", self.concurrency.clone());
        registry.register("heartbeats", "Heartbeats that were answered", self.heartbeats.clone());
        let missed = "Heartbeats that failed or were not answered in time";
        registry.register("heartbeats_missed", missed, self.heartbeats_missed.clone());
        let freezes = "Runs that were made to stand still because no heartbeat was acknowledged";
        registry.register("run_freezes", freezes, self.freezes.clone());
        registry.register("leases_lost", "Runs whose lease this process has lost", self.leases_lost.clone());
        registry.register("dumped_bytes", "Bytes that the dump tools have written, by engine", self.dumped.clone());
        let stored = "Bytes that were sent to destinations, by engine and destination";
        registry.register("stored_bytes", stored, self.stored.clone());
        let deliveries = "Tries to tell a webhook of the end of a run, by what became of them: delivered, failed and tried again, or given up";
        registry.register("webhook_deliveries", deliveries, self.deliveries.clone());
        let dropped = "Log lines of runs that were left out because there were too many of them";
        registry.register("run_log_lines_dropped", dropped, self.lines_dropped.clone());
    }
}

/// A client may write any word.
fn known_method(method: &str) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    KNOWN.into_iter().find(|known| *known == method).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_no_method_is_has_no_series_of_its_own() {
        assert_eq!((known_method("PATCH"), known_method("patch"), known_method("BREW")), ("PATCH", "other", "other"));
    }

    #[test]
    fn an_exemplar_names_a_trace_only_where_it_is_kept() {
        let stored = |flags: &str| {
            let traceparent = Some(format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}"));
            Trace::stored(&TraceContext { traceparent, tracestate: None })
        };
        let id = TraceId::from_hex("4bf92f3577b34da6a3ce929d0e0e4736").expect("an id");
        assert_eq!(stored("01"), Some(Trace { trace_id: Hex(id) }));
        assert_eq!((stored("00"), stored("nonsense"), Trace::stored(&TraceContext::default())), (None, None, None));
    }
}
