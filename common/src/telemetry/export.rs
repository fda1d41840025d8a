//! How spans leave the process.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use opentelemetry::KeyValue;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithTonicConfig, tonic_types::transport::ClientTlsConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    resource::{EnvResourceDetector, TelemetryResourceDetector},
    trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanProcessor},
};
use thread_priority::{
    NormalThreadSchedulePolicy::Batch, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
    thread_native_id,
};
use tokio::runtime::Handle;

use super::plan::{Plan, Protocol};
use crate::config::ConfigError;

/// What takes the spans that have ended; `None` without a collector. To be called on the process's runtime.
pub(super) fn batches(plan: &Plan) -> Result<Option<BatchSpanProcessor>, ConfigError> {
    let Some(protocol) = plan.protocol else { return Ok(None) };
    in_background(move || {
        let told = Told { exporter: exporter(plan, protocol)?, failing: AtomicBool::new(false) };
        let config = BatchConfigBuilder::default().with_max_export_batch_size(plan.batch).build();
        let mut batches = BatchSpanProcessor::builder(told).with_batch_config(config).build();
        batches.set_resource(&resource(plan.service.clone()));
        Ok(Some(batches))
    })
}

fn exporter(plan: &Plan, protocol: Protocol) -> Result<SpanExporter, ConfigError> {
    let built = match protocol {
        Protocol::Http => SpanExporter::builder().with_http().build(),
        // The exporter's own TLS would trust nobody.
        Protocol::Grpc if plan.tls => {
            SpanExporter::builder().with_tonic().with_tls_config(ClientTlsConfig::new().with_native_roots()).build()
        }
        Protocol::Grpc => SpanExporter::builder().with_tonic().build(),
    };
    // Its text may hold the endpoint, in which some put a key.
    built.map_err(|_: ExporterBuildError| ConfigError(format!("{}: cannot be used", plan.endpoint_variable)))
}

/// Calls `start` on a thread that never interrupts another, and so has the threads that it starts run: they inherit it
/// (sched(7)). Hundreds of spans at a time are turned into bytes, and requests would wait for that.
fn in_background<T: Send>(start: impl FnOnce() -> T + Send) -> T {
    // The exporter for gRPC puts its connection on the runtime.
    let runtime = Handle::current();
    let start = move || {
        let _on_the_runtime = runtime.enter();
        if let Err(error) = step_back() {
            tracing::debug!(%error, "spans are exported at the priority of requests");
        }
        start()
    };
    std::thread::scope(|scope| scope.spawn(start).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn step_back() -> Result<(), thread_priority::Error> {
    // Of 99, which is a niceness of 10: beside a request that wants all of a core, a tenth of it. That is what the spans of
    // requests cost that fill the rest, so none is lost; and mostly they are exported when a core is idle.
    let priority = ThreadPriority::Crossplatform(22.try_into().unwrap_or_default());
    set_thread_priority_and_policy(thread_native_id(), priority, ThreadSchedulePolicy::Normal(Batch))
}

fn resource(service: String) -> Resource {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let ours = [
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", uuid::Uuid::now_v7().to_string()),
        KeyValue::new("host.name", host.trim().to_owned()),
    ];
    // Later ones win.
    Resource::builder_empty()
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_attributes(ours)
        .with_detector(Box::new(EnvResourceDetector::new()))
        .with_service_name(service)
        .build()
}

/// An exporter that tells the log when its collector goes away and when it is back, each once.
#[derive(Debug)]
struct Told {
    exporter: SpanExporter,
    failing: AtomicBool,
}

impl opentelemetry_sdk::trace::SpanExporter for Told {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        let exported = self.exporter.export(batch).await;
        match (&exported, self.failing.swap(exported.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => {
                tracing::warn!(%error, spans = count, "spans could not be sent and are lost; the collector is tried again");
            }
            (Ok(()), true) => tracing::info!("the collector takes spans again"),
            _ => {}
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
