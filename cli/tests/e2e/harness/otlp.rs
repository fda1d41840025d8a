//! A receiver of OTLP over HTTP.

use std::sync::{Arc, Mutex};

use axum::{Router, body::Bytes, routing::post};
use opentelemetry_proto::tonic::{collector::trace::v1::ExportTraceServiceRequest, trace::v1::Span};
use prost::Message;
use tokio::net::TcpListener;

/// A span and the service that sent it.
#[derive(Clone, Debug)]
pub struct Received {
    /// `service.name`.
    pub service: String,
    /// The span.
    pub span: Span,
}

/// A running receiver.
#[derive(Clone)]
pub struct Receiver {
    /// Where to send.
    pub endpoint: String,
    spans: Arc<Mutex<Vec<Received>>>,
}

impl Receiver {
    /// Starts it.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let spans: Arc<Mutex<Vec<Received>>> = Arc::default();
        let store = spans.clone();
        let take = move |body: Bytes| {
            let store = store.clone();
            async move {
                let request = ExportTraceServiceRequest::decode(body).expect("OTLP");
                for group in request.resource_spans {
                    let service = group.resource.iter().flat_map(|r| &r.attributes).find(|a| a.key == "service.name");
                    let service = format!("{:?}", service.and_then(|s| s.value.clone()).and_then(|v| v.value));
                    let spans = group.scope_spans.into_iter().flat_map(|s| s.spans);
                    store
                        .lock()
                        .expect("not poisoned")
                        .extend(spans.map(|span| Received { service: service.clone(), span }));
                }
            }
        };
        let router = Router::new().route("/v1/traces", post(take));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { endpoint, spans }
    }

    /// What came so far.
    pub fn spans(&self) -> Vec<Received> {
        self.spans.lock().expect("not poisoned").clone()
    }
}
