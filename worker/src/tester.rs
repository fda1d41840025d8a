//! Answers the connection tests that API processes leave: outside the limit, within 10 s.

use std::time::{Duration, Instant};

use common::{
    connection_test::{self, Target, TestResult},
    db::DbError,
    destination,
    id::Reference,
    queue::{Notice, heard},
    source,
};
use sqlx::PgConnection;

use crate::{
    failure::{At, RunError},
    lease::ProcessGroups,
    pipeline::{dump::Dump, open_store},
    service::Shared,
};

/// Longest time of a test; its client gives up a little later.
const LIMIT: Duration = Duration::from_secs(9);

/// Answers tests for ever.
pub async fn run(shared: Shared) {
    let mut notices = shared.wakeups.subscribe();
    loop {
        let taken = shared
            .db
            .within(Duration::from_secs(5), async |conn| connection_test::take(conn, &shared.config.pools).await)
            .await;
        match taken {
            Ok(Some((id, target))) => {
                // Not awaited: one slow server must not hold up the next question.
                tokio::spawn(answer(shared.clone(), id, target));
            }
            Ok(None) => heard(&mut notices, shared.config.timing.poll, |notice| *notice == Notice::Test).await,
            Err(_) => tokio::time::sleep(shared.config.timing.poll).await,
        }
    }
}

async fn answer(shared: Shared, id: uuid::Uuid, target: Target) {
    let began = Instant::now();
    let groups = ProcessGroups::default();
    let tested = tokio::time::timeout(LIMIT, test(&shared, target, &groups)).await;
    groups.kill();
    let (ok, message, version) = match tested {
        Ok(Ok((message, version))) => (true, message, version),
        Ok(Err(error)) => (false, error.message, None),
        Err(_) => (false, format!("no answer within {} s", LIMIT.as_secs()), None),
    };
    let result = TestResult {
        ok,
        message,
        version,
        duration_ms: common::time::ms(began.elapsed()),
        worker: shared.config.name.clone(),
    };
    let replied: Result<(), DbError> =
        shared.db.within(Duration::from_secs(5), async |conn| connection_test::reply(conn, id, &result).await).await;
    if let Err(error) = replied {
        tracing::warn!(error = %common::error::Chain(&error), "the answer to a connection test could not be stored");
    }
    shared.wakeups.tell(Notice::Test);
}

async fn test(shared: &Shared, target: Target, groups: &ProcessGroups) -> Result<(String, Option<String>), RunError> {
    let gone = || RunError::give_up("gone", "it was deleted meanwhile");
    match target {
        Target::Source(id) => {
            let reference = Reference::new(id.to_string());
            let source = shared
                .db
                .within(Duration::from_secs(5), async |conn| source::find(conn, &reference).await)
                .await?
                .ok_or_else(gone)?;
            let access =
                source.access(&shared.key).map_err(|e| RunError::give_up("secret_unreadable", e.to_string()))?;
            let (inspected, warning) = Dump::new(&shared.config, access).look(groups).await?;
            shared.note_inventory(id, &inspected);
            let mut message = format!(
                "{} database(s), about {} bytes, dumped with {}",
                inspected.databases.len(),
                inspected.estimate(),
                inspected.tool_version
            );
            if let Some(warning) = warning {
                message = format!("{message}; {warning}");
            }
            Ok((message, Some(inspected.server_version)))
        }
        Target::Destination(id) => {
            let reference = Reference::new(id.to_string());
            let destination = shared
                .db
                .within(Duration::from_secs(5), async |conn| destination::find(conn, &reference).await)
                .await?
                .ok_or_else(gone)?;
            let store = open_store(shared, &destination).await?;
            let message = store.test(destination.ready_at.is_none()).await.map_err(|e| e.at(&destination.slug))?;
            let mark = async |conn: &mut PgConnection| destination::mark_ready(conn, &destination).await;
            match shared.db.within(Duration::from_secs(5), mark).await? {
                true => Ok((message, None)),
                false => Err(RunError::give_up("changed", "the destination was changed meanwhile: test it again")),
            }
        }
    }
}
