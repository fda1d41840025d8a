//! Requests that wait: for an execution to end, or for the database to come back.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use axum::http::StatusCode;
use common::{
    db::{ANSWER_TIMEOUT, DbError},
    execution::{self, Execution},
    id::ExecutionId,
};
use tokio::time::{Duration, Instant};

use crate::{
    auth::{Caller, HOLD},
    error::ApiError,
    rate_limit::Decision,
    state::AppState,
    watch::{Seen, Shown, find_with_artifacts},
};

/// Time between two looks whether the caller's credential still counts.
const REVOKED: Duration = Duration::from_millis(500);
/// Time between two tries to reach a database that is away.
const RETRY: Duration = Duration::from_millis(250);
/// States remembered for when the database is away.
const MOST_KNOWN: usize = 4_096;
/// Positions in the queue that are told.
const MOST_QUEUED: i64 = 1_000;
/// How old they may be.
const QUEUE_AGE: Duration = Duration::from_secs(1);

/// How long the answer to a poll is kept back (unless the execution ends before), the longer the nearer its client is to
/// its limit. Thirty scripts that poll every five seconds from one address would otherwise use up the minute in a
/// third of it and then be refused, which ends them. Nothing up to a tenth of the limit, so that one client sees
/// every answer at once; the longest hold, a third of the window, at four fifths.
pub fn pace(decision: &Decision) -> Duration {
    let used = 1.0 - f64::from(decision.remaining) / f64::from(decision.limit.max(1));
    HOLD.min(decision.window / 3).mul_f64(((used - 0.1) / 0.7).clamp(0.0, 1.0))
}

fn not_found() -> ApiError {
    ApiError::not_found("Execution", "execution_not_found")
}

/// The state of an execution at its end, or at `until`.
pub async fn until_over(
    state: &AppState,
    caller: &Caller,
    id: ExecutionId,
    until: Instant,
) -> Result<Arc<Shown>, ApiError> {
    // Registered before the question, or an end in between is missed.
    let mut watched = state.watcher.watch(id);
    let (first, mut body) = look(state, id).await?;
    let first = first.filter(|execution| caller.sees_execution(execution)).ok_or_else(not_found)?;
    if first.status.is_over() {
        return Ok(body);
    }
    let mut revoked = tokio::time::interval_at(Instant::now() + REVOKED, REVOKED);
    loop {
        tokio::select! {
            Seen { execution, body: seen, .. } = watched.seen() => {
                body = seen;
                if execution.status.is_over() {
                    return Ok(body);
                }
            }
            () = tokio::time::sleep_until(until) => return Ok(body),
            () = state.stop.cancelled() => return Ok(body),
            _ = revoked.tick() => {
                if !caller.still_counts(&state.memory).await.unwrap_or(true) {
                    return Err(ApiError::new(StatusCode::UNAUTHORIZED, "key_revoked", "the right to wait for this was taken away"));
                }
            }
        }
    }
}

async fn look(state: &AppState, id: ExecutionId) -> Result<(Option<Execution>, Arc<Shown>), DbError> {
    let ask = async |conn: &mut sqlx::PgConnection| find_with_artifacts(conn, &[id]).await;
    let (mut executions, artifacts) = state.db.within(ANSWER_TIMEOUT, ask).await?;
    let execution = executions.pop();
    let body = execution.as_ref().map(|execution| Arc::new(Shown::of(execution, &artifacts))).unwrap_or_default();
    if let Some(execution) = &execution {
        state.known.remember(execution, &body);
    }
    Ok((execution, body))
}

/// As [`until_over`] for a poll, which survives trouble: with the database away it gets the last state that this
/// process knows, marked as stale in its data, or is held until the database is back.
pub async fn for_poll(
    state: &AppState,
    caller: &Caller,
    id: ExecutionId,
    until: Instant,
    hold_until: Instant,
) -> Result<Arc<Shown>, ApiError> {
    loop {
        let refused = match until_over(state, caller, id, until).await {
            Err(error) if error.is_away() => error,
            answer => return answer,
        };
        if let Some((execution, body)) = state.known.get(id)
            && caller.sees_execution(&execution)
        {
            let mut data = body.data.clone();
            data["stale"] = true.into();
            return Ok(Arc::new(Shown { data, ..Shown::default() }));
        }
        let Ok(_held) = state.held.try_acquire() else { return Err(refused) };
        if Instant::now() + RETRY > hold_until {
            return Err(refused);
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = state.stop.cancelled() => return Err(refused),
        }
    }
}

/// The last states that this process told, for when the database is away.
#[derive(Default)]
pub struct LastKnown(Mutex<Known>);

#[derive(Default)]
struct Known {
    states: HashMap<ExecutionId, (Arc<Execution>, Arc<Shown>)>,
    order: VecDeque<ExecutionId>,
}

impl LastKnown {
    fn remember(&self, execution: &Execution, body: &Arc<Shown>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let state = (Arc::new(execution.clone()), body.clone());
        if known.states.insert(execution.id, state).is_none() {
            known.order.push_back(execution.id);
            if known.order.len() > MOST_KNOWN
                && let Some(oldest) = known.order.pop_front()
            {
                known.states.remove(&oldest);
            }
        }
    }

    fn get(&self, id: ExecutionId) -> Option<(Arc<Execution>, Arc<Shown>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).states.get(&id).cloned()
    }
}

/// Where executions stand in the queue, from one look a second at most.
#[derive(Default)]
pub struct QueuePositions(tokio::sync::Mutex<Option<(Instant, HashMap<ExecutionId, usize>)>>);

impl QueuePositions {
    /// 1 for the first; `None` past [`MOST_QUEUED`], or when it waits no longer.
    pub async fn position(&self, state: &AppState, id: ExecutionId) -> Option<usize> {
        let mut queue = self.0.lock().await;
        let fresh = queue.as_ref().filter(|(at, _)| at.elapsed() < QUEUE_AGE);
        if fresh.is_none() {
            let asked = Instant::now();
            let ids =
                state.db.within(ANSWER_TIMEOUT, async |conn| execution::queue(conn, MOST_QUEUED).await).await.ok()?;
            *queue = Some((asked, ids.into_iter().zip(1..).collect()));
        }
        queue.as_ref().and_then(|(_, positions)| positions.get(&id).copied())
    }
}
