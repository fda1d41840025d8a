//! Artifacts: the objects of published backups. A backup is published when its rows exist.

use serde::Serialize;
use sqlx::PgConnection;

use crate::id::{DestinationId, ExecutionId, JobId};

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
}

/// Records what was published, within the transaction that finishes the execution.
pub async fn insert(
    conn: &mut PgConnection,
    execution: ExecutionId,
    job: JobId,
    new: &[NewArtifact],
) -> Result<(), sqlx::Error> {
    for artifact in new {
        sqlx::query!(
            "insert into artifacts (id, execution_id, job_id, destination_id, database_name, path, size_bytes, sha256, plain_bytes, plain_sha256)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            uuid::Uuid::now_v7(),
            execution as _,
            job as _,
            artifact.destination as _,
            artifact.database,
            artifact.path,
            artifact.size_bytes,
            artifact.sha256,
            artifact.plain.as_ref().map(|p| p.size_bytes),
            artifact.plain.as_ref().map(|p| p.sha256.clone()),
        )
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}

/// The objects of some executions, in order.
pub async fn of_executions(conn: &mut PgConnection, executions: &[ExecutionId]) -> Result<Vec<Artifact>, sqlx::Error> {
    sqlx::query_as!(
        Artifact,
        r#"select id, execution_id as "execution_id: ExecutionId", destination_id as "destination_id: DestinationId",
                  database_name as database, path, size_bytes as size, sha256
             from artifacts where execution_id = any ($1) order by id"#,
        executions as _
    )
    .fetch_all(conn)
    .await
}
