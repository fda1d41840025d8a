//! The sweeper: removes what attempts that died left in the destinations, from their own record.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use common::{
    destination::{self, Destination},
    id::{DestinationId, Reference},
    staged_object::{self, Litter},
};
use futures::future::join_all;

use crate::{pipeline::open_store, service::Shared};

/// Longest time of a question to the database.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest time of a removal.
const REMOVAL: Duration = Duration::from_secs(60);

/// Sweeps for ever, every few ticks.
pub async fn run(shared: Shared) {
    // A store that refuses is told once, not every few seconds.
    let mut told = HashSet::new();
    loop {
        tokio::time::sleep(shared.config.timing.ticker.mul_f64(rand::random_range(1.0..2.0))).await;
        let due = shared.db.within(ANSWER, async |conn| staged_object::due(conn, &shared.config.pools).await).await;
        let Ok(due) = due else { continue };
        let mut by_destination: HashMap<DestinationId, Vec<Litter>> = HashMap::new();
        for litter in due {
            by_destination.entry(litter.destination).or_default().push(litter);
        }
        // Side by side: one that does not answer keeps no other waiting for more than a removal.
        let swept = by_destination.into_iter().map(|(destination, all)| sweep_all(&shared, destination, all));
        for (litter, error) in join_all(swept).await.into_iter().flatten() {
            if told.insert(litter.id) {
                tracing::warn!(path = litter.path, execution = %litter.execution, trace_id = litter.trace_id(), "an unpublished object could not be removed yet: {error}");
            }
        }
        if told.len() > 10_000 {
            told.clear();
        }
    }
}

/// Those of one destination, one after the other; what could not be removed, with why.
async fn sweep_all(shared: &Shared, id: DestinationId, all: Vec<Litter>) -> Vec<(Litter, String)> {
    let reference = Reference::new(id.to_string());
    let found = shared.db.within(ANSWER, async |conn| destination::find(conn, &reference).await).await;
    let destination = match found {
        Ok(destination) => destination,
        Err(error) => return all.into_iter().map(|litter| (litter, error.to_string())).collect(),
    };
    let mut failed = Vec::new();
    for litter in all {
        match sweep(shared, destination.as_ref(), &litter).await {
            Ok(()) => {}
            Err(Failure::Silent) => {
                failed.push((litter, format!("no answer within {} s", REMOVAL.as_secs())));
                // The others would wait as long, and on a mount that hangs each takes a thread with it.
                break;
            }
            Err(Failure::Told(why)) => failed.push((litter, why)),
        }
    }
    failed
}

enum Failure {
    /// The store does not answer.
    Silent,
    /// It does, or the database does not.
    Told(String),
}

async fn sweep(shared: &Shared, destination: Option<&Destination>, litter: &Litter) -> Result<(), Failure> {
    let (path, execution, trace_id) = (&litter.path, litter.execution, litter.trace_id());
    if litter.restored {
        tracing::warn!(path, %execution, trace_id, "this database was restored from a dump that was made during the run, brought back to a point in time, or has taken over from another: what the run has written may be a backup, and is left alone");
    } else if let Some(destination) = destination {
        let store = open_store(shared, destination).await.map_err(|e| Failure::Told(e.message))?;
        let remove = store.remove(path, litter.upload_id.as_deref(), litter.swept_before);
        let removed = tokio::time::timeout(REMOVAL, remove).await.map_err(|_| Failure::Silent)?;
        removed.map_err(|e| Failure::Told(e.message))?;
        tracing::info!(path, %execution, trace_id, destination = destination.slug, "removed what an attempt left behind");
    }
    let noted = shared.db.within(ANSWER, async |conn| staged_object::swept(conn, litter).await).await;
    noted.map_err(|e| Failure::Told(e.to_string()))
}
