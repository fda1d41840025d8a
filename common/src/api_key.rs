//! API keys: `dbm_`, 40 random base62 characters, and 6 base62 characters of CRC-32 over what stands before
//! them, so that a typo or a secret scanner needs no database. Only the SHA-256 is stored.

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::{
    id::{ApiKeyId, JobId},
    permission::PermissionSet,
};

const PREFIX: &str = "dbm_";
const RANDOM_LENGTH: usize = 40;
const CHECK_LENGTH: usize = 6;
const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A key as its owner holds it. It exists once, when it is made, and cannot be printed by accident.
#[derive(Clone, Debug)]
pub struct PlainKey(SecretString);

/// What the database knows of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashedKey([u8; 32]);

impl PlainKey {
    /// A new random key.
    pub fn generate() -> Self {
        let mut key = PREFIX.to_owned();
        for _ in 0..RANDOM_LENGTH {
            key.push(char::from(BASE62[rand::random_range(0..BASE62.len())]));
        }
        key.push_str(&check_characters(&key));
        Self(key.into())
    }

    /// Reads a key that a caller sent; `None` when its form or checksum is wrong.
    pub fn parse(text: &str) -> Option<Self> {
        let (body, check) = text.split_at_checked(text.len().checked_sub(CHECK_LENGTH)?)?;
        let random = body.strip_prefix(PREFIX)?;
        let sane = random.len() == RANDOM_LENGTH && random.bytes().all(|b| b.is_ascii_alphanumeric());
        (sane && check == check_characters(body)).then(|| Self(text.to_owned().into()))
    }

    /// The text, to be shown to its owner once.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// What is stored and looked up.
    pub fn hash(&self) -> HashedKey {
        HashedKey(Sha256::digest(self.expose()).into())
    }
}

fn check_characters(body: &str) -> String {
    let mut crc = crc32fast::hash(body.as_bytes());
    let mut check = [b'0'; CHECK_LENGTH];
    for place in check.iter_mut().rev() {
        *place = BASE62[(crc % 62) as usize];
        crc /= 62;
    }
    check.into_iter().map(char::from).collect()
}

/// A key that may be used now.
#[derive(Clone, Debug)]
pub struct ApiKey {
    /// Its id.
    pub id: ApiKeyId,
    /// The name its maker gave it.
    pub name: String,
    /// What it may do.
    pub permissions: PermissionSet,
    /// The only jobs it sees, when it is scoped.
    pub jobs: Option<Vec<JobId>>,
}

impl ApiKey {
    /// Whether this key may see and trigger a job.
    pub fn sees(&self, job: JobId) -> bool {
        self.jobs.as_ref().is_none_or(|jobs| jobs.contains(&job))
    }
}

/// What a look-up of a key found.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// It may be used.
    Valid(ApiKey),
    /// No such key.
    Unknown,
    /// Switched off by an administrator.
    Disabled,
    /// Past its expiry.
    Expired,
}

/// A key about to be made.
#[derive(Clone, Debug)]
pub struct NewApiKey {
    /// Name for people.
    pub name: String,
    /// What it may do.
    pub permissions: PermissionSet,
    /// The only jobs it sees; `None` for all.
    pub jobs: Option<Vec<JobId>>,
    /// Refused from this moment on.
    pub expires_at: Option<DateTime<Utc>>,
}

/// Stores a new key and returns it with the plain text, which is not stored.
pub async fn create(conn: &mut PgConnection, new: &NewApiKey) -> Result<(ApiKeyId, PlainKey), sqlx::Error> {
    let (id, plain) = (ApiKeyId::new(), PlainKey::generate());
    sqlx::query!(
        "insert into api_keys (id, name, secret_hash, permissions, job_ids, expires_at) values ($1, $2, $3, $4, $5, $6)",
        id as _,
        new.name,
        &plain.hash().0[..],
        &new.permissions.names(),
        new.jobs.as_deref() as _,
        new.expires_at,
    )
    .execute(conn)
    .await?;
    Ok((id, plain))
}

/// Looks a key up by its hash. The comparison happens in an index over SHA-256 values, which an attacker cannot
/// steer, so its timing tells nothing of a stored key.
pub async fn look_up(conn: &mut PgConnection, key: &HashedKey) -> Result<Lookup, sqlx::Error> {
    let row = sqlx::query!(
        r#"select id as "id: ApiKeyId", name, permissions, job_ids as "job_ids: Vec<JobId>", enabled,
                  coalesce(expires_at <= clock_timestamp(), false) as "expired!"
             from api_keys where secret_hash = $1"#,
        &key.0[..]
    )
    .fetch_optional(conn)
    .await?;
    Ok(match row {
        None => Lookup::Unknown,
        Some(row) if !row.enabled => Lookup::Disabled,
        Some(row) if row.expired => Lookup::Expired,
        Some(row) => Lookup::Valid(ApiKey {
            id: row.id,
            name: row.name,
            // A name that this version does not know grants nothing.
            permissions: PermissionSet::parse(
                &row.permissions.into_iter().filter(|p| PermissionSet::parse(&[p]).is_ok()).collect::<Vec<_>>(),
            )
            .unwrap_or_default(),
            jobs: row.job_ids,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_documented_form_and_its_own_check() {
        let key = PlainKey::generate();
        assert_eq!(key.expose().len(), 50);
        assert_eq!(PlainKey::parse(key.expose()).map(|k| k.hash()), Some(key.hash()));
        assert!(!format!("{key:?}").contains(&key.expose()[4..]));
    }

    #[test]
    fn a_typo_is_seen_without_a_database() {
        let key = PlainKey::generate().expose().to_owned();
        for at in 4..key.len() {
            let mut typo = key.clone().into_bytes();
            typo[at] = if typo[at] == b'x' { b'y' } else { b'x' };
            let typo = String::from_utf8(typo).expect("ascii");
            assert!(PlainKey::parse(&typo).is_none(), "{at}");
        }
        for text in ["", "dbm_", "dbm_your_api_key", "é", &key[1..], &format!("{key}0")] {
            assert!(PlainKey::parse(text).is_none(), "{text}");
        }
    }
}
