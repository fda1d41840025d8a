//! Requests that wait: for an execution to end, or for the database to come back.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use axum::http::StatusCode;
use common::{execution::Execution, id::ExecutionId};
use tokio::time::{Duration, Instant};

use crate::{
    auth::{Caller, HOLD},
    error::ApiError,
    rate_limit::Decision,
    routes::executions::not_found,
    state::AppState,
    watch::{Shown, find_with_artifacts},
};

/// Longest time between two looks whether a held request fits.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Time between two tries to reach a database that is away.
pub const RETRY: Duration = Duration::from_millis(250);
/// Without a look for so long, what was seen last is not taken for the state.
const BLIND: Duration = Duration::from_secs(3);
/// States remembered for when the database is away.
const MOST_KNOWN: usize = 4_096;

/// How long the answer to a poll is kept back (unless the execution ends before), the longer the nearer its client is to
/// its limit. Thirty scripts that poll every five seconds from one address would otherwise use up the minute in a
/// third of it and then be refused, which ends them. Nothing up to a tenth of the limit, so that one client sees
/// every answer at once; the longest hold, a third of the window, at four fifths.
pub fn pace(decision: &Decision) -> Duration {
    let used = 1.0 - f64::from(decision.remaining) / f64::from(decision.limit.max(1));
    HOLD.min(decision.window / 3).mul_f64(((used - 0.1) / 0.7).clamp(0.0, 1.0))
}

/// Waits, as one of the requests that this process holds; gives `refusal` when it may not, or no longer.
pub async fn hold(state: &AppState, wait: Duration, until: Instant, refusal: ApiError) -> Result<(), ApiError> {
    let Ok(_held) = state.held.try_acquire() else { return Err(refusal) };
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(refusal);
    }
    // Those who wait for the same moment must not come back in one burst, and a setting may change meanwhile.
    let wait = wait.clamp(Duration::from_millis(20), LOOK_AGAIN).mul_f64(rand::random_range(1.0..1.1));
    tokio::select! {
        () = tokio::time::sleep(wait.min(left)) => Ok(()),
        () = state.stop.closing.cancelled() => Err(refusal),
    }
}

/// An execution that the caller may see, with its answer.
pub async fn look(state: &AppState, caller: &Caller, id: ExecutionId) -> Result<(Execution, Arc<Shown>), ApiError> {
    let ask = async |conn: &mut sqlx::PgConnection| find_with_artifacts(conn, &[id]).await;
    let (mut executions, artifacts) = state.ask(ask).await?;
    let execution = executions.pop().filter(|execution| caller.sees_execution(execution)).ok_or_else(not_found)?;
    let shown = state.known.remember(&execution, Shown::of(&execution, &artifacts));
    Ok((execution, shown))
}

/// The state of an execution at its end, or at `until`.
pub async fn until_over(
    state: &AppState,
    caller: &Caller,
    id: ExecutionId,
    until: Instant,
) -> Result<Arc<Shown>, ApiError> {
    if until <= Instant::now() {
        // A plain poll: nobody waits, so nobody has to look for it again.
        return Ok(look(state, caller, id).await?.1);
    }
    // Registered before the question, or an end in between is missed.
    let mut watched = state.watcher.watch(id);
    let begun = Instant::now();
    let mut shown = {
        let (first, shown) = look(state, caller, id).await?;
        if first.status.is_over() {
            return Ok(shown);
        }
        shown
    };
    let revoked = caller.loses_its_right(&state.memory);
    tokio::pin!(revoked);
    loop {
        tokio::select! {
            seen = watched.seen() => {
                shown = seen.body;
                if seen.execution.status.is_over() {
                    return Ok(shown);
                }
            }
            () = tokio::time::sleep_until(until) => {
                // While the database is away nothing is seen, which is not the same as no change.
                return match state.watcher.last_look().max(Some(begun)) {
                    Some(at) if at.elapsed() >= BLIND => Ok(look(state, caller, id).await?.1),
                    _ => Ok(shown),
                };
            }
            () = state.stop.closing.cancelled() => return Ok(shown),
            () = &mut revoked => {
                return Err(ApiError::new(StatusCode::UNAUTHORIZED, "key_revoked", "the right to wait for this was taken away"));
            }
        }
    }
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
        hold(state, RETRY, hold_until, refused).await?;
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
    /// Gives the answer back: that of another who was told the same, where there is one. Thousands who wait for one
    /// execution hold one answer then, and there are not thousands to free when it ends.
    fn remember(&self, execution: &Execution, shown: Shown) -> Arc<Shown> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, same)) = known.states.get(&execution.id).filter(|(_, body)| **body == shown) {
            return same.clone();
        }
        let shown = Arc::new(shown);
        let state = (Arc::new(execution.clone()), shown.clone());
        if known.states.insert(execution.id, state).is_none() {
            known.order.push_back(execution.id);
            if known.order.len() > MOST_KNOWN
                && let Some(oldest) = known.order.pop_front()
            {
                known.states.remove(&oldest);
            }
        }
        shown
    }

    fn get(&self, id: ExecutionId) -> Option<(Arc<Execution>, Arc<Shown>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).states.get(&id).cloned()
    }
}
