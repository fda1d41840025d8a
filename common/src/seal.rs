//! Secrets at rest: AES-256-GCM with a random 96-bit nonce, and a context that ties a sealed value to its
//! row, so that copying one row's secret into another does not open.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use base64::{Engine, engine::general_purpose::STANDARD};
use sqlx::PgConnection;
use zeroize_on_drop::Bytes32;

/// The key of an instance; API and workers hold the same one. While it is rotated they hold two: what is sealed is sealed
/// with the first, and opens with either.
pub struct SealKey {
    first: LessSafeKey,
    other: Option<LessSafeKey>,
}

/// Why a key or a sealed value was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SealError {
    /// The key's text is not 32 bytes in base64 or hex.
    #[error("the encryption key must be 32 bytes in base64 or hex; make one with: openssl rand -base64 32")]
    MalformedKey,
    /// Another key, another context, or damage.
    #[error("a sealed value does not open with this encryption key")]
    DoesNotOpen,
    /// The database was set up with another key.
    #[error("this is not the encryption key that this database was set up with")]
    WrongKey,
}

mod zeroize_on_drop {
    /// Key bytes on their way into the cipher, wiped afterwards.
    pub struct Bytes32(pub [u8; 32]);
    impl Drop for Bytes32 {
        fn drop(&mut self) {
            // A plain store may be optimised away since the value dies here.
            for byte in &mut self.0 {
                // SAFETY: a valid, aligned, exclusive reference to one byte.
                unsafe { std::ptr::write_volatile(byte, 0) };
            }
        }
    }
}

impl std::fmt::Debug for SealKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealKey(…)")
    }
}

impl SealKey {
    /// Reads a key of 32 bytes from base64 or hex.
    pub fn parse(text: &str) -> Result<Self, SealError> {
        let text = text.trim();
        let bytes = if text.len() == 64 { hex::decode(text).ok() } else { STANDARD.decode(text).ok() };
        let bytes: [u8; 32] = bytes.and_then(|b| b.try_into().ok()).ok_or(SealError::MalformedKey)?;
        let bytes = Bytes32(bytes);
        let key = UnboundKey::new(&AES_256_GCM, &bytes.0).map_err(|_| SealError::MalformedKey)?;
        Ok(Self { first: LessSafeKey::new(key), other: None })
    }

    /// Opens what the other key sealed, too.
    pub fn with_other(self, other: SealKey) -> Self {
        Self { other: Some(other.first), ..self }
    }

    /// The text of a new random key.
    pub fn generate() -> String {
        STANDARD.encode(rand::random::<[u8; 32]>())
    }

    /// Seals `plain`; it opens only with the same `context`.
    pub fn seal(&self, context: &str, plain: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = rand::random();
        let mut body = plain.to_vec();
        self.first
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context), &mut body)
            .expect("AES-GCM takes any input below 64 GiB");
        [&nonce[..], &body].concat()
    }

    /// Opens what [`SealKey::seal`] made under the same context.
    pub fn open(&self, context: &str, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let keys = std::iter::once(&self.first).chain(&self.other);
        keys.map(|key| open_with(key, context, sealed)).find(Result::is_ok).unwrap_or(Err(SealError::DoesNotOpen))
    }

    /// Whether the other key is not needed for this value.
    pub fn is_sealed_with_first(&self, context: &str, sealed: &[u8]) -> bool {
        open_with(&self.first, context, sealed).is_ok()
    }
}

fn open_with(key: &LessSafeKey, context: &str, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
    let (nonce, body) = sealed.split_at_checked(NONCE_LEN).ok_or(SealError::DoesNotOpen)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError::DoesNotOpen)?;
    let mut body = body.to_vec();
    let plain = key.open_in_place(nonce, Aad::from(context), &mut body).map_err(|_| SealError::DoesNotOpen)?;
    Ok(plain.to_vec())
}

pub(crate) const CANARY_CONTEXT: &str = "canary";
const CANARY: &[u8] = b"dbackup";

/// Checks the key against the database's canary; the first process of an instance leaves it.
pub async fn check_canary(conn: &mut PgConnection, key: &SealKey) -> Result<(), CanaryError> {
    sqlx::query!(
        "insert into encryption_canary (sealed) values ($1) on conflict do nothing",
        key.seal(CANARY_CONTEXT, CANARY)
    )
    .execute(&mut *conn)
    .await?;
    let sealed = sqlx::query_scalar!("select sealed from encryption_canary").fetch_one(conn).await?;
    match key.open(CANARY_CONTEXT, &sealed) {
        Ok(plain) if plain == CANARY => Ok(()),
        _ => Err(CanaryError::Key(SealError::WrongKey)),
    }
}

/// A name that is the same for all processes of an instance and differs from every other's: two instances may share
/// a Redis. To be asked for after the canary was checked.
pub async fn instance_name(conn: &mut PgConnection) -> Result<String, sqlx::Error> {
    sqlx::query_scalar!("select instance from encryption_canary").fetch_one(conn).await
}

/// Why the canary could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    /// The key is wrong.
    #[error(transparent)]
    Key(SealError),
    /// The database did not answer.
    #[error("could not check the encryption key against the database")]
    Database(#[from] sqlx::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SealKey {
        SealKey::parse(&SealKey::generate()).expect("a generated key parses")
    }

    #[test]
    fn a_sealed_secret_opens_only_with_its_key_and_its_context() {
        let (key, other) = (key(), key());
        let sealed = key.seal("source:1", b"s3cret");
        assert_eq!(key.open("source:1", &sealed).as_deref(), Ok(&b"s3cret"[..]));
        assert_eq!(key.open("source:2", &sealed), Err(SealError::DoesNotOpen));
        assert_eq!(other.open("source:1", &sealed), Err(SealError::DoesNotOpen));
        assert!(!sealed.windows(6).any(|w| w == b"s3cret"));
        let mut damaged = sealed.clone();
        *damaged.last_mut().expect("not empty") ^= 1;
        assert_eq!(key.open("source:1", &damaged), Err(SealError::DoesNotOpen));
        assert_eq!(key.open("source:1", &[]), Err(SealError::DoesNotOpen));
    }

    #[test]
    fn a_key_that_is_not_32_bytes_is_refused() {
        for text in ["", "short", &"zz".repeat(32), &STANDARD.encode([0u8; 31])] {
            assert_eq!(SealKey::parse(text).err(), Some(SealError::MalformedKey), "{text}");
        }
        assert!(SealKey::parse(&hex::encode([7u8; 32])).is_ok());
    }
}
