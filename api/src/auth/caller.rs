//! The caller of a request, as handlers see it.

use std::net::IpAddr;

use chrono::{DateTime, Utc};
use common::{
    api_key::{ApiKey, HashedKey, Lookup},
    audit::Actor,
    db::DbError,
    execution::Execution,
    id::{ApiKeyId, JobId},
    permission::PermissionSet,
};
use ipnet::IpNet;

use super::memory::Memory;

/// Who calls. Handlers take it from the request's extensions.
#[derive(Clone, Debug)]
pub struct Caller {
    key: ApiKey,
    hash: HashedKey,
    address: IpAddr,
    request_id: String,
}

impl Caller {
    /// The holder of a key.
    pub fn of_key(key: ApiKey, hash: HashedKey, address: IpAddr, request_id: &str) -> Self {
        Self { key, hash, address, request_id: request_id.to_owned() }
    }

    /// The name for labels and logs.
    pub fn name(&self) -> &str {
        &self.key.name
    }

    /// Whose idempotency keys are used.
    pub fn id(&self) -> ApiKeyId {
        self.key.id
    }

    /// Whether this caller may see a job.
    pub fn sees(&self, job: JobId) -> bool {
        self.key.jobs.as_ref().is_none_or(|jobs| jobs.contains(&job))
    }

    /// Whether this caller may see an execution; a group only when it sees every member.
    pub fn sees_execution(&self, execution: &Execution) -> bool {
        match &execution.members {
            Some(members) => members.iter().all(|member| self.sees(member.job_id)),
            None => self.sees(execution.job_id),
        }
    }

    /// The only jobs this caller sees, when it is scoped.
    pub fn only(&self) -> Option<Vec<JobId>> {
        self.key.jobs.clone()
    }

    /// What it may do.
    pub fn permissions(&self) -> &PermissionSet {
        &self.key.permissions
    }

    /// The only networks it may call from.
    pub fn networks(&self) -> Option<&[IpNet]> {
        self.key.networks.as_deref()
    }

    /// When it ends.
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        self.key.expires_at
    }

    /// As the audit log names it.
    pub fn actor(&self) -> Actor {
        Actor {
            kind: "ApiKey",
            id: Some(self.key.id.0),
            name: self.key.name.clone(),
            address: Some(self.address),
            request_id: Some(self.request_id.clone()),
        }
    }

    /// Whether its credential still counts; asked again and again by whoever streams to it.
    pub async fn still_counts(&self, memory: &Memory) -> Result<bool, DbError> {
        Ok(matches!(memory.look_up(&self.hash).await?, Lookup::Valid(_)))
    }
}
