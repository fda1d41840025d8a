//! Names of stored objects. The token makes each attempt's names its own: nothing is ever overwritten. The
//! *last* hex digits of the execution's id are used, because the first ones of a UUIDv7 are a clock and the same
//! for all runs of a second.

use std::fmt::Write;

use chrono::{DateTime, Utc};
use common::{execution::claim::Claim, job::Compression, source::Engine};
use sha2::{Digest, Sha256};

/// Names of one attempt.
#[derive(Clone, Debug)]
pub struct Names {
    folder: String,
    stem: String,
    identity: String,
}

impl Names {
    /// The names of an attempt of the job `slug`, claimed at `claimed_at`.
    pub fn new(slug: &str, claimed_at: DateTime<Utc>, claim: Claim) -> Self {
        let hex = claim.execution.0.simple().to_string();
        Self {
            folder: slug.to_owned(),
            stem: format!("{slug}_{}", claimed_at.format("%Y-%m-%dT%H-%M-%SZ")),
            identity: format!("{}-{}", &hex[20..], claim.token),
        }
    }

    /// The object of one database.
    pub fn object(&self, database: &str, engine: Engine, compression: Compression, encrypted: bool) -> String {
        let dump = match engine {
            Engine::Postgres => "dump",
            Engine::Mysql | Engine::Mariadb => "sql",
        };
        let suffix = match compression {
            Compression::Zstd => ".zst",
            Compression::Gzip => ".gz",
            Compression::None => "",
        };
        let age = if encrypted { ".age" } else { "" };
        format!("{}/{}_{}_{}.{dump}{suffix}{age}", self.folder, self.stem, component(database), self.identity)
    }

    /// The manifest of all of them.
    pub fn manifest(&self) -> String {
        format!("{}/{}_{}.json", self.folder, self.stem, self.identity)
    }
}

/// Longest form of a database's name in an object's name; the whole stays below the 255 bytes of file systems.
const MAX_COMPONENT: usize = 96;

/// A database's name as part of a file name: bytes other than letters, digits, dot, hyphen and underscore become
/// `=` and two hex digits, and a long name is cut and given a hash, so that two databases never meet.
fn component(database: &str) -> String {
    let mut name = String::new();
    for byte in database.bytes() {
        match byte {
            // Two dots in a row would look like a way out.
            b'.' if name.is_empty() || name.ends_with('.') => name.push_str("=2E"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' => name.push(char::from(byte)),
            _ => write!(name, "={byte:02X}").unwrap_or_default(),
        }
    }
    if name.len() > MAX_COMPONENT {
        name.truncate(MAX_COMPONENT - 17);
        name.push('=');
        name.push_str(&hex::encode(&Sha256::digest(database)[..8]));
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::{execution::claim::Token, id::ExecutionId};

    fn names(token: i64) -> Names {
        let execution = ExecutionId(uuid::Uuid::parse_str("0190a5b2-1111-7222-8333-0123456789ab").expect("a uuid"));
        let at = DateTime::parse_from_rfc3339("2025-01-15T10:30:00Z").expect("a time").to_utc();
        Names::new("daily", at, Claim { execution, token: Token(token), slot: 1, attempt: 1 })
    }

    #[test]
    fn a_name_tells_job_time_database_and_attempt() {
        assert_eq!(
            names(7).object("shop", Engine::Postgres, Compression::Zstd, false),
            "daily/daily_2025-01-15T10-30-00Z_shop_0123456789ab-7.dump.zst"
        );
        assert!(names(7).object("shop", Engine::Mysql, Compression::Gzip, true).ends_with("-7.sql.gz.age"));
        assert_eq!(names(7).manifest(), "daily/daily_2025-01-15T10-30-00Z_0123456789ab-7.json");
        assert_ne!(names(7).manifest(), names(8).manifest());
    }

    #[test]
    fn a_databases_name_cannot_leave_the_folder_nor_meet_another() {
        let long = "x".repeat(200);
        let databases = ["../../etc/passwd", "a/b", "a_b", "a=2Fb", "a\nb", "..", "ü", &long, &format!("{long}y")];
        let mut seen = std::collections::BTreeSet::new();
        for database in databases {
            let name = names(1).object(database, Engine::Mariadb, Compression::Gzip, true);
            let (folder, file) = name.split_once('/').expect("one folder");
            assert!(folder == "daily" && !file.contains('/') && file.len() < 240 && file.is_ascii(), "{name}");
            assert!(seen.insert(name), "{database} meets another");
        }
    }
}
