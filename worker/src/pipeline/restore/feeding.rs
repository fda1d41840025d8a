//! The stored bytes, unpacked, into the tool that restores; its end only when all of them are known to be right.

use age::x25519::Identity;
use bytes::Bytes;
use common::{store::StoreError, telemetry::Span};
use futures::TryStreamExt;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{ChildStdin, ChildStdout},
    sync::mpsc,
};

use super::{Part, Reading, Restoration, open, target::Target, touched::Now, unpack};
use crate::{
    failure::{At, RunError},
    pipeline::{
        QUEUE,
        dump::{self, child::Running},
        manifest::Manifest,
        threads::apart,
    },
};

/// What is fed, and for whom.
pub struct Feeding<'a> {
    /// The restore.
    pub all: Restoration<'a>,
    /// Where to.
    pub target: &'a Target<'a>,
    /// Of the backup.
    pub manifest: &'a Manifest,
    /// What opens it, where it is encrypted.
    pub identity: &'a Option<Identity>,
    /// The database.
    pub part: &'a Part<'a>,
}

/// What became of feeding a tool.
enum Fed {
    /// It took everything.
    Whole,
    /// It stopped taking: it has ended.
    Refused,
}

impl Feeding<'_> {
    /// Into a tool that speaks to the server itself.
    pub async fn direct(&self, mut tool: Running, reading: &mut Reading, span: &mut Span) -> Result<(), RunError> {
        let mut stdin = tool.stdin();
        let fed = self.feed(&mut stdin, self.target.ending(), reading).await;
        if fed.is_err() {
            // Before its input ends: it must not take that for the end of the backup.
            tool.kill();
        }
        drop(stdin);
        let ended = tool.wait().await?;
        dump::tell(&ended, span);
        match (fed?, ended.status.success()) {
            (Fed::Refused, true) => Err(early(&ended.name)),
            _ => self.target.ended(self.part.into, ended),
        }
    }

    /// Into pg_restore, whose script goes through psql without what the server does not know. psql commits when its input
    /// ends: so that ends only when pg_restore has ended well, and a heartbeat was acknowledged after that.
    pub async fn script(
        &self,
        mut reader: Running,
        mut psql: Running,
        reading: &mut Reading,
        span: &mut Span,
    ) -> Result<(), RunError> {
        let (mut stdin, mut commands) = (reader.stdin(), psql.stdin());
        let script = reader.stdout();
        let feeding = async {
            let fed = self.feed(&mut stdin, Now::Open, reading).await;
            if fed.is_err() {
                reader.kill();
            }
            stdin = None;
            fed
        };
        let (fed, relayed) = tokio::join!(feeding, relay(script, &mut commands));
        let read = reader.wait().await?;
        let whole = matches!((&fed, read.status.success(), relayed), (Ok(Fed::Whole), true, true));
        let confirmed = if whole { self.all.shared.keeper.confirm(self.all.lease).await.is_ok() } else { false };
        // A psql that took no more has ended by itself, and says why.
        if !confirmed && relayed {
            psql.kill();
        } else if confirmed {
            self.all.touched.note(self.part.into, Now::Sent);
        }
        drop(commands);
        let ended = psql.wait().await?;
        dump::tell(if read.status.success() { &ended } else { &read }, span);
        match fed? {
            _ if !relayed && !ended.status.success() => self.target.ended(self.part.into, ended),
            _ if !read.status.success() => self.target.ended(self.part.into, read),
            Fed::Refused => Err(early(&read.name)),
            Fed::Whole if !relayed => Err(early(&ended.name)),
            Fed::Whole if !confirmed => Err(lost()),
            Fed::Whole => self.target.ended(self.part.into, ended),
        }
    }

    /// Feeds everything; the last of it when it is known to be right, of which `ending` is noted.
    async fn feed(&self, stdin: &mut Option<ChildStdin>, ending: Now, reading: &mut Reading) -> Result<Fed, RunError> {
        let Feeding { all, target, manifest, identity, part } = self;
        let (artifact, destination) = part.copy;
        let at = |e: StoreError| e.at(&destination.slug);
        let shelf = open(all.shared, destination).await?;
        let mut stream = shelf.read(&artifact.path, 0..part.object.stored_bytes).await.map_err(at)?;
        let (stored_out, stored_in) = mpsc::channel(QUEUE);
        let (plain_out, plain_in) = mpsc::channel(QUEUE);
        let how = unpack::Packed { identity: (*identity).clone(), compression: manifest.compression };
        let rename = target.rename(&part.object.database, part.into);
        let unpacking = apart("unpack", move || unpack::unpack(how, rename, stored_in, plain_out));
        let stored = async {
            let mut hash = Sha256::new();
            while let Some(chunk) = stream.try_next().await.map_err(at)? {
                hash.update(&chunk);
                reading.add(chunk.len(), all.lease);
                // Closed when the tool has ended, or the bytes cannot be unpacked: told there.
                if stored_out.send(chunk).await.is_err() {
                    break;
                }
            }
            drop(stored_out);
            Ok::<_, RunError>(hex::encode(hash.finalize()))
        };
        let writing = async { Ok(write(plain_in, stdin).await) };
        let (stored, written) = tokio::try_join!(stored, writing)?;
        let unpacked = unpacking
            .await
            .map_err(|_| RunError::retry("internal_error", "a thread could not be started, or broke off"))?;
        let Some(last) = written else { return Ok(Fed::Refused) };
        let plain = unpacked
            .map_err(|e| RunError::give_up("backup_damaged", format!("{} cannot be unpacked: {e}", artifact.path)))?;
        if stored != part.object.stored_sha256 || plain.sha256 != part.object.plain_sha256 {
            return Err(RunError::give_up(
                "backup_damaged",
                format!("{} changed while it was restored", artifact.path),
            ));
        }
        let confirmed = all.shared.keeper.confirm(all.lease).await;
        confirmed.map_err(|_| lost())?;
        let Some(mut stdin) = stdin.take() else { return Ok(Fed::Refused) };
        all.touched.note(part.into, ending);
        match stdin.write_all(&last).await.and(stdin.shutdown().await) {
            Ok(()) => Ok(Fed::Whole),
            Err(_) => Ok(Fed::Refused),
        }
    }
}

fn early(tool: &str) -> RunError {
    RunError::give_up("restore_failed", format!("{tool} ended before the backup did"))
}

fn lost() -> RunError {
    RunError::retry("lease_lost", "the lease was lost before the restore was complete")
}

/// What pg_restore 17 and later begin with, and servers before 17 refuse.
const UNKNOWN: &[u8] = b"SET transaction_timeout = 0;\n";
/// Where it stands, at most so far from the beginning.
const HEAD: usize = 16 << 10;

/// Hands a script on without [`UNKNOWN`]; gives whether all of it was taken. `to` stays open.
async fn relay(script: Option<ChildStdout>, to: &mut Option<ChildStdin>) -> bool {
    let (Some(mut script), Some(to)) = (script, to.as_mut()) else { return false };
    let (mut head, mut chunk) = (Vec::new(), vec![0; 256 << 10]);
    let mut begun = false;
    loop {
        let n = match script.read(&mut chunk).await {
            Ok(n) => n,
            Err(_) => return false,
        };
        if !begun {
            head.extend_from_slice(&chunk[..n]);
            if n > 0 && head.len() < HEAD {
                continue;
            }
            if let Some(at) = memchr::memmem::find(&head, UNKNOWN) {
                head.drain(at..at + UNKNOWN.len());
            }
            begun = true;
            if to.write_all(&head).await.is_err() {
                return false;
            }
        } else if to.write_all(&chunk[..n]).await.is_err() {
            return false;
        }
        if n == 0 {
            return to.flush().await.is_ok();
        }
    }
}

/// Writes all but the last chunk, and gives that; `None` when the tool takes no more.
async fn write(mut chunks: mpsc::Receiver<Bytes>, stdin: &mut Option<ChildStdin>) -> Option<Bytes> {
    let stdin = stdin.as_mut()?;
    let mut kept: Option<Bytes> = None;
    while let Some(chunk) = chunks.recv().await {
        if let Some(before) = kept.replace(chunk) {
            stdin.write_all(&before).await.ok()?;
        }
    }
    Some(kept.unwrap_or_default())
}
