//! Restores: a backup that goes back into a database. They are executions like any other, polled and cancelled alike.

use axum::{
    Extension,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use common::{
    artifact, encryption,
    execution::{
        Execution, Status,
        restore::{self, Order, Ordered, RestoreRequest},
    },
    id::{ExecutionId, Reference},
    queue::Notice,
    source::{self, Engine, Source},
    telemetry::TraceContext,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    Check,
    accepted::{Accepted, How, enqueue_span, idempotency, key_reused, queue_full, told},
    executions::{find, not_found, wait_until},
};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{RawBody, Segment, parse},
    openapi::Triggered,
    state::AppState,
};

/// Body of a restore; all of it is optional. Without `overwrite`, a target that holds something is refused.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "database": "shop", "into": "shop_restored" }))]
pub struct RestoreBody {
    /// Source, by id or slug, whose server it goes to; left out: where the backup came from.
    source_id: Option<String>,
    /// Which database of the backup; left out: all of them.
    database: Option<String>,
    /// Name of the database that it becomes, made where it is missing; left out: its own.
    into: Option<String>,
    /// Replace what the backup contains in a target that is not empty; what else is there stays.
    #[serde(default)]
    overwrite: bool,
    /// PostgreSQL: restore owners and grants too; their roles must exist.
    #[serde(default)]
    keep_owners: bool,
    /// Of an encrypted backup: an age identity that opens it, or the text of its key file. It is kept sealed until the
    /// restore has ended, and then erased.
    #[schema(value_type = Option<String>, format = Password)]
    identity: Option<SecretString>,
    wait: Option<u64>,
}

impl RestoreBody {
    fn check(&self) -> Result<(), ApiError> {
        let mut check = Check::default();
        let sane = |name: &str| !name.is_empty() && name.len() <= 63 && !name.chars().any(char::is_control);
        if self.into.as_deref().is_some_and(|name| !sane(name)) {
            check.refuse("into", "must be the name of a database: 1 to 63 bytes without control characters");
        }
        check.wait(self.wait);
        if self.into.as_deref().is_some_and(|name| SYSTEM.contains(&name.to_lowercase().as_str())) {
            check.refuse("into", "is a database of the server's own: choose another name");
        }
        check.done()
    }
}

/// What a server keeps for itself, and what it makes new databases from.
const SYSTEM: [&str; 6] = ["template0", "template1", "mysql", "sys", "information_schema", "performance_schema"];

/// Restores a backup into a database. It is an execution of type Restore: poll it as any other.
///
/// Its worker reads the whole backup and compares its SHA-256 before it touches the target, makes the database where it is
/// missing, and refuses one that is not empty unless `overwrite` is said. PostgreSQL restores each database in one
/// transaction: all of it, or nothing.
#[utoipa::path(post, path = "/api/executions/{id}/restore", tag = "executions", params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters; the same key and body make one restore in 24 hours")), request_body = Option<RestoreBody>, responses((status = 200, body = Triggered)))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    headers: HeaderMap,
    RawBody(raw): RawBody,
) -> Result<Response, ApiError> {
    let body: RestoreBody = parse(&raw)?;
    body.check()?;
    let backup = find(&state, &caller, &id).await?;
    let restorable = restorable(&state, &backup).await?;
    let into_database = database_of(&restorable.databases, &body)?;
    let source = target(&state, &backup, body.source_id.clone()).await?;
    if body.keep_owners && source.engine != Engine::Postgres {
        return Err(ApiError::invalid_field("keepOwners", "is for PostgreSQL alone"));
    }
    let order = Order {
        backup_id: backup.id,
        source_id: source.id,
        database: into_database,
        into: body.into,
        overwrite: body.overwrite,
        keep_owners: body.keep_owners,
    };
    allowed(&state, &caller, &order).await?;
    let identity = identity(body.identity, &restorable.recipients)?;
    let wait = wait_until(body.wait);
    let once = [b"restore ", id.as_bytes(), b" ", &raw[..]].concat();
    place(&state, &caller, order, identity, &headers, &once, wait).await
}

/// Restores once more what an earlier restore was about.
pub async fn again(
    state: &AppState,
    caller: &Caller,
    old: &Execution,
    headers: &HeaderMap,
    raw: &[u8],
) -> Result<Response, ApiError> {
    caller.demand(common::permission::Permission::StorageRestore)?;
    let order = state.ask(async |conn| restore::find(conn, old.id).await).await?.ok_or_else(not_found)?;
    allowed(state, caller, &order).await?;
    let backup = find(state, caller, &order.backup_id.to_string()).await?;
    if !restorable(state, &backup).await?.recipients.is_empty() {
        return Err(ApiError::conflict(
            "identity_required",
            format!(
                "the backup is encrypted, and its identity was forgotten with the end of the restore: send POST /api/executions/{}/restore with the identity once more",
                backup.id
            ),
        ));
    }
    let once = [b"restore again ", old.id.to_string().as_bytes(), b" ", raw].concat();
    place(state, caller, order, None, headers, &once, None).await
}

async fn place(
    state: &AppState,
    caller: &Caller,
    order: Order,
    identity: Option<SecretString>,
    headers: &HeaderMap,
    once: &[u8],
    wait: Option<Instant>,
) -> Result<Response, ApiError> {
    let idempotency = idempotency(headers, caller, once)?;
    let mut span = enqueue_span(caller);
    let trace = TraceContext::of(span.context());
    let id = ExecutionId::new();
    let sealed_identity =
        identity.map(|identity| state.key.seal(&restore::identity_context(id), identity.expose_secret().as_bytes()));
    let request = RestoreRequest { id, order, actor: caller.actor(), trace, idempotency, sealed_identity };
    let ordered = state.ask(async |conn| restore::order(conn, &request).await).await;
    let accepted = ordered.and_then(|ordered| match ordered {
        Ordered::Queued(id) => Ok(Accepted { id, how: How::New }),
        Ordered::Replayed(id) => Ok(Accepted { id, how: How::Replayed }),
        Ordered::KeyReused => Err(key_reused()),
        Ordered::Gone => Err(not_found()),
        Ordered::QueueFull(cap) => Err(queue_full(&format!("{cap} restores of this job wait already"))),
    });
    let accepted = told(&mut span, accepted)?;
    drop(span);
    if accepted.how == How::New {
        state.wakeups.tell(Notice::Work);
        let backup = request.order.backup_id;
        tracing::info!(execution = %accepted.id, %backup, caller = caller.name(), "restore queued");
    }
    accepted.answer(state, caller, wait).await
}

/// Which database of the backup is meant. With another name for it, the backup must have but one, or it must be named.
fn database_of(all: &[String], body: &RestoreBody) -> Result<Option<String>, ApiError> {
    match (&body.database, all) {
        (Some(name), all) if !all.contains(name) => {
            Err(ApiError::invalid_field("database", format!("is not in this backup, which has {}", all.join(", "))))
        }
        (Some(name), _) => Ok(Some(name.clone())),
        (None, [only]) => Ok(Some(only.clone())),
        (None, all) if body.into.is_some() => Err(ApiError::invalid_field(
            "database",
            format!("is required with 'into': the backup has {}", all.join(", ")),
        )),
        (None, _) => Ok(None),
    }
}

/// The identity of those given that opens the backup. One that is not encrypted needs none, and none is kept for it.
fn identity(given: Option<SecretString>, recipients: &[String]) -> Result<Option<SecretString>, ApiError> {
    match given {
        _ if recipients.is_empty() => Ok(None),
        None => Err(ApiError::invalid_field(
            "identity",
            format!(
                "is required: the backup is encrypted to {}. Send the age identity of one of them, or restore by hand as docs/format.md says",
                recipients.join(", ")
            ),
        )),
        Some(given) => {
            encryption::identity(&given, recipients).map(Some).map_err(|why| ApiError::invalid_field("identity", why))
        }
    }
}

/// What a backup holds that can be restored.
pub struct Restorable {
    /// Its databases, of which there is at least one.
    pub databases: Vec<String>,
    /// Whose identities open it; nobody's are needed when it is not encrypted.
    pub recipients: Vec<String>,
}

/// What can be restored of a backup; else the answer to whoever wants to.
pub async fn restorable(state: &AppState, backup: &Execution) -> Result<Restorable, ApiError> {
    let nothing =
        |what| ApiError::conflict("nothing_to_restore", format!("{what}: name a backup that ended with Success"));
    if backup.members.is_some() || backup.is_restore() {
        return Err(nothing("this execution is no backup"));
    }
    if backup.status != Status::Success {
        return Err(nothing("this execution left no backup"));
    }
    let artifacts = state.ask(async |conn| artifact::of_executions(conn, &[backup.id]).await).await?;
    let recipients = artifacts.iter().find_map(|artifact| artifact.recipients.clone()).unwrap_or_default();
    let mut databases: Vec<String> = artifacts.into_iter().filter_map(|artifact| artifact.database).collect();
    databases.sort();
    databases.dedup();
    match databases.is_empty() {
        true => Err(nothing("this backup is not on record any more")),
        false => Ok(Restorable { databases, recipients }),
    }
}

/// The source whose server it goes to.
async fn target(state: &AppState, backup: &Execution, named: Option<String>) -> Result<Source, ApiError> {
    let (found, why) = match named.map(Reference::new) {
        Some(named) => (state.ask(async |conn| source::find(conn, &named).await).await?, "there is no such source"),
        None => (
            state.ask(async |conn| restore::own_source(conn, backup.id).await).await?,
            "is required: the source of the backup was deleted",
        ),
    };
    found.ok_or_else(|| ApiError::invalid_field("sourceId", why))
}

/// A key that is scoped to jobs writes to their own sources alone, and replaces nothing there but what was backed up.
async fn allowed(state: &AppState, caller: &Caller, order: &Order) -> Result<(), ApiError> {
    if caller.only().is_none() {
        return Ok(());
    }
    let refuse =
        |why| Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", format!("this key is scoped to jobs: {why}")));
    let own = state.ask(async |conn| restore::source_of(conn, order.backup_id).await).await?;
    if own != Some(order.source_id) {
        return refuse("it restores into their own sources alone");
    }
    if order.overwrite && order.into.is_some() && order.into != order.database {
        return refuse("it replaces what is in the database that was backed up, and in no other");
    }
    Ok(())
}
