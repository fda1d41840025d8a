//! Local folders: `.part` file, fsync, rename, fsync of the folder.

use std::{
    io::{self, ErrorKind},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use common::{
    destination::LocalConfig,
    store::{Folder, MARKER, io_error},
};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use tokio::{fs, io::AsyncWriteExt};

use super::{Measure, StoreError};

/// A folder that backups are written to.
#[derive(Clone, Debug)]
pub struct LocalStore {
    folder: Folder,
}

impl LocalStore {
    /// Refuses a root outside the allowed folders.
    pub async fn open(config: &LocalConfig, allowed: &[PathBuf]) -> Result<Self, StoreError> {
        Ok(Self { folder: Folder::open(config, allowed).await? })
    }

    fn root(&self) -> &Path {
        self.folder.root()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path(path)
    }

    /// Beside the final name, hidden, so that a rename is enough and no glob over backups finds it.
    fn part(&self, path: &str) -> PathBuf {
        let path = self.path(path);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        path.with_file_name(format!(".{name}.part"))
    }

    /// The marker must be there.
    pub async fn check(&self) -> Result<(), StoreError> {
        self.folder.check().await
    }

    /// The marker must be there, and the file system take writes.
    pub async fn check_writable(&self) -> Result<(), StoreError> {
        self.folder.check_writable().await
    }

    /// Writes, reads and removes a small file; leaves the marker the first time.
    pub async fn test(&self, first: bool) -> Result<String, StoreError> {
        if first {
            match create_private(&self.root().join(MARKER)).await {
                Ok(mut file) => {
                    let text = b"This folder is a DBackup destination. Backups stop when this file is missing.\n";
                    let written = async {
                        file.write_all(text).await?;
                        file.sync_all().await
                    }
                    .await;
                    written.map_err(|e| io_error(&e, "write the marker in", self.root()))?;
                    sync_folder(self.root()).await.map_err(|e| io_error(&e, "sync", self.root()))?;
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io_error(&error, "write the marker in", self.root())),
            }
        }
        self.check().await?;
        let probe = self.root().join(format!(".dbackup-test-{}", uuid::Uuid::now_v7()));
        let tried = async {
            let mut file = create_private(&probe).await?;
            file.write_all(b"test").await?;
            file.sync_all().await
        }
        .await;
        let removed = fs::remove_file(&probe).await;
        tried.and(removed).map_err(|e| io_error(&e, "write to", self.root()))?;
        Ok(format!("{} is writable", self.root().display()))
    }

    /// Names a file, without making it.
    pub fn begin(&self, path: &str) -> LocalBegun {
        LocalBegun { store: self.clone(), path: path.to_owned() }
    }

    /// A small file: part, fsync, rename, fsync of the folder.
    pub async fn put(&self, path: &str, text: Bytes) -> Result<(), StoreError> {
        let measure = Measure { bytes: text.len() as u64, sha256: String::new() };
        let mut upload = self.begin(path).start().await?;
        upload.write(text).await?;
        upload.flush().await?;
        upload.publish(&measure).await
    }

    /// Removes the part file and the final one. Only where the store is really mounted: otherwise the files are
    /// elsewhere, and another worker or a later sweep finds them.
    pub async fn remove(&self, path: &str) -> Result<(), StoreError> {
        self.check().await?;
        for file in [self.part(path), self.path(path)] {
            match fs::remove_file(&file).await {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(io_error(&error, "remove", &file)),
                _ => {}
            }
        }
        Ok(())
    }

    /// The whole path.
    pub fn describe(&self, path: &str) -> String {
        self.path(path).display().to_string()
    }
}

/// A file that has a name but does not exist.
pub struct LocalBegun {
    store: LocalStore,
    path: String,
}

impl LocalBegun {
    /// Makes the part file; one that exists is somebody else's and an error.
    pub async fn start(self) -> Result<LocalUpload, StoreError> {
        let path = self.store.path(&self.path);
        within(STEP, &path, self.make()).await
    }

    async fn make(&self) -> Result<LocalUpload, StoreError> {
        let (part, path) = (self.store.part(&self.path), self.store.path(&self.path));
        let folder = path.parent().unwrap_or(self.store.root()).to_owned();
        if !fs::try_exists(&folder).await.unwrap_or(false) {
            // Not create_dir_all: the root itself must be there already.
            match fs::create_dir(&folder).await {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(io_error(&error, "make the folder", &folder));
                }
                _ => sync_folder(self.store.root()).await.map_err(|e| io_error(&e, "sync", self.store.root()))?,
            }
        }
        self.store.folder.within(&folder).await?;
        let file = create_private(&part).await.map_err(|e| io_error(&e, "make", &part))?;
        // The mount may have gone since the run began: then this file lies on the disk below it.
        if let Err(error) = self.store.folder.check_patiently().await {
            let _ = fs::remove_file(&part).await;
            return Err(error);
        }
        Ok(LocalUpload { store: self.store.clone(), file, part, path })
    }
}

/// Longest time of a step, as of a request to an object store: a mount that hangs would keep the run, and its slot.
const STEP: Duration = Duration::from_secs(240);
/// Longest time in which everything that was written is to be on the disk: the kernel may hold gigabytes of it.
const FLUSH: Duration = Duration::from_secs(1_800);

/// Does a step on a file within its time.
async fn within<T>(
    limit: Duration,
    path: &Path,
    step: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let silent = |_| {
        let text = format!("{} does not answer within {} s: does its mount hang?", path.display(), limit.as_secs());
        StoreError::retry("store_silent", text)
    };
    tokio::time::timeout(limit, step).await.map_err(silent)?
}

/// A part file that is written.
pub struct LocalUpload {
    store: LocalStore,
    file: fs::File,
    part: PathBuf,
    path: PathBuf,
}

impl LocalUpload {
    /// Takes the next bytes.
    pub async fn write(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        self.write_within(&chunk, STEP).await
    }

    async fn write_within(&mut self, chunk: &[u8], limit: Duration) -> Result<(), StoreError> {
        let Self { file, part, .. } = self;
        let write = async { file.write_all(chunk).await.map_err(|e| io_error(&e, "write to", part)) };
        within(limit, part, write).await
    }

    /// Forces everything to the disk. A full disk may show itself only here.
    pub async fn flush(&mut self) -> Result<(), StoreError> {
        let Self { file, part, .. } = self;
        let flush = async {
            file.flush().await?;
            file.sync_all().await
        };
        within(FLUSH, part, async { flush.await.map_err(|e| io_error(&e, "write to", part)) }).await
    }

    /// Gives the file its name, unless the name is taken, and forces the folder to the disk.
    pub async fn publish(&mut self, expected: &Measure) -> Result<(), StoreError> {
        within(STEP, &self.path, self.name(expected)).await
    }

    async fn name(&self, expected: &Measure) -> Result<(), StoreError> {
        let length = self.file.metadata().await.map_err(|e| io_error(&e, "look at", &self.part))?.len();
        if length != expected.bytes {
            return Err(StoreError::retry(
                "size_differs",
                format!("{} has {length} bytes, but {} were written to it", self.part.display(), expected.bytes),
            ));
        }
        self.store.folder.check_patiently().await?;
        let (part, path) = (self.part.clone(), self.path.clone());
        let renamed = tokio::task::spawn_blocking(move || rename_new(&part, &path)).await.map_err(io::Error::other);
        renamed.and_then(|r| r).map_err(|e| io_error(&e, "rename to", &self.path))?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        sync_folder(folder).await.map_err(|e| io_error(&e, "sync", folder))
    }
}

fn rename_new(part: &Path, path: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, part, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(()),
        // A file system without the flag (NFS, some FUSE). The token in the name makes a clash impossible but
        // for a copy that somebody put there.
        Err(nix::Error::EINVAL | nix::Error::ENOSYS | nix::Error::ENOTSUP) => match path.try_exists()? {
            true => Err(ErrorKind::AlreadyExists.into()),
            false => std::fs::rename(part, path),
        },
        Err(error) => Err(error.into()),
    }
}

async fn create_private(path: &Path) -> io::Result<fs::File> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    fs::OpenOptions::from(options).open(path).await
}

async fn sync_folder(path: &Path) -> io::Result<()> {
    fs::File::open(path).await?.sync_all().await
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use common::store::Class;

    use super::*;

    async fn store(root: &Path) -> LocalStore {
        let config = LocalConfig { root: root.to_owned() };
        LocalStore::open(&config, &[root.to_owned()]).await.expect("a store")
    }

    #[tokio::test]
    async fn what_was_begun_on_a_mount_that_has_gone_since_is_not_written_below_it() {
        let root = std::env::temp_dir().join(format!("mount-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&root).expect("a folder");
        let store = store(&root).await;
        store.test(true).await.expect("is writable");
        let (first, second) = (store.begin("job/first"), store.begin("job/second"));
        let mut upload = first.start().await.expect("begins");
        upload.flush().await.expect("flushes");
        std::fs::remove_file(root.join(MARKER)).expect("removes");
        let error = second.start().await.err().expect("the mount is gone");
        assert_eq!(error.code, "store_missing");
        let error = upload.publish(&Measure { bytes: 0, sha256: String::new() }).await.expect_err("the mount is gone");
        assert_eq!(error.code, "store_missing");
        let left: Vec<_> =
            std::fs::read_dir(root.join("job")).expect("a folder").flatten().map(|f| f.file_name()).collect();
        assert_eq!(left, [".first.part"], "one file was begun before");
        std::fs::remove_dir_all(&root).expect("removes");
    }

    #[tokio::test]
    async fn a_write_that_does_not_come_back_ends_after_its_time_and_may_be_tried_again() {
        let short = Duration::from_millis(50);
        // A pipe that nobody reads takes little, and then nothing.
        let (reader, writer) = io::pipe().expect("a pipe");
        let file = fs::File::from_std(OwnedFd::from(writer).into());
        let store = store(&std::env::temp_dir()).await;
        let mut upload = LocalUpload { store, file, part: "/hangs/.part".into(), path: "/hangs/file".into() };
        let chunk = vec![0; 1 << 20];
        let all = async { while let Ok(()) = upload.write_within(&chunk, short).await {} };
        tokio::time::timeout(Duration::from_secs(10), all).await.expect("a write ends");
        let error = upload.write_within(&chunk, short).await.expect_err("it hangs");
        assert_eq!((error.code, error.class), ("store_silent", Class::Retry), "{}", error.message);
        // The thread that hangs comes back, so that the test can end.
        drop(reader);
    }
}
