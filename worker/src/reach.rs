//! What this worker cannot serve and another perhaps can: a folder that is not mounted here, a server that is newer than the
//! tools here. Runs that need it are left to the workers that can, as long as there are such. Without that a worker whose
//! mount is missing, which fails whatever it claims within milliseconds, would take and fail the whole queue.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use common::{
    db::{ANSWER_TIMEOUT, DbError},
    destination::{self, Destination},
    execution::{self, claim},
    id::SourceId,
    store::StoreError,
    worker::OutOfReach,
};
use futures::future::join_all;
use uuid::Uuid;

use crate::{
    failure::{At, RunError},
    lease::Lease,
    pipeline::{open_store, upload::Store},
    run_log::RunLog,
    service::{Shared, patiently},
};

/// How long what was learned from a run counts: a source's server may be another one by then.
const LEARNED: Duration = Duration::from_secs(600);

/// Attempts of a run, after which it is given back no more and ends with its own error. What each of the workers has learned
/// it forgets: where all of them lack something, and each takes long to find out, they would hand the run on for ever.
const MOST_ATTEMPTS: i32 = 30;

/// What was found.
#[derive(Debug, Default)]
pub struct Reach {
    found: Mutex<Found>,
    /// One look at a time: an older one must not undo what a newer one found.
    looking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Found {
    folders: OutOfReach,
    /// Sources and restores, by a run that failed.
    learned: BTreeMap<Uuid, (String, Instant)>,
    untold: bool,
}

impl Found {
    fn keep_learned(&mut self, keep: impl Fn(&Uuid, &Instant) -> bool) {
        let before = self.learned.len();
        self.learned.retain(|id, (_, since)| keep(id, since));
        self.untold |= self.learned.len() < before;
    }
}

impl Reach {
    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it.
    pub fn out_of_reach(&self) -> OutOfReach {
        let found = self.found();
        let learned = found.learned.iter().map(|(id, (why, _))| (*id, why.clone()));
        learned.chain(found.folders.clone()).collect()
    }

    /// Whether it changed since the last call.
    pub fn take_untold(&self) -> bool {
        let mut found = self.found();
        found.keep_learned(|_, since| since.elapsed() < LEARNED);
        std::mem::take(&mut found.untold)
    }

    /// Other tools are here now.
    pub fn other_tools(&self) {
        self.found().keep_learned(|_, _| false);
    }

    fn learn(&self, id: Uuid, why: String) {
        let mut found = self.found();
        found.learned.insert(id, (why, Instant::now()));
        // A registration that is under way may be of before.
        found.untold = true;
    }

    fn set_folders(&self, folders: OutOfReach) {
        let mut found = self.found();
        for (id, why) in &folders {
            if !found.folders.contains_key(id) {
                tracing::warn!(destination = %id, "out of reach of this worker, its runs are left to workers that reach it: {why}");
            }
        }
        for id in found.folders.keys().filter(|id| !folders.contains_key(id)) {
            tracing::info!(destination = %id, "within reach of this worker again");
        }
        found.untold |= found.folders != folders;
        found.folders = folders;
    }
}

/// The first look, to be done before the first claim. What fails of it is done again with the next beat.
pub async fn begin(shared: &Shared) {
    if look(shared).await.is_ok() && !shared.presence.reach.out_of_reach().is_empty() {
        let _ = shared.presence.register().await;
    }
}

/// Looks for ever.
pub async fn run(shared: Shared) {
    loop {
        tokio::time::sleep(shared.config.timing.ticker.mul_f64(rand::random_range(0.75..1.25))).await;
        // While the database is away nothing is claimed either.
        let _ = look(&shared).await;
    }
}

/// Looks at every folder that runs of this worker may need, and forgets the restores that are over.
pub async fn look(shared: &Shared) -> Result<(), DbError> {
    let (pools, reach) = (&shared.config.pools, &shared.presence.reach);
    let _looking = reach.looking.lock().await;
    let learned: Vec<Uuid> = reach.found().learned.keys().copied().collect();
    let ask = async |conn: &mut sqlx::PgConnection| {
        let over = if learned.is_empty() { Vec::new() } else { execution::ended_of(conn, &learned).await? };
        Ok((destination::folders(conn, pools).await?, over))
    };
    let (folders, over) = shared.db.within(ANSWER_TIMEOUT, ask).await?;
    reach.found().keep_learned(|id, _| !over.contains(id));
    let looks = folders.iter().map(async |folder| Some((folder.id.0, see(shared, folder).await.err()?.message)));
    reach.set_folders(join_all(looks).await.into_iter().flatten().collect());
    Ok(())
}

async fn see(shared: &Shared, folder: &Destination) -> Result<(), RunError> {
    let store = open_store(shared, folder).await?;
    let seen: Result<(), StoreError> = match &store {
        Store::Local(store) => store.check_writable().await,
        Store::S3(_) => Ok(()),
    };
    seen.map_err(|e| e.at(&folder.slug))
}

/// What a run is.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A backup of this source.
    Backup(SourceId),
    /// A restore.
    Restore,
}

/// Whether a failure may be one of this worker's sight of a store.
pub fn is_of_store(code: &str) -> bool {
    matches!(
        code,
        "store_missing" | "store_silent" | "store_failed" | "path_not_allowed" | "permission_denied" | "read_only"
    )
}

/// Whether a run that failed here is to be given back, because this worker cannot serve it and another can. That is on
/// record then: this worker does not claim it again.
pub async fn is_for_others(shared: &Shared, lease: &Lease, kind: Kind, error: &RunError, log: &RunLog) -> bool {
    if lease.claim.attempt > MOST_ATTEMPTS {
        return false;
    }
    let out_of_reach = match (error.code, kind) {
        ("client_too_old", Kind::Backup(source)) => Some(source.0),
        // The restore itself: of the backups of its target nothing is said. And a copy that is within reach may be of no use.
        ("client_too_old", Kind::Restore) => Some(lease.claim.execution.0),
        (code, Kind::Restore) if is_of_store(code) => Some(lease.claim.execution.0),
        // Told by the look that follows.
        (code, Kind::Backup(_)) if is_of_store(code) => None,
        _ => return false,
    };
    if let Some(id) = out_of_reach {
        shared.presence.reach.learn(id, error.message.clone());
    }
    let others = tokio::select! {
        biased;
        _ = lease.stopped() => return false,
        others = others_can(shared, lease) => others,
    };
    // A refusal of the database's: the run ends with its own error.
    let others = others.unwrap_or(false);
    if others {
        log.warn(format!("left to a worker that can: {}", error.message));
    }
    others
}

async fn others_can(shared: &Shared, lease: &Lease) -> Result<bool, DbError> {
    patiently(|| look(shared)).await?;
    patiently(|| shared.presence.register()).await?;
    let (claimant, lease_time) = (shared.presence.claimant(), shared.config.timing.lease);
    let ask = async |conn: &mut sqlx::PgConnection| {
        claim::is_for_others(conn, lease.claim.execution, &claimant, lease_time).await
    };
    patiently(|| shared.db.within(ANSWER_TIMEOUT, ask)).await
}
