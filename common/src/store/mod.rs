//! Stores, as far as more than the workers need them: opening one, and reading what lies in it. A worker restores from
//! there, an API process hands out downloads. How backups are written is the workers' affair.

mod local;
mod s3;

use std::{ops::Range, path::PathBuf};

use bytes::Bytes;
use futures::stream::BoxStream;

use crate::destination::DestinationAccess;
pub use local::{Folder, MARKER, io_error};
pub use s3::Bucket;

/// Whether to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Network, 5xx, locks: a pause may help.
    Retry,
    /// Password, disk full, missing database: only a person helps.
    GiveUp,
}

/// Why a destination refused; the caller knows which destination.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// What was done, what the store said, what to do.
    pub message: String,
    /// For programs.
    pub code: &'static str,
    /// Whether to try again.
    pub class: Class,
}

impl StoreError {
    /// A failure that another try may mend.
    pub fn retry(code: &'static str, message: impl Into<String>) -> Self {
        Self { message: message.into(), code, class: Class::Retry }
    }

    /// A failure that only a person mends.
    pub fn give_up(code: &'static str, message: impl Into<String>) -> Self {
        Self { message: message.into(), code, class: Class::GiveUp }
    }
}

/// Bytes of an object, in order. An object that ends before the last byte that was asked for ends with an error.
pub type Bytestream = BoxStream<'static, Result<Bytes, StoreError>>;

/// A destination that is read.
#[derive(Clone, Debug)]
pub enum Shelf {
    /// A folder.
    Local(Folder),
    /// An object store.
    S3(Bucket),
}

impl Shelf {
    /// Opens a destination without asking it for anything. `allowed` are the folders of `DBACKUP_LOCAL_PATHS`.
    pub async fn open(access: DestinationAccess, allowed: &[PathBuf]) -> Result<Self, StoreError> {
        Ok(match access {
            DestinationAccess::Local(config) => Shelf::Local(Folder::open(&config, allowed).await?),
            DestinationAccess::S3 { config, secret_access_key } => {
                Shelf::S3(Bucket::open(&config, &secret_access_key)?)
            }
        })
    }

    /// Reads a part of an object. What is wrong with the object shows itself here or in the stream.
    pub async fn read(&self, path: &str, range: Range<u64>) -> Result<Bytestream, StoreError> {
        match self {
            Shelf::Local(folder) => folder.read(path, range).await,
            Shelf::S3(bucket) => Ok(bucket.read(path, range)),
        }
    }
}
