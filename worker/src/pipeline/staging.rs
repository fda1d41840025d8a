//! What an attempt may leave in destinations: recorded before its first byte, and removed where the attempt fails.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use common::{db::ANSWER_TIMEOUT, staged_object, store::StoreError};
use futures::future::join_all;

use super::{Attempt, Target, upload::Store};
use crate::{
    failure::RunError,
    run_log::RunLog,
    service::{Shared, patiently},
};

/// Every name that this attempt may have left in a destination.
#[derive(Default)]
pub struct Staging(Mutex<Vec<Staged>>);

#[derive(Clone)]
struct Staged {
    store: Arc<Store>,
    path: String,
    upload_id: Option<String>,
}

/// Longest time of a removal; a mount that hangs must not keep an attempt from its end.
const REMOVAL: Duration = Duration::from_secs(60);

impl Staged {
    async fn remove(&self) -> Result<(), StoreError> {
        let removed = tokio::time::timeout(REMOVAL, self.store.remove(&self.path, self.upload_id.as_deref(), false));
        let silent = |_| StoreError::retry("store_silent", format!("no answer within {} s", REMOVAL.as_secs()));
        removed.await.map_err(silent)?
    }
}

impl Staging {
    /// Records a name in the database before its first byte, and here.
    pub(super) async fn record(
        &self,
        attempt: Attempt<'_>,
        target: &Target,
        path: &str,
        upload_id: Option<&str>,
    ) -> Result<(), RunError> {
        let upload = upload_id.map(str::to_owned);
        let staged = Staged { store: target.store.clone(), path: path.to_owned(), upload_id: upload };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(staged);
        let claim = attempt.assignment.claim;
        let db = &attempt.shared.db;
        let recorded = patiently(|| {
            db.within(ANSWER_TIMEOUT, async |conn| staged_object::record(conn, claim, target.id, path, upload_id).await)
        })
        .await?;
        if recorded { Ok(()) } else { Err(RunError::retry("lease_lost", "the lease was lost")) }
    }

    /// Removes whatever lies under the recorded names. What cannot be removed now is left to the sweeper.
    pub async fn discard(&self, shared: &Shared, log: &RunLog) {
        let staged = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let removed = join_all(staged.iter().map(|s| s.remove())).await;
        let mut clean = true;
        for (staged, result) in staged.iter().zip(removed) {
            if let Err(error) = result {
                clean = false;
                log.warn(format!("{} could not be cleaned away yet ({error}); the sweeper tries again", staged.path));
            }
        }
        if clean && !staged.is_empty() {
            let claim = log.claim();
            let noted =
                shared.db.within(ANSWER_TIMEOUT, async |conn| staged_object::discarded(conn, claim.token).await).await;
            if let Err(error) = noted {
                tracing::debug!(
                    error = %common::error::Chain(&error),
                    "the record of staged names stays for the sweeper"
                );
            }
        }
    }
}
