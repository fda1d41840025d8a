//! Clients that ask an API process as fast as it answers.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use serde_json::json;

use crate::harness::{Cluster, sql};

/// Clients at once.
pub const CLIENTS: usize = 32;

/// One client on one connection, as light as can be: it shares the machine with what it measures.
pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects to an API process.
    pub async fn connect(url: &str) -> Self {
        let address = url.trim_start_matches("http://").to_owned();
        let stream = TcpStream::connect(address).await.expect("connects");
        stream.set_nodelay(true).expect("a socket");
        Self { stream, buffer: vec![0; 64 << 10] }
    }

    /// Sends a request and reads its whole answer.
    pub async fn ask(&mut self, request: &str) -> &str {
        self.stream.write_all(request.as_bytes()).await.expect("writes");
        let (mut read, mut whole) = (0, None);
        while whole.is_none_or(|whole| read < whole) {
            let n = self.stream.read(&mut self.buffer[read..]).await.expect("answers");
            assert!(n > 0, "the connection was closed");
            read += n;
            whole = whole.or_else(|| length(&self.buffer[..read]));
        }
        std::str::from_utf8(&self.buffer[..read]).expect("text")
    }
}

/// Bytes of the whole answer, once its head is there. Header names come in lower case from the service.
fn length(answer: &[u8]) -> Option<usize> {
    let head = memchr::memmem::find(answer, b"\r\n\r\n")? + 4;
    let name = b"content-length: ";
    let at = memchr::memmem::find(&answer[..head], name).expect("an answer says its length") + name.len();
    let digits = answer[at..].iter().take_while(|c| c.is_ascii_digit());
    Some(head + digits.fold(0, |n, c| n * 10 + usize::from(c - b'0')))
}

/// A request with the administrator's key and no body.
pub fn request(cluster: &Cluster, method: &str, path: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {}\r\nContent-Length: 0\r\n\r\n",
        cluster.admin_key
    )
}

/// Answers a second of so many clients that send one request after the other.
pub async fn rate(url: &str, request: &str, long: Duration) -> f64 {
    let until = Instant::now() + long;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (request, connect) = (request.to_owned(), Client::connect(url));
            async move {
                let mut client = connect.await;
                let mut count = 0_u32;
                while Instant::now() < until {
                    let answer = client.ask(&request).await;
                    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
                    count += 1;
                }
                count
            }
        })
        .collect();
    let counts = futures::future::join_all(clients).await;
    f64::from(counts.iter().sum::<u32>()) / long.as_secs_f64()
}

/// Lets as many wait as come.
pub async fn lift_caps(cluster: &Cluster) {
    let change = json!({ "maxPending": 1_000_000, "maxPendingPerJob": 1_000_000 });
    cluster.ok("PATCH", "/api/settings", Some(change)).await;
    sql(&cluster.database, "update jobs set overlap = 'allow', max_attempts = 1").await;
}

/// Deletes what waits, and what it left in the table.
pub async fn forget_pending(cluster: &Cluster) {
    let forget = "delete from executions where status = 'Pending'";
    sqlx::query(forget).execute(&cluster.pool).await.expect("deletes");
    sql(&cluster.database, "vacuum analyze executions").await;
}
