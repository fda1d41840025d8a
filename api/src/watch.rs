//! Waiting for executions without asking for each: the clients of a process share one look at the database a second,
//! in one statement for all the ids they wait for, and a notification brings the look forward. A client that goes away
//! costs nothing.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::body::Bytes;
use common::{
    artifact,
    db::{Db, DbError},
    execution::{
        self, Execution, Status, group,
        log::{self, Line, LogCursor},
        waiting::{WaitReason, Waiting},
    },
    id::ExecutionId,
    queue::{Notice, Wakeups},
};
use serde_json::{Value, json};
use sqlx::PgConnection;
use tokio::{
    sync::{Notify, broadcast, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::reason::Reasons;

/// Longest time between two looks while somebody waits.
const LOOK: Duration = Duration::from_secs(1);
/// Shortest time between two looks, however many notices come.
const GATHER: Duration = Duration::from_millis(10);
/// Longest time of a look.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Executions on a live list.
pub const MOST_RECENT: i64 = 500;

/// An execution as it was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The execution.
    pub execution: Arc<Execution>,
    /// Its answer.
    pub body: Arc<Shown>,
    /// Lines of its log after `lines_after`, for those who follow it.
    pub lines: Arc<Vec<Line>>,
    /// Where the lines begin.
    pub lines_after: i64,
}

/// Lets many wait.
#[derive(Clone)]
pub struct Watcher(Arc<Inner>);

struct Inner {
    db: Db,
    reasons: Reasons,
    watched: Mutex<HashMap<ExecutionId, Entry>>,
    lists: broadcast::Sender<Arc<Execution>>,
    /// When the last look at everything that brought an answer was begun.
    looked: Mutex<Option<Instant>>,
    /// Somebody began to wait.
    begun: Notify,
}

struct Entry {
    sender: watch::Sender<Option<Seen>>,
    /// Where the followers of the log are; `None` when nobody follows it.
    log_after: Option<i64>,
}

/// A wait; it ends when it is dropped.
pub struct Watched {
    receiver: watch::Receiver<Option<Seen>>,
    inner: Arc<Inner>,
    id: ExecutionId,
}

impl Watcher {
    /// Starts looking, until `stop`.
    pub fn start(db: Db, reasons: Reasons, wakeups: Wakeups, stop: CancellationToken) -> Self {
        let inner = Arc::new(Inner {
            db,
            reasons,
            watched: Mutex::default(),
            lists: broadcast::channel(1024).0,
            looked: Mutex::default(),
            begun: Notify::new(),
        });
        tokio::spawn(stop.run_until_cancelled_owned(inner.clone().run(wakeups.subscribe())));
        Self(inner)
    }

    /// Registers a wait. Do so before asking for the state, or a change in between is missed.
    pub fn watch(&self, id: ExecutionId) -> Watched {
        let receiver = {
            let mut watched = self.0.watched();
            let entry = watched.entry(id).or_insert_with(|| Entry { sender: watch::channel(None).0, log_after: None });
            entry.sender.subscribe()
        };
        self.0.begun.notify_one();
        Watched { receiver, inner: self.0.clone(), id }
    }

    /// When the executions that are waited for were last looked at with success.
    pub fn last_look(&self) -> Option<Instant> {
        *self.0.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes of all executions, for live lists.
    pub fn changes(&self) -> broadcast::Receiver<Arc<Execution>> {
        let receiver = self.0.lists.subscribe();
        self.0.begun.notify_one();
        receiver
    }
}

impl Watched {
    /// The next look that brought something.
    pub async fn seen(&mut self) -> Seen {
        loop {
            if self.receiver.changed().await.is_err() {
                // The process is ending: the caller's other branches end the wait.
                std::future::pending::<()>().await;
            }
            if let Some(seen) = self.receiver.borrow_and_update().clone() {
                return seen;
            }
        }
    }

    /// Has the looks bring lines of the log after `after` too.
    pub fn follow_log(&self, after: i64) {
        if let Some(entry) = self.inner.watched().get_mut(&self.id) {
            entry.log_after.get_or_insert(after);
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut watched = self.inner.watched();
        // This receiver is still counted.
        if watched.get(&self.id).is_some_and(|entry| entry.sender.receiver_count() <= 1) {
            watched.remove(&self.id);
        }
    }
}

/// An execution with its artifacts, as it is answered. Written once for all who wait: two thousand of them are
/// answered within a tenth of a second.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// What stands under `data`.
    pub data: Value,
    /// The whole answer.
    pub answer: Bytes,
    /// While it is Pending: what tells why.
    pub waiting: Option<Waiting>,
}

impl Shown {
    /// Of an execution and, among others, its artifacts.
    pub fn of(execution: &Execution, artifacts: &[artifact::Artifact]) -> Self {
        let mut data = json!(execution);
        data["artifacts"] = artifacts.iter().filter(|a| a.execution_id == execution.id).map(|a| json!(a)).collect();
        let answer = json!({ "success": true, "data": data }).to_string().into();
        Self { data, answer, waiting: execution.waiting.as_deref().cloned() }
    }
}

impl Inner {
    fn watched(&self) -> MutexGuard<'_, HashMap<ExecutionId, Entry>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> bool {
        self.watched().is_empty() && self.lists.receiver_count() == 0
    }

    async fn run(self: Arc<Self>, mut notices: broadcast::Receiver<Notice>) {
        let mut known = HashMap::new();
        loop {
            while self.idle() {
                known.clear();
                self.begun.notified().await;
            }
            let next = Instant::now() + LOOK;
            let begun = Instant::now();
            match self.look(None, &mut known).await {
                Ok(()) => *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = Some(begun),
                Err(error) => {
                    tracing::debug!(error = %common::error::Chain(&error), "could not look at the executions that clients wait for")
                }
            }
            // Until the next full look, only at what is told to have changed.
            // The first at once: those who wait for it should not wait for others.
            let mut again = Instant::now();
            while let Some(changed) = gather(&mut notices, again, next).await {
                match changed {
                    Changed::Some(ids) => {
                        let _ = self.look(Some(&ids), &mut known).await;
                        again = Instant::now() + GATHER;
                    }
                    Changed::Perhaps => break,
                }
            }
        }
    }

    /// Looks at the watched executions that are in `only`, or at all of them.
    async fn look(
        &self,
        only: Option<&HashSet<ExecutionId>>,
        known: &mut HashMap<ExecutionId, State>,
    ) -> Result<(), DbError> {
        let (ids, cursors) = self.wanted(only);
        let listing = self.lists.receiver_count() > 0;
        if ids.is_empty() && !listing {
            return Ok(());
        }
        let listed: Vec<ExecutionId> = only.filter(|_| listing).into_iter().flatten().copied().collect();
        let ask = async |conn: &mut PgConnection| {
            let found = find_with_artifacts(conn, &ids).await?;
            // After the state: of a run that was over then, these are all of its lines.
            let lines = if cursors.is_empty() { Vec::new() } else { log::read_new(conn, &cursors).await? };
            let listed = match (listing, only) {
                (false, _) => Vec::new(),
                (true, None) => execution::recent(conn, MOST_RECENT).await?,
                (true, Some(_)) => execution::find_all(conn, &listed).await?,
            };
            Ok((found, lines, listed))
        };
        let ((executions, artifacts), lines, mut listed) = self.db.within(TIMEOUT, ask).await?;
        self.publish(executions, &artifacts, lines);
        if only.is_none() {
            // What is on no list any more will not change: it is forgotten, however long somebody listens.
            let still: HashSet<ExecutionId> = listed.iter().map(|execution| execution.id).collect();
            known.retain(|id, _| still.contains(id));
        }
        self.reasons.tell(&mut listed).await;
        for execution in listed {
            let state = State::of(&execution);
            if known.insert(execution.id, state.clone()) != Some(state) {
                let _ = self.lists.send(Arc::new(execution));
            }
        }
        Ok(())
    }

    fn wanted(&self, only: Option<&HashSet<ExecutionId>>) -> (Vec<ExecutionId>, Vec<LogCursor>) {
        let watched = self.watched();
        let wanted = watched.iter().filter(|(id, entry)| {
            let seen = entry.sender.borrow();
            let over = seen.as_ref().is_some_and(|seen| seen.execution.status.is_over());
            // A group changes with its members, whose ids the notice names.
            let group = seen.as_ref().is_some_and(|seen| seen.execution.members.is_some());
            !over && only.is_none_or(|only| group || only.contains(id))
        });
        let (mut ids, mut cursors) = (Vec::new(), Vec::new());
        for (id, entry) in wanted {
            ids.push(*id);
            cursors.extend(entry.log_after.map(|after| LogCursor { execution: *id, after }));
        }
        (ids, cursors)
    }

    fn publish(&self, executions: Vec<Execution>, artifacts: &[artifact::Artifact], lines: Vec<(ExecutionId, Line)>) {
        let mut lines_of: HashMap<ExecutionId, Vec<Line>> = HashMap::new();
        for (id, line) in lines {
            lines_of.entry(id).or_default().push(line);
        }
        let mut watched = self.watched();
        for execution in executions {
            let Some(entry) = watched.get_mut(&execution.id) else { continue };
            let lines = lines_of.remove(&execution.id).unwrap_or_default();
            let lines_after = entry.log_after.unwrap_or(0);
            entry.log_after = entry.log_after.map(|after| lines.last().map_or(after, |line| line.seq));
            let body = Arc::new(Shown::of(&execution, artifacts));
            let quiet = lines.is_empty() && entry.sender.borrow().as_ref().is_some_and(|seen| seen.body == body);
            if !quiet {
                entry.sender.send_replace(Some(Seen {
                    execution: Arc::new(execution),
                    body,
                    lines: Arc::new(lines),
                    lines_after,
                }));
            }
        }
    }
}

/// Executions and groups, and the artifacts of those that have some.
pub async fn find_with_artifacts(
    conn: &mut PgConnection,
    ids: &[ExecutionId],
) -> Result<(Vec<Execution>, Vec<artifact::Artifact>), sqlx::Error> {
    let mut executions = execution::find_all(conn, ids).await?;
    let found: HashSet<ExecutionId> = executions.iter().map(|e| e.id).collect();
    let missing: Vec<ExecutionId> = ids.iter().filter(|id| !found.contains(id)).copied().collect();
    if !missing.is_empty() {
        executions.extend(group::find_groups(conn, &missing).await?);
    }
    let published: Vec<ExecutionId> = executions.iter().filter(|e| e.status == Status::Success).map(|e| e.id).collect();
    let artifacts = if published.is_empty() { Vec::new() } else { artifact::of_executions(conn, &published).await? };
    Ok((executions, artifacts))
}

/// What is told of an execution on a list when it changes.
#[derive(PartialEq, Eq, Clone)]
struct State {
    status: Status,
    stage: String,
    progress: Option<i16>,
    waiting_for: Option<WaitReason>,
}

impl State {
    fn of(execution: &Execution) -> Self {
        Self {
            status: execution.status,
            stage: execution.stage.clone(),
            progress: execution.progress,
            waiting_for: execution.waiting_for.as_ref().map(|waiting| waiting.reason),
        }
    }
}

enum Changed {
    Some(HashSet<ExecutionId>),
    /// Notices were lost: look at everything.
    Perhaps,
}

/// Gathers the notices of changed executions: the first, and those that come until `not_before`; `None` at `until`.
async fn gather(notices: &mut broadcast::Receiver<Notice>, not_before: Instant, until: Instant) -> Option<Changed> {
    let mut ids = HashSet::new();
    let mut end = until;
    loop {
        match tokio::time::timeout_at(end, notices.recv()).await {
            Ok(Ok(Notice::Changed(changed))) => {
                ids.extend(changed);
                end = end.min(not_before);
            }
            Ok(Ok(Notice::Resync) | Err(broadcast::error::RecvError::Lagged(_))) => return Some(Changed::Perhaps),
            Ok(Ok(_)) => {}
            Ok(Err(broadcast::error::RecvError::Closed)) => std::future::pending().await,
            Err(_) if ids.is_empty() => return None,
            Err(_) => return Some(Changed::Some(ids)),
        }
    }
}
