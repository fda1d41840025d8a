//! Slugs: the stable, client-choosable names of sources, destinations and jobs. A job's slug is also a
//! folder and the start of a file name, so the alphabet is narrow.

/// Longest slug in characters.
pub const MAX_LENGTH: usize = 64;

/// Whether a client may choose this slug: 1 to 64 of `a-z`, `0-9` and `-`, beginning and ending with a
/// letter or digit, and not a UUID (an id is accepted wherever a slug is, so the two must not meet).
pub fn is_valid(slug: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    slug.len() <= MAX_LENGTH
        && slug.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && edge(slug.chars().next())
        && edge(slug.chars().last())
        && uuid::Uuid::parse_str(slug).is_err()
}

/// A slug made from a name: what is not a letter or digit becomes one hyphen. A name that leaves nothing
/// gives `unnamed`.
pub fn from_name(name: &str) -> String {
    let mut slug = String::new();
    for c in name.chars().map(|c| c.to_ascii_lowercase()) {
        if c.is_ascii_alphanumeric() {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
        if slug.len() == MAX_LENGTH - 8 {
            break;
        }
    }
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() || uuid::Uuid::parse_str(slug).is_ok() {
        return "unnamed".to_owned();
    }
    slug.to_owned()
}

/// The n-th candidate for a slug made from a name: the plain one first, then with a number behind it.
pub fn candidate(name: &str, n: u32) -> String {
    match n {
        0 => from_name(name),
        n => format!("{}-{}", from_name(name), n + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_becomes_a_valid_slug_that_is_one_path_component() {
        let long = "x".repeat(300);
        for name in [
            "Daily MySQL Backup",
            "../../etc/passwd",
            "a\nb\"c'd",
            "...",
            "",
            "Ünïcode",
            &long,
            "-a-",
            "0190a5b2-0000-7000-8000-000000000000",
        ] {
            for n in 0..3 {
                let slug = candidate(name, n);
                assert!(is_valid(&slug), "{name:?} gave {slug:?}");
            }
        }
        assert_eq!(from_name("Daily MySQL Backup"), "daily-mysql-backup");
        assert_eq!(candidate("../../etc/passwd", 1), "etc-passwd-2");
    }

    #[test]
    fn a_slug_that_could_leave_its_folder_is_refused() {
        for bad in ["", ".", "..", "a/b", "A", "a_b", "-a", "a-", "a b", "0190a5b2-0000-7000-8000-000000000000"] {
            assert!(!is_valid(bad), "{bad:?}");
        }
    }
}
