//! The signed tokens of sessions: a JWT of fifteen minutes with the session's id and no permission in it, so that what
//! is taken away from a person or a session acts at once.

use axum::http::{HeaderMap, HeaderValue, header};
use common::{
    id::{SessionId, UserId},
    session::{LIFETIME, SigningKey},
};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode, get_current_timestamp,
};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

/// How long a token counts, in seconds.
pub const TOKEN_SECONDS: u64 = 900;
/// Clocks of API processes may differ by this, in seconds.
const LEEWAY: u64 = 30;
const ISSUER: &str = "dbackup";
/// Cookie with the token.
pub const SESSION_COOKIE: &str = "dbackup_session";
/// Cookie with the refresh token; sent only where it is used.
pub const REFRESH_COOKIE: &str = "dbackup_refresh";
const REFRESH_PATH: &str = "/api/session";

#[derive(Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    sub: UserId,
    sid: SessionId,
    iat: u64,
    exp: u64,
}

/// Signs a token for a session of an instance.
pub fn issue(keys: &[SigningKey], instance: &str, user: UserId, session: SessionId) -> Option<SecretString> {
    let key = keys.iter().find(|key| key.signs)?;
    let now = get_current_timestamp();
    let claims = Claims {
        iss: ISSUER.to_owned(),
        aud: instance.to_owned(),
        sub: user,
        sid: session,
        iat: now,
        exp: now + TOKEN_SECONDS,
    };
    let header = Header { kid: Some(key.id.to_string()), ..Header::new(Algorithm::HS256) };
    let signed = encode(&header, &claims, &EncodingKey::from_secret(key.secret.expose_secret().as_bytes()));
    signed.ok().map(SecretString::from)
}

/// Whether a token names a key that is not among these: it may be newer than they are.
pub fn names_another_key(keys: &[SigningKey], token: &str) -> bool {
    let kid = decode_header(token).ok().and_then(|header| header.kid);
    kid.is_some_and(|kid| keys.iter().all(|key| key.id.to_string() != kid))
}

/// The session of a token, when one of the keys signed it for this instance and its time is not over.
pub fn verify(keys: &[SigningKey], instance: &str, token: &str) -> Option<SessionId> {
    let kid = decode_header(token).ok()?.kid?;
    let key = keys.iter().find(|key| key.id.to_string() == kid)?;
    // One algorithm, so that the token cannot choose a weaker one.
    let mut validation = Validation::new(Algorithm::HS256);
    validation.leeway = LEEWAY;
    validation.set_issuer(&[ISSUER]);
    validation.set_audience(&[instance]);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    let secret = DecodingKey::from_secret(key.secret.expose_secret().as_bytes());
    decode::<Claims>(token, &secret, &validation).ok().map(|token| token.claims.sid)
}

/// The value of a cookie.
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let values = headers.get_all(header::COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let pairs = values.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.into_iter().find(|(found, _)| *found == name).map(|(_, value)| value)
}

fn set_cookie(headers: &mut HeaderMap, name: &str, value: &str, path: &str, seconds: u64, https: bool) {
    let secure = if https { "; Secure" } else { "" };
    let text = format!("{name}={value}; Path={path}; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}");
    if let Ok(mut value) = HeaderValue::from_str(&text) {
        value.set_sensitive(true);
        headers.append(header::SET_COOKIE, value);
    }
}

/// Hands the tokens to the browser. `refresh` is `None` where it has the newer one already.
pub fn set_cookies(headers: &mut HeaderMap, token: &SecretString, refresh: Option<&SecretString>, https: bool) {
    set_cookie(headers, SESSION_COOKIE, token.expose_secret(), "/", TOKEN_SECONDS, https);
    if let Some(refresh) = refresh {
        set_cookie(headers, REFRESH_COOKIE, refresh.expose_secret(), REFRESH_PATH, LIFETIME.as_secs(), https);
    }
}

/// Takes the tokens from the browser.
pub fn clear_cookies(headers: &mut HeaderMap, https: bool) {
    set_cookie(headers, SESSION_COOKIE, "", "/", 0, https);
    set_cookie(headers, REFRESH_COOKIE, "", REFRESH_PATH, 0, https);
}

/// Whether a page of this very service made the request: what a browser says of where it comes from. A request with a
/// cookie that says nothing of it is not taken for one.
pub fn is_same_origin(headers: &HeaderMap) -> bool {
    let text = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(site) = text(header::HeaderName::from_static("sec-fetch-site")) {
        return site == "same-origin";
    }
    let origin = text(header::ORIGIN).and_then(|origin| origin.split_once("://")).map(|(_, authority)| authority);
    match (origin, text(header::HOST)) {
        (Some(origin), Some(host)) => origin.eq_ignore_ascii_case(host),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

    use super::*;

    fn key(signs: bool) -> SigningKey {
        SigningKey { id: uuid::Uuid::now_v7(), secret: format!("{:064x}", rand::random::<u128>()).into(), signs }
    }

    fn token(keys: &[SigningKey], session: SessionId) -> String {
        issue(keys, "here", UserId::new(), session).expect("signs").expose_secret().to_owned()
    }

    #[test]
    fn a_token_counts_with_its_key_for_its_instance_and_its_time() {
        let (session, old, new) = (SessionId::new(), key(true), key(true));
        let signed = token(std::slice::from_ref(&old), session);
        assert_eq!(
            verify(&[new, SigningKey { signs: false, ..old }], "here", &signed),
            Some(session),
            "after a rotation"
        );
        assert_eq!(verify(&[key(true)], "here", &signed), None, "another key");
        let keys = [key(true)];
        let signed = token(&keys, session);
        assert_eq!(verify(&keys, "elsewhere", &signed), None, "another instance");
        let mut claims: serde_json::Value =
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(signed.split('.').nth(1).expect("claims")).expect("base64"))
                .expect("JSON");
        claims["exp"] = (get_current_timestamp() - LEEWAY - 1).into();
        let header = Header { kid: Some(keys[0].id.to_string()), ..Header::new(Algorithm::HS256) };
        let late = encode(&header, &claims, &EncodingKey::from_secret(keys[0].secret.expose_secret().as_bytes()))
            .expect("signs");
        assert_eq!(verify(&keys, "here", &late), None, "past its time");
    }

    #[test]
    fn a_token_cannot_choose_its_algorithm_nor_be_altered() {
        let keys = [key(true)];
        let signed = token(&keys, SessionId::new());
        let [_, claims, signature]: [&str; 3] = signed.split('.').collect::<Vec<_>>().try_into().expect("three parts");
        let with = |header: &str| URL_SAFE_NO_PAD.encode(header.replace("KID", &keys[0].id.to_string()));
        for header in [r#"{"alg":"none","kid":"KID"}"#, r#"{"alg":"HS512","kid":"KID"}"#, r#"{"alg":"HS256"}"#] {
            assert_eq!(verify(&keys, "here", &format!("{}.{claims}.{signature}", with(header))), None, "{header}");
            assert_eq!(verify(&keys, "here", &format!("{}.{claims}.", with(header))), None, "{header}");
        }
        assert_eq!(verify(&keys, "here", "nonsense"), None);
        // Nor another algorithm with the right key.
        let claims: Claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).expect("base64")).expect("claims");
        let header = Header { kid: Some(keys[0].id.to_string()), ..Header::new(Algorithm::HS512) };
        let other = encode(&header, &claims, &EncodingKey::from_secret(keys[0].secret.expose_secret().as_bytes()));
        assert_eq!(verify(&keys, "here", &other.expect("signs")), None, "HS512");
    }

    #[test]
    fn only_a_page_of_this_service_counts_as_same_origin() {
        for (headers, same) in [
            (&[("sec-fetch-site", "same-origin")][..], true),
            (&[("sec-fetch-site", "same-site")], false),
            (&[("sec-fetch-site", "cross-site"), ("origin", "http://here:3000"), ("host", "here:3000")], false),
            (&[("origin", "http://here:3000"), ("host", "here:3000")], true),
            (&[("origin", "http://evil.example"), ("host", "here:3000")], false),
            (&[("origin", "null"), ("host", "here:3000")], false),
            (&[("host", "here:3000")], false),
        ] {
            let map = headers
                .iter()
                .map(|(name, value)| (header::HeaderName::from_static(name), value.parse().expect("a value")));
            assert_eq!(is_same_origin(&map.collect()), same, "{headers:?}");
        }
    }
}
