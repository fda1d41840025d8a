//! Local folders.

use std::{
    collections::HashSet,
    io::{self, ErrorKind, SeekFrom},
    ops::Range,
    path::{Component, Path, PathBuf},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
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

/// Longest time of a look at a folder.
const LOOK: Duration = Duration::from_secs(10);

/// Folders that a look has not come back from. A mount that hangs keeps every thread that looks at it, and there are only so
/// many for all folders: nobody else looks there until the first comes back.
static HANGING: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);

fn hanging() -> MutexGuard<'static, HashSet<PathBuf>> {
    HANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at `folder` on a thread of its own, for at most `limit`.
async fn look<T: Send + 'static>(
    folder: &Path,
    limit: Duration,
    look: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StoreError> {
    let silent = || {
        let text = format!("{} does not answer: does its mount hang?", folder.display());
        Err(StoreError::retry("store_silent", text))
    };
    if hanging().contains(folder) {
        return silent();
    }
    let mut looking = tokio::task::spawn_blocking(look);
    match tokio::time::timeout(limit, &mut looking).await {
        Ok(Ok(seen)) => Ok(seen),
        Ok(Err(error)) => Err(StoreError::retry("store_failed", format!("a look at a folder ended: {error}"))),
        Err(_) => {
            let folder = folder.to_owned();
            hanging().insert(folder.clone());
            tokio::spawn(async move {
                let _ = looking.await;
                hanging().remove(&folder);
            });
            silent()
        }
    }
}

/// A folder that backups are written to.
#[derive(Clone, Debug)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// Refuses a root outside the allowed folders.
    pub async fn open(config: &LocalConfig, allowed: &[PathBuf]) -> Result<Self, StoreError> {
        let root = &config.root;
        if !look(root, LOOK, is_within(root.clone(), allowed.to_owned())).await? {
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
        let marker = self.root.join(MARKER);
        self.judge(look(&self.root, LOOK, move || std::fs::metadata(marker)).await?)
    }

    /// The same, for as long as it takes: for one who has a limit of his own.
    pub async fn check_patiently(&self) -> Result<(), StoreError> {
        self.judge(fs::metadata(self.root.join(MARKER)).await)
    }

    fn judge(&self, marker: io::Result<std::fs::Metadata>) -> Result<(), StoreError> {
        match marker {
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

    /// The marker must be there, and the folder take files of this process.
    pub async fn check_writable(&self) -> Result<(), StoreError> {
        self.check().await?;
        let root = self.root.clone();
        let taken = look(&self.root, LOOK, move || nix::unistd::access(&root, nix::unistd::AccessFlags::W_OK)).await?;
        taken.map_err(|errno| io_error(&errno.into(), "write to", &self.root))
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

/// Whether a folder lies in one of these. Links are followed where it exists, so that none leads outside.
fn is_within(folder: PathBuf, allowed: Vec<PathBuf>) -> impl FnOnce() -> bool + Send + 'static {
    let real = |path: PathBuf| std::fs::canonicalize(&path).unwrap_or(path);
    move || {
        let climbs = folder.components().any(|c| c == Component::ParentDir);
        let folder = real(folder);
        !climbs && allowed.into_iter().any(|one| folder.starts_with(real(one)))
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_folder_that_hangs_keeps_one_thread_and_no_other_folder_and_is_looked_at_again_when_it_is_back() {
        let (hanging, other) = (Path::new("/hangs"), Path::new("/answers"));
        let (back, comes_back) = channel::<()>();
        let hung = look(hanging, SHORT, move || comes_back.recv()).await;
        assert_eq!(hung.expect_err("no answer").code, "store_silent");
        let (caught, catches) = channel();
        let refused = look(hanging, SHORT, move || caught.send(())).await;
        assert_eq!(refused.expect_err("it hangs still").code, "store_silent");
        assert!(catches.recv().is_err(), "another thread was sent there");
        assert_eq!(look(other, SHORT, || 7).await.expect("it answers"), 7);
        back.send(()).expect("somebody hears");
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while look(hanging, SHORT, || ()).await.is_err() {
            assert!(std::time::Instant::now() < end, "never looked at again");
            tokio::task::yield_now().await;
        }
    }
}
