//! Wake-ups: how processes hear of each other without asking.
//!
//! A `NOTIFY` inside the enqueue transaction costs a factor of ten (a commit with one takes a cluster-wide
//! lock), so a process sends one after its commits, on a connection of its own, at once and then at most every
//! 20 ms. Nothing depends on a notice: a lost one costs one poll interval.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use sqlx::{PgConnection, postgres::PgListener};
use tokio::sync::{
    Notify,
    broadcast::{self, error::RecvError},
};
use tokio_util::sync::CancellationToken;

use crate::{db::Db, id::ExecutionId, metrics};

const CHANNEL: &str = "dbackup";
/// Shortest time between two notices of a process.
const GATHER: Duration = Duration::from_millis(20);
/// Ids in one notice; PostgreSQL allows 8,000 bytes.
const MAX_IDS: usize = 150;
/// A listener that heard nothing for this long asks whether its connection lives.
const SILENCE: Duration = Duration::from_secs(10);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notice {
    /// There may be something to claim: enqueued, a slot free, a limit changed.
    Work,
    /// These executions changed.
    Changed(Vec<ExecutionId>),
    /// These running executions shall stop.
    Cancel(Vec<ExecutionId>),
    /// A connection test waits or was answered.
    Test,
    /// The listener was away: look once at everything.
    Resync,
}

impl Notice {
    /// Its kind, for metrics.
    fn kind(&self) -> &'static str {
        match self {
            Notice::Work => "work",
            Notice::Changed(_) => "changed",
            Notice::Cancel(_) => "cancel",
            Notice::Test => "test",
            Notice::Resync => "resync",
        }
    }
}

/// Waits until something of this kind may have happened, at most `limit`: a notice that is `wanted`, a resync, or
/// notices that were missed.
pub async fn heard(notices: &mut broadcast::Receiver<Notice>, limit: Duration, wanted: impl Fn(&Notice) -> bool) {
    let told = async {
        loop {
            match notices.recv().await {
                Ok(notice) if wanted(&notice) || notice == Notice::Resync => return,
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => return,
                // The process is ending: only the time limit is left.
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    };
    let _ = tokio::time::timeout(limit, told).await;
}

#[derive(Debug, Default)]
struct Outbox {
    work: bool,
    test: bool,
    changed: BTreeSet<ExecutionId>,
    cancel: BTreeSet<ExecutionId>,
}

/// Sends and receives the notices of a process.
#[derive(Clone, Debug)]
pub struct Wakeups {
    outbox: Arc<std::sync::Mutex<Outbox>>,
    filled: Arc<Notify>,
    fan_out: broadcast::Sender<Notice>,
}

impl Wakeups {
    /// Starts the sending and the listening task; both end with `stop`.
    pub fn start(db: Db, stop: CancellationToken) -> Self {
        let wakeups = Self { outbox: Arc::default(), filled: Arc::default(), fan_out: broadcast::channel(1024).0 };
        tokio::spawn(stop.clone().run_until_cancelled_owned(listen(db.clone(), wakeups.fan_out.clone())));
        tokio::spawn(wakeups.clone().send_all(db, stop));
        wakeups
    }

    /// Subscribes. Register before asking the database, or what happens in between is missed.
    pub fn subscribe(&self) -> broadcast::Receiver<Notice> {
        self.fan_out.subscribe()
    }

    /// Tells every process, after the commit of what it tells.
    pub fn tell(&self, notice: Notice) {
        {
            let mut outbox = self.outbox.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match notice {
                Notice::Work => outbox.work = true,
                Notice::Test => outbox.test = true,
                Notice::Changed(ids) => outbox.changed.extend(ids),
                Notice::Cancel(ids) => outbox.cancel.extend(ids),
                Notice::Resync => {}
            }
        }
        self.filled.notify_one();
    }

    async fn send_all(self, db: Db, stop: CancellationToken) {
        let mut conn = None;
        while stop.run_until_cancelled(self.filled.notified()).await.is_some() {
            let outbox = std::mem::take(&mut *self.outbox.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
            for payload in payloads(&outbox) {
                let sent = tokio::time::timeout(Duration::from_secs(2), send(&db, &mut conn, &payload)).await;
                if matches!(sent, Ok(Ok(()))) {
                    metrics::get().notice_sent(parse(&payload).kind());
                } else {
                    metrics::get().notices_failed.inc();
                    // The others find out at their next poll.
                    tracing::debug!("a notice could not be sent");
                    conn = None;
                }
            }
            tokio::time::sleep(GATHER).await;
        }
    }
}

async fn send(db: &Db, conn: &mut Option<PgConnection>, payload: &str) -> Result<(), sqlx::Error> {
    let conn = match conn {
        Some(conn) => conn,
        None => {
            let new = conn.insert(db.connect_apart().await?);
            // A notice is a commit of its own, and nothing depends on it: it need not wait for the disk.
            sqlx::query("set synchronous_commit = off").execute(&mut *new).await?;
            new
        }
    };
    sqlx::query!("select pg_notify($1, $2)", CHANNEL, payload).execute(conn).await?;
    Ok(())
}

fn payloads(outbox: &Outbox) -> Vec<String> {
    let mut payloads = Vec::new();
    if outbox.work {
        payloads.push("work".to_owned());
    }
    if outbox.test {
        payloads.push("test".to_owned());
    }
    for (word, ids) in [("changed", &outbox.changed), ("cancel", &outbox.cancel)] {
        let ids: Vec<String> = ids.iter().map(ExecutionId::to_string).collect();
        payloads.extend(ids.chunks(MAX_IDS).map(|chunk| format!("{word} {}", chunk.join(" "))));
    }
    payloads
}

fn parse(payload: &str) -> Notice {
    let (word, rest) = payload.split_once(' ').unwrap_or((payload, ""));
    let ids = || rest.split(' ').filter_map(|id| id.parse().ok()).collect();
    match word {
        "work" => Notice::Work,
        "test" => Notice::Test,
        "changed" => Notice::Changed(ids()),
        "cancel" => Notice::Cancel(ids()),
        // A newer version's word: look at everything.
        _ => Notice::Resync,
    }
}

async fn listen(db: Db, fan_out: broadcast::Sender<Notice>) {
    loop {
        if let Err(error) = listen_once(&db, &fan_out).await {
            tracing::debug!(%error, "the listener lost its connection");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn listen_once(db: &Db, fan_out: &broadcast::Sender<Notice>) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(&db.pool_apart()).await?;
    listener.listen(CHANNEL).await?;
    let _ = fan_out.send(Notice::Resync);
    loop {
        match tokio::time::timeout(SILENCE, listener.try_recv()).await {
            Ok(Ok(Some(notification))) => {
                let notice = parse(notification.payload());
                metrics::get().notice_received(notice.kind());
                let _ = fan_out.send(notice);
            }
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(error)) => return Err(error),
            // Half-open connections look like silence.
            Err(_) => {
                let ask = sqlx::query("select 1").execute(&mut listener);
                tokio::time::timeout(Duration::from_secs(5), ask).await.map_err(|_| sqlx::Error::PoolTimedOut)??;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_survives_its_way_through_the_database() {
        let id = ExecutionId::new();
        let outbox = Outbox {
            work: true,
            test: true,
            changed: [id].into(),
            cancel: (0..400).map(|_| ExecutionId::new()).collect(),
        };
        let payloads = payloads(&outbox);
        assert!(payloads.iter().all(|p| p.len() < 8000));
        let notices: Vec<Notice> = payloads.iter().map(|p| parse(p)).collect();
        assert_eq!(&notices[..3], &[Notice::Work, Notice::Test, Notice::Changed(vec![id])]);
        let cancelled: usize = notices.iter().map(|n| if let Notice::Cancel(ids) = n { ids.len() } else { 0 }).sum();
        assert_eq!(cancelled, 400);
        assert_eq!(parse("word-of-a-newer-version x"), Notice::Resync);
    }
}
