//! Connections: accepted, limited in how slow their clients may be, and ended gracefully.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::ConnectInfo,
    http::{HeaderValue, Request, header::CONNECTION},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Longest time for the head of a request, and of silence between two requests of a connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of the head of a request, at most.
const MOST_HEADER_BYTES: usize = 64 << 10;
/// A client that does not take its answer for so long is gone: nothing else would end a stream to it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time that requests under way get after the stop.
const DRAIN: Duration = Duration::from_secs(20);
/// Connections that may wait to be accepted; the kernel takes the lesser of this and `net.core.somaxconn`. One that does
/// not fit is tried again by its client after a second.
const BACKLOG: u32 = 4096;
/// Pause after a connection could not be accepted: with all files open the next try fails at once, too.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The two steps of a stop. A proxy needs a moment to see that a process is not ready any more: what it sends until
/// then must be served.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Step one: `/readyz` says 503, and a connection ends with its next answer.
    pub stopping: CancellationToken,
    /// Step two: nothing is taken any more, and those who wait are told the state then.
    pub closing: CancellationToken,
}

impl Stop {
    /// The steps after `signal`, so far apart.
    pub fn after(signal: CancellationToken, delay: Duration) -> Self {
        let stop = Self { stopping: signal, closing: CancellationToken::new() };
        let steps = stop.clone();
        tokio::spawn(async move {
            steps.stopping.cancelled().await;
            tokio::time::sleep(delay).await;
            steps.closing.cancel();
        });
        stop
    }
}

/// Listens on an address.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A connection of the process before, not yet forgotten by the kernel, must not keep this one from starting.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until `stop` closes; requests under way are answered.
pub async fn serve(listener: TcpListener, router: Router, stop: Stop) {
    let graceful = GracefulShutdown::new();
    while let Some(accepted) = stop.closing.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, peer)) => {
                let connection = graceful.watch(connection(stream, peer, router.clone(), stop.stopping.clone()));
                tokio::spawn(async move {
                    // A client that breaks off is no news.
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, %peer, "a connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests were still open after {} s and were cut", DRAIN.as_secs());
    }
}

fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    stopping: CancellationToken,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> {
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(WRITE_TIMEOUT));
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        let (answer, stopping) = (router.clone().oneshot(request), stopping.clone());
        async move {
            let mut answer = answer.await?;
            if stopping.is_cancelled() {
                // A client that keeps its connection would not be turned away before the end cuts it.
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(answer)
        }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MOST_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
}
