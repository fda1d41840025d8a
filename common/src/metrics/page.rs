//! `/metrics` on a port of its own, and nothing else. A scraper that hangs holds one of a few connections for a while,
//! and nothing of the service.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{
    encoding::{prometheus_text, text},
    registry::Registry,
};
use tokio::{net::TcpListener, sync::Semaphore};

use super::known::Known;
use crate::{config::ConfigError, db::Db};

/// Scrapers at once; others wait to be accepted.
const MOST_CONNECTIONS: usize = 8;
/// Longest time for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time of a connection, which serves one request.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Flags of every process that has metrics.
#[derive(clap::Args, Clone, Debug)]
pub struct MetricsArgs {
    /// Address and port of the page of metrics, /metrics, such as 127.0.0.1:9464; without it there is none
    #[arg(long, env = "DBACKUP_METRICS_LISTEN")]
    pub metrics_listen: Option<String>,
}

impl MetricsArgs {
    /// Listens, if an address is given.
    pub fn listen(&self) -> Result<Option<TcpListener>, ConfigError> {
        let Some(text) = self.metrics_listen.as_deref().filter(|text| !text.is_empty()) else { return Ok(None) };
        let fail = |why: String| ConfigError(format!("DBACKUP_METRICS_LISTEN: {why}"));
        let address: SocketAddr =
            text.parse().map_err(|_| fail(format!("'{text}' is not an address and port, such as 127.0.0.1:9464")))?;
        let listen = || {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        listen().map(Some).map_err(|e| fail(format!("cannot listen on {address}: {e}")))
    }
}

/// What a process is, and so what it tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its own counters, and what the database knows of jobs, queue and workers.
    Api,
    /// Its own counters.
    Worker,
    /// Both: `dbackup up`.
    Both,
}

struct Page {
    registry: Registry,
    known: Arc<Known>,
}

/// Serves the page as long as the process lives, also while it waits for its database and while it drains.
pub fn serve(listener: Option<TcpListener>, role: Role, db: &Db) {
    let Some(listener) = listener else { return };
    let known = Arc::new(Known::new(role, db.clone()));
    let mut registry = Registry::with_prefix("dbackup");
    super::get().register(&mut registry, role);
    registry.register_collector(Box::new(known.clone()));
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "metrics are served");
    }
    tokio::spawn(accept(listener, Arc::new(Page { registry, known })));
}

async fn accept(listener: TcpListener, page: Arc<Page>) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a scraper could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let page = page.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, page.clone()));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // A scraper that breaks off is no news.
            let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
            drop(place);
        });
    }
}

async fn answer(request: Request<Incoming>, page: Arc<Page>) -> Result<Response<String>, Infallible> {
    let mut response = Response::new(String::new());
    if request.uri().path() != "/metrics" {
        *response.status_mut() = StatusCode::NOT_FOUND;
        return Ok(response);
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        return Ok(response);
    }
    page.known.refresh().await;
    let (content_type, encoded) = page.encode(wants_open_metrics(request.headers()));
    match encoded {
        Ok(text) => {
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
            *response.body_mut() = text;
        }
        Err(error) => {
            tracing::error!(%error, "the metrics could not be written");
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        }
    }
    Ok(response)
}

impl Page {
    /// Exemplars exist in OpenMetrics only.
    fn encode(&self, open_metrics: bool) -> (&'static str, Result<String, std::fmt::Error>) {
        let mut text = String::new();
        let (content_type, done) = match open_metrics {
            true => (OPEN_METRICS, text::encode(&mut text, &self.registry)),
            false => (prometheus_text::CONTENT_TYPE, prometheus_text::encode(&mut text, &self.registry)),
        };
        (content_type, done.map(|()| text))
    }
}

/// Whoever names it can read it, and prefers it to the older form.
fn wants_open_metrics(headers: &HeaderMap) -> bool {
    let mut accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.any(|value| value.contains("application/openmetrics-text"))
}
