//! What a run does with bytes: dump → compress → encrypt → every destination at once, as one stream with the pace of the
//! slowest; then publish, in an order that lets nothing be seen that is not whole.

pub mod compress;
pub mod dump;
pub mod encrypt;
pub mod manifest;
pub mod meter;
pub mod name;
pub mod restore;
mod sending;
mod staging;
mod threads;
pub mod upload;

use std::{sync::Arc, time::Instant};

use age::x25519::Recipient;
use bytes::{Bytes, BytesMut};
use common::{
    artifact::{NewArtifact, Plain},
    destination::{Destination, DestinationAccess},
    encryption,
    execution::{Stage, claim::Assignment, finish::Published, log::Level},
    id::{DestinationId, ExecutionId},
    job::Job,
    metrics,
    source::{Source, SourceAccess},
    telemetry::{Span, span::SpanKind},
};
use futures::{TryFutureExt, future::try_join_all};
use tokio::{io::AsyncReadExt, process::ChildStdout, sync::mpsc};

use crate::{
    failure::{At, RunError},
    lease::Lease,
    run_log::RunLog,
    service::Shared,
    trace::noted,
};
use dump::{Database, Dump, Inspected};
use manifest::{Manifest, ManifestObject};
use meter::{Measure, Streamed};
use name::Names;
use sending::Sending;
pub use staging::Staging;
use threads::{Threads, Through};
use upload::{Store, Upload};

/// One read from the dump tool, at most.
const READ: usize = 256 << 10;
/// Chunks between two parts of the stream.
const QUEUE: usize = 4;

/// A destination, opened.
struct Target {
    id: DestinationId,
    name: String,
    store: Arc<Store>,
}

/// Objects that are whole and in their destinations, but not visible yet.
pub struct StagedBackup {
    targets: Vec<Target>,
    names: Names,
    inspected: Inspected,
    /// Who can open it; nobody where it is not encrypted.
    recipients: Vec<Recipient>,
    objects: Vec<StagedObject>,
}

impl StagedBackup {
    fn recipient_names(&self) -> Vec<String> {
        self.recipients.iter().map(ToString::to_string).collect()
    }
}

struct StagedObject {
    database: String,
    path: String,
    facts: Streamed,
    uploads: Vec<Upload>,
}

/// What every step of an attempt uses.
#[derive(Clone, Copy)]
pub struct Attempt<'a> {
    /// The worker.
    pub shared: &'a Shared,
    /// The right to run.
    pub lease: &'a Arc<Lease>,
    /// What to run.
    pub assignment: &'a Assignment,
    /// Where to tell.
    pub log: &'a RunLog,
    /// What may have to be removed.
    pub staging: &'a Staging,
}

/// Streams every database to every destination. When it returns, all bytes are there and none can be seen.
pub async fn stream(attempt: Attempt<'_>) -> Result<StagedBackup, RunError> {
    let Attempt { shared, lease, assignment, log, .. } = attempt;
    lease.set_stage(Stage::Initializing);
    let recipients = recipients(&assignment.job)?;
    let targets = open_targets(shared, assignment).await?;
    let access = source_access(shared, &assignment.source, assignment.claim.execution)?;
    let dump = Dump::new(&shared.config, access);
    let mut span = lease.span(SpanKind::Client, "inspect");
    dump.describe(&mut span, None);
    if assignment.claim.attempt > 1 {
        dump.end_former(&lease.groups, log).await;
    }
    let inspected = dump.inspect(&lease.groups, &log.within(&span)).await;
    let inspected = noted(&mut span, inspected)?;
    drop(span);
    shared.note_inventory(assignment.source.id, &inspected);
    if let Some(most) = inspected.most_frozen {
        lease.limit_freeze(most);
    }
    log.info(format!(
        "{} {} with {}; about {} bytes in {} database(s)",
        assignment.source.engine.as_str(),
        inspected.server_version,
        inspected.tool_version,
        inspected.estimate(),
        inspected.databases.len()
    ));
    let names = Names::new(&assignment.job_slug, assignment.briefing.claimed_at, assignment.claim);
    let mut backup = StagedBackup { targets, names, inspected, recipients, objects: Vec::new() };
    for at in 0..backup.inspected.databases.len() {
        let object = stream_one(attempt, &dump, &backup, at).await?;
        backup.objects.push(object);
    }
    Ok(backup)
}

/// Whoever can open the backups of a job. One that is not known ends the run: nothing is stored for everybody to read.
fn recipients(job: &Job) -> Result<Vec<Recipient>, RunError> {
    let texts = job.encryption.iter().flat_map(|encryption| &encryption.recipients);
    let unknown = |text, problem| RunError::give_up("recipient_unknown", format!("recipient '{text}' {problem}"));
    texts.map(|text| encryption::recipient(text).map_err(|problem| unknown(text, problem))).collect()
}

async fn open_targets(shared: &Shared, assignment: &Assignment) -> Result<Vec<Target>, RunError> {
    if assignment.destinations.is_empty() {
        return Err(RunError::give_up("no_destination", "the job has no destination"));
    }
    try_join_all(assignment.destinations.iter().map(|destination| open_target(shared, destination))).await
}

async fn open_target(shared: &Shared, destination: &Destination) -> Result<Target, RunError> {
    let store = open_store(shared, destination).await?;
    store.check().await.map_err(|e| e.at(&destination.slug))?;
    Ok(Target { id: destination.id, name: destination.slug.clone(), store: Arc::new(store) })
}

/// A source with its secrets, for the sessions of one run.
fn source_access(shared: &Shared, source: &Source, run: ExecutionId) -> Result<SourceAccess, RunError> {
    let unreadable = |e| RunError::give_up("secret_unreadable", format!("source '{}': {e}", source.slug));
    let access = source.access(&shared.key).map_err(unreadable)?;
    Ok(SourceAccess { session: format!("dbackup {run}"), ..access })
}

/// A destination with its secrets.
fn destination_access(shared: &Shared, destination: &Destination) -> Result<DestinationAccess, RunError> {
    let unreadable = |e| RunError::give_up("secret_unreadable", format!("destination '{}': {e}", destination.slug));
    destination.access(&shared.key).map_err(unreadable)
}

/// Opens a destination without asking it for anything.
pub async fn open_store(shared: &Shared, destination: &Destination) -> Result<Store, RunError> {
    let access = destination_access(shared, destination)?;
    Store::open(access, &shared.config.local_paths).await.map_err(|e| e.at(&destination.slug))
}

async fn stream_one(
    attempt: Attempt<'_>,
    dump: &Dump,
    backup: &StagedBackup,
    at: usize,
) -> Result<StagedObject, RunError> {
    let Attempt { lease, assignment, log, .. } = attempt;
    let database = &backup.inspected.databases[at];
    let path = backup.names.object(
        &database.name,
        assignment.source.engine,
        assignment.job.compression,
        !backup.recipients.is_empty(),
    );
    let mut sendings = sending::begin(attempt, &backup.targets, &path, database.estimate).await?;
    lease.set_stage(Stage::Dumping);
    let mut span = lease.span(SpanKind::Client, "dump");
    dump.describe(&mut span, Some(&database.name));
    let facts = dump_into(attempt, dump, backup, database, &mut sendings, &mut span).await?;
    drop(span);
    lease.set_stage(Stage::Uploading);
    let uploads = sending::flush(sendings).await?;
    log.info(format!("'{}': {} bytes dumped, {} to store", database.name, facts.plain.bytes, facts.stored.bytes));
    Ok(StagedObject { database: database.name.clone(), path, facts, uploads })
}

/// Streams one database through compression and encryption to the destinations. When it returns, the tool has ended well and
/// everything was handed over. A destination that failed is told by its own span and not by that of the dump.
async fn dump_into(
    attempt: Attempt<'_>,
    dump: &Dump,
    backup: &StagedBackup,
    database: &Database,
    sendings: &mut [Sending],
    span: &mut Span,
) -> Result<Streamed, RunError> {
    let Attempt { lease, assignment, .. } = attempt;
    let (log, began) = (attempt.log.within(span), Instant::now());
    log.info(format!("dumping '{}'", database.name));
    let mut tool = noted(span, dump.start(&database.name, &backup.inspected, lease, &log))?;

    let (threads, plain_out, stored_in) = Threads::start(lease, assignment.job.compression, &backup.recipients);
    let done_before: u64 = backup.objects.iter().map(|o| o.facts.plain.bytes).sum();
    let engine = assignment.source.engine.as_str();
    let reading = read_dump(tool.stdout(), plain_out, lease, done_before, backup.inspected.estimate(), engine)
        .map_err(|e| RunError::retry("dump_failed", format!("the dump of '{}' could not be read: {e}", database.name)));
    let reading = async { noted(&mut *span, reading.await) };
    // The first failure ends both: a destination that failed must not wait for a dump that stalls.
    tokio::try_join!(reading, sending::distribute(stored_in, sendings))?;
    let Through { plain, plain_ends, stored } = threads.end().await?;
    span.set_bytes(plain.bytes, began.elapsed());
    let finished = tool.finish(span).await;
    noted(span, finished)?;
    let facts = Streamed { plain, plain_ends, stored: stored? };
    noted(span, dump.check_complete(&database.name, &facts))?;
    Ok(facts)
}

/// Reads the dump to its end and tells how far it is, by the server's own estimate of all databases.
async fn read_dump(
    stdout: Option<ChildStdout>,
    output: mpsc::Sender<Bytes>,
    lease: &Lease,
    mut read: u64,
    estimate: u64,
    engine: &'static str,
) -> std::io::Result<()> {
    let Some(mut stdout) = stdout else { return Ok(()) };
    let dumped = metrics::get().dumped(engine);
    loop {
        let mut chunk = BytesMut::with_capacity(READ);
        match stdout.read_buf(&mut chunk).await? {
            0 => return Ok(()),
            n => {
                read += n as u64;
                dumped.inc_by(n as u64);
                lease.count(n, read, estimate);
            }
        }
        // A closed channel means that a destination failed, which is told where it failed.
        if output.send(chunk.freeze()).await.is_err() {
            return Ok(());
        }
    }
}

/// Makes a staged backup visible: every object in every destination, checked, and then the manifests.
pub async fn publish(attempt: Attempt<'_>, mut backup: StagedBackup) -> Result<Published, RunError> {
    let Attempt { assignment, log, staging, .. } = attempt;
    let mut artifacts = Vec::new();
    let recipients = backup.recipient_names();
    for object in &mut backup.objects {
        let stored = &object.facts.stored;
        try_join_all(object.uploads.iter_mut().zip(&backup.targets).map(async |(upload, target)| {
            let note = upload.publish(stored).await.map_err(|e| e.at(&target.name))?;
            if let Some(note) = note {
                log.line(Level::Debug, format!("destination '{}': {note}", target.name));
            }
            Ok::<_, RunError>(())
        }))
        .await?;
        artifacts.extend(backup.targets.iter().map(|target| NewArtifact {
            destination: target.id,
            database: Some(object.database.clone()),
            path: object.path.clone(),
            size_bytes: as_i64(stored.bytes),
            sha256: stored.sha256.clone(),
            plain: Some(Plain {
                size_bytes: as_i64(object.facts.plain.bytes),
                sha256: object.facts.plain.sha256.clone(),
            }),
            recipients: recipients.clone(),
        }));
    }
    let (path, text) = (backup.names.manifest(), manifest_text(assignment, &backup)?);
    let measure =
        Measure { bytes: text.len() as u64, sha256: hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&text)) };
    for target in &backup.targets {
        staging.record(attempt, target, &path, None).await?;
        target.store.put(&path, text.clone()).await.map_err(|e| e.at(&target.name))?;
        log.info(format!("stored at {}", target.store.describe(backup.objects.first().map_or(&path, |o| &o.path))));
        artifacts.push(NewArtifact {
            destination: target.id,
            database: None,
            path: path.clone(),
            size_bytes: as_i64(measure.bytes),
            sha256: measure.sha256.clone(),
            plain: None,
            recipients: Vec::new(),
        });
    }
    let (path, checksum) = match &backup.objects[..] {
        [only] => (only.path.clone(), &only.facts.stored.sha256),
        _ => (path, &measure.sha256),
    };
    Ok(Published {
        job: assignment.job.id,
        size_bytes: as_i64(backup.objects.iter().map(|o| o.facts.stored.bytes).sum()),
        path,
        checksum: format!("sha256:{checksum}"),
        snapshot_at: backup.inspected.snapshot_at,
        artifacts,
    })
}

fn as_i64(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn manifest_text(assignment: &Assignment, backup: &StagedBackup) -> Result<Bytes, RunError> {
    let manifest = Manifest {
        format_version: manifest::version(!backup.recipients.is_empty()),
        execution_id: assignment.claim.execution.to_string(),
        trace_id: assignment.briefing.trace.trace_id().map(str::to_owned),
        job_id: assignment.job.id.to_string(),
        job: assignment.job_slug.clone(),
        engine: assignment.source.engine,
        server_version: backup.inspected.server_version.clone(),
        tool_version: backup.inspected.tool_version.clone(),
        snapshot_at: backup.inspected.snapshot_at,
        compression: assignment.job.compression,
        recipients: backup.recipient_names(),
        labels: assignment.labels.clone(),
        locked: assignment.locked,
        objects: backup
            .objects
            .iter()
            .map(|object| ManifestObject {
                database: object.database.clone(),
                file: object.path.rsplit('/').next().unwrap_or(&object.path).to_owned(),
                stored_bytes: object.facts.stored.bytes,
                stored_sha256: object.facts.stored.sha256.clone(),
                plain_bytes: object.facts.plain.bytes,
                plain_sha256: object.facts.plain.sha256.clone(),
            })
            .collect(),
    };
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|e| RunError::give_up("internal_error", format!("the manifest could not be written: {e}")))?;
    Ok(text.into())
}
