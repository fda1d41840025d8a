//! The way back of [`super::super::compress`], on a thread of its own.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use common::job::Compression;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::pipeline::compress::Measure;

/// Bytes that are handed on at once.
const CHUNK: usize = 256 << 10;

/// What comes in, as a reader. Blocks.
struct Inlet {
    chunks: mpsc::Receiver<Bytes>,
    now: Bytes,
}

impl Read for Inlet {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.now = chunk,
                None => return Ok(0),
            }
        }
        let n = into.len().min(self.now.len());
        self.now.copy_to_slice(&mut into[..n]);
        Ok(n)
    }
}

/// Unpacks everything that comes in until the other side closes, and measures what goes out. Blocks.
pub fn unpack(
    compression: Compression,
    input: mpsc::Receiver<Bytes>,
    output: mpsc::Sender<Bytes>,
) -> io::Result<Measure> {
    let inlet = Inlet { chunks: input, now: Bytes::new() };
    let mut reader: Box<dyn Read> = match compression {
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(inlet)?),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(inlet)),
        Compression::None => Box::new(inlet),
    };
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        // In full chunks: the last one is kept back, and must be more than what is left of a frame.
        if (&mut reader).take(CHUNK as u64).read_to_end(&mut chunk)? == 0 {
            return Ok(Measure { bytes, sha256: hex::encode(hash.finalize()) });
        }
        hash.update(&chunk);
        bytes += chunk.len() as u64;
        // Closed: the tool has ended, which is told there.
        if output.blocking_send(chunk.into()).is_err() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::compress;

    #[test]
    fn what_was_compressed_unpacks_to_itself_and_a_cut_off_stream_is_an_error() {
        let plain: Vec<u8> = (0..700_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for compression in [Compression::Zstd, Compression::Gzip, Compression::None] {
            let through = |work: &dyn Fn(mpsc::Receiver<Bytes>, mpsc::Sender<Bytes>) -> io::Result<Measure>,
                           bytes: &[u8]| {
                let (input, taken) = mpsc::channel(4096);
                for chunk in bytes.chunks(70_001) {
                    input.blocking_send(Bytes::copy_from_slice(chunk)).expect("room");
                }
                drop(input);
                let (given, mut output) = mpsc::channel(4096);
                let measure = work(taken, given);
                let mut all = Vec::new();
                while let Some(chunk) = output.blocking_recv() {
                    all.extend_from_slice(&chunk);
                }
                (measure, all)
            };
            let (_, stored) = through(&|i, o| compress::compress(compression, i, o), &plain);
            let (measure, unpacked) = through(&|i, o| unpack(compression, i, o), &stored);
            assert!(unpacked == plain, "{compression:?}");
            let digest = hex::encode(Sha256::digest(&plain));
            assert_eq!(measure.expect("unpacks"), Measure { bytes: plain.len() as u64, sha256: digest });
            if compression != Compression::None {
                let (cut, _) = through(&|i, o| unpack(compression, i, o), &stored[..stored.len() - 9]);
                assert!(cut.is_err(), "{compression:?}");
            }
        }
    }
}
