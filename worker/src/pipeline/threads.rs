//! The threads that a dump goes through on its way to the destinations: measure → compress → encrypt.

use std::io;

use age::x25519::Recipient;
use bytes::Bytes;
use common::{job::Compression, telemetry::span::SpanKind};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    QUEUE, compress, encrypt,
    meter::{self, Ends, Measure},
};
use crate::{failure::RunError, lease::Lease};

/// They end when what feeds them ends, or when what they feed does.
pub struct Threads {
    measuring: JoinHandle<(Measure, Ends)>,
    compressing: JoinHandle<io::Result<Measure>>,
    encrypting: Option<JoinHandle<io::Result<Measure>>>,
}

/// What went through them.
pub struct Through {
    /// The dump.
    pub plain: Measure,
    /// How the dump begins and ends.
    pub plain_ends: Ends,
    /// What came out, unless a thread failed.
    pub stored: Result<Measure, RunError>,
}

impl Threads {
    /// Starts them; gives where the dump goes in and where what is stored comes out.
    pub fn start(
        lease: &Lease,
        compression: Compression,
        recipients: &[Recipient],
    ) -> (Self, mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>) {
        let (plain_out, plain_in) = mpsc::channel(QUEUE);
        let (measured_out, measured_in) = mpsc::channel(QUEUE);
        let (packed_out, packed_in) = mpsc::channel(QUEUE);
        let measuring = tokio::task::spawn_blocking(move || meter::measure(plain_in, measured_out));
        let span = lease.span(SpanKind::Internal, "compress");
        let compressing =
            tokio::task::spawn_blocking(move || compress::compress_in(span, compression, measured_in, packed_out));
        if recipients.is_empty() {
            return (Self { measuring, compressing, encrypting: None }, plain_out, packed_in);
        }
        let (stored_out, stored_in) = mpsc::channel(QUEUE);
        let (span, recipients) = (lease.span(SpanKind::Internal, "encrypt"), recipients.to_vec());
        let encrypting =
            tokio::task::spawn_blocking(move || encrypt::encrypt_in(span, &recipients, packed_in, stored_out));
        (Self { measuring, compressing, encrypting: Some(encrypting) }, plain_out, stored_in)
    }

    /// Waits for their end.
    pub async fn end(self) -> Result<Through, RunError> {
        let ended = |e| RunError::give_up("internal_error", format!("a thread of the stream ended: {e}"));
        let (plain, plain_ends) = self.measuring.await.map_err(ended)?;
        let packed = self.compressing.await.map_err(ended)?;
        let encrypted = match self.encrypting {
            Some(encrypting) => Some(encrypting.await.map_err(ended)?),
            None => None,
        };
        let stored = match (packed, encrypted) {
            // It failed first: compression found nobody to take what it made.
            (Err(packed), Some(Err(error))) if packed.kind() == io::ErrorKind::BrokenPipe => Err(unencrypted(&error)),
            (Err(error), _) => {
                Err(RunError::retry("compression_failed", format!("the dump could not be compressed: {error}")))
            }
            (Ok(_), Some(Err(error))) => Err(unencrypted(&error)),
            (Ok(_), Some(Ok(encrypted))) => Ok(encrypted),
            (Ok(packed), None) => Ok(packed),
        };
        Ok(Through { plain, plain_ends, stored })
    }
}

fn unencrypted(error: &io::Error) -> RunError {
    RunError::retry("encryption_failed", format!("the dump could not be encrypted: {error}"))
}
