//! The threads that a dump goes through on its way to the destinations: measure → compress → encrypt.

use std::io;

use age::x25519::Recipient;
use bytes::Bytes;
use common::{job::Compression, telemetry::span::SpanKind};
use tokio::sync::{mpsc, oneshot};

use super::{
    QUEUE, compress, encrypt,
    meter::{self, Ends, Measure},
};
use crate::{failure::RunError, lease::Lease};

/// Does work in a thread of its own, which is not one of the runtime's for blocking work: file operations wait for one of
/// those, of which there are 512, and a run would keep three of them for as long as it goes. The result does not come when
/// the thread could not be started, or panicked.
pub fn apart<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
    let (sender, result) = oneshot::channel();
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(move || drop(sender.send(work())));
    if let Err(error) = started {
        tracing::error!(%error, name, "a thread could not be started");
    }
    result
}

/// They end when what feeds them ends, or when what they feed does.
pub struct Threads {
    measuring: oneshot::Receiver<(Measure, Ends)>,
    compressing: oneshot::Receiver<io::Result<Measure>>,
    encrypting: Option<oneshot::Receiver<io::Result<Measure>>>,
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
        let measuring = apart("measure", move || meter::measure(plain_in, measured_out));
        let span = lease.span(SpanKind::Internal, "compress");
        let compressing = apart("compress", move || compress::compress_in(span, compression, measured_in, packed_out));
        if recipients.is_empty() {
            return (Self { measuring, compressing, encrypting: None }, plain_out, packed_in);
        }
        let (stored_out, stored_in) = mpsc::channel(QUEUE);
        let (span, recipients) = (lease.span(SpanKind::Internal, "encrypt"), recipients.to_vec());
        let encrypting = apart("encrypt", move || encrypt::encrypt_in(span, &recipients, packed_in, stored_out));
        (Self { measuring, compressing, encrypting: Some(encrypting) }, plain_out, stored_in)
    }

    /// Waits for their end.
    pub async fn end(self) -> Result<Through, RunError> {
        let ended = |_| RunError::retry("internal_error", "a thread of the stream could not be started, or broke off");
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn work_that_is_apart_waits_for_none_of_the_threads_of_the_runtime() {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.max_blocking_threads(1).enable_time().build().expect("a runtime");
        let (let_go, held) = std::sync::mpsc::channel::<()>();
        runtime.block_on(async {
            let busy = tokio::task::spawn_blocking(move || held.recv().ok());
            let seven = tokio::time::timeout(Duration::from_secs(10), apart("seven", || 7)).await;
            assert_eq!(seven.expect("it waits for nobody"), Ok(7));
            drop(let_go);
            busy.await.expect("ends");
        });
    }
}
