//! Encryption to the recipients of a job, with age, on a thread of its own. No identity is known here: a worker cannot read
//! what it stored.

use std::{
    io::{self, Write},
    time::Instant,
};

use age::{Encryptor, x25519::Recipient};
use bytes::Bytes;
use common::telemetry::Span;
use tokio::sync::mpsc;

use super::meter::{Measure, Outlet};

/// As [`encrypt`], under a span that ends with it.
pub fn encrypt_in(
    mut span: Span,
    recipients: &[Recipient],
    input: mpsc::Receiver<Bytes>,
    sender: mpsc::Sender<Bytes>,
) -> io::Result<Measure> {
    let began = Instant::now();
    span.set("dbackup.encryption", "age");
    span.set("dbackup.recipients", i64::try_from(recipients.len()).unwrap_or(i64::MAX));
    let encrypted = encrypt(recipients, input, sender);
    match &encrypted {
        Ok(stored) => span.set_bytes(stored.bytes, began.elapsed()),
        // The other end went: what failed has a span of its own.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => span.fail("encryption_failed", error.to_string()),
    }
    encrypted
}

/// Encrypts everything that comes in until the other side closes, and measures what goes out. Blocks.
pub fn encrypt(
    recipients: &[Recipient],
    mut input: mpsc::Receiver<Bytes>,
    sender: mpsc::Sender<Bytes>,
) -> io::Result<Measure> {
    let recipients = recipients.iter().map(|recipient| recipient as &dyn age::Recipient);
    let encryptor = Encryptor::with_recipients(recipients).map_err(io::Error::other)?;
    let mut writer = encryptor.wrap_output(Outlet::new(sender))?;
    while let Some(chunk) = input.blocking_recv() {
        writer.write_all(&chunk)?;
    }
    writer.finish()?.end()
}
