//! API keys: `dbm_`, 40 random base62 characters, and 6 base62 characters of CRC-32 over what stands before
//! them, so that a typo or a secret scanner needs no database. Only the SHA-256 is stored.

mod manage;

use std::{net::IpAddr, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use ipnet::IpNet;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::{
    id::{ApiKeyId, JobId},
    permission::PermissionSet,
};

pub use manage::{Filter, KeyDraft, KeyInfo, KeyLimits, Use, create, delete, find, list, record_uses, rotate, update};

const PREFIX: &str = "dbm_";
const RANDOM_LENGTH: usize = 40;
const CHECK_LENGTH: usize = 6;
const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A key as its owner holds it. It exists once, when it is made, and cannot be printed by accident.
#[derive(Clone, Debug)]
pub struct PlainKey(SecretString);

/// What the database knows of a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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

    /// Its first characters, which tell keys apart for people: 24 of its 238 bits.
    pub fn hint(&self) -> String {
        self.expose().chars().take(PREFIX.len() + 4).collect()
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
    /// The only networks it may be used from, when it is scoped.
    pub networks: Option<Vec<IpNet>>,
    /// Limits of its own, in place of those per address.
    pub limits: KeyLimits,
    /// Refused from this moment on.
    pub expires_at: Option<DateTime<Utc>>,
}

impl ApiKey {
    /// Whether it may be used from an address.
    pub fn allows_address(&self, address: IpAddr) -> bool {
        self.networks.as_ref().is_none_or(|networks| networks.iter().any(|network| network.contains(&address)))
    }
}

/// What a look-up of a key found.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// It may be used.
    Valid(Arc<ApiKey>),
    /// No such key.
    Unknown,
    /// Switched off by an administrator.
    Disabled,
    /// Past its expiry.
    Expired,
    /// A secret from before the last rotation, past its grace.
    Rotated,
}

/// A look-up, and for how long its answer holds.
#[derive(Clone, Debug)]
pub struct LookedUp {
    /// What was found.
    pub lookup: Lookup,
    /// The epoch of that moment: an answer of another epoch must be asked for again.
    pub epoch: i64,
    /// Until its expiry, or the end of its grace, by the database's clock.
    pub good_for: Option<Duration>,
}

/// Looks a key up by its hash. The comparison happens in an index over SHA-256 values, which an attacker cannot
/// steer, so its timing tells nothing of a stored key. One statement, so that key and epoch are of one snapshot.
pub async fn look_up(conn: &mut PgConnection, key: &HashedKey) -> Result<LookedUp, sqlx::Error> {
    let row = sqlx::query!(
        r#"select e.epoch, k.id as "id?: ApiKeyId", k.name as "name?", k.permissions as "permissions?",
                  k.job_ids as "job_ids?: Vec<JobId>", k.networks as "networks?", k.read_limit as "read_limit?",
                  k.write_limit as "write_limit?", k.expires_at as "expires_at?", coalesce(k.enabled, false) as "enabled!",
                  coalesce(k.expires_at <= clock_timestamp(), false) as "expired!",
                  coalesce(k.secret_hash <> $1 and k.previous_until <= clock_timestamp(), false) as "rotated!",
                  extract(epoch from least(k.expires_at, case when k.secret_hash <> $1 then k.previous_until end)
                                     - clock_timestamp())::float8 as good_for_seconds
             from auth_epoch e left join api_keys k on k.secret_hash = $1 or k.previous_hash = $1"#,
        &key.0[..]
    )
    .fetch_one(conn)
    .await?;
    let good_for = row.good_for_seconds.map(|s| Duration::from_secs_f64(s.clamp(0.0, 1e9)));
    let lookup = match (row.id, row.name) {
        (Some(_), Some(_)) if row.rotated => Lookup::Rotated,
        (Some(_), Some(_)) if !row.enabled => Lookup::Disabled,
        (Some(_), Some(_)) if row.expired => Lookup::Expired,
        (Some(id), Some(name)) => Lookup::Valid(Arc::new(ApiKey {
            id,
            name,
            permissions: PermissionSet::of_stored(row.permissions.unwrap_or_default()),
            jobs: row.job_ids,
            networks: row.networks.map(|networks| networks_of_stored(&networks)),
            limits: KeyLimits { read: row.read_limit, write: row.write_limit },
            expires_at: row.expires_at,
        })),
        _ => Lookup::Unknown,
    };
    Ok(LookedUp { lookup, epoch: row.epoch, good_for })
}

/// The epoch in force: see the table `auth_epoch`.
pub async fn auth_epoch(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!("select epoch from auth_epoch").fetch_one(conn).await
}

/// What this version does not understand allows nothing.
fn networks_of_stored(networks: &[String]) -> Vec<IpNet> {
    networks.iter().filter_map(|network| network.parse().ok()).collect()
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
