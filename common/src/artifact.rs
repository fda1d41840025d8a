//! Artifacts: the objects of published backups. A backup is published when its rows exist.

use serde::Serialize;
use sqlx::PgConnection;

use crate::{
    execution::{claim::Claim, finish::Published},
    id::{DestinationId, ExecutionId},
};

/// An object that has just been published.
#[derive(Clone, Debug)]
pub struct NewArtifact {
    /// Where it lies.
    pub destination: DestinationId,
    /// Which database; `None` for the manifest.
    pub database: Option<String>,
    /// Relative to the destination's root.
    pub path: String,
    /// As stored.
    pub size_bytes: i64,
    /// Hex, of the stored bytes.
    pub sha256: String,
    /// Before compression; `None` for the manifest.
    pub plain: Option<Plain>,
    /// Who can open it; empty when it is not encrypted.
    pub recipients: Vec<String>,
}

/// The dump before compression.
#[derive(Clone, Debug)]
pub struct Plain {
    /// Its length.
    pub size_bytes: i64,
    /// Hex.
    pub sha256: String,
}

/// An object as clients see it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Its id.
    pub id: uuid::Uuid,
    /// The run that published it.
    #[serde(skip)]
    pub execution_id: ExecutionId,
    /// Where it lies.
    pub destination_id: DestinationId,
    /// Which database; null for the manifest.
    pub database: Option<String>,
    /// Relative to the destination's root.
    pub path: String,
    /// As stored.
    pub size: i64,
    /// Hex, of the stored bytes.
    pub sha256: String,
    /// age recipients that can open it; left out when it is not encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipients: Option<Vec<String>>,
}

/// Records what was published, within the transaction that finishes the executions.
pub async fn insert(conn: &mut PgConnection, published: &[(Claim, &Published)]) -> Result<(), sqlx::Error> {
    let objects =
        || published.iter().flat_map(|(claim, p)| p.artifacts.iter().map(move |a| (claim.execution, p.job, a)));
    sqlx::query!(
        "insert into artifacts (id, execution_id, job_id, destination_id, database_name, path, size_bytes, sha256, plain_bytes, plain_sha256, recipients)
         select id, execution_id, job_id, destination_id, database_name, path, size_bytes, sha256, plain_bytes, plain_sha256,
                string_to_array(recipients, ' ')
           from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::bigint[], $8::text[],
                       $9::bigint[], $10::text[], $11::text[])
             as a (id, execution_id, job_id, destination_id, database_name, path, size_bytes, sha256, plain_bytes, plain_sha256,
                   recipients)",
        &objects().map(|_| uuid::Uuid::now_v7()).collect::<Vec<_>>(),
        objects().map(|(execution, ..)| execution).collect::<Vec<_>>() as _,
        objects().map(|(_, job, _)| job).collect::<Vec<_>>() as _,
        objects().map(|(.., a)| a.destination).collect::<Vec<_>>() as _,
        objects().map(|(.., a)| a.database.as_deref()).collect::<Vec<_>>() as _,
        objects().map(|(.., a)| a.path.as_str()).collect::<Vec<_>>() as _,
        &objects().map(|(.., a)| a.size_bytes).collect::<Vec<_>>(),
        objects().map(|(.., a)| a.sha256.as_str()).collect::<Vec<_>>() as _,
        objects().map(|(.., a)| a.plain.as_ref().map(|p| p.size_bytes)).collect::<Vec<_>>() as _,
        objects().map(|(.., a)| a.plain.as_ref().map(|p| p.sha256.as_str())).collect::<Vec<_>>() as _,
        // An array of arrays must be square: these go as words.
        objects().map(|(.., a)| (!a.recipients.is_empty()).then(|| a.recipients.join(" "))).collect::<Vec<_>>() as _,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The objects of some executions, in order.
pub async fn of_executions(conn: &mut PgConnection, executions: &[ExecutionId]) -> Result<Vec<Artifact>, sqlx::Error> {
    sqlx::query_as!(
        Artifact,
        r#"select id, execution_id as "execution_id: ExecutionId", destination_id as "destination_id: DestinationId",
                  database_name as database, path, size_bytes as size, sha256, recipients
             from artifacts where execution_id = any ($1) order by id"#,
        executions as _
    )
    .fetch_all(conn)
    .await
}
