//! The log of a run: lines are gathered and written in batches while it goes on.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use common::{
    db::Db,
    execution::{
        claim::Claim,
        log::{Level, NewLine, append},
    },
    metrics,
    telemetry::{Span, attempt::claim_span_id},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::lease::{Lease, Stop};

/// Lines are readable at most this late.
const GATHER: Duration = Duration::from_millis(300);
/// Lines in one statement.
const BATCH: usize = 200;
/// Lines of one attempt; what a tool says beyond is counted, not kept.
const MOST_LINES: usize = 5_000;

/// What writes a log.
pub struct Writer {
    task: JoinHandle<()>,
    over: CancellationToken,
}

impl Writer {
    /// Waits until everything is written that was told so far. Whoever has a [`RunLog`] still tells nobody from now on: a
    /// process that a tool has left behind may hold its standard error open, and so the log, for ever.
    pub async fn end(self) {
        self.over.cancel();
        let _ = self.task.await;
    }
}

/// Writes lines of one run.
#[derive(Clone, Debug)]
pub struct RunLog {
    lease: Arc<Lease>,
    lines: mpsc::Sender<NewLine>,
    /// Of what is being done, in hex.
    span_id: String,
}

impl RunLog {
    /// Starts the writing task.
    pub fn start(db: Db, lease: Arc<Lease>) -> (Self, Writer) {
        let (lines, receiver) = mpsc::channel(1024);
        let over = CancellationToken::new();
        let task = tokio::spawn(write(db, lease.clone(), receiver, over.clone()));
        let span_id = claim_span_id(lease.claim.execution, lease.claim.token).to_string();
        (Self { lease, lines, span_id }, Writer { task, over })
    }

    /// A log that nobody writes.
    #[cfg(test)]
    pub fn unheard(lease: Arc<Lease>) -> Self {
        Self { lease, lines: mpsc::channel(1).0, span_id: String::new() }
    }

    /// The same log, for lines that are told within a span.
    #[must_use]
    pub fn within(&self, span: &Span) -> Self {
        match span.context() {
            context if context.is_valid() => Self { span_id: context.span_id().to_string(), ..self.clone() },
            _ => self.clone(),
        }
    }

    /// The claim whose log this is.
    pub fn claim(&self) -> Claim {
        self.lease.claim
    }

    /// A line at the run's stage.
    pub fn line(&self, level: Level, message: impl Into<String>) {
        self.with_details(level, message, None);
    }

    /// A line with longer text.
    pub fn with_details(&self, level: Level, message: impl Into<String>, details: Option<String>) {
        let message = message.into();
        tracing::debug!(parent: &self.lease.log(), execution = %self.lease.claim.execution, level = level.as_str(), "{message}");
        #[expect(clippy::disallowed_methods, reason = "a line of the log decides nothing, and asks no database")]
        let at = Utc::now();
        // A full channel means the database is slower than the tool's chatter: the run does not wait for its log.
        let span_id = self.span_id.clone();
        let line = NewLine { at, level, stage: self.lease.stage(), message, details, span_id };
        if self.lines.try_send(line).is_err() {
            metrics::get().lines_dropped.inc();
        }
    }

    /// What happens.
    pub fn info(&self, message: impl Into<String>) {
        self.line(Level::Info, message);
    }

    /// What somebody should look at.
    pub fn warn(&self, message: impl Into<String>) {
        self.line(Level::Warning, message);
    }
}

async fn write(db: Db, lease: Arc<Lease>, mut receiver: mpsc::Receiver<NewLine>, over: CancellationToken) {
    let mut batch = Vec::new();
    let mut written = 0;
    let mut open = true;
    while open {
        match over.run_until_cancelled(receiver.recv_many(&mut batch, BATCH)).await {
            Some(0) => break,
            Some(_) => open = gather(&mut receiver, &mut batch, &over).await,
            // What was told until now is still there to be received.
            None => {
                receiver.close();
                open = receiver.recv_many(&mut batch, BATCH).await > 0;
            }
        }
        let room = MOST_LINES.saturating_sub(written);
        if batch.len() > room {
            let before = batch.len();
            batch.retain(|line| matches!(line.level, Level::Error | Level::Success));
            metrics::get().lines_dropped.inc_by((before - batch.len()) as u64);
        }
        if !batch.is_empty() {
            store(&db, &lease, &batch).await;
        }
        written += batch.len();
        batch.clear();
    }
}

/// Adds what comes within [`GATHER`]; `false` when nothing more will come.
async fn gather(receiver: &mut mpsc::Receiver<NewLine>, batch: &mut Vec<NewLine>, over: &CancellationToken) -> bool {
    let until = tokio::time::Instant::now() + GATHER;
    while batch.len() < BATCH {
        let room = BATCH - batch.len();
        let more = over.run_until_cancelled(receiver.recv_many(batch, room));
        match tokio::time::timeout_at(until, more).await {
            Ok(Some(0)) => return false,
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return true,
        }
    }
    true
}

/// Writes a batch. While the database is away it is kept: the lines of an outage are worth the most.
async fn store(db: &Db, lease: &Lease, batch: &[NewLine]) {
    let claim = lease.claim;
    let mut pause = GATHER;
    while lease.stop_reason() != Some(Stop::Lost) {
        match db.within(Duration::from_secs(5), async |conn| append(conn, claim.token, batch).await).await {
            // Not taken: another worker has the run, and its log is not ours to write.
            Ok(_) => return,
            Err(error) if error.is_passing() => {
                tracing::debug!(parent: &lease.log(), execution = %claim.execution, error = %common::error::Chain(&error), "log lines wait for the database");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
            Err(error) => {
                tracing::warn!(parent: &lease.log(), execution = %claim.execution, error = %common::error::Chain(&error), "log lines could not be written");
                return;
            }
        }
    }
}
