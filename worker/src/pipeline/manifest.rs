//! The manifest: the last file written, and the mark that the backup is whole.

use chrono::{DateTime, Utc};
use common::{job::Compression, label::Labels, source::Engine};
use serde::{Deserialize, Serialize};

/// Newest version of the stored form that is known here.
pub const NEWEST_VERSION: u32 = 2;

/// Version of the stored form: 1, or 2 where it is encrypted, so that what knows no encryption leaves it alone.
pub fn version(encrypted: bool) -> u32 {
    if encrypted { 2 } else { 1 }
}

/// What lies beside the objects of a backup; see `docs/format.md`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// See [`version`].
    pub format_version: u32,
    /// Which run made it.
    pub execution_id: String,
    /// Its trace.
    pub trace_id: Option<String>,
    /// Id of the job.
    pub job_id: String,
    /// Slug of the job.
    pub job: String,
    /// What the dump is of.
    pub engine: Engine,
    /// Version of the server.
    pub server_version: String,
    /// Version of the tool that wrote the dump.
    pub tool_version: String,
    /// The time whose data it holds, by the server's clock.
    #[serde(serialize_with = "common::time::millis")]
    pub snapshot_at: DateTime<Utc>,
    /// zstd, gzip or none.
    pub compression: Compression,
    /// Recipients of the encryption; empty when it is not encrypted.
    pub recipients: Vec<String>,
    /// Labels of the execution.
    pub labels: Labels,
    /// Retention leaves it alone.
    pub locked: bool,
    /// One for each database.
    pub objects: Vec<ManifestObject>,
}

/// One stored object.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestObject {
    /// Name of the database as the server has it.
    pub database: String,
    /// File name, beside the manifest.
    pub file: String,
    /// As stored.
    pub stored_bytes: u64,
    /// Hex, of the stored bytes: `sha256sum` of the file.
    pub stored_sha256: String,
    /// Before compression.
    pub plain_bytes: u64,
    /// Hex, of the dump.
    pub plain_sha256: String,
}
