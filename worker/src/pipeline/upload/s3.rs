//! S3 and what speaks its protocol: multipart upload, completed only when the dump is known to be good. Put and
//! abort rights suffice.

use bytes::{Bytes, BytesMut};
use common::{destination::S3Config, store::Bucket};
use object_store::{
    Error, MultipartId, ObjectStoreExt, PutPayload,
    multipart::{MultipartStore, PartId},
    path::Path,
};
use secrecy::SecretString;
use tokio::task::JoinSet;

use super::{Measure, StoreError};

const MIN_PART_BYTES: u64 = 8 << 20;
const MAX_PARTS: u64 = 10_000;
/// Parts of one upload under way at once; with one more being gathered this bounds the memory.
const PARTS_AT_ONCE: usize = 2;

/// A bucket that is written to.
#[derive(Clone, Debug)]
pub struct S3Store(Bucket);

impl S3Store {
    /// Prepares the client without a request.
    pub fn open(config: &S3Config, secret: &SecretString) -> Result<Self, StoreError> {
        Ok(Self(Bucket::open(config, secret)?))
    }

    /// Opens and aborts a multipart upload: the rights that a backup needs, and no object stays.
    pub async fn test(&self) -> Result<String, StoreError> {
        let key = self.0.key(&format!(".dbackup-test-{}", uuid::Uuid::now_v7()));
        let id = self.0.client().create_multipart(&key).await.map_err(|e| self.0.error(&e, "begin an upload to"))?;
        self.0.client().abort_multipart(&key, &id).await.map_err(|e| self.0.error(&e, "abort an upload to"))?;
        Ok(format!("bucket '{}' takes uploads", self.0.name()))
    }

    /// Opens a multipart upload; it costs nothing while it has no part.
    pub async fn begin(&self, path: &str, estimate_bytes: u64) -> Result<S3Upload, StoreError> {
        let key = self.0.key(path);
        let id = self.0.client().create_multipart(&key).await.map_err(|e| self.0.error(&e, "begin an upload to"))?;
        Ok(S3Upload {
            store: self.clone(),
            key,
            id,
            part_bytes: usize::try_from(part_bytes(estimate_bytes)).unwrap_or(usize::MAX),
            gathered: BytesMut::new(),
            under_way: JoinSet::new(),
            parts: Vec::new(),
        })
    }

    /// One request: the object is there whole or not at all.
    pub async fn put(&self, path: &str, text: Bytes) -> Result<(), StoreError> {
        self.0.client().put(&self.0.key(path), text.into()).await.map_err(|e| self.0.error(&e, "write to"))?;
        Ok(())
    }

    /// Aborts an open upload. One that is not open any more was completed and not published: then the object goes. `again`
    /// it may only be that it was aborted before.
    pub async fn remove(&self, path: &str, upload_id: Option<&str>, again: bool) -> Result<(), StoreError> {
        let key = self.0.key(path);
        if let Some(id) = upload_id {
            match self.0.client().abort_multipart(&key, &id.to_owned()).await {
                Ok(()) => return Ok(()),
                Err(Error::NotFound { .. }) if again => return self.remove_late(&key).await,
                Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(self.0.error(&error, "abort an upload to")),
            }
        }
        match self.0.client().delete(&key).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.0.error(&error, "delete from")),
        }
    }

    /// Of an upload that was aborted before: the store may have been completing it just then, which takes it up to minutes,
    /// and have answered the abort all the same. To look and to delete are more than a backup needs the right to.
    async fn remove_late(&self, key: &Path) -> Result<(), StoreError> {
        let blind = match self.0.client().head(key).await {
            Ok(_) => false,
            Err(Error::NotFound { .. }) => return Ok(()),
            Err(error) if is_denied(&error) => true,
            Err(error) => return Err(self.0.error(&error, "look at an object in")),
        };
        match self.0.client().delete(key).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) if blind && is_denied(&error) => Ok(()),
            Err(error) => Err(self.0.error(&error, "delete from")),
        }
    }

    /// As a URL.
    pub fn describe(&self, path: &str) -> String {
        self.0.describe(path)
    }
}

fn is_denied(error: &Error) -> bool {
    matches!(error, Error::PermissionDenied { .. } | Error::Unauthenticated { .. })
}

/// Fixed at the start, since stores want equal parts: twice the estimate must fit into the parts allowed.
fn part_bytes(estimate_bytes: u64) -> u64 {
    (estimate_bytes.saturating_mul(2) / MAX_PARTS + 1).next_multiple_of(1 << 20).max(MIN_PART_BYTES)
}

/// A multipart upload that is written.
pub struct S3Upload {
    store: S3Store,
    key: Path,
    id: MultipartId,
    part_bytes: usize,
    gathered: BytesMut,
    under_way: JoinSet<(usize, object_store::Result<PartId>)>,
    parts: Vec<Option<PartId>>,
}

impl S3Upload {
    /// What the store calls it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Takes the next bytes; waits while enough parts are under way.
    pub async fn write(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        let mut chunk = &chunk[..];
        while !chunk.is_empty() {
            if self.gathered.is_empty() {
                // Whole at once: grown byte by byte it would take up to twice as much.
                self.gathered.reserve(self.part_bytes);
            }
            let room = self.part_bytes - self.gathered.len();
            let (now, later) = chunk.split_at(room.min(chunk.len()));
            self.gathered.extend_from_slice(now);
            chunk = later;
            if self.gathered.len() == self.part_bytes {
                self.send_part().await?;
            }
        }
        Ok(())
    }

    async fn send_part(&mut self) -> Result<(), StoreError> {
        while self.under_way.len() >= PARTS_AT_ONCE {
            self.take_part().await?;
        }
        let index = self.parts.len();
        if index as u64 >= MAX_PARTS {
            let most = (self.part_bytes as u64 * MAX_PARTS) >> 30;
            return Err(StoreError::give_up(
                "object_too_large",
                format!(
                    "the dump is larger than the {most} GiB that the size of its database made room for: compress it"
                ),
            ));
        }
        self.parts.push(None);
        let payload = PutPayload::from(self.gathered.split().freeze());
        let (client, key, id) = (self.store.0.client().clone(), self.key.clone(), self.id.clone());
        self.under_way.spawn(async move { (index, client.put_part(&key, &id, index, payload).await) });
        Ok(())
    }

    async fn take_part(&mut self) -> Result<(), StoreError> {
        match self.under_way.join_next().await {
            None => Ok(()),
            Some(Ok((index, Ok(part)))) => {
                self.parts[index] = Some(part);
                Ok(())
            }
            Some(Ok((_, Err(error)))) => Err(self.store.0.error(&error, "upload a part to")),
            Some(Err(error)) => Err(StoreError::retry("store_failed", format!("an upload task ended: {error}"))),
        }
    }

    /// Sends what is left and waits for every part.
    pub async fn flush(&mut self) -> Result<(), StoreError> {
        if !self.gathered.is_empty() || self.parts.is_empty() {
            self.send_part().await?;
        }
        while !self.under_way.is_empty() {
            self.take_part().await?;
        }
        Ok(())
    }

    /// Completes the upload, which is what makes it visible, and asks for the size where that is allowed.
    pub async fn publish(&mut self, expected: &Measure) -> Result<Option<String>, StoreError> {
        let parts: Option<Vec<PartId>> = self.parts.iter().cloned().collect();
        let parts = parts.ok_or_else(|| StoreError::retry("store_failed", "a part was not confirmed"))?;
        // It may have been completed all the same: the answer to an earlier try was lost, or took longer than its time, as
        // that of a large object may. The size below tells.
        let failed = self.store.0.client().complete_multipart(&self.key, &self.id, parts).await.err();
        match self.store.0.client().head(&self.key).await {
            Ok(found) if found.size == expected.bytes => Ok(None),
            Ok(found) => Err(StoreError::retry(
                "size_differs",
                format!("{} has {} bytes, but {} were sent", self.key, found.size, expected.bytes),
            )),
            Err(error) => match failed {
                Some(failed) => Err(self.store.0.error(&failed, "complete an upload to")),
                None if is_denied(&error) => Ok(Some(
                    "the stored size could not be compared, because this key may not read; each part was confirmed"
                        .to_owned(),
                )),
                None => Err(self.store.0.error(&error, "look at an object in")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_the_estimate_fits_into_the_parts_that_stores_allow() {
        for estimate in [0, 1 << 20, 40 << 30, 5 << 40] {
            let part = part_bytes(estimate);
            assert!(part >= 8 << 20 && part * MAX_PARTS >= estimate * 2, "{estimate}");
        }
        assert_eq!(part_bytes(0), 8 << 20);
    }
}
