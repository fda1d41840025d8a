//! Spans of OpenTelemetry. Nothing is kept of one whose trace is not sampled, so those cost next to nothing; and with no
//! collector configured no trace is.

use std::{
    borrow::Cow,
    cell::Cell,
    sync::{
        OnceLock,
        mpsc::{SyncSender, sync_channel},
    },
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context, InstrumentationScope, Key, Value,
    trace::{Link, Span as _, SpanBuilder, SpanId, Status, TraceContextExt, TraceId, Tracer as _, TracerProvider as _},
};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SdkTracer, SdkTracerProvider};

pub use opentelemetry::{
    KeyValue,
    trace::{SpanContext, SpanKind},
};

use super::{STOP_PATIENCE, export::Exporting};

/// Shortest time between two flushes that were asked for: many claims at once share one.
const FLUSH_GATHER: Duration = Duration::from_millis(50);

/// What all spans of a process go through.
struct Tracing {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// Wakes the thread that flushes; `None` without a collector.
    flush: Option<SyncSender<()>>,
}

static TRACING: OnceLock<Tracing> = OnceLock::new();

/// Takes the spans of this process from now on.
pub(super) fn start(exporting: Exporting) {
    let exports = exporting.exports();
    let provider = exporting.provider(Ids::default());
    let scope = InstrumentationScope::builder("dbackup").with_version(env!("CARGO_PKG_VERSION")).build();
    let tracer = provider.tracer_with_scope(scope);
    let flush = exports.then(|| start_flushing(provider.clone())).flatten();
    let _ = TRACING.set(Tracing { provider, tracer, flush });
}

/// Sends what is left. Blocks, for at most [`STOP_PATIENCE`].
pub(super) fn stop() {
    if let Some(tracing) = TRACING.get() {
        let _ = tracing.provider.shutdown_with_timeout(STOP_PATIENCE);
    }
}

/// A thread of its own, since a flush waits for the collector: whoever asks for one must not.
fn start_flushing(provider: SdkTracerProvider) -> Option<SyncSender<()>> {
    // Room for one: a flush that is asked for while another waits to begin is the same.
    let (sender, asked) = sync_channel(1);
    let flushing = std::thread::Builder::new().name("trace-flush".to_owned()).spawn(move || {
        while asked.recv().is_ok() {
            // It ends within the SDK's own five seconds. What could not be sent is told by the exporter.
            let _ = provider.force_flush();
            std::thread::sleep(FLUSH_GATHER);
        }
    });
    flushing.ok().map(|_| sender)
}

/// Has the spans that have ended sent now and not with the next batch, without waiting for it.
pub fn flush_soon() {
    if let Some(flush) = TRACING.get().and_then(|tracing| tracing.flush.as_ref()) {
        let _ = flush.try_send(());
    }
}

thread_local! {
    /// The id of the next span of this thread, when it must be a certain one.
    static NEXT_ID: Cell<Option<SpanId>> = const { Cell::new(None) };
}

/// Random ids, but for a span whose id others must be able to name: the SDK takes ids from nowhere else.
#[derive(Debug, Default)]
pub(super) struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        self.0.new_trace_id()
    }

    fn new_span_id(&self) -> SpanId {
        NEXT_ID.take().unwrap_or_else(|| self.0.new_span_id())
    }
}

/// The process's own clock: the times of a span decide nothing.
#[expect(clippy::disallowed_methods, reason = "the times of a span decide nothing, and ask no database")]
pub fn now() -> SystemTime {
    SystemTime::now()
}

/// An open span. It ends when it is dropped.
#[derive(Debug)]
pub struct Span {
    /// `None` when nothing is kept of it.
    recording: Option<opentelemetry_sdk::trace::Span>,
    context: SpanContext,
}

impl Span {
    /// A span that begins a trace, or continues the one that came with a request. It has ids whether it is sampled or
    /// not.
    pub fn root(parent: &SpanContext, kind: SpanKind, name: impl Into<Cow<'static, str>>) -> Self {
        let Some(tracing) = TRACING.get() else { return Self::unkept(SpanContext::NONE) };
        Self::build(tracing, SpanBuilder::from_name(name).with_kind(kind), parent)
    }

    /// A span under another that begins now. Under one that is not sampled nothing is kept, and its context is that of
    /// the parent.
    pub fn child(parent: &SpanContext, kind: SpanKind, name: &'static str) -> Self {
        Self::start(parent, SpanBuilder::from_name(name).with_kind(kind))
    }

    fn start(parent: &SpanContext, builder: SpanBuilder) -> Self {
        match TRACING.get() {
            Some(tracing) if parent.is_sampled() => Self::build(tracing, builder, parent),
            _ => Self::unkept(parent.clone()),
        }
    }

    fn build(tracing: &Tracing, builder: SpanBuilder, parent: &SpanContext) -> Self {
        // A context of its own: what is current in this thread is nobody's parent here. One that is not valid must not
        // be in it: the sampler would take it for a parent that is not sampled.
        let context = match parent.is_valid() {
            true => Context::new().with_remote_span_context(parent.clone()),
            false => Context::new(),
        };
        let span = tracing.tracer.build_with_context(builder, &context);
        let context = span.span_context().clone();
        Self { recording: span.is_recording().then_some(span), context }
    }

    fn unkept(context: SpanContext) -> Self {
        Self { recording: None, context }
    }

    /// What children and links name, and what is sent on.
    pub fn context(&self) -> &SpanContext {
        &self.context
    }

    /// Whether anything is kept of it: what is costly to find out need not be found out otherwise.
    pub fn is_recording(&self) -> bool {
        self.recording.is_some()
    }

    /// Notes an attribute.
    pub fn set(&mut self, key: impl Into<Key>, value: impl Into<Value>) {
        if let Some(span) = &mut self.recording {
            span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// Notes how many bytes went through since `began`, and at which rate.
    pub fn set_bytes(&mut self, bytes: u64, took: Duration) {
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.set("dbackup.bytes", whole(bytes));
        // A float that is cast stops at the ends of the integer's range.
        #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = (bytes as f64 / took.as_secs_f64().max(1e-6)) as i64;
        self.set("dbackup.bytes_per_second", rate);
    }

    /// Notes something that happened at this moment.
    pub fn event(&mut self, name: &'static str, attributes: Vec<KeyValue>) {
        if let Some(span) = &mut self.recording {
            span.add_event(name, attributes);
        }
    }

    /// Marks it as failed: a stable word for programs, a text for people.
    pub fn fail(&mut self, error_type: impl Into<Value>, text: impl Into<Cow<'static, str>>) {
        if let Some(span) = &mut self.recording {
            span.set_attribute(KeyValue::new("error.type", error_type));
            span.set_status(Status::error(text));
        }
    }
}

/// A span that is over when it is written: its times are known.
pub(super) struct Past {
    pub kind: SpanKind,
    pub name: &'static str,
    pub from: SystemTime,
    pub to: SystemTime,
    /// Where it must be a certain one.
    pub id: Option<SpanId>,
    pub attributes: Vec<KeyValue>,
    pub link: Option<SpanContext>,
    /// `error.type`, and the text of the status.
    pub error: Option<(String, String)>,
}

impl Past {
    /// Writes it under `parent`, where that is sampled.
    pub fn write(self, parent: &SpanContext) {
        let links = self.link.filter(SpanContext::is_valid).map(Link::with_context).into_iter().collect();
        let builder = SpanBuilder::from_name(self.name)
            .with_kind(self.kind)
            .with_start_time(self.from)
            .with_attributes(self.attributes)
            .with_links(links);
        NEXT_ID.set(self.id);
        let mut span = Span::start(parent, builder);
        // Taken by the span, unless nothing is kept of it.
        NEXT_ID.set(None);
        if let Some((code, text)) = self.error {
            span.fail(code, text);
        }
        if let Some(mut span) = span.recording.take() {
            // A clock that was set back in between must not make a span of negative length.
            span.end_with_timestamp(self.to.max(self.from));
        }
    }
}
