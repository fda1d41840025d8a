//! The way back of [`super::super::encrypt`] and [`super::super::compress`], on a thread of its own.

use std::{
    io::{self, Read},
    iter,
};

use age::{Decryptor, x25519::Identity};
use bytes::{Buf, Bytes};
use common::job::Compression;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::pipeline::meter::Measure;

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

/// Bytes that are replaced by others on their way.
#[derive(Clone, Debug)]
pub struct Rename {
    /// What is looked for.
    pub from: Vec<u8>,
    /// What comes instead.
    pub into: Vec<u8>,
}

impl Rename {
    /// Replaces in `bytes` and gives what is sure; keeps back in `kept` what may be the beginning of one more.
    fn pass(&self, kept: &mut Vec<u8>, bytes: &[u8]) -> Vec<u8> {
        let mut all = std::mem::take(kept);
        all.extend_from_slice(bytes);
        let (mut out, mut at) = (Vec::with_capacity(all.len()), 0);
        for found in memchr::memmem::find_iter(&all, &self.from) {
            out.extend_from_slice(&all[at..found]);
            out.extend_from_slice(&self.into);
            at = found + self.from.len();
        }
        let sure = all.len().saturating_sub(self.from.len() - 1).max(at);
        out.extend_from_slice(&all[at..sure]);
        kept.extend_from_slice(&all[sure..]);
        out
    }
}

/// What was done to a dump before it was stored.
pub struct Packed {
    /// What opens it, where it is encrypted.
    pub identity: Option<Identity>,
    /// How it is compressed.
    pub compression: Compression,
}

/// Unpacks everything that comes in until the other side closes, and measures what goes out. Blocks.
pub fn unpack(
    packed: Packed,
    rename: Option<Rename>,
    input: mpsc::Receiver<Bytes>,
    output: mpsc::Sender<Bytes>,
) -> io::Result<Measure> {
    let inlet = Inlet { chunks: input, now: Bytes::new() };
    let opened: Box<dyn Read> = match &packed.identity {
        Some(identity) => {
            let decryptor = Decryptor::new(inlet).map_err(io::Error::other)?;
            Box::new(decryptor.decrypt(iter::once(identity as _)).map_err(io::Error::other)?)
        }
        None => Box::new(inlet),
    };
    let mut reader: Box<dyn Read> = match packed.compression {
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(opened)?),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(opened)),
        Compression::None => opened,
    };
    let (mut hash, mut bytes, mut kept) = (Sha256::new(), 0, Vec::new());
    // Closed: the tool has ended, which is told there.
    let send =
        |chunk: Vec<u8>| output.blocking_send(chunk.into()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe));
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        // In full chunks: the last one is kept back, and must be more than what is left of a frame.
        if (&mut reader).take(CHUNK as u64).read_to_end(&mut chunk)? == 0 {
            if !kept.is_empty() {
                send(kept)?;
            }
            return Ok(Measure { bytes, sha256: hex::encode(hash.finalize()) });
        }
        hash.update(&chunk);
        bytes += chunk.len() as u64;
        let chunk = match &rename {
            Some(rename) => rename.pass(&mut kept, &chunk),
            None => chunk,
        };
        if !chunk.is_empty() {
            send(chunk)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{compress, encrypt};

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
            let (_, compressed) = through(&|i, o| compress::compress(compression, i, o), &plain);
            let key = Identity::generate();
            let recipients = [Identity::generate().to_public(), key.to_public()];
            let (_, encrypted) = through(&|i, o| encrypt::encrypt(&recipients, i, o), &compressed);
            for (stored, identity) in [(compressed, None), (encrypted, Some(key))] {
                let packed = || Packed { identity: identity.clone(), compression };
                let (measure, unpacked) = through(&|i, o| unpack(packed(), None, i, o), &stored);
                assert!(unpacked == plain, "{compression:?}");
                let digest = hex::encode(Sha256::digest(&plain));
                assert_eq!(measure.expect("unpacks"), Measure { bytes: plain.len() as u64, sha256: digest });
                if compression != Compression::None || identity.is_some() {
                    let (cut, _) = through(&|i, o| unpack(packed(), None, i, o), &stored[..stored.len() - 9]);
                    assert!(cut.is_err(), "{compression:?}");
                }
            }
        }
    }

    #[test]
    fn a_name_is_replaced_wherever_the_chunks_are_cut_and_nothing_else_is() {
        let rename = Rename { from: b"`shop` ".to_vec(), into: b"`shop_check` ".to_vec() };
        let text = b"a `shop` b `shop`c `sho `shop` `shop` d `shop";
        for cut in 1..text.len() {
            let (mut kept, mut out) = (Vec::new(), Vec::new());
            for chunk in text.chunks(cut) {
                out.extend(rename.pass(&mut kept, chunk));
            }
            out.extend(kept);
            let text = String::from_utf8_lossy(&out);
            assert_eq!(text, "a `shop_check` b `shop`c `sho `shop_check` `shop_check` d `shop", "cut at {cut}");
        }
    }
}
