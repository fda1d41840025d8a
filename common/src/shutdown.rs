//! SIGTERM and SIGINT as a token that tasks wait on.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGTERM or SIGINT. A second signal ends the process at once with
/// the status a shell expects of a signal's death, for a person who does not want to wait for the drain.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = token.clone();
    tokio::spawn(async move {
        let mut signals = 0;
        loop {
            let number = tokio::select! { _ = term.recv() => 15, _ = int.recv() => 2 };
            signals += 1;
            if signals > 1 {
                std::process::exit(128 + number);
            }
            tracing::info!(signal = number, "stopping; a second signal stops at once");
            stop.cancel();
        }
    });
    Ok(token)
}
