//! Spans of OpenTelemetry. Nothing is kept of one whose trace is not sampled, so those cost next to nothing; and with no
//! collector configured no trace is.
//!
//! A span is handed to OpenTelemetry's batches when it ends. Its tracer would make it too, but gives ids of its own to
//! all, and takes longer than is needed where the parent is always known and has decided whether it is sampled.

use std::{
    borrow::Cow,
    sync::{
        Arc, OnceLock,
        mpsc::{SyncSender, sync_channel},
    },
    time::{Duration, SystemTime},
};

use opentelemetry::{
    InstrumentationScope, Key, Value,
    trace::{Event, Link, SpanId, Status, TraceFlags, TraceId},
};
use opentelemetry_sdk::trace::{
    BatchSpanProcessor, Config, IdGenerator, RandomIdGenerator, Sampler, SamplingDecision, ShouldSample, SpanData,
    SpanEvents, SpanLimits, SpanLinks, SpanProcessor,
};

pub use opentelemetry::{
    KeyValue,
    trace::{SpanContext, SpanKind},
};

use super::{STOP_PATIENCE, export::batches, plan::Plan};
use crate::config::ConfigError;

/// Shortest time between two flushes that were asked for: many claims at once share one.
const FLUSH_GATHER: Duration = Duration::from_millis(50);

/// What all spans of a process go through, where there is a collector.
struct Tracing {
    batches: Arc<BatchSpanProcessor>,
    /// Says what becomes of a trace that begins here.
    sampler: Sampler,
    scope: InstrumentationScope,
    limits: SpanLimits,
    /// Wakes the thread that flushes.
    flush: SyncSender<()>,
}

static TRACING: OnceLock<Tracing> = OnceLock::new();

/// Takes the spans of this process from now on. To be called on the process's runtime.
pub(super) fn start(plan: Plan) -> Result<(), ConfigError> {
    let Some(batches) = batches(&plan)?.map(Arc::new) else { return Ok(()) };
    let scope = InstrumentationScope::builder("dbackup").with_version(env!("CARGO_PKG_VERSION")).build();
    let flush = start_flushing(batches.clone())?;
    let _ =
        TRACING.set(Tracing { batches, sampler: plan.sampler, scope, limits: Config::default().span_limits, flush });
    Ok(())
}

/// Sends what is left. Blocks, for at most [`STOP_PATIENCE`].
pub(super) fn stop() {
    if let Some(tracing) = TRACING.get() {
        let _ = tracing.batches.shutdown_with_timeout(STOP_PATIENCE);
    }
}

/// A thread of its own, since a flush waits for the collector: whoever asks for one must not.
fn start_flushing(batches: Arc<BatchSpanProcessor>) -> Result<SyncSender<()>, ConfigError> {
    // Room for one: a flush that is asked for while another waits to begin is the same.
    let (sender, asked) = sync_channel(1);
    let flushing = std::thread::Builder::new().name("trace-flush".to_owned()).spawn(move || {
        while asked.recv().is_ok() {
            // It ends within the SDK's own five seconds. What could not be sent is told by the exporter.
            let _ = batches.force_flush();
            std::thread::sleep(FLUSH_GATHER);
        }
    });
    flushing.map_err(|error| ConfigError(format!("traces: a thread could not be started: {error}")))?;
    Ok(sender)
}

/// Has the spans that have ended sent now and not with the next batch, without waiting for it.
pub fn flush_soon() {
    if let Some(tracing) = TRACING.get() {
        let _ = tracing.flush.try_send(());
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
    recording: Option<SpanData>,
    context: SpanContext,
}

impl Span {
    /// A span that begins a trace, or continues the one that came with a request. It has ids whether it is sampled or
    /// not.
    pub fn root(parent: &SpanContext, kind: SpanKind, name: impl Into<Cow<'static, str>>) -> Self {
        let (name, ids) = (name.into(), RandomIdGenerator::default());
        let trace = if parent.is_valid() { parent.trace_id() } else { ids.new_trace_id() };
        // Without a collector nothing is sampled: a flag that says otherwise would have others record the children of
        // spans that nobody has.
        let tracing = TRACING.get().filter(|tracing| match parent.is_valid() {
            true => parent.is_sampled(),
            false => tracing.begins(trace, &kind, &name),
        });
        let context = context_under(parent, trace, ids.new_span_id(), tracing.is_some());
        Self { recording: tracing.map(|tracing| tracing.data(&context, parent, kind, name)), context }
    }

    /// A span under another that begins now. Under one that is not sampled nothing is kept, and its context is that of
    /// the parent.
    pub fn child(parent: &SpanContext, kind: SpanKind, name: &'static str) -> Self {
        Self::under(parent, kind, name, None)
    }

    /// The same, with a certain id if there is one.
    fn under(parent: &SpanContext, kind: SpanKind, name: &'static str, id: Option<SpanId>) -> Self {
        let Some(tracing) = TRACING.get().filter(|_| parent.is_sampled()) else {
            return Self { recording: None, context: parent.clone() };
        };
        let id = id.unwrap_or_else(|| RandomIdGenerator::default().new_span_id());
        let context = context_under(parent, parent.trace_id(), id, true);
        Self { recording: Some(tracing.data(&context, parent, kind, name.into())), context }
    }

    /// What children and links name, and what is sent on.
    pub fn context(&self) -> &SpanContext {
        &self.context
    }

    /// Whether anything is kept of it: what is costly to find out need not be found out otherwise.
    pub fn is_recording(&self) -> bool {
        self.recording.is_some()
    }

    /// Makes room for so many attributes, where it is known that there will be many.
    pub fn reserve(&mut self, attributes: usize) {
        if let Some(span) = &mut self.recording {
            span.attributes.reserve_exact(attributes);
        }
    }

    /// Notes an attribute.
    pub fn set(&mut self, key: impl Into<Key>, value: impl Into<Value>) {
        if let Some(span) = &mut self.recording {
            span.attributes.push(KeyValue::new(key, value));
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
            span.events.events.push(Event::new(name, now(), attributes, 0));
        }
    }

    /// Marks it as failed: a stable word for programs, a text for people.
    pub fn fail(&mut self, error_type: impl Into<Value>, text: impl Into<Cow<'static, str>>) {
        self.set("error.type", error_type);
        if let Some(span) = &mut self.recording {
            span.status = Status::error(text);
        }
    }

    fn end(&mut self, at: SystemTime) {
        if let (Some(mut span), Some(tracing)) = (self.recording.take(), TRACING.get()) {
            // A clock that was set back in between must not make a span of negative length.
            span.end_time = at.max(span.start_time);
            keep_within(&tracing.limits, &mut span);
            tracing.batches.on_end(span);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if self.is_recording() {
            self.end(now());
        }
    }
}

fn context_under(parent: &SpanContext, trace: TraceId, id: SpanId, sampled: bool) -> SpanContext {
    let flags = TraceFlags::NOT_SAMPLED.with_sampled(sampled);
    SpanContext::new(trace, id, flags, false, parent.trace_state().clone())
}

impl Tracing {
    /// Whether a trace that begins here is sampled.
    fn begins(&self, trace: TraceId, kind: &SpanKind, name: &str) -> bool {
        let sampled = self.sampler.should_sample(None, trace, name, kind, &[], &[]);
        sampled.decision == SamplingDecision::RecordAndSample
    }

    /// Of a span that begins now.
    fn data(&self, context: &SpanContext, parent: &SpanContext, kind: SpanKind, name: Cow<'static, str>) -> SpanData {
        let begins = now();
        SpanData {
            span_context: context.clone(),
            parent_span_id: parent.span_id(),
            parent_span_is_remote: parent.is_valid() && parent.is_remote(),
            span_kind: kind,
            name,
            start_time: begins,
            end_time: begins,
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        }
    }
}

/// By the `OTEL_SPAN_…_COUNT_LIMIT` variables: what was noted last goes first.
fn keep_within(limits: &SpanLimits, span: &mut SpanData) {
    fn keep<T>(all: &mut Vec<T>, most: u32, dropped: &mut u32) {
        let over = all.len().saturating_sub(usize::try_from(most).unwrap_or(usize::MAX));
        all.truncate(all.len() - over);
        *dropped += u32::try_from(over).unwrap_or(u32::MAX);
    }
    keep(&mut span.attributes, limits.max_attributes_per_span, &mut span.dropped_attributes_count);
    keep(&mut span.events.events, limits.max_events_per_span, &mut span.events.dropped_count);
    keep(&mut span.links.links, limits.max_links_per_span, &mut span.links.dropped_count);
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
        let mut span = Span::under(parent, self.kind, self.name, self.id);
        if let Some(data) = &mut span.recording {
            data.start_time = self.from;
            data.attributes = self.attributes;
            data.links.links.extend(self.link.filter(SpanContext::is_valid).map(Link::with_context));
        }
        if let Some((code, text)) = self.error {
            span.fail(code, text);
        }
        span.end(self.to);
    }
}
