//! Who calls, and whether they may: the address, the credential, the rate limit, the permission, in this order.

pub mod caller;
pub mod memory;

use std::{net::IpAddr, time::Duration};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use common::{
    api_key::{ApiKey, Lookup, PlainKey},
    permission::Permission,
};
use tokio::time::Instant;

pub use caller::Caller;

use crate::{
    context::{ClientAddress, RequestId},
    error::ApiError,
    rate_limit::{Decision, LimitClass, Subject},
    state::AppState,
};

/// Longest time that a poll is held before it is refused or answered with a failure.
pub const HOLD: Duration = Duration::from_secs(20);

/// Longest time between two looks whether a held poll fits.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// When a held poll must be answered.
#[derive(Clone, Copy, Debug)]
pub struct HoldUntil(pub Instant);

/// What a route asks of its caller.
#[derive(Clone)]
pub struct Gate {
    /// The process.
    pub state: AppState,
    /// What the caller must hold; `None` is open to everybody.
    pub permission: Option<Permission>,
    /// What the request counts against.
    pub limit: LimitClass,
}

/// The middleware of every route.
pub async fn admit(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    let hold_until = Instant::now() + HOLD;
    let address = request.extensions().get::<ClientAddress>().map_or(IpAddr::from([0, 0, 0, 0]), |a| a.0);
    let request_id = request.extensions().get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
    let identified = match gate.permission {
        Some(_) => gate.identify(request.headers(), address, hold_until).await,
        None => Ok(None),
    };
    // A failed sign-in counts too, by its address.
    let key = identified.as_ref().ok().and_then(Option::as_ref);
    let decision = match gate.limited(key, address, hold_until).await {
        Ok(decision) => decision,
        Err((error, decision)) => return with_limit_headers(error.into_response(), Some(decision)),
    };
    let permitted = identified.and_then(|key| gate.permit(key, address, &request_id));
    let response = match permitted {
        Ok(caller) => {
            let extensions = request.extensions_mut();
            extensions.insert(HoldUntil(hold_until));
            if let Some(decision) = decision {
                extensions.insert(decision);
            }
            if let Some(caller) = caller {
                extensions.insert(caller);
            }
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    with_limit_headers(response, decision)
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

impl Gate {
    /// The key that the request presents, with the hash by which it is looked up again.
    async fn identify(
        &self,
        headers: &HeaderMap,
        address: IpAddr,
        hold_until: Instant,
    ) -> Result<Option<(ApiKey, common::api_key::HashedKey)>, ApiError> {
        let hash = presented(headers)?.hash();
        let lookup = loop {
            match self.state.memory.look_up(&hash).await {
                Ok(lookup) => break lookup,
                // The contract's scripts die of a single 503, so a poll waits for the database.
                Err(error) if self.limit == LimitClass::Poll && error.is_passing() => {
                    self.hold(Duration::from_millis(250), hold_until, error.into()).await?;
                }
                Err(error) => return Err(error.into()),
            }
        };
        match lookup {
            Lookup::Valid(key) if key.allows_address(address) => {
                self.state.memory.used(key.id, address);
                Ok(Some((*key, hash)))
            }
            Lookup::Valid(_) => Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "network_not_allowed",
                format!("this API key may not be used from {address}: use it from one of its networks"),
            )),
            Lookup::Unknown => Err(unauthorized("key_invalid", "invalid API key")),
            Lookup::Disabled => Err(unauthorized("key_disabled", "this API key is disabled")),
            Lookup::Expired => Err(unauthorized("key_expired", "this API key has expired")),
            Lookup::Rotated => {
                Err(unauthorized("key_rotated", "this API key was rotated: use the secret that the rotation gave"))
            }
        }
    }

    fn permit(
        &self,
        key: Option<(ApiKey, common::api_key::HashedKey)>,
        address: IpAddr,
        request_id: &str,
    ) -> Result<Option<Caller>, ApiError> {
        let (Some((key, hash)), Some(permission)) = (key, self.permission) else { return Ok(None) };
        if !key.permissions.allows(permission) {
            return Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "permission_missing",
                format!("this API key lacks the permission {}", permission.as_str()),
            ));
        }
        Ok(Some(Caller::of_key(key, hash, address, request_id)))
    }

    /// Counts the request. A poll over the limit is held until it fits, at most [`HOLD`], before it is refused.
    async fn limited(
        &self,
        key: Option<&(ApiKey, common::api_key::HashedKey)>,
        address: IpAddr,
        hold_until: Instant,
    ) -> Result<Option<Decision>, (ApiError, Decision)> {
        loop {
            let settings = self.state.memory.settings_or_last().await;
            let Some(mut rule) = self.limit.rule(&settings.rate_limit) else { return Ok(None) };
            let mut subject = Subject::of(address);
            if let Some((key, _)) = key
                && let Some(own) = self.limit.own(&key.limits)
            {
                (subject, rule.limit) = (Subject::Key(key.id), own);
            }
            let decision = self.state.rate_limiter.check(self.limit, subject, rule).await;
            if decision.allowed {
                return Ok(Some(decision));
            }
            let refused = too_many(decision);
            if self.limit != LimitClass::Poll {
                return Err((refused, decision));
            }
            self.hold(decision.reset, hold_until, refused).await.map_err(|error| (error, decision))?;
        }
    }

    /// Waits, as one of the requests that this process holds; gives `refusal` when it may not.
    async fn hold(&self, wait: Duration, until: Instant, refusal: ApiError) -> Result<(), ApiError> {
        let Ok(_held) = self.state.held.try_acquire() else { return Err(refusal) };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(refusal);
        }
        // Those who wait for the same moment must not come back in one burst, and a setting may change meanwhile.
        let wait = wait.clamp(Duration::from_millis(20), LOOK_AGAIN).mul_f64(rand::random_range(1.0..1.1));
        tokio::select! {
            () = tokio::time::sleep(wait.min(left)) => Ok(()),
            () = self.state.stop.cancelled() => Err(refusal),
        }
    }
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(1000)).unwrap_or(u32::MAX)
}

fn too_many(decision: Decision) -> ApiError {
    let wait = seconds(decision.reset).max(1);
    ApiError::new(
        StatusCode::TOO_MANY_REQUESTS,
        "rate_limited",
        format!("more than {} requests: try again in {wait} s", decision.limit),
    )
    .retry_after(wait)
}

/// Counts a request that reaches no route.
pub async fn limit_stray(state: &AppState, class: LimitClass, address: IpAddr) -> Result<(), ApiError> {
    let settings = state.memory.settings_or_last().await;
    let Some(rule) = class.rule(&settings.rate_limit) else { return Ok(()) };
    let decision = state.rate_limiter.check(class, Subject::of(address), rule).await;
    if decision.allowed { Ok(()) } else { Err(too_many(decision)) }
}

fn with_limit_headers(mut response: Response, decision: Option<Decision>) -> Response {
    if let Some(decision) = decision {
        let headers = response.headers_mut();
        for (name, value) in [
            ("ratelimit-limit", decision.limit),
            ("ratelimit-remaining", decision.remaining),
            ("ratelimit-reset", seconds(decision.reset)),
        ] {
            headers.insert(name, HeaderValue::from(value));
        }
    }
    response
}
