//! Passwords: Argon2id with the parameters that RFC 9106 and OWASP give for interactive use (19 MiB, two passes).

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use secrecy::{ExposeSecret, SecretString};

/// Shortest password, in characters.
pub const MIN_LENGTH: usize = 10;
/// Longest password, in characters: hashing must not be made slow by its length.
pub const MAX_LENGTH: usize = 500;

/// A hash as it is stored.
#[derive(Clone, PartialEq, Eq)]
pub struct Hashed(String);

impl std::fmt::Debug for Hashed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hashed(…)")
    }
}

impl Hashed {
    /// As stored.
    pub fn of_stored(text: String) -> Self {
        Self(text)
    }

    /// The PHC string.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a password was refused.
pub fn problem(password: &SecretString) -> Option<String> {
    let length = password.expose_secret().chars().count();
    (!(MIN_LENGTH..=MAX_LENGTH).contains(&length))
        .then(|| format!("must have between {MIN_LENGTH} and {MAX_LENGTH} characters"))
}

/// Hashes; takes tens of milliseconds of a whole core, so never on a thread that serves requests.
pub fn hash(password: &SecretString) -> Hashed {
    let hashed = Argon2::default().hash_password(password.expose_secret().as_bytes());
    Hashed(hashed.expect("the system has random bytes, and the parameters are the crate's own").to_string())
}

/// Whether it is the password. Takes as long for `None` (nobody of that name) as for a wrong password.
pub fn verify(password: &SecretString, hashed: Option<&Hashed>) -> bool {
    static NOBODY: std::sync::LazyLock<Hashed> = std::sync::LazyLock::new(|| hash(&"nobody's password".into()));
    let stored = hashed.unwrap_or(&NOBODY);
    let right = PasswordHash::new(stored.as_str())
        .is_ok_and(|stored| Argon2::default().verify_password(password.expose_secret().as_bytes(), &stored).is_ok());
    right && hashed.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_stored_as_argon2id_with_a_salt_of_its_own() {
        let password: SecretString = "correct horse".into();
        let (one, two) = (hash(&password), hash(&password));
        assert!(one.as_str().starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{}", one.as_str());
        assert_ne!(one, two);
        assert!(verify(&password, Some(&one)) && verify(&password, Some(&two)));
        assert!(!verify(&"correct hors".into(), Some(&one)));
        assert!(!verify(&"nobody's password".into(), None), "nobody has no password");
        assert!(!format!("{one:?}").contains("argon2"));
    }
}
