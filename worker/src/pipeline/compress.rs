//! Compression and the checksums on both sides of it, on threads of their own: they are the one part of a run that is
//! bound by the processor.

use std::{
    io::{self, Write},
    time::Instant,
};

use bytes::Bytes;
use common::{job::Compression, telemetry::Span};
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use zstd::zstd_safe::CParameter;

/// zstd's own default: 344 MB/s and 2.3 : 1 on a sample of system files, one core.
const ZSTD_LEVEL: i32 = 3;
/// Input of one job, a window of level 3. The default, four of them, takes 20 MiB more memory and stores no less.
const ZSTD_JOB_BYTES: u32 = 2 << 20;

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
pub struct Compressed {
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
struct Outlet {
    meter: Meter,
    gathered: Vec<u8>,
    sender: mpsc::Sender<Bytes>,
}

const CHUNK: usize = 256 << 10;

impl Outlet {
    fn send(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let chunk = Bytes::from(std::mem::replace(&mut self.gathered, Vec::with_capacity(CHUNK)));
        self.meter.add(&chunk);
        // The other end goes when the run is stopped or a destination failed; the reason is told there.
        self.sender.blocking_send(chunk).map_err(|_| io::ErrorKind::BrokenPipe.into())
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

enum Encoder {
    Zstd(zstd::stream::write::Encoder<'static, Outlet>),
    Gzip(GzEncoder<Outlet>),
    None(Outlet),
}

impl Encoder {
    fn new(compression: Compression, outlet: Outlet) -> io::Result<Self> {
        Ok(match compression {
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(outlet, ZSTD_LEVEL)?;
                encoder.include_checksum(true)?;
                // On a thread of its own zstd gathers whole jobs of input. Fed chunk by chunk in place, its window wraps
                // around and matches are looked for in two pieces, which costs half as much CPU again.
                encoder.multithread(1)?;
                encoder.set_parameter(CParameter::JobSize(ZSTD_JOB_BYTES))?;
                Encoder::Zstd(encoder)
            }
            Compression::Gzip => Encoder::Gzip(GzEncoder::new(outlet, flate2::Compression::default())),
            Compression::None => Encoder::None(outlet),
        })
    }

    fn write_all(&mut self, chunk: &[u8]) -> io::Result<()> {
        match self {
            Encoder::Zstd(e) => e.write_all(chunk),
            Encoder::Gzip(e) => e.write_all(chunk),
            Encoder::None(e) => e.write_all(chunk),
        }
    }

    fn finish(self) -> io::Result<Outlet> {
        match self {
            Encoder::Zstd(e) => e.finish(),
            Encoder::Gzip(e) => e.finish(),
            Encoder::None(e) => Ok(e),
        }
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

/// As [`compress`], under a span that ends with it.
pub fn compress_in(
    mut span: Span,
    compression: Compression,
    input: mpsc::Receiver<Bytes>,
    sender: mpsc::Sender<Bytes>,
) -> io::Result<Measure> {
    let began = Instant::now();
    span.set("dbackup.compression", compression.as_str());
    let compressed = compress(compression, input, sender);
    match &compressed {
        Ok(stored) => span.set_bytes(stored.bytes, began.elapsed()),
        // The other end went: what failed has a span of its own.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => span.fail("compression_failed", error.to_string()),
    }
    compressed
}

/// Compresses everything that comes in until the other side closes, and measures what goes out. Blocks.
pub fn compress(
    compression: Compression,
    mut input: mpsc::Receiver<Bytes>,
    sender: mpsc::Sender<Bytes>,
) -> io::Result<Measure> {
    let outlet = Outlet { meter: Meter::default(), gathered: Vec::with_capacity(CHUNK), sender };
    let mut encoder = Encoder::new(compression, outlet)?;
    while let Some(chunk) = input.blocking_recv() {
        encoder.write_all(&chunk)?;
    }
    let mut outlet = encoder.finish()?;
    outlet.send()?;
    Ok(outlet.meter.end())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn round_trip(compression: Compression, plain: &[u8]) -> (Vec<u8>, Compressed) {
        let (input, rx) = mpsc::channel(4096);
        for chunk in plain.chunks(70_000) {
            input.blocking_send(Bytes::copy_from_slice(chunk)).expect("room");
        }
        drop(input);
        let (tx, mut output) = mpsc::channel(4096);
        let (measured, to_compress) = mpsc::channel(4096);
        let (plain, plain_ends) = measure(rx, measured);
        let facts =
            Compressed { plain, plain_ends, stored: compress(compression, to_compress, tx).expect("compresses") };
        let mut stored = Vec::new();
        while let Some(chunk) = output.blocking_recv() {
            stored.extend_from_slice(&chunk);
        }
        (stored, facts)
    }

    #[test]
    fn what_is_stored_unpacks_to_the_dump_and_both_checksums_are_right() {
        let plain: Vec<u8> = (0..3_000_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for compression in [Compression::Zstd, Compression::Gzip, Compression::None] {
            let (stored, facts) = round_trip(compression, &plain);
            let mut unpacked = Vec::new();
            match compression {
                Compression::Zstd => zstd::stream::copy_decode(&stored[..], &mut unpacked).map(|()| 0),
                Compression::Gzip => flate2::read::GzDecoder::new(&stored[..]).read_to_end(&mut unpacked),
                Compression::None => (&stored[..]).read_to_end(&mut unpacked),
            }
            .expect("unpacks");
            assert!(unpacked == plain, "{compression:?}");
            let measure =
                |bytes: &[u8]| Measure { bytes: bytes.len() as u64, sha256: hex::encode(Sha256::digest(bytes)) };
            assert_eq!((&facts.plain, &facts.stored), (&measure(&plain), &measure(&stored)), "{compression:?}");
            assert_eq!(
                (&facts.plain_ends.head[..], &facts.plain_ends.tail[..]),
                (&plain[..256], &plain[plain.len() - 256..])
            );
        }
    }
}
