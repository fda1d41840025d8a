//! A restore, from the stored bytes into a database:
//!
//! 1. read the manifest, and look at the target: may it be signed in to, is it there, is it empty;
//! 2. read every object to its end and compare its SHA-256, so that nothing is touched for a backup that is not whole;
//! 3. feed each object to the engine's own tool. Its last bytes are kept back until all that was read again had the
//!    checksum that it must have, and a heartbeat was acknowledged: PostgreSQL commits nothing before them.
//!
//! PostgreSQL restores a database in one transaction: all of it or nothing. MariaDB and MySQL have no transaction for
//! that, so what failed half-way stays there, and is told; nothing is tried again by itself then.

mod feeding;
mod mariadb;
mod postgres;
mod target;
pub mod touched;
mod unpack;

use std::{sync::Arc, time::Instant};

use age::x25519::Identity;
use bytes::BytesMut;
use common::{
    artifact::Artifact,
    destination::Destination,
    encryption,
    execution::{Stage, claim::RestoreAssignment, finish::Restored, restore::identity_context},
    metrics,
    store::{Shelf, StoreError},
    telemetry::span::SpanKind,
};
use futures::TryStreamExt;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

use super::{
    destination_access,
    manifest::{Manifest, ManifestObject, NEWEST_VERSION},
};
use crate::{
    failure::{At, Class, RunError},
    lease::Lease,
    reach::is_of_store,
    run_log::RunLog,
    service::Shared,
    trace::noted,
};
use feeding::Feeding;
use target::{Target, Tools};
use touched::Touched;

/// Largest manifest that is read.
const MOST_MANIFEST_BYTES: i64 = 16 << 20;

/// What every step of a restore uses.
#[derive(Clone, Copy)]
pub struct Restoration<'a> {
    /// The worker.
    pub shared: &'a Shared,
    /// The right to run.
    pub lease: &'a Arc<Lease>,
    /// What to bring back, and where to.
    pub assignment: &'a RestoreAssignment,
    /// Where to tell.
    pub log: &'a RunLog,
    /// What was done to the target.
    pub touched: &'a Touched,
}

/// An object that was found whole, and the database that it becomes.
struct Part<'a> {
    object: &'a ManifestObject,
    into: &'a str,
    /// The copy that is whole.
    copy: Copy<'a>,
}

/// An object, and the destination where it lies.
type Copy<'a> = (&'a Artifact, &'a Destination);

/// Brings a backup back. What became of the target is told by [`Restoration::touched`].
pub async fn restore(all: Restoration<'_>) -> Result<Restored, RunError> {
    let Restoration { shared, lease, assignment, log, .. } = all;
    lease.set_stage(Stage::Initializing);
    let manifest = manifest(all).await?;
    let objects = objects(assignment, &manifest)?;
    let identity = identity(all, &manifest)?;
    let mut span = lease.span(SpanKind::Client, "inspect");
    let opened = async {
        let target = Target::open(shared, lease, assignment, &manifest).await?;
        if assignment.claim.attempt > 1 {
            target.end_former(log).await;
        }
        for object in &objects {
            target.check(into(assignment, object)).await?;
        }
        Ok(target)
    };
    let opened = opened.await;
    let target = noted(&mut span, opened)?;
    target.describe(&mut span, None);
    drop(span);
    log.info(format!(
        "{} restores into {} {}",
        target.tool_version(),
        manifest.engine.as_str(),
        target.server_version()
    ));

    lease.set_stage(Stage::Verifying);
    let mut span = lease.span(SpanKind::Internal, "verify");
    let verified = verify(all, &objects).await;
    let parts = noted(&mut span, verified)?;
    drop(span);

    lease.set_stage(Stage::Restoring);
    let bytes = bytes_of(&objects);
    let mut reading = Reading { done: bytes, of: bytes * 2 };
    for part in &parts {
        restore_one(all, &target, &manifest, &identity, part, &mut reading).await?;
    }
    Ok(Restored { size_bytes: i64::try_from(bytes).unwrap_or(i64::MAX), snapshot_at: manifest.snapshot_at })
}

/// How much was read, of what is read twice.
struct Reading {
    done: u64,
    of: u64,
}

impl Reading {
    fn add(&mut self, bytes: usize, lease: &Lease) {
        self.done += bytes as u64;
        lease.count(bytes, self.done, self.of);
    }
}

/// The copies of one object, or of the manifest, that still have a destination.
fn copies<'a>(all: Restoration<'a>, database: Option<&str>) -> Result<Vec<Copy<'a>>, RunError> {
    let of_it: Vec<_> = all.assignment.copies.iter().filter(|(a, _)| a.database.as_deref() == database).collect();
    if of_it.is_empty() {
        return Err(RunError::give_up(
            "backup_gone",
            "the backup is not on record any more: there is nothing to restore",
        ));
    }
    let found: Vec<_> = of_it.into_iter().filter_map(|(a, d)| Some((a, d.as_ref()?))).collect();
    match found.is_empty() {
        true => Err(RunError::give_up(
            "destination_gone",
            "every destination of the backup was deleted from DBackup: add one that has its files, and restore by hand as docs/format.md says",
        )),
        false => Ok(found),
    }
}

async fn open(shared: &Shared, destination: &Destination) -> Result<Shelf, RunError> {
    let access = destination_access(shared, destination)?;
    Shelf::open(access, &shared.config.local_paths).await.map_err(|e| e.at(&destination.slug))
}

/// Copies that did not serve.
struct Tries<'a> {
    log: &'a RunLog,
    what: String,
    errors: Vec<RunError>,
}

impl<'a> Tries<'a> {
    fn of(log: &'a RunLog, what: impl Into<String>) -> Self {
        Self { log, what: what.into(), errors: Vec::new() }
    }

    /// Tells of one; the next one may serve.
    fn failed(&mut self, destination: &Destination, error: RunError) {
        let what = &self.what;
        self.log.warn(format!("the copy of {what} in '{}' does not serve: {}", destination.slug, error.message));
        self.errors.push(error);
    }

    /// None served. One that another try may find outweighs those that stay as they are, and one that another worker may.
    fn none(self) -> RunError {
        let find = |is: fn(&RunError) -> bool| self.errors.iter().find(|e| is(e));
        let again = find(|e| e.class == Class::Retry).or(find(|e| is_of_store(e.code))).or(self.errors.first());
        let (class, code) = again.map_or((Class::GiveUp, "backup_gone"), |e| (e.class, e.code));
        let texts: Vec<_> = self.errors.iter().map(|e| e.message.as_str()).collect();
        let texts = texts.join("; ");
        let message = format!("no copy of {} serves, and the target was not touched: {texts}", self.what);
        RunError { message, code, class }
    }
}

fn damaged(artifact: &Artifact) -> RunError {
    RunError::give_up("backup_damaged", format!("{} is not what was stored: its SHA-256 differs", artifact.path))
}

async fn manifest(all: Restoration<'_>) -> Result<Manifest, RunError> {
    let mut tries = Tries::of(all.log, "the manifest");
    for (artifact, destination) in copies(all, None)? {
        match read_manifest(all, artifact, destination).await {
            Ok(manifest) => return Ok(manifest),
            Err(error) => tries.failed(destination, error),
        }
    }
    Err(tries.none())
}

async fn read_manifest(
    all: Restoration<'_>,
    artifact: &Artifact,
    destination: &Destination,
) -> Result<Manifest, RunError> {
    if artifact.size > MOST_MANIFEST_BYTES {
        return Err(damaged(artifact));
    }
    let at = |e: StoreError| e.at(&destination.slug);
    let shelf = open(all.shared, destination).await?;
    let mut stream = shelf.read(&artifact.path, 0..u64::try_from(artifact.size).unwrap_or(0)).await.map_err(at)?;
    let mut text = BytesMut::new();
    while let Some(chunk) = stream.try_next().await.map_err(at)? {
        text.extend_from_slice(&chunk);
    }
    if hex::encode(Sha256::digest(&text)) != artifact.sha256 {
        return Err(damaged(artifact));
    }
    let unknown = |why: String| RunError::give_up("manifest_unknown", format!("{} {why}", artifact.path));
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| unknown(format!("is not a manifest that this version reads: {error}")))?;
    match manifest.format_version {
        1..=NEWEST_VERSION => Ok(manifest),
        other => Err(unknown(format!(
            "has format version {other}, and this one restores 1 to {NEWEST_VERSION}: use a newer worker"
        ))),
    }
}

/// What opens the backup, where it is encrypted.
fn identity(all: Restoration<'_>, manifest: &Manifest) -> Result<Option<Identity>, RunError> {
    if manifest.recipients.is_empty() {
        return Ok(None);
    }
    let refuse = |code, why: &str| {
        let to = manifest.recipients.join(", ");
        RunError::give_up(code, format!("the backup is encrypted to {to}, and {why}; the target was not touched"))
    };
    let sealed = all.assignment.sealed_identity.as_deref();
    let sealed = sealed.ok_or_else(|| refuse("identity_missing", "no identity was given with the restore"))?;
    let context = identity_context(all.assignment.claim.execution);
    let opened = all.shared.key.open(&context, sealed).map_err(|e| refuse("secret_unreadable", &e.to_string()))?;
    let text = SecretString::from(String::from_utf8_lossy(&opened).into_owned());
    let identity = encryption::identity(&text, &manifest.recipients);
    let identity = identity.map_err(|why| refuse("identity_wrong", &format!("the identity {why}")))?;
    let identity = identity.expose_secret().parse();
    identity.map(Some).map_err(|why| refuse("identity_wrong", why))
}

/// The objects of the backup that are meant.
fn objects<'a>(assignment: &RestoreAssignment, manifest: &'a Manifest) -> Result<Vec<&'a ManifestObject>, RunError> {
    let database = assignment.order.database.as_ref();
    let wanted = |object: &&ManifestObject| database.is_none_or(|name| *name == object.database);
    let objects: Vec<_> = manifest.objects.iter().filter(wanted).collect();
    match objects.is_empty() {
        true => Err(RunError::give_up("database_not_in_backup", "the backup has no such database")),
        false => Ok(objects),
    }
}

/// The database that an object becomes.
fn into<'a>(assignment: &'a RestoreAssignment, object: &'a ManifestObject) -> &'a str {
    assignment.order.into.as_deref().unwrap_or(&object.database)
}

fn bytes_of(objects: &[&ManifestObject]) -> u64 {
    objects.iter().map(|object| object.stored_bytes).sum()
}

/// Reads every object to its end.
async fn verify<'a>(all: Restoration<'a>, objects: &[&'a ManifestObject]) -> Result<Vec<Part<'a>>, RunError> {
    let mut reading = Reading { done: 0, of: bytes_of(objects) * 2 };
    let mut parts = Vec::new();
    for object in objects {
        let copy = whole_copy(all, object, &mut reading).await?;
        parts.push(Part { object, into: into(all.assignment, object), copy });
    }
    Ok(parts)
}

/// The first copy of an object that is as it was stored.
async fn whole_copy<'a>(
    all: Restoration<'a>,
    object: &ManifestObject,
    reading: &mut Reading,
) -> Result<Copy<'a>, RunError> {
    let mut tries = Tries::of(all.log, format!("'{}'", object.database));
    for (artifact, destination) in copies(all, Some(&object.database))? {
        match read_whole(all, object, artifact, destination, reading).await {
            Ok(()) => {
                let text = format!(
                    "{}: {} bytes in '{}' are as they were stored",
                    tries.what, object.stored_bytes, destination.slug
                );
                all.log.info(text);
                return Ok((artifact, destination));
            }
            Err(error) => tries.failed(destination, error),
        }
    }
    Err(tries.none())
}

async fn read_whole(
    all: Restoration<'_>,
    object: &ManifestObject,
    artifact: &Artifact,
    destination: &Destination,
    reading: &mut Reading,
) -> Result<(), RunError> {
    let at = |e: StoreError| e.at(&destination.slug);
    let shelf = open(all.shared, destination).await?;
    let mut stream = shelf.read(&artifact.path, 0..object.stored_bytes).await.map_err(at)?;
    let mut hash = Sha256::new();
    while let Some(chunk) = stream.try_next().await.map_err(at)? {
        hash.update(&chunk);
        reading.add(chunk.len(), all.lease);
    }
    let same = hex::encode(hash.finalize()) == artifact.sha256 && artifact.sha256 == object.stored_sha256;
    if same { Ok(()) } else { Err(damaged(artifact)) }
}

/// Whether the server has said that it did not take the end. A connection that broke and a tool that was ended say nothing of
/// what it made of that: it may have committed, and wait for its standby. A server may speak another language than the tools:
/// then `pg_restore` says what it could not do, and psql ends with its status for an error in a script.
fn is_refused(error: &RunError) -> bool {
    let says = |words: &str| error.message.contains(words);
    let by_psql = says("psql into") && says("exited with status 3");
    error.code != "source_unreachable" && (says("ERROR:") || says("could not execute query") || by_psql)
}

async fn restore_one(
    all: Restoration<'_>,
    target: &Target<'_>,
    manifest: &Manifest,
    identity: &Option<Identity>,
    part: &Part<'_>,
    reading: &mut Reading,
) -> Result<(), RunError> {
    let mut span = all.lease.span(SpanKind::Client, "restore");
    target.describe(&mut span, Some(part.into));
    let (log, began) = (all.log.within(&span), Instant::now());
    let done = async {
        // Once more: somebody may have filled it while the backup was read.
        target.prepare(part.into, &log).await?;
        log.info(format!("restoring '{}' into '{}'", part.object.database, part.into));
        let Tools { tool, reader } = target.start(part.into, &log)?;
        all.touched.note(part.into, target.begun());
        let feeding = Feeding { all, target, manifest, identity, part };
        let done = match reader {
            None => feeding.direct(tool, reading, &mut span).await,
            Some(reader) => feeding.script(reader, tool, reading, &mut span).await,
        };
        match &done {
            Ok(()) => all.touched.over(true),
            Err(error) if all.lease.stop_reason().is_none() && is_refused(error) => all.touched.over(false),
            Err(_) => {}
        }
        done
    };
    let done = done.await;
    noted(&mut span, done)?;
    span.set_bytes(part.object.stored_bytes, began.elapsed());
    metrics::get().restored(manifest.engine.as_str()).inc_by(part.object.stored_bytes);
    log.info(format!("'{}' is restored: {} bytes", part.into, part.object.plain_bytes));
    Ok(())
}
