//! What is counted of a stream between its parts: length, checksum, both ends; and how a part hands on what it made.

use std::io::{self, Write};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

/// Length and checksum of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Bytes.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// First and last bytes of a dump: what its format says about being whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// At most [`END_BYTES`] from the beginning.
    pub head: Vec<u8>,
    /// At most [`END_BYTES`] from the end.
    pub tail: Vec<u8>,
}

/// How much [`Ends`] keeps.
pub const END_BYTES: usize = 256;

impl Ends {
    fn add(&mut self, chunk: &[u8]) {
        let missing = END_BYTES - self.head.len();
        self.head.extend_from_slice(&chunk[..missing.min(chunk.len())]);
        self.tail.extend_from_slice(&chunk[chunk.len().saturating_sub(END_BYTES)..]);
        let surplus = self.tail.len().saturating_sub(END_BYTES);
        self.tail.drain(..surplus);
    }
}

/// What went in and what came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Streamed {
    /// The dump.
    pub plain: Measure,
    /// How the dump begins and ends.
    pub plain_ends: Ends,
    /// What is stored.
    pub stored: Measure,
}

#[derive(Default)]
struct Meter {
    bytes: u64,
    hash: Sha256,
}

impl Meter {
    fn add(&mut self, chunk: &[u8]) {
        self.bytes += chunk.len() as u64;
        self.hash.update(chunk);
    }

    fn end(self) -> Measure {
        Measure { bytes: self.bytes, sha256: hex::encode(self.hash.finalize()) }
    }
}

/// Sends what is written to it on, in chunks of about [`CHUNK`].
pub struct Outlet {
    meter: Meter,
    gathered: Vec<u8>,
    sender: mpsc::Sender<Bytes>,
}

const CHUNK: usize = 256 << 10;

impl Outlet {
    /// Into a channel.
    pub fn new(sender: mpsc::Sender<Bytes>) -> Self {
        Self { meter: Meter::default(), gathered: Vec::with_capacity(CHUNK), sender }
    }

    fn send(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let chunk = Bytes::from(std::mem::replace(&mut self.gathered, Vec::with_capacity(CHUNK)));
        self.meter.add(&chunk);
        // The other end goes when the run is stopped or a destination failed; the reason is told there.
        self.sender.blocking_send(chunk).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Sends the rest, and measures all of it.
    pub fn end(mut self) -> io::Result<Measure> {
        self.send()?;
        Ok(self.meter.end())
    }
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() >= CHUNK {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Measures the dump on its way to the compression, on a thread of its own so that the checksum does not add to the
/// time of the compression. Blocks.
pub fn measure(mut input: mpsc::Receiver<Bytes>, output: mpsc::Sender<Bytes>) -> (Measure, Ends) {
    let (mut meter, mut ends) = (Meter::default(), Ends::default());
    while let Some(chunk) = input.blocking_recv() {
        meter.add(&chunk);
        ends.add(&chunk);
        // A closed channel: the compression ended first, and tells why.
        if output.blocking_send(chunk).is_err() {
            break;
        }
    }
    (meter.end(), ends)
}
