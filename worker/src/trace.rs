//! The spans of an attempt, as its worker makes them: see [`common::telemetry::attempt`] for their shape.

use std::time::{Instant, SystemTime};

use common::{
    execution::{
        Outcome,
        claim::{Briefing, Claim},
        finish::{Ending, Failure, Finished},
    },
    telemetry::{
        Span, TraceContext,
        attempt::{Attempt, Closing, Waited},
        span::{self, KeyValue, SpanContext, SpanKind},
    },
};

use crate::failure::RunError;

/// The trace of an attempt.
#[derive(Debug)]
pub struct RunTrace {
    attempt: Attempt,
    /// By the clock of this process.
    claimed: SystemTime,
    claim: SpanContext,
    /// Where lines about the run are told: it puts execution and trace into them.
    log: tracing::Span,
}

impl RunTrace {
    /// Of a claim that was sent at `sent`; writes the wait that it ended and the claim itself.
    pub fn begin(claim: Claim, worker: &str, briefing: &Briefing, sent: Instant) -> Self {
        let attempt = Attempt::new(claim, worker, &briefing.trace);
        let claimed = span::now().checked_sub(sent.elapsed()).unwrap_or_else(span::now);
        let waited = Waited { since: briefing.queued_at.into(), until: briefing.claimed_at.into() };
        attempt.begin(&briefing.pool, waited, claimed, briefing.previous);
        Self { claim: attempt.claim_span(), claimed, log: log_span(claim, worker, &briefing.trace), attempt }
    }

    /// A span of the attempt, under the claim.
    pub fn span(&self, kind: SpanKind, name: &'static str) -> Span {
        Span::child(&self.claim, kind, name)
    }

    /// See [`RunTrace::begin`].
    pub fn log(&self) -> &tracing::Span {
        &self.log
    }

    /// Writes the closing span, when the end was recorded. When it was not, somebody else takes the run back, and writes
    /// it.
    pub fn close(&self, ending: &Ending, finished: Option<Finished>) {
        let over = match finished {
            Some(Finished::Ended) => true,
            Some(Finished::Requeued) => false,
            Some(Finished::Zombie) | None => return,
        };
        let failed = |failure: &Failure| {
            let attributes = vec![KeyValue::new("dbackup.stage", failure.stage.as_str())];
            (Some((failure.code.to_owned(), failure.error.clone())), attributes)
        };
        let (error, attributes) = match ending {
            Ending::Success(published) => (None, vec![KeyValue::new("dbackup.bytes", published.size_bytes)]),
            Ending::Restored(restored) => (None, vec![KeyValue::new("dbackup.bytes", restored.size_bytes)]),
            Ending::Failed(failure) | Ending::Retry(failure, _) => failed(failure),
            Ending::Released => (None, Vec::new()),
        };
        let outcome = ended_as(ending, over);
        self.attempt.close(Closing { from: self.claimed, to: span::now(), outcome, error, attributes });
    }
}

fn log_span(claim: Claim, worker: &str, trace: &TraceContext) -> tracing::Span {
    let (execution, trace_id) = (claim.execution, trace.trace_id());
    tracing::info_span!("run", %execution, trace_id, attempt = claim.attempt, worker)
}

/// What became of an attempt, in a word, for its span and the log; `over` where the run ended with it.
pub fn ended_as(ending: &Ending, over: bool) -> &'static str {
    match ending {
        Ending::Success(_) | Ending::Restored(_) => "success",
        Ending::Failed(failure) => match failure.outcome {
            Some(Outcome::Cancelled) => "cancelled",
            Some(Outcome::TimedOut) => "timed_out",
            _ => "failed",
        },
        Ending::Retry(..) if over => "failed",
        Ending::Retry(..) => "retry",
        Ending::Released if over => "cancelled",
        Ending::Released => "released",
    }
}

/// Marks a span as failed where its work did.
pub fn noted<T>(span: &mut Span, done: Result<T, RunError>) -> Result<T, RunError> {
    if let Err(error) = &done {
        span.fail(error.code, error.message.clone());
    }
    done
}
