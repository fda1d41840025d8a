//! W3C trace context: how a trace comes in with a request and lies in the database with an execution.

use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{SpanContext, TraceContextExt},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// W3C trace context in the form of its two headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceContext {
    /// `traceparent`.
    pub traceparent: Option<String>,
    /// `tracestate`.
    pub tracestate: Option<String>,
}

impl TraceContext {
    /// The context of a span, to be stored or sent on; empty for one that is not valid.
    pub fn of(span: &SpanContext) -> Self {
        let mut context = Self::default();
        if span.is_valid() {
            let of_span = Context::new().with_remote_span_context(span.clone());
            TraceContextPropagator::new().inject_context(&of_span, &mut context);
            context.tracestate = context.tracestate.filter(|state| !state.is_empty());
        }
        context
    }

    /// The span it names. Malformed headers are ignored, as W3C asks: then it is not valid, and a span under it begins a
    /// new trace.
    pub fn span(&self) -> SpanContext {
        if self.traceparent.is_none() {
            return SpanContext::NONE;
        }
        TraceContextPropagator::new().extract_with_context(&Context::new(), self).span().span_context().clone()
    }

    /// The trace id in hex, from the stored `traceparent`.
    pub fn trace_id(&self) -> Option<&str> {
        self.traceparent.as_deref()?.split('-').nth(1).filter(|id| id.len() == 32)
    }
}

impl Extractor for TraceContext {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            TRACEPARENT => self.traceparent.as_deref(),
            TRACESTATE => self.tracestate.as_deref(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

impl Injector for TraceContext {
    fn set(&mut self, key: &str, value: String) {
        match key {
            TRACEPARENT => self.traceparent = Some(value),
            TRACESTATE => self.tracestate = Some(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_comes_back_as_it_was_stored_and_a_malformed_one_names_no_span() {
        let stored = TraceContext {
            traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned()),
            tracestate: Some("vendor=opaque,other=1".to_owned()),
        };
        let span = stored.span();
        assert!(span.is_sampled() && span.is_remote(), "{span:?}");
        assert_eq!(TraceContext::of(&span), stored);
        assert_eq!(stored.trace_id(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        for bad in ["", "00-x-y-01", "00-00000000000000000000000000000000-00f067aa0ba902b7-01"] {
            let bad = TraceContext { traceparent: Some(bad.to_owned()), tracestate: None };
            assert!(!bad.span().is_valid(), "{bad:?}");
        }
        assert_eq!(TraceContext::of(&SpanContext::NONE), TraceContext::default());
    }
}
