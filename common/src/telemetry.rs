//! Logs and traces of a process.
//!
//! Spans always have ids, so that every answer and execution has a trace id; they are exported over OTLP
//! (HTTP, protobuf) only when `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set.
//! The filter is per layer: one global filter would drop the spans that carry the context.

use std::collections::HashMap;

use opentelemetry::{
    propagation::TextMapPropagator,
    trace::{TraceContextExt, TracerProvider},
};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{EnvFilter, Layer, filter::LevelFilter, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::ConfigError;

/// Flushes what is left when the process ends.
pub struct Telemetry(SdkTracerProvider);

impl Telemetry {
    /// Starts logging and tracing. `RUST_LOG` filters the log (default `info`), `DBACKUP_LOG_FORMAT` is `text`
    /// or `json`.
    pub fn start(service: &'static str) -> Result<Self, ConfigError> {
        let mut provider =
            SdkTracerProvider::builder().with_resource(Resource::builder().with_service_name(service).build());
        let set = |name: &str| std::env::var(name).is_ok_and(|v| !v.is_empty());
        let disabled = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|v| v.eq_ignore_ascii_case("true"));
        if !disabled && (set("OTEL_EXPORTER_OTLP_ENDPOINT") || set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")) {
            for name in ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] {
                match std::env::var(name).as_deref() {
                    Ok("" | "http/protobuf") | Err(_) => {}
                    Ok(other) => {
                        return Err(ConfigError(format!(
                            "{name} is '{other}' but this version speaks http/protobuf only"
                        )));
                    }
                }
            }
            let exporter = opentelemetry_otlp::SpanExporter::builder()
                .with_http()
                .build()
                .map_err(|e| ConfigError(format!("OTEL_EXPORTER_OTLP_ENDPOINT: {e}")))?;
            provider = provider.with_batch_exporter(exporter);
        }
        let provider = provider.build();
        let filter = match std::env::var("RUST_LOG") {
            Ok(text) => EnvFilter::try_new(&text).map_err(|e| ConfigError(format!("RUST_LOG: {e}")))?,
            // PostgreSQL's notices ("already exists, skipping") are news to nobody.
            Err(_) => EnvFilter::new("info,sqlx::postgres::notice=warn"),
        };
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let log = match std::env::var("DBACKUP_LOG_FORMAT").as_deref() {
            Ok("json") => log.json().with_filter(filter).boxed(),
            Ok("text") | Err(_) => log
                .with_target(false)
                .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                .with_filter(filter)
                .boxed(),
            Ok(other) => return Err(ConfigError(format!("DBACKUP_LOG_FORMAT is '{other}' but must be text or json"))),
        };
        let traces = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("dbackup"))
            .with_location(false)
            .with_threads(false)
            // Both cost something at each poll of each request, and nothing here asks for the current context.
            .with_context_activation(false)
            .with_tracked_inactivity(false)
            .with_filter(LevelFilter::INFO);
        tracing_subscriber::registry()
            .with(traces)
            .with(log)
            .try_init()
            .map_err(|e| ConfigError(format!("logging could not start: {e}")))?;
        Ok(Self(provider))
    }

    /// Sends what is left; a collector that is away delays the end by a moment at most.
    pub async fn stop(self) {
        let _ = tokio::task::spawn_blocking(move || self.0.shutdown()).await;
    }
}

/// W3C trace context in the form of its two headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceContext {
    /// `traceparent`.
    pub traceparent: Option<String>,
    /// `tracestate`.
    pub tracestate: Option<String>,
}

impl TraceContext {
    /// The context of a span, to be stored or sent on.
    pub fn of(span: &Span) -> Self {
        let mut headers = HashMap::new();
        TraceContextPropagator::new().inject_context(&span.context(), &mut headers);
        Self {
            traceparent: headers.remove("traceparent"),
            tracestate: headers.remove("tracestate").filter(|s| !s.is_empty()),
        }
    }

    /// Makes this the parent of `span`, which must not have been entered yet. Malformed headers are ignored, as
    /// W3C asks: the span then begins a new trace.
    pub fn adopt(&self, span: &Span) {
        let headers: HashMap<String, String> = [("traceparent", &self.traceparent), ("tracestate", &self.tracestate)]
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value.clone()?)))
            .collect();
        if !headers.is_empty() {
            let _ = span.set_parent(TraceContextPropagator::new().extract(&headers));
        }
    }

    /// The trace id in hex, from the stored `traceparent`.
    pub fn trace_id(&self) -> Option<&str> {
        self.traceparent.as_deref()?.split('-').nth(1).filter(|id| id.len() == 32)
    }
}

/// The trace id of a span in hex, if its trace is kept.
pub fn sampled_trace_id(span: &Span) -> Option<String> {
    let context = span.context();
    let context = context.span().span_context().clone();
    (context.is_valid() && context.is_sampled()).then(|| context.trace_id().to_string())
}

/// The trace id of a span in hex.
pub fn trace_id(span: &Span) -> String {
    span.context().span().span_context().trace_id().to_string()
}
