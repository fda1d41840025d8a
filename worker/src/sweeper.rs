//! The sweeper: removes what attempts that died left in the destinations, from their own record.

use std::{collections::HashMap, time::Duration};

use common::{destination, id::Reference, staged_object};

use crate::{pipeline::open_store, service::Shared};

/// Sweeps for ever, every few ticks.
pub async fn run(shared: Shared) {
    // A store that refuses is told once, not every few seconds.
    let mut told = HashMap::new();
    loop {
        tokio::time::sleep(shared.config.timing.ticker.mul_f64(rand::random_range(1.0..2.0))).await;
        let due = shared
            .db
            .within(Duration::from_secs(5), async |conn| staged_object::due(conn, &shared.config.pools).await)
            .await;
        let Ok(due) = due else { continue };
        for litter in due {
            if let Err(error) = sweep(&shared, &litter).await {
                let times: &mut u32 = told.entry(litter.id).or_default();
                *times += 1;
                if *times == 1 {
                    tracing::warn!(path = litter.path, execution = %litter.execution, trace_id = litter.trace_id(), "an unpublished object could not be removed yet: {error}");
                }
            }
        }
        if told.len() > 10_000 {
            told.clear();
        }
    }
}

async fn sweep(shared: &Shared, litter: &staged_object::Litter) -> Result<(), String> {
    let limit = Duration::from_secs(5);
    let reference = Reference::new(litter.destination.to_string());
    let destination = shared
        .db
        .within(limit, async |conn| destination::find(conn, &reference).await)
        .await
        .map_err(|e| e.to_string())?;
    if let Some(destination) = destination {
        let store = open_store(shared, &destination).map_err(|e| e.message)?;
        let removed =
            tokio::time::timeout(Duration::from_secs(60), store.remove(&litter.path, litter.upload_id.as_deref()))
                .await;
        removed.map_err(|_| "no answer within 60 s".to_owned())?.map_err(|e| e.message)?;
        tracing::info!(path = litter.path, execution = %litter.execution, trace_id = litter.trace_id(), destination = destination.slug, "removed what an attempt left behind");
    }
    shared.db.within(limit, async |conn| staged_object::swept(conn, litter).await).await.map_err(|e| e.to_string())
}
