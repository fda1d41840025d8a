//! Encryption of backups with age: to recipients. Whoever holds the identity of one opens them with the public `age`
//! tool; DBackup is given one for a restore alone, and forgets it.

use std::collections::BTreeSet;

use age::x25519;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

/// Recipients of one backup, at most: each makes its file some 100 bytes longer.
pub const MOST_RECIPIENTS: usize = 16;

/// Who can open the backups of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Encryption {
    /// age recipients, 1 to 16, as `age-keygen` prints them: any one of their identities opens a backup.
    #[schema(min_items = 1, max_items = 16, example = json!(["age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"]))]
    pub recipients: Vec<String>,
}

impl Encryption {
    /// As it is stored: no recipients are no encryption.
    pub fn of(recipients: Vec<String>) -> Option<Self> {
        (!recipients.is_empty()).then_some(Self { recipients })
    }

    /// The same with every recipient in its one spelling; else what is wrong, each with the path of its field.
    pub fn checked(self) -> Result<Self, Vec<(String, &'static str)>> {
        let mut problems = Vec::new();
        if self.recipients.is_empty() || self.recipients.len() > MOST_RECIPIENTS {
            problems.push(("recipients".to_owned(), "must list between 1 and 16 age recipients"));
        }
        let (mut seen, mut recipients) = (BTreeSet::new(), Vec::new());
        for (at, text) in self.recipients.iter().enumerate().take(MOST_RECIPIENTS) {
            let checked = recipient(text).and_then(|known| match seen.insert(known.to_string()) {
                true => Ok(known),
                false => Err("is listed twice"),
            });
            match checked {
                Ok(known) => recipients.push(known.to_string()),
                Err(problem) => problems.push((format!("recipients[{at}]"), problem)),
            }
        }
        if problems.is_empty() { Ok(Self { recipients }) } else { Err(problems) }
    }
}

/// Reads a recipient; else what is wrong with it.
pub fn recipient(text: &str) -> Result<x25519::Recipient, &'static str> {
    let text = text.trim();
    if text.to_ascii_uppercase().starts_with(SECRET_PREFIX) {
        return Err(
            "is an identity, which must stay secret: give the recipient that `age-keygen -y` prints for it, and make a new one if this one may have been seen",
        );
    }
    text.parse().map_err(|_| "is not an age recipient: it begins with age1, and `age-keygen` prints it")
}

const SECRET_PREFIX: &str = "AGE-SECRET-KEY-";

/// Length of an identity as text.
const SECRET_LENGTH: usize = 74;

/// The identity among those in `text` that opens what is encrypted to `recipients`; else what is wrong. The text is that of a
/// key file, whose lines may have been lost on the way: a form's field has none.
pub fn identity(text: &SecretString, recipients: &[String]) -> Result<SecretString, String> {
    let text = text.expose_secret().to_ascii_uppercase();
    let mut known = 0;
    for (at, _) in text.match_indices(SECRET_PREFIX) {
        let identity = text.get(at..at + SECRET_LENGTH).and_then(|text| text.parse::<x25519::Identity>().ok());
        let identity = identity.ok_or("holds an age identity with a mistake in it: was all of it copied?")?;
        known += 1;
        if recipients.contains(&identity.to_public().to_string()) {
            return Ok(identity.to_string());
        }
    }
    match known {
        0 => Err(format!("holds no age identity, which begins with {SECRET_PREFIX}1 and is written by `age-keygen`")),
        _ => Err(format!("does not open this backup, which is encrypted to {}", recipients.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (SecretString, String) {
        let identity = x25519::Identity::generate();
        (identity.to_string(), identity.to_public().to_string())
    }

    #[test]
    fn recipients_are_stored_in_one_spelling_and_what_is_wrong_is_told_without_a_secret() {
        let ((secret, first), (_, second)) = (pair(), pair());
        let of = |recipients: &[&str]| {
            Encryption { recipients: recipients.iter().map(|text| (*text).to_owned()).collect() }.checked()
        };
        let spelt = format!(" {} ", first.to_uppercase());
        assert_eq!(of(&[&spelt, &second]).expect("known").recipients, [first.clone(), second]);
        let problems = of(&[&first, &spelt, "age1nonsense", secret.expose_secret(), &first[..40]]).expect_err("wrong");
        let fields: Vec<_> = problems.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["recipients[1]", "recipients[2]", "recipients[3]", "recipients[4]"]);
        assert!(problems[2].1.contains("must stay secret") && !format!("{problems:?}").contains(SECRET_PREFIX));
        assert!(of(&[]).is_err());
        let many: Vec<_> = (0..=MOST_RECIPIENTS).map(|_| pair().1).collect();
        assert!(of(&many.iter().map(String::as_str).collect::<Vec<_>>()).is_err());
    }

    #[test]
    fn of_a_file_of_identities_the_one_that_opens_is_taken_and_no_other_leaves_it() {
        let ((first, first_recipient), (second, recipient), (_, strange)) = (pair(), pair(), pair());
        let file = format!(
            "# created: today\n# public key: {recipient}\n{}\n\n{}\n",
            first.expose_secret(),
            second.expose_secret()
        );
        let found = identity(&file.clone().into(), &[strange.clone(), recipient]).expect("opens");
        assert_eq!(found.expose_secret(), second.expose_secret());
        let flat = file.replace('\n', "");
        assert!(identity(&flat.into(), &[first_recipient]).is_ok(), "a form's field has one line");
        let cut = first.expose_secret()[..70].to_owned();
        assert!(identity(&cut.into(), std::slice::from_ref(&strange)).is_err_and(|why| why.contains("mistake")));
        let error = identity(&file.into(), std::slice::from_ref(&strange)).expect_err("does not open");
        assert!(error.contains(&strange) && !error.contains(SECRET_PREFIX), "{error}");
        for nothing in ["", "# only words", "age1xyz"] {
            assert!(identity(&nothing.to_owned().into(), std::slice::from_ref(&strange)).is_err(), "{nothing}");
        }
    }
}
