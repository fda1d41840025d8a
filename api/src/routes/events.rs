//! Server-sent events: one execution with its log, or all executions. A stream ends within a second when its key
//! counts no more or the process stops; a browser then comes back by itself with `Last-Event-ID`.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Extension,
    extract::State,
    http::HeaderMap,
    response::sse::{Event, KeepAlive, Sse},
};
use common::{
    execution::{self, Execution, log::Line},
    id::ExecutionId,
};
use futures::Stream;
use serde_json::{Value, json};
use tokio::{
    sync::{broadcast::error::RecvError, mpsc},
    time::Duration,
};

use super::executions::execution_id;
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Segment, cursor},
    reason::QUEUE_AGE,
    state::AppState,
    waiting,
    watch::{MOST_RECENT, Seen, Shown, Watched},
};

/// A comment this often keeps proxies from cutting a quiet stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events that wait for a slow client; then its stream waits, and nobody else.
const BUFFER: usize = 64;

type Answer = Sse<axum::response::sse::KeepAliveStream<EventStream>>;

/// Events as they come out of a task; the task ends when the client goes away.
pub struct EventStream(mpsc::Receiver<Event>);

impl Stream for EventStream {
    type Item = Result<Event, Infallible>;
    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|event| event.map(Ok))
    }
}

fn stream(receiver: mpsc::Receiver<Event>) -> Answer {
    Sse::new(EventStream(receiver)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

/// Waits for what ends every stream: a credential that counts no more, the end of the process, a client that left.
async fn over(state: &AppState, caller: &Caller, sender: &mpsc::Sender<Event>) {
    tokio::select! {
        () = caller.loses_its_right(&state.memory) => {}
        () = state.stop.closing.cancelled() => {}
        () = sender.closed() => {}
    }
}

/// The status of one execution and the lines of its log, each as it comes, then `end`.
#[utoipa::path(get, path = "/api/executions/{id}/events", tag = "executions", params(("Last-Event-ID" = Option<String>, Header, description = "id of the last event that was seen")), responses((status = 200, content_type = "text/event-stream", body = String)))]
pub async fn one(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    headers: HeaderMap,
) -> Result<Answer, ApiError> {
    let last = headers.get("last-event-id").map(|value| value.to_str().unwrap_or("x"));
    let after = cursor(last).map_err(|_| ApiError::malformed("Last-Event-ID", "is not the id of an event"))?;
    let id = execution_id(&id)?;
    // Registered before the first look, or what happens in between is missed.
    let watched = state.watcher.watch(id);
    let (execution, shown) = waiting::look(&state, &caller, id).await?;
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let mut follower =
            Follower { state: &state, sender: &sender, id, after: after.unwrap_or(0), status: Value::Null };
        tokio::select! {
            _ = follower.follow(watched, execution.status.is_over(), shown) => {}
            () = over(&state, &caller, &sender) => {}
        }
    });
    Ok(stream(receiver))
}

struct Follower<'a> {
    state: &'a AppState,
    sender: &'a mpsc::Sender<Event>,
    id: ExecutionId,
    /// The last line that was sent; the id of every event.
    after: i64,
    /// The last status that was sent.
    status: Value,
}

/// The client has gone, or the database has.
struct Gone;

impl Follower<'_> {
    async fn follow(&mut self, mut watched: Watched, mut over: bool, mut last: Arc<Shown>) -> Result<(), Gone> {
        self.catch_up().await?;
        watched.follow_log(self.after);
        self.tell_status(&last).await?;
        while !over {
            // What holds it back may change while nothing of it does.
            let look_again = async {
                match last.waiting {
                    Some(_) => tokio::time::sleep(QUEUE_AGE).await,
                    None => std::future::pending().await,
                }
            };
            let Seen { execution, body, lines, lines_after } = tokio::select! {
                seen = watched.seen() => seen,
                () = look_again => {
                    self.tell_status(&last).await?;
                    continue;
                }
            };
            // A look may have been missed, or have begun elsewhere: then the lines between are read here.
            if lines_after > self.after {
                self.catch_up().await?;
            }
            self.tell_lines(&lines).await?;
            over = execution.status.is_over();
            if over {
                self.catch_up().await?;
            }
            self.tell_status(&body).await?;
            last = body;
        }
        self.send(Event::default().event("end").data("{}")).await
    }

    async fn catch_up(&mut self) -> Result<(), Gone> {
        let (id, after) = (self.id, self.after);
        let lines = self.state.ask(async |conn| execution::log::read(conn, id, Some(after)).await).await;
        self.tell_lines(&lines.map_err(|_| Gone)?).await
    }

    async fn tell_lines(&mut self, lines: &[Line]) -> Result<(), Gone> {
        for line in lines {
            if line.seq > self.after {
                self.after = line.seq;
                self.send(Event::default().event("log").data(json!(line).to_string())).await?;
            }
        }
        Ok(())
    }

    async fn tell_status(&mut self, shown: &Shown) -> Result<(), Gone> {
        let mut body = shown.data.clone();
        self.state.reasons.tell_in(&mut body, shown.waiting.as_ref()).await;
        if body != self.status {
            self.send(Event::default().event("status").data(body.to_string())).await?;
            self.status = body;
        }
        Ok(())
    }

    async fn send(&self, event: Event) -> Result<(), Gone> {
        self.sender.send(event.id(self.after.to_string())).await.map_err(|_| Gone)
    }
}

/// Every execution that the caller may see, as it changes: first those that wait and run.
#[utoipa::path(get, path = "/api/events", tag = "executions", responses((status = 200, content_type = "text/event-stream", body = String)))]
pub async fn all(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Result<Answer, ApiError> {
    let mut changes = state.watcher.changes();
    let now = recent(&state).await?;
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let tell = async {
            tell_all(&sender, &caller, now).await?;
            loop {
                match changes.recv().await {
                    Ok(execution) => tell(&sender, &caller, &execution).await?,
                    // Too slow for the changes: begin anew.
                    Err(RecvError::Lagged(_)) => {
                        tell_all(&sender, &caller, recent(&state).await.map_err(|_| Gone)?).await?;
                    }
                    Err(RecvError::Closed) => return Err::<(), Gone>(Gone),
                }
            }
        };
        tokio::select! {
            _ = tell => {}
            () = over(&state, &caller, &sender) => {}
        }
    });
    Ok(stream(receiver))
}

/// Those that wait and run, with what they wait for.
async fn recent(state: &AppState) -> Result<Vec<Execution>, ApiError> {
    let mut now = state.ask(async |conn| execution::recent(conn, MOST_RECENT).await).await?;
    state.reasons.tell(&mut now).await;
    Ok(now)
}

async fn tell_all(sender: &mpsc::Sender<Event>, caller: &Caller, mut now: Vec<Execution>) -> Result<(), Gone> {
    now.sort_by_key(|execution| execution.seq);
    for execution in now {
        tell(sender, caller, &execution).await?;
    }
    Ok(())
}

async fn tell(sender: &mpsc::Sender<Event>, caller: &Caller, execution: &Execution) -> Result<(), Gone> {
    if !caller.sees_execution(execution) {
        return Ok(());
    }
    let event = Event::default().event("execution").data(json!(execution).to_string());
    sender.send(event.id(execution.seq.to_string())).await.map_err(|_| Gone)
}
