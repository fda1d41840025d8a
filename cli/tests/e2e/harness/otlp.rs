//! Receivers of OTLP: HTTP and gRPC on one port, with and without TLS; and one that takes a connection and never answers.

use std::{
    convert::Infallible,
    io::Read,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::body::Bytes;
use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    HeaderMap, Request, Response,
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, status::StatusCode},
};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use super::{source::shell, unique, until};

/// A span and who sent it.
#[derive(Clone, Debug)]
pub struct Received {
    /// Attributes of the process.
    pub resource: Vec<KeyValue>,
    /// Headers of the request that brought it.
    pub headers: HeaderMap,
    /// The span.
    pub span: Span,
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|a| a.key == key)?.value.clone()?.value?;
    Some(match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(yes) => yes.to_string(),
        other => format!("{other:?}"),
    })
}

impl Received {
    /// Its trace, in hex.
    pub fn trace(&self) -> String {
        hex::encode(&self.span.trace_id)
    }

    /// Its id, in hex.
    pub fn id(&self) -> String {
        hex::encode(&self.span.span_id)
    }

    /// Its parent, in hex; empty for a root.
    pub fn parent(&self) -> String {
        hex::encode(&self.span.parent_span_id)
    }

    /// The spans it links to, in hex.
    pub fn links(&self) -> Vec<String> {
        self.span.links.iter().map(|link| hex::encode(&link.span_id)).collect()
    }

    /// An attribute, as text.
    pub fn get(&self, key: &str) -> Option<String> {
        text(&self.span.attributes, key)
    }

    /// An attribute of the process.
    pub fn of_process(&self, key: &str) -> Option<String> {
        text(&self.resource, key)
    }

    /// What went wrong, when it is marked so.
    pub fn error(&self) -> Option<&str> {
        let status = self.span.status.as_ref()?;
        (status.code == StatusCode::Error as i32).then_some(status.message.as_str())
    }

    /// An attribute of the event of this name.
    pub fn of_event(&self, event: &str, key: &str) -> Option<String> {
        text(&self.span.events.iter().find(|e| e.name == event)?.attributes, key)
    }

    /// How long it was.
    pub fn length(&self) -> Duration {
        Duration::from_nanos(self.span.end_time_unix_nano - self.span.start_time_unix_nano)
    }
}

/// A running receiver.
#[derive(Clone)]
pub struct Receiver {
    /// Where to send.
    pub endpoint: String,
    spans: Arc<Mutex<Vec<Received>>>,
    largest: Arc<AtomicUsize>,
}

impl Receiver {
    /// Starts it, without TLS.
    pub async fn start() -> Self {
        Self::listen(None).await
    }

    /// Starts it with TLS, as `localhost`; gives the authority to trust.
    pub async fn with_tls() -> (Self, PathBuf) {
        let folder = std::env::temp_dir().join(unique("otlp-tls"));
        let acceptor = TlsAcceptor::from(Arc::new(certified(&folder)));
        (Self::listen(Some(acceptor)).await, folder.join("ca.pem"))
    }

    async fn listen(tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let endpoint = match tls {
            None => format!("http://127.0.0.1:{port}"),
            Some(_) => format!("https://localhost:{port}"),
        };
        let receiver = Self { endpoint, spans: Arc::default(), largest: Arc::default() };
        let serving = receiver.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (receiver, tls) = (serving.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => receiver.serve(stream).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                receiver.serve(stream).await;
                            }
                        }
                    }
                });
            }
        });
        receiver
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let answer = service_fn(move |request: Request<Incoming>| {
            let receiver = self.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.expect("a body").to_bytes();
                let kind = head.headers.get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default();
                let grpc = kind.starts_with("application/grpc");
                receiver.take(&head.headers, message(&head.headers, &body, grpc));
                // An empty message: all were taken.
                let mut frames = vec![Ok::<_, Infallible>(Frame::data(Bytes::new()))];
                if grpc {
                    let status =
                        HeaderMap::from_iter([("grpc-status".parse().expect("a name"), "0".parse().expect("a value"))]);
                    frames = vec![Ok(Frame::data(Bytes::from_static(&[0; 5]))), Ok(Frame::trailers(status))];
                }
                let response = Response::builder().header("content-type", kind);
                Ok::<_, Infallible>(response.body(StreamBody::new(stream::iter(frames))).expect("a response"))
            }
        });
        let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await;
    }

    fn take(&self, headers: &HeaderMap, request: ExportTraceServiceRequest) {
        let mut spans = self.spans.lock().expect("not poisoned");
        let before = spans.len();
        for group in request.resource_spans {
            let resource = group.resource.map(|r| r.attributes).unwrap_or_default();
            let received = group.scope_spans.into_iter().flat_map(|s| s.spans);
            spans.extend(received.map(|span| Received { resource: resource.clone(), headers: headers.clone(), span }));
        }
        self.largest.fetch_max(spans.len() - before, Ordering::SeqCst);
    }

    /// The most spans that came at once.
    pub fn largest(&self) -> usize {
        self.largest.load(Ordering::SeqCst)
    }

    /// What came so far.
    pub fn spans(&self) -> Vec<Received> {
        self.spans.lock().expect("not poisoned").clone()
    }

    /// What came so far of a trace, in the order of time.
    pub fn of(&self, trace: &str) -> Vec<Received> {
        let mut spans: Vec<_> = self.spans().into_iter().filter(|s| s.trace() == trace).collect();
        spans.sort_by_key(|s| s.span.start_time_unix_nano);
        spans
    }

    /// Waits until so many spans of each name have come of a trace, and gives all of it.
    pub async fn holds(&self, trace: &str, names: &[(&str, usize)], limit: Duration) -> Vec<Received> {
        until(&format!("{names:?} of trace {trace} arrive"), limit, || async {
            let spans = self.of(trace);
            let came = |(name, count): &(&str, usize)| spans.iter().filter(|s| s.span.name == *name).count() >= *count;
            names.iter().all(came).then_some(spans)
        })
        .await
    }
}

fn message(headers: &HeaderMap, body: &[u8], grpc: bool) -> ExportTraceServiceRequest {
    // gRPC: a flag that says whether it is compressed, and the length.
    let (packed, body) =
        if grpc { (body[0] == 1, &body[5..]) } else { (headers.contains_key("content-encoding"), body) };
    let mut plain = Vec::new();
    match packed {
        true => flate2::read::GzDecoder::new(body).read_to_end(&mut plain).map(drop).expect("gzip"),
        false => plain.extend_from_slice(body),
    }
    ExportTraceServiceRequest::decode(&plain[..]).expect("OTLP")
}

/// An authority and what it signed for `localhost`, in a folder.
fn certified(folder: &Path) -> ServerConfig {
    std::fs::create_dir(folder).expect("a folder");
    let folder = folder.display();
    let request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    let leaf = "-config <(printf '[req]\\ndistinguished_name=dn\\n[dn]\\n') -addext subjectAltName=DNS:localhost";
    shell(&format!(
        "cd {folder}; {request} -subj '/CN=an authority' -keyout ca.key -out ca.pem 2>&1
         {request} {leaf} -subj /CN=localhost -CA ca.pem -CAkey ca.key -keyout leaf.key -out leaf.pem 2>&1"
    ));
    let file = |name: &str| format!("{folder}/{name}");
    let certificate = CertificateDer::from_pem_file(file("leaf.pem")).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(file("leaf.key")).expect("a key");
    let mut config =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).expect("they fit");
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

/// The endpoint of a collector that takes every connection and answers none.
pub async fn silent() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    endpoint
}
