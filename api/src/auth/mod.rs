//! Who calls, and whether they may: the address, the credential, the rate limit, the permission, in this order.

pub mod caller;
pub mod memory;
pub mod strangers;
pub mod token;

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    Extension,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use common::{
    api_key::{ApiKey, HashedKey, Lookup, PlainKey},
    permission::Permission,
    telemetry::{
        Span,
        span::{SpanContext, SpanKind},
    },
};
use tokio::time::Instant;

pub use caller::{Caller, Identity};

use crate::{
    context::Visitor,
    error::ApiError,
    rate_limit::{Decision, LimitClass, Subject},
    state::AppState,
    waiting,
};

/// Longest time that a poll is held before it is refused or answered with a failure.
pub const HOLD: Duration = Duration::from_secs(20);

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
const RATE_LIMIT_REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
const RATE_LIMIT_RESET: HeaderName = HeaderName::from_static("ratelimit-reset");

/// When a held poll must be answered.
#[derive(Clone, Copy, Debug)]
pub struct HoldUntil(pub Instant);

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    Open,
    /// Whoever is identified.
    Identified,
    /// Whoever holds this permission.
    Needs(Permission),
}

/// What a route asks of its caller.
#[derive(Clone)]
pub struct Gate {
    /// The process.
    pub state: AppState,
    /// Who may use it.
    pub access: Access,
    /// What the request counts against.
    pub limit: LimitClass,
}

/// The middleware of every route.
pub async fn admit(
    State(gate): State<Gate>,
    Extension(visitor): Extension<Visitor>,
    mut request: Request,
    next: Next,
) -> Response {
    let hold_until = Instant::now() + HOLD;
    let address = visitor.address;
    let identified = match gate.access {
        Access::Open => Ok(None),
        Access::Identified | Access::Needs(_) => {
            let mut span = Span::child(&visitor.span, SpanKind::Internal, "auth");
            let identified = gate.identify(request.headers(), address, hold_until).await.map(Some);
            if let Err(error) = &identified {
                span.fail(error.code(), error.text().to_owned());
            }
            identified
        }
    };
    // A failed sign-in counts too, by its address.
    let identity = identified.as_ref().ok().and_then(Option::as_ref);
    let limited = gate.limited(identity, address, hold_until);
    let decision = match in_span(&visitor.span, gate.limit, limited).await {
        Ok(decision) => decision,
        Err((error, decision)) => return with_limit_headers(error.into_response(), Some(decision)),
    };
    let permitted = identified.and_then(|identity| {
        let Some(identity) = identity else { return Ok(None) };
        gate.permit(&identity, request.method(), request.headers())?;
        Ok(Some(Caller::new(identity, gate.access, visitor)))
    });
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

/// Counts a request under a span; what is not counted has none.
async fn in_span(
    parent: &SpanContext,
    class: LimitClass,
    limited: impl Future<Output = Result<Option<Decision>, (ApiError, Decision)>>,
) -> Result<Option<Decision>, (ApiError, Decision)> {
    if class == LimitClass::Free {
        return limited.await;
    }
    let mut span = Span::child(parent, SpanKind::Internal, "rate_limit");
    span.reserve(2);
    let limited = limited.await;
    span.set("dbackup.rate_limit.class", class.name());
    match &limited {
        Ok(Some(decision)) => span.set("dbackup.rate_limit.remaining", i64::from(decision.remaining)),
        Ok(None) => {}
        Err((error, _)) => span.fail(error.code(), error.text().to_owned()),
    }
    limited
}

fn unauthorized(code: &'static str, error: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, code, error)
}

fn presented_key(value: &HeaderValue) -> Result<PlainKey, ApiError> {
    let text = value.to_str().ok().and_then(|v| {
        let (scheme, token) = v.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    text.and_then(PlainKey::parse)
        .ok_or_else(|| unauthorized("key_invalid", "invalid API key: it should begin with dbm_ and be copied whole"))
}

impl Gate {
    /// Who the request says it is. For a poll the database is asked until it answers, since the contract's scripts die
    /// of a single 503.
    async fn identify(&self, headers: &HeaderMap, address: IpAddr, hold_until: Instant) -> Result<Identity, ApiError> {
        loop {
            match self.identify_once(headers, address).await {
                Err(error) if self.limit == LimitClass::Poll && error.is_away() => {
                    waiting::hold(&self.state, waiting::RETRY, hold_until, error).await?;
                }
                identity => return identity,
            }
        }
    }

    /// By its key, else by its cookie.
    async fn identify_once(&self, headers: &HeaderMap, address: IpAddr) -> Result<Identity, ApiError> {
        if let Some(value) = headers.get(header::AUTHORIZATION) {
            let hash = presented_key(value)?.hash();
            let lookup = self.look_up(&hash, address).await?;
            return Ok(Identity::Key(self.usable(lookup, address)?, hash));
        }
        let Some(token) = token::cookie(headers, token::SESSION_COOKIE).filter(|token| !token.is_empty()) else {
            return Err(unauthorized("key_missing", "no API key: send the header 'Authorization: Bearer dbm_…'"));
        };
        let over =
            || unauthorized("session_over", "the session is over: renew it at POST /api/session/refresh, or sign in");
        let mut keys = self.state.memory.signing_keys(&self.state.key).await?;
        if token::names_another_key(&keys, token) {
            // Another process has begun to sign with a new key, which this one does not remember yet.
            keys = self.state.memory.newer_signing_keys(&self.state.key).await?;
        }
        let session = token::verify(&keys, &self.state.instance, token).ok_or_else(over)?;
        let person = self.state.memory.session(session).await?;
        person.map(|person| Identity::Person(person, session)).ok_or_else(over)
    }

    async fn look_up(&self, hash: &HashedKey, address: IpAddr) -> Result<Lookup, ApiError> {
        if let Some(lookup) = self.state.memory.recall(hash).await? {
            return Ok(lookup);
        }
        let (from, rule) = (Subject::of(address), self.state.memory.settings_or_last().await.rate_limit.read);
        if let Some(reset) = self.state.strangers.shut_out(from, rule) {
            let (limit, window) = (rule.limit, rule.window());
            return Err(too_many(Decision { allowed: false, limit, remaining: 0, window, reset }));
        }
        let lookup = self.state.memory.look_up(hash).await?;
        if matches!(lookup, Lookup::Unknown) {
            self.state.strangers.note(from, rule);
        }
        Ok(lookup)
    }

    fn usable(&self, lookup: Lookup, address: IpAddr) -> Result<Arc<ApiKey>, ApiError> {
        match lookup {
            Lookup::Valid(key) if key.allows_address(address) => {
                self.state.memory.used(key.id, address);
                Ok(key)
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

    fn permit(&self, identity: &Identity, method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
        // A browser sends the cookie whoever asks it to.
        let changes = !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
        if changes && matches!(identity, Identity::Person(..)) && !token::is_same_origin(headers) {
            return Err(other_origin());
        }
        match self.access {
            Access::Needs(permission) => identity.demand(permission),
            _ => Ok(()),
        }
    }

    /// Counts the request. A poll over the limit is held until it fits, at most [`HOLD`], before it is refused; one of
    /// nobody is not, or strangers would take up the places of those who poll.
    async fn limited(
        &self,
        identity: Option<&Identity>,
        address: IpAddr,
        hold_until: Instant,
    ) -> Result<Option<Decision>, (ApiError, Decision)> {
        loop {
            let settings = self.state.memory.settings_or_last().await;
            let Some(mut rule) = self.limit.rule(&settings.rate_limit) else { return Ok(None) };
            let mut subject = Subject::of(address);
            if let Some(Identity::Key(key, _)) = identity
                && let Some(own) = self.limit.own(&key.limits)
            {
                (subject, rule.limit) = (Subject::Key(key.id), own);
            }
            let decision = self.state.rate_limiter.check(self.limit, subject, rule).await;
            if decision.allowed {
                return Ok(Some(decision));
            }
            let refused = too_many(decision);
            if self.limit != LimitClass::Poll || identity.is_none() {
                return Err((refused, decision));
            }
            waiting::hold(&self.state, decision.reset, hold_until, refused).await.map_err(|error| (error, decision))?;
        }
    }
}

/// 403 of a change that a page of another origin asked for.
pub fn other_origin() -> ApiError {
    ApiError::new(
        StatusCode::FORBIDDEN,
        "other_origin",
        "a change with a session must come from a page of this service: send Origin or Sec-Fetch-Site, or use an API key",
    )
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(1000)).unwrap_or(u32::MAX)
}

fn too_many(decision: Decision) -> ApiError {
    let wait = seconds(decision.reset).max(1);
    ApiError::new(
        StatusCode::TOO_MANY_REQUESTS,
        "rate_limited",
        format!("more than {} requests in {} s: try again in {wait} s", decision.limit, decision.window.as_secs()),
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
        // Room for those of `context::surround` too: the map would grow, and be filled anew, twice.
        headers.reserve(16);
        for (name, value) in [
            (RATE_LIMIT, decision.limit),
            (RATE_LIMIT_REMAINING, decision.remaining),
            (RATE_LIMIT_RESET, seconds(decision.reset)),
        ] {
            headers.insert(name, HeaderValue::from(value));
        }
    }
    response
}
