//! The spans that frame an attempt of a run, which several processes write:
//!
//! ```text
//! enqueue                       the API process, or the worker whose scheduler fired
//! ├─ queue.wait                 who claimed, once that is over
//! ├─ claim                      who claimed; over and sent at once, the parent of all that the attempt does
//! │  ├─ inspect, dump, upload … who claimed
//! └─ attempt                    who ended it: the worker, or whoever took the run back when the worker was lost
//! ```
//!
//! A worker may die at any moment, and spans that are open then are never sent. So nothing that is sent has a parent that
//! could be missing: the stages hang on the claim, which was sent before them, and the rest on the span that the trigger
//! stored. The closing span hangs there too and only links to the claim: of a worker that died right after it claimed,
//! the claim's span may not have been sent.

use std::time::SystemTime;

use opentelemetry::{
    KeyValue,
    trace::{SpanContext, SpanId, SpanKind, TraceFlags},
};
use sha2::{Digest, Sha256};

use super::{
    TraceContext,
    span::{self, Past},
};
use crate::{
    execution::claim::{Claim, Token},
    id::ExecutionId,
};

/// The id of a claim's span: the first 8 bytes of the SHA-256 of the execution's id and the fencing token. Whoever knows
/// the two can name it: who takes a lost run back, and the claim after it. [`crate::execution::lease::rescue`] has it in
/// SQL.
pub fn claim_span_id(execution: ExecutionId, token: Token) -> SpanId {
    let digest = Sha256::new().chain_update(execution.0.as_bytes()).chain_update(token.0.to_be_bytes()).finalize();
    let mut id = [0; 8];
    id.copy_from_slice(&digest[..8]);
    // W3C knows no span of id zero.
    if id == [0; 8] { SpanId::from_bytes([0, 0, 0, 0, 0, 0, 0, 1]) } else { SpanId::from_bytes(id) }
}

/// An attempt, as its worker knows it, or whoever took it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Of which run.
    pub execution: ExecutionId,
    /// Its fencing token.
    pub token: Token,
    /// Which claim of the run.
    pub number: i32,
    /// Who claimed.
    pub worker: String,
    /// What the trigger stored.
    pub trace: TraceContext,
}

/// How long a run waited until it was claimed, by the database's clock.
#[derive(Clone, Copy, Debug)]
pub struct Waited {
    /// When it was queued, or queued again.
    pub since: SystemTime,
    /// When it was claimed.
    pub until: SystemTime,
}

/// How an attempt ended.
#[derive(Clone, Debug)]
pub struct Closing {
    /// When it began and when it ended, by one clock.
    pub from: SystemTime,
    /// See `from`.
    pub to: SystemTime,
    /// A stable word: `success`, `failed`, `retry`, `cancelled`, `timed_out`, `released`, `worker_lost`.
    pub outcome: &'static str,
    /// A stable word and a text, when it failed.
    pub error: Option<(String, String)>,
    /// What else is known.
    pub attributes: Vec<KeyValue>,
}

impl Attempt {
    /// Of a claim that this process holds.
    pub fn new(claim: Claim, worker: &str, trace: &TraceContext) -> Self {
        Self {
            execution: claim.execution,
            token: claim.token,
            number: claim.attempt,
            worker: worker.to_owned(),
            trace: trace.clone(),
        }
    }

    /// The claim's span, whoever asks; not valid when the run has no trace.
    pub fn claim_span(&self) -> SpanContext {
        self.span_of(self.token)
    }

    fn span_of(&self, token: Token) -> SpanContext {
        let parent = self.trace.span();
        if !parent.is_valid() {
            return SpanContext::NONE;
        }
        let flags = if parent.is_sampled() { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
        let id = claim_span_id(self.execution, token);
        SpanContext::new(parent.trace_id(), id, flags, true, parent.trace_state().clone())
    }

    fn attributes(&self) -> Vec<KeyValue> {
        vec![
            KeyValue::new("dbackup.execution.id", self.execution.to_string()),
            KeyValue::new("dbackup.attempt", i64::from(self.number)),
            KeyValue::new("dbackup.worker", self.worker.clone()),
        ]
    }

    /// Writes the wait that is over and the claim, which was sent at `claimed` by this process's clock, and has them
    /// sent. `previous` is the token of the attempt before.
    pub fn begin(&self, pool: &str, waited: Waited, claimed: SystemTime, previous: Option<Token>) {
        let parent = self.trace.span();
        if !parent.is_sampled() {
            return;
        }
        let mut attributes = self.attributes();
        attributes.extend([
            KeyValue::new("messaging.system", "dbackup"),
            KeyValue::new("messaging.operation.type", "receive"),
            KeyValue::new("messaging.operation.name", "claim"),
            KeyValue::new("messaging.destination.name", pool.to_owned()),
            KeyValue::new("messaging.message.id", self.execution.to_string()),
        ]);
        let wait = Past {
            kind: SpanKind::Internal,
            name: "queue.wait",
            from: waited.since,
            to: waited.until,
            id: None,
            attributes: self.attributes(),
            link: None,
            error: None,
        };
        wait.write(&parent);
        let claim = Past {
            kind: SpanKind::Consumer,
            name: "claim",
            from: claimed,
            to: span::now(),
            id: Some(claim_span_id(self.execution, self.token)),
            attributes,
            link: previous.map(|token| self.span_of(token)),
            error: None,
        };
        claim.write(&parent);
        span::flush_soon();
    }

    /// Writes the closing span.
    pub fn close(&self, closing: Closing) {
        let mut attributes = self.attributes();
        attributes.push(KeyValue::new("dbackup.outcome", closing.outcome));
        attributes.extend(closing.attributes);
        let attempt = Past {
            kind: SpanKind::Internal,
            name: "attempt",
            from: closing.from,
            to: closing.to,
            id: None,
            attributes,
            link: Some(self.claim_span()),
            error: closing.error,
        };
        attempt.write(&self.trace.span());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_span_of_a_claim_is_the_same_for_whoever_names_it_and_another_for_each_attempt() {
        let execution = ExecutionId("01932f1e-7c5d-7b3a-9a51-0c1f6f6f5d2e".parse().expect("a UUID"));
        let id = claim_span_id(execution, Token(7));
        // sha256 of the sixteen bytes of the id and 0000000000000007.
        assert_eq!(id.to_string(), "3fdf625bd9e42313");
        assert_ne!(id, claim_span_id(execution, Token(8)));
        assert_ne!(id, claim_span_id(ExecutionId::new(), Token(7)));
    }
}
