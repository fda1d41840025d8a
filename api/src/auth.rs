//! Who calls, and whether they may.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use common::{
    api_key::{ApiKey, Lookup, PlainKey, look_up},
    id::JobId,
    permission::Permission,
};

use crate::{error::ApiError, state::AppState};

/// Who calls. Handlers take it from the request's extensions.
#[derive(Clone, Debug)]
pub struct Caller {
    key: ApiKey,
}

impl Caller {
    /// The name for labels and logs.
    pub fn name(&self) -> &str {
        &self.key.name
    }

    /// The key.
    pub fn key(&self) -> &ApiKey {
        &self.key
    }

    /// Whether this caller may see a job.
    pub fn sees(&self, job: JobId) -> bool {
        self.key.sees(job)
    }

    /// The only jobs this caller sees, when it is scoped.
    pub fn only(&self) -> Option<Vec<JobId>> {
        self.key.jobs.clone()
    }
}

fn unauthorized(code: &'static str, error: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, code, error)
}

fn presented(headers: &HeaderMap) -> Result<PlainKey, ApiError> {
    let value = headers
        .get(header::AUTHORIZATION)
        .ok_or_else(|| unauthorized("key_missing", "no API key: send the header 'Authorization: Bearer dbm_…'"))?;
    let text = value.to_str().ok().and_then(|v| {
        let (scheme, token) = v.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    text.and_then(PlainKey::parse)
        .ok_or_else(|| unauthorized("key_invalid", "invalid API key: it should begin with dbm_ and be copied whole"))
}

/// Lets a request pass when its key holds `permission`.
pub async fn authorize(
    State((state, permission)): State<(AppState, Permission)>,
    mut request: Request,
    next: Next,
) -> Response {
    match caller(&state, request.headers(), permission).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

async fn caller(state: &AppState, headers: &HeaderMap, permission: Permission) -> Result<Caller, ApiError> {
    let hash = presented(headers)?.hash();
    match state.ask(async |conn| look_up(conn, &hash).await).await? {
        Lookup::Valid(key) if key.permissions.allows(permission) => Ok(Caller { key }),
        Lookup::Valid(_) => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "permission_missing",
            format!("this API key lacks the permission {}", permission.as_str()),
        )),
        Lookup::Unknown => Err(unauthorized("key_invalid", "invalid API key")),
        Lookup::Disabled => Err(unauthorized("key_disabled", "this API key is disabled")),
        Lookup::Expired => Err(unauthorized("key_expired", "this API key has expired")),
    }
}
