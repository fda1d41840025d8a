//! A TCP proxy that holds, drops or cuts what passes: how the tests stop a dump in its middle, and how a worker
//! loses its database.

use std::{
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

use super::until;

/// What the proxy does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Pass.
    Pass,
    /// Hold: nothing is read and nothing closed, as when packets are dropped.
    Hold,
    /// Pass so many bytes to the client of each connection, then hold.
    HoldAfter(u64),
    /// The same of the bytes that each client sends.
    HoldAfterSent(u64),
    /// Pass every COMMIT, and hold the answers of its connection from there on: what was done is done, and nobody hears of it.
    HoldCommitted,
    /// Close every connection, also new ones.
    Cut,
}

/// A running proxy; its connections end with it.
pub struct Proxy {
    /// Where clients connect.
    pub port: u16,
    mode: watch::Sender<Mode>,
    target: watch::Sender<SocketAddr>,
    passed: Arc<AtomicU64>,
    /// How many connections there have been, and of how many the client is lost.
    begun: Arc<AtomicU64>,
    lost: watch::Sender<u64>,
}

impl Proxy {
    /// A proxy in front of a port of this machine.
    pub async fn start(target: u16) -> Self {
        let here = IpAddr::from([127, 0, 0, 1]);
        Self::between(here, (here, target).into()).await
    }

    /// A proxy on an address of this machine, in front of another machine.
    pub async fn between(address: IpAddr, target: SocketAddr) -> Self {
        let listener = TcpListener::bind((address, 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (mode, watched) = watch::channel(Mode::Pass);
        let passed = Arc::new(AtomicU64::new(0));
        let counter = passed.clone();
        let (target, targeted) = watch::channel(target);
        let (begun, (lost, losses)) = (Arc::new(AtomicU64::new(0)), watch::channel(0));
        let number = begun.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (target, number) = (*targeted.borrow(), number.fetch_add(1, Ordering::SeqCst));
                let mut losses = losses.clone();
                let lost = async move { drop(losses.wait_for(|lost| number < *lost).await) };
                tokio::spawn(connection(client, target, watched.clone(), counter.clone(), lost));
            }
        });
        Self { port, mode, target, passed, begun, lost }
    }

    /// The machine of those who are connected now is lost: nothing of theirs comes any more, not even their end.
    pub fn lose_clients(&self) {
        self.lost.send_replace(self.begun.load(Ordering::SeqCst));
    }

    /// Leads connections from now on to another port of this machine.
    pub fn lead_to(&self, port: u16) {
        self.target.send_replace((IpAddr::from([127, 0, 0, 1]), port).into());
    }

    /// Changes what it does, for open connections too. Counting starts anew.
    pub fn set(&self, mode: Mode) {
        self.passed.store(0, Ordering::SeqCst);
        self.mode.send_replace(mode);
    }

    /// Waits until so many bytes have passed to clients.
    pub async fn passes(&self, bytes: u64) {
        until(&format!("{bytes} bytes pass"), Duration::from_secs(30), || async {
            (self.passed.load(Ordering::SeqCst) >= bytes).then_some(())
        })
        .await;
    }
}

async fn connection(
    client: TcpStream,
    target: SocketAddr,
    mode: watch::Receiver<Mode>,
    passed: Arc<AtomicU64>,
    lost: impl Future<Output = ()>,
) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let committed = AtomicBool::new(false);
    let mut there = pin!(pump(client_read, server_write, mode.clone(), None, &committed));
    let mut back = pin!(pump(server_read, client_write, mode, Some(passed), &committed));
    tokio::select! {
        () = &mut there => {}
        () = &mut back => {}
        () = lost => std::future::pending().await,
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut mode: watch::Receiver<Mode>,
    passed: Option<Arc<AtomicU64>>,
    committed: &AtomicBool,
) {
    let mut buffer = vec![0; 16 << 10];
    let mut count = 0;
    loop {
        let now = *mode.borrow_and_update();
        let read = match now {
            Mode::Cut => return,
            Mode::Hold => None,
            Mode::HoldAfter(limit) if passed.is_some() && count >= limit => None,
            Mode::HoldAfterSent(limit) if passed.is_none() && count >= limit => None,
            _ => Some(from.read(&mut buffer)),
        };
        let read = async {
            match read {
                Some(read) => read.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = mode.changed() => match changed {
                Ok(()) => count = 0,
                Err(_) => return,
            },
            result = read => match result {
                Ok(n) if n > 0 => {
                    match &passed {
                        None => note_commit(&buffer[..n], *mode.borrow(), committed),
                        Some(_) => {
                            if !may_answer(&mut mode, committed).await {
                                return;
                            }
                        }
                    }
                    if to.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                    count += n as u64;
                    if let Some(passed) = &passed {
                        passed.fetch_add(n as u64, Ordering::SeqCst);
                    }
                }
                _ => return,
            },
        }
    }
}

fn note_commit(sent: &[u8], mode: Mode, committed: &AtomicBool) {
    if mode == Mode::HoldCommitted {
        committed.fetch_or(sent.windows(6).any(|sent| sent == b"COMMIT"), Ordering::SeqCst);
    }
}

/// Waits while the answers of a connection that has committed are held; `false` when the proxy ends before.
async fn may_answer(mode: &mut watch::Receiver<Mode>, committed: &AtomicBool) -> bool {
    let held = |mode: &Mode| *mode == Mode::HoldCommitted && committed.load(Ordering::SeqCst);
    mode.wait_for(|mode| !held(mode)).await.is_ok()
}
