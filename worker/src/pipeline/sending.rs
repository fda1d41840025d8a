//! The stream's last part: every destination at once, at the pace of the slowest, each under a span of its own.

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{
    metrics::{self, Counter},
    telemetry::{Span, span::SpanKind},
};
use futures::future::try_join_all;
use tokio::sync::mpsc;

use super::{Attempt, Target, upload::Upload};
use crate::{
    failure::{At, RunError},
    trace::noted,
};

/// An upload under way.
pub struct Sending {
    upload: Upload,
    destination: String,
    bytes: u64,
    stored: Counter,
    began: Instant,
    span: Span,
}

/// Opens an upload in every destination, each recorded before its first byte.
pub async fn begin(
    attempt: Attempt<'_>,
    targets: &[Target],
    path: &str,
    estimate: u64,
) -> Result<Vec<Sending>, RunError> {
    let mut all = Vec::new();
    for target in targets {
        let mut span = attempt.lease.span(SpanKind::Client, "upload");
        span.set("dbackup.destination", target.name.clone());
        span.set("dbackup.destination.kind", target.store.kind());
        let begun = open(attempt, target, path, estimate).await;
        let upload = noted(&mut span, begun)?;
        let engine = attempt.assignment.source.engine.as_str();
        let stored = metrics::get().stored(engine, target.store.kind(), &target.name);
        all.push(Sending { upload, destination: target.name.clone(), bytes: 0, stored, began: Instant::now(), span });
    }
    Ok(all)
}

async fn open(attempt: Attempt<'_>, target: &Target, path: &str, estimate: u64) -> Result<Upload, RunError> {
    let upload = target.store.begin(path, estimate).await.map_err(|e| e.at(&target.name))?;
    attempt.staging.record(attempt, target, path, upload.id()).await?;
    upload.start().await.map_err(|e| e.at(&target.name))
}

/// Hands each chunk to every destination; the slowest sets the pace.
pub async fn distribute(mut input: mpsc::Receiver<Bytes>, all: &mut [Sending]) -> Result<(), RunError> {
    while let Some(chunk) = input.recv().await {
        try_join_all(all.iter_mut().map(|sending| sending.write(chunk.clone()))).await?;
    }
    Ok(())
}

/// Has every destination hold all bytes safely, and gives the uploads, which are not visible yet.
pub async fn flush(all: Vec<Sending>) -> Result<Vec<Upload>, RunError> {
    try_join_all(all.into_iter().map(Sending::flush)).await
}

impl Sending {
    async fn write(&mut self, chunk: Bytes) -> Result<(), RunError> {
        let bytes = chunk.len() as u64;
        let written = self.upload.write(chunk).await.map_err(|e| e.at(&self.destination));
        noted(&mut self.span, written)?;
        self.bytes += bytes;
        self.stored.inc_by(bytes);
        Ok(())
    }

    async fn flush(mut self) -> Result<Upload, RunError> {
        let flushed = self.upload.flush().await.map_err(|e| e.at(&self.destination));
        noted(&mut self.span, flushed)?;
        let took: Duration = self.began.elapsed();
        self.span.set_bytes(self.bytes, took);
        Ok(self.upload)
    }
}
