//! The caller of a request, as handlers see it: the holder of a key, or a person who is signed in.

use std::sync::Arc;

use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use common::{
    api_key::{ApiKey, HashedKey, Lookup},
    audit::Actor,
    db::DbError,
    execution::Execution,
    id::{ApiKeyId, JobId, SessionId, UserId},
    permission::{Permission, PermissionSet},
    session::SignedIn,
    telemetry::span::SpanContext,
};
use ipnet::IpNet;
use tokio::time::{Duration, Instant, interval_at};

use super::{Access, memory::Memory};
use crate::{context::Visitor, error::ApiError};

/// Time between two looks whether a caller's credential still counts.
const REVOKED: Duration = Duration::from_millis(500);

/// What a request identified itself with.
#[derive(Clone, Debug)]
pub enum Identity {
    /// A key, and the hash by which it is looked up again.
    Key(Arc<ApiKey>, HashedKey),
    /// A session.
    Person(SignedIn, SessionId),
}

impl Identity {
    /// What it may do.
    pub fn permissions(&self) -> &PermissionSet {
        match self {
            Identity::Key(key, _) => &key.permissions,
            Identity::Person(person, _) => &person.permissions,
        }
    }

    /// Refuses whoever does not hold a permission.
    pub fn demand(&self, permission: Permission) -> Result<(), ApiError> {
        match self.permissions().allows(permission) {
            true => Ok(()),
            false => Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "permission_missing",
                format!("{} lacks the permission {}", self.noun(), permission.as_str()),
            )),
        }
    }

    /// As an error names it.
    pub fn noun(&self) -> &'static str {
        match self {
            Identity::Key(..) => "this API key",
            Identity::Person(..) => "your user",
        }
    }
}

/// Who calls. Handlers take it from the request's extensions; thousands of them may wait at once, each with a copy.
#[derive(Clone, Debug)]
pub struct Caller(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    identity: Identity,
    access: Access,
    visitor: Visitor,
}

impl Caller {
    /// Whoever was identified, for what, from where, by which request.
    pub fn new(identity: Identity, access: Access, visitor: Visitor) -> Self {
        Self(Arc::new(Inner { identity, access, visitor }))
    }

    fn key(&self) -> Option<&ApiKey> {
        match &self.0.identity {
            Identity::Key(key, _) => Some(key),
            Identity::Person(..) => None,
        }
    }

    /// The name for labels and logs.
    pub fn name(&self) -> &str {
        match &self.0.identity {
            Identity::Key(key, _) => &key.name,
            Identity::Person(person, _) => &person.name,
        }
    }

    /// Whose idempotency keys are used: the key's, or the person's own.
    pub fn id(&self) -> ApiKeyId {
        match &self.0.identity {
            Identity::Key(key, _) => key.id,
            Identity::Person(person, _) => ApiKeyId(person.user.0),
        }
    }

    /// The person and the session, when it is one.
    pub fn person(&self) -> Option<(UserId, SessionId)> {
        match &self.0.identity {
            Identity::Key(..) => None,
            Identity::Person(person, session) => Some((person.user, *session)),
        }
    }

    /// What an execution says of what triggered it.
    pub fn trigger_kind(&self) -> &'static str {
        if self.key().is_some() { "Api" } else { "Manual" }
    }

    /// Whether this caller may see a job.
    pub fn sees(&self, job: JobId) -> bool {
        self.key().and_then(|key| key.jobs.as_ref()).is_none_or(|jobs| jobs.contains(&job))
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
        self.key().and_then(|key| key.jobs.clone())
    }

    /// What it may do.
    pub fn permissions(&self) -> &PermissionSet {
        self.0.identity.permissions()
    }

    /// Refuses when they lack a permission that the route itself does not ask for.
    pub fn demand(&self, permission: Permission) -> Result<(), ApiError> {
        self.0.identity.demand(permission)
    }

    /// The only networks it may call from.
    pub fn networks(&self) -> Option<&[IpNet]> {
        self.key().and_then(|key| key.networks.as_deref())
    }

    /// When it ends.
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        self.key().and_then(|key| key.expires_at)
    }

    /// The span of the request.
    pub fn span(&self) -> &SpanContext {
        &self.0.visitor.span
    }

    /// As the audit log names it.
    pub fn actor(&self) -> Actor {
        let kind = if self.key().is_some() { "ApiKey" } else { "User" };
        self.0.visitor.actor(kind, Some(self.id().0), self.name())
    }

    /// Comes to its end when the caller may no longer do what it was let in for, or sees fewer jobs: whoever waits or
    /// streams watches it. While the database is away nothing is told anyway, so nothing is taken away either.
    pub async fn loses_its_right(&self, memory: &Memory) {
        let mut tick = interval_at(Instant::now() + REVOKED, REVOKED);
        loop {
            tick.tick().await;
            if !self.still_counts(memory).await.unwrap_or(true) {
                return;
            }
        }
    }

    async fn still_counts(&self, memory: &Memory) -> Result<bool, DbError> {
        let may = |permissions: &PermissionSet| match self.0.access {
            Access::Needs(permission) => permissions.allows(permission),
            Access::Open | Access::Identified => true,
        };
        match &self.0.identity {
            Identity::Key(key, hash) => Ok(match memory.look_up(hash).await? {
                Lookup::Valid(now) => {
                    now.allows_address(self.0.visitor.address) && may(&now.permissions) && !is_narrower(&now, key)
                }
                _ => false,
            }),
            Identity::Person(_, session) => {
                Ok(memory.session(*session).await?.is_some_and(|now| may(&now.permissions)))
            }
        }
    }
}

/// Whether a key sees fewer jobs than it did.
fn is_narrower(now: &ApiKey, before: &ApiKey) -> bool {
    match (&now.jobs, &before.jobs) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(now), Some(before)) => before.iter().any(|job| !now.contains(job)),
    }
}
