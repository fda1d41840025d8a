//! Logs and traces of a process.
//!
//! The log is written through `tracing`. Spans are made by OpenTelemetry's own API ([`span`]) and not from those of
//! `tracing`: the parent of a run's spans comes from the database, others must be able to name a claim's span
//! ([`attempt`]), and a lost worker's last span is written by somebody else. So the spans of `tracing` are there for the
//! log alone: they put trace and execution into every line.

pub mod attempt;
mod context;
mod export;
mod plan;
pub mod span;

pub use context::TraceContext;
pub use span::Span;

use std::{
    io::{self, BufWriter, Stderr, Write, stderr},
    time::Duration,
};

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

use self::plan::Plan;
use crate::config::ConfigError;

/// Longest time that a process which stops waits for its last spans to be taken. A collector that is slow or away must
/// not keep it from stopping.
pub const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Lines of the log that wait for whoever reads it, at most; more are dropped. What reads a log may stand still, on a disk
/// that is full or a machine that is busy, and neither a request nor a heartbeat may wait for it.
const WAITING_LINES: usize = 16_384;

/// Time after which what was logged meanwhile is written.
const LINES_GATHER: Duration = Duration::from_millis(2);

/// Writes what came together, the first line at once, and then waits a moment for more. Without that the thread that writes
/// wakes for each line, and looks in vain for the next.
struct Gathering(BufWriter<Stderr>);

impl Write for Gathering {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.0.write(lines)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        std::thread::sleep(LINES_GATHER);
        Ok(())
    }
}

/// Flushes what is left when the process ends.
pub struct Telemetry(WorkerGuard);

impl Telemetry {
    /// Starts logging and tracing. `RUST_LOG` filters the log (default `info`), `DBACKUP_LOG_FORMAT` is `text`
    /// or `json`. Traces are configured by the `OTEL_*` variables, and exported only where those name a collector.
    /// `service` is the `service.name` unless `OTEL_SERVICE_NAME` is set. To be called on the process's runtime.
    pub fn start(service: &'static str) -> Result<Self, ConfigError> {
        let plan = Plan::from_env(service)?;
        let filter = match std::env::var("RUST_LOG") {
            Ok(text) => EnvFilter::try_new(&text).map_err(|e| ConfigError(format!("RUST_LOG: {e}")))?,
            // PostgreSQL's notices ("already exists, skipping") are news to nobody.
            Err(_) => EnvFilter::new("info,sqlx::postgres::notice=warn"),
        };
        let (writer, guard) = NonBlockingBuilder::default()
            .buffered_lines_limit(WAITING_LINES)
            .finish(Gathering(BufWriter::with_capacity(64 << 10, stderr())));
        let log = tracing_subscriber::fmt::layer().with_writer(writer);
        let log = match std::env::var("DBACKUP_LOG_FORMAT").as_deref() {
            // The list of spans would repeat the current one in every line.
            Ok("json") => log.json().with_span_list(false).boxed(),
            Ok("text") | Err(_) => {
                log.with_target(false).with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed()
            }
            Ok(other) => return Err(ConfigError(format!("DBACKUP_LOG_FORMAT is '{other}' but must be text or json"))),
        };
        // The filter of everything, as there is one layer: one of a layer's own costs each line, and each poll of a request.
        tracing_subscriber::registry()
            .with(filter)
            .with(log)
            .try_init()
            .map_err(|e| ConfigError(format!("logging could not start: {e}")))?;
        span::start(plan)?;
        Ok(Self(guard))
    }

    /// Sends what is left, for at most [`STOP_PATIENCE`], and writes the last lines of the log, for at most a second.
    pub async fn stop(self) {
        let flush = move || {
            span::stop();
            drop(self.0);
        };
        let _ = tokio::task::spawn_blocking(flush).await;
    }
}
