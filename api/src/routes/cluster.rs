//! `/api/cluster`.

use std::{sync::Arc, time::Duration};

use axum::{Extension, Json, extract::State, http::StatusCode};
use common::{
    audit::Event,
    cluster::{self, Cluster},
    db::ANSWER_TIMEOUT,
    queue::Notice,
    worker::{self, Cordoned, Worker},
};
use serde_json::Value;

use super::data;
use crate::{auth::Caller, error::ApiError, extract::Segment, openapi::Data, state::AppState};

/// How old the count of what waits may be: it looks at every row that waits.
const DEPTH_AGE: Duration = Duration::from_secs(1);

/// The cluster at a glance: workers, slots in use, what waits and the limit. A key that is bound to jobs sees of other
/// jobs' slots only that they are in use, and not what is out of reach of a worker. `queue` is up to a second old.
#[utoipa::path(get, path = "/api/cluster", tag = "cluster", responses((status = 200, body = Data<Cluster>)))]
pub async fn get(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Result<Json<Value>, ApiError> {
    look(&state, &caller).await.map(|cluster| data(&cluster))
}

/// The cluster as a caller may see it.
pub async fn look(state: &AppState, caller: &Caller) -> Result<Cluster, ApiError> {
    let count = async { state.db.within(ANSWER_TIMEOUT, async |conn| cluster::queue(conn).await).await.map(Arc::new) };
    let queue = state.depth.within(DEPTH_AGE, count).await?;
    let mut cluster = state.ask(async |conn| Cluster::look(conn, (*queue).clone()).await).await?;
    if let Some(jobs) = caller.only() {
        cluster.show_only(&jobs);
    }
    Ok(cluster)
}

/// Has a worker claim nothing more from the answer on; what it runs goes on. It holds until it is taken away: also when
/// the worker loses its connection, and for the next worker of its name.
#[utoipa::path(post, path = "/api/cluster/workers/{id}/cordon", tag = "cluster", responses((status = 200, body = Data<Worker>)))]
pub async fn cordon(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(worker): Segment,
) -> Result<Json<Value>, ApiError> {
    change(&state, &caller, &worker, true).await
}

/// Lets a cordoned worker claim again, at once.
#[utoipa::path(post, path = "/api/cluster/workers/{id}/uncordon", tag = "cluster", responses((status = 200, body = Data<Worker>)))]
pub async fn uncordon(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(worker): Segment,
) -> Result<Json<Value>, ApiError> {
    change(&state, &caller, &worker, false).await
}

async fn change(state: &AppState, caller: &Caller, worker: &str, cordoned: bool) -> Result<Json<Value>, ApiError> {
    let action = if cordoned { "worker.cordon" } else { "worker.uncordon" };
    let change = async |conn: &mut sqlx::PgConnection| {
        let done = worker::cordon(conn, worker, cordoned).await?;
        let event = match &done {
            Cordoned::Done(worker) => Some(Event::new(action, worker.id, &worker.name)),
            Cordoned::NotFound | Cordoned::Ambiguous(_) => None,
        };
        Ok((done, event))
    };
    match state.change(caller, change).await? {
        Cordoned::Done(mut worker) => {
            if caller.only().is_some() {
                worker.out_of_reach.clear();
            }
            tracing::info!(worker = worker.name, caller = caller.name(), "{action}");
            state.wakeups.tell(Notice::Work);
            Ok(data(&worker))
        }
        Cordoned::NotFound => Err(ApiError::not_found("Worker", "worker_not_found")),
        Cordoned::Ambiguous(workers) => Err(ApiError::new(
            StatusCode::CONFLICT,
            "ambiguous_name",
            format!("{workers} workers have this name: use the id that GET /api/cluster shows"),
        )),
    }
}
