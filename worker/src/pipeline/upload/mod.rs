//! Destinations. An upload is staged first (nothing visible), then published.
//!
//! S3 goes through `object_store` and not OpenDAL, because only its multipart interface shows the upload id: it
//! is recorded before the first byte, so that an upload of a killed worker can be aborted without listing the
//! bucket.

mod local;
mod s3;

use std::path::PathBuf;

use bytes::Bytes;
use common::{destination::DestinationAccess, store::StoreError};

use super::meter::Measure;
pub use local::LocalStore;
pub use s3::S3Store;

/// An opened destination.
#[derive(Debug)]
pub enum Store {
    /// A folder.
    Local(LocalStore),
    /// An object store.
    S3(S3Store),
}

impl Store {
    /// Opens a destination without asking it for anything. `allowed` are the folders of `DBACKUP_LOCAL_PATHS`.
    pub async fn open(access: DestinationAccess, allowed: &[PathBuf]) -> Result<Self, StoreError> {
        Ok(match access {
            DestinationAccess::Local(config) => Store::Local(LocalStore::open(&config, allowed).await?),
            DestinationAccess::S3 { config, secret_access_key } => {
                Store::S3(S3Store::open(&config, &secret_access_key)?)
            }
        })
    }

    /// What it is, as clients write it.
    pub fn kind(&self) -> &'static str {
        match self {
            Store::Local(_) => "local",
            Store::S3(_) => "s3",
        }
    }

    /// Whether a run may begin to write.
    pub async fn check(&self) -> Result<(), StoreError> {
        match self {
            Store::Local(store) => store.check().await,
            Store::S3(_) => Ok(()),
        }
    }

    /// Writes something small and takes it away again. `first` is true until a test once succeeded: it may then
    /// leave the marker.
    pub async fn test(&self, first: bool) -> Result<String, StoreError> {
        match self {
            Store::Local(store) => store.test(first).await,
            Store::S3(store) => store.test().await,
        }
    }

    /// Prepares an upload. Nothing is written before [`Begun::start`], so that its name is recorded first.
    pub async fn begin(&self, path: &str, estimate_bytes: u64) -> Result<Begun, StoreError> {
        Ok(match self {
            Store::Local(store) => Begun::Local(store.begin(path)),
            Store::S3(store) => Begun::S3(store.begin(path, estimate_bytes).await?),
        })
    }

    /// Writes a small object at once, visible when it is whole.
    pub async fn put(&self, path: &str, text: Bytes) -> Result<(), StoreError> {
        match self {
            Store::Local(store) => store.put(path, text).await,
            Store::S3(store) => store.put(path, text).await,
        }
    }

    /// Removes whatever an attempt left under a name: a part file, an open upload, an unpublished object. `again` when it
    /// was removed before.
    pub async fn remove(&self, path: &str, upload_id: Option<&str>, again: bool) -> Result<(), StoreError> {
        match self {
            Store::Local(store) => store.remove(path).await,
            Store::S3(store) => store.remove(path, upload_id, again).await,
        }
    }

    /// Where a path lies, for people.
    pub fn describe(&self, path: &str) -> String {
        match self {
            Store::Local(store) => store.describe(path),
            Store::S3(store) => store.describe(path),
        }
    }
}

/// An upload that has a name but no byte.
pub enum Begun {
    /// A file to be made.
    Local(local::LocalBegun),
    /// A multipart upload that is open.
    S3(s3::S3Upload),
}

impl Begun {
    /// What an object store calls the upload.
    pub fn id(&self) -> Option<&str> {
        match self {
            Begun::Local(_) => None,
            Begun::S3(upload) => Some(upload.id()),
        }
    }

    /// Ready to be written to.
    pub async fn start(self) -> Result<Upload, StoreError> {
        Ok(match self {
            Begun::Local(begun) => Upload::Local(begun.start().await?),
            Begun::S3(upload) => Upload::S3(upload),
        })
    }
}

/// An upload that is written.
pub enum Upload {
    /// Into a part file.
    Local(local::LocalUpload),
    /// In parts.
    S3(s3::S3Upload),
}

impl Upload {
    /// Takes the next bytes.
    pub async fn write(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        match self {
            Upload::Local(upload) => upload.write(chunk).await,
            Upload::S3(upload) => upload.write(chunk).await,
        }
    }

    /// All bytes are safely there, still not visible.
    pub async fn flush(&mut self) -> Result<(), StoreError> {
        match self {
            Upload::Local(upload) => upload.flush().await,
            Upload::S3(upload) => upload.flush().await,
        }
    }

    /// Makes the object visible and compares what is stored with what was sent. Tells what could not be compared.
    pub async fn publish(&mut self, expected: &Measure) -> Result<Option<String>, StoreError> {
        match self {
            Upload::Local(upload) => upload.publish(expected).await.map(|()| None),
            Upload::S3(upload) => upload.publish(expected).await,
        }
    }
}
