//! Local folders.

use std::{
    io::{self, ErrorKind, SeekFrom},
    ops::Range,
    path::{Component, Path, PathBuf},
};

use bytes::BytesMut;
use futures::{StreamExt, stream};
use tokio::{
    fs,
    io::{AsyncReadExt, AsyncSeekExt},
};

use super::{Bytestream, StoreError};
use crate::destination::LocalConfig;

/// Written once by the first test. A folder without it is not the store: a missing mount looks like an empty
/// folder, and a backup written there would be on the wrong disk.
pub const MARKER: &str = ".dbackup-store";

/// One read, at most.
const READ: usize = 256 << 10;

/// A folder that backups are written to.
#[derive(Clone, Debug)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// Refuses a root outside the allowed folders.
    pub fn open(config: &LocalConfig, allowed: &[PathBuf]) -> Result<Self, StoreError> {
        let root = &config.root;
        let climbs = root.components().any(|c| c == Component::ParentDir);
        // Links are followed where the folder exists, so that none leads outside.
        let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if climbs || !allowed.iter().any(|folder| real(root).starts_with(real(folder))) {
            let allowed: Vec<_> = allowed.iter().map(|p| p.display().to_string()).collect();
            return Err(StoreError::give_up(
                "path_not_allowed",
                format!("{} is not under DBACKUP_LOCAL_PATHS of this process ({})", root.display(), allowed.join(":")),
            ));
        }
        Ok(Self { root: root.clone() })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The whole path of an object.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The marker must be there.
    pub async fn check(&self) -> Result<(), StoreError> {
        match fs::metadata(self.root.join(MARKER)).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(StoreError::give_up(
                "store_missing",
                format!(
                    "{} holds no {MARKER}: is the mount missing? (A new destination gets the file from its first test: POST /api/destinations/…/test)",
                    self.root.display()
                ),
            )),
            Err(error) => Err(io_error(&error, "look for the marker in", &self.root)),
        }
    }

    /// A folder within, which must not lead out by a link.
    pub async fn within(&self, folder: &Path) -> Result<(), StoreError> {
        let inside = fs::canonicalize(folder).await.map_err(|e| io_error(&e, "open", folder))?;
        let root = fs::canonicalize(&self.root).await.map_err(|e| io_error(&e, "open", &self.root))?;
        match inside.starts_with(&root) {
            true => Ok(()),
            false => Err(StoreError::give_up(
                "path_not_allowed",
                format!("{} leads out of the destination: remove the link", folder.display()),
            )),
        }
    }

    pub(super) async fn read(&self, path: &str, range: Range<u64>) -> Result<Bytestream, StoreError> {
        self.check().await?;
        let path = self.path(path);
        let gone = |error: &io::Error| match error.kind() {
            ErrorKind::NotFound => StoreError::give_up(
                "object_missing",
                format!("{} is not there any more: somebody removed or moved it", path.display()),
            ),
            _ => io_error(error, "read", &path),
        };
        let mut file = fs::File::open(&path).await.map_err(|e| gone(&e))?;
        self.within(&path).await?;
        file.seek(SeekFrom::Start(range.start)).await.map_err(|e| gone(&e))?;
        let left = range.end.saturating_sub(range.start);
        let chunks = stream::try_unfold((file, left, path), |(mut file, left, path)| async move {
            if left == 0 {
                return Ok(None);
            }
            let most = READ.min(usize::try_from(left).unwrap_or(READ));
            let mut chunk = BytesMut::with_capacity(most);
            let read = (&mut file).take(most as u64).read_buf(&mut chunk).await;
            match read.map_err(|e| io_error(&e, "read", &path))? {
                0 => Err(StoreError::give_up("object_damaged", format!("{} is cut off", path.display()))),
                n => Ok(Some((chunk.freeze(), (file, left - n as u64, path)))),
            }
        });
        Ok(chunks.boxed())
    }
}

/// A failure of a file system, with what to do about it.
pub fn io_error(error: &io::Error, doing: &str, path: &Path) -> StoreError {
    let text = |hint: &str| format!("could not {doing} {}: {error}{hint}", path.display());
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            StoreError::give_up("disk_full", text("; free space or choose another destination"))
        }
        ErrorKind::ReadOnlyFilesystem => StoreError::give_up("read_only", text("; remount it writable")),
        ErrorKind::PermissionDenied => {
            StoreError::give_up("permission_denied", text("; the user of this process needs the right to it"))
        }
        ErrorKind::NotFound => StoreError::give_up("store_missing", text("; is the mount missing?")),
        ErrorKind::AlreadyExists => StoreError::give_up("name_taken", text("; nothing is overwritten")),
        _ => StoreError::retry("store_failed", text("")),
    }
}
