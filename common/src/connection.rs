//! The `config` of sources and destinations: its secrets are kept apart, sealed, and never come back.

use std::collections::BTreeMap;

use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value};

use crate::seal::{SealError, SealKey};

/// What stands where a secret is, in every answer.
pub const MASK: &str = "********";

/// One field that a client must mend.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub struct FieldProblem {
    /// Path of the field in the body, such as `config.host`.
    pub field: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl FieldProblem {
    /// A problem with one field.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

/// Which fields of a config are secret, and which say where the secrets are sent.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Fields that are sealed.
    pub secrets: &'static [&'static str],
    /// Fields that decide who receives the secrets: host, port, endpoint, TLS.
    pub address: &'static [&'static str],
}

/// A config taken apart.
#[derive(Clone, Debug, Default)]
pub struct SplitConfig {
    /// What may be shown.
    pub open: Map<String, Value>,
    /// What may not.
    pub secrets: BTreeMap<String, SecretString>,
}

impl Shape {
    /// Applies what a client sent to what is stored: fields that are absent stay, `null` removes one, and the
    /// mask keeps a stored secret, unless the address changes with it: a saved password could otherwise be
    /// sent to a stranger's server.
    pub fn merge(&self, stored: SplitConfig, sent: Map<String, Value>) -> Result<SplitConfig, Vec<FieldProblem>> {
        let had_secrets = !stored.secrets.is_empty();
        let mut merged = stored.clone();
        let mut renewed = Vec::new();
        let mut problems = Vec::new();
        for (name, value) in sent {
            if self.secrets.contains(&name.as_str()) {
                match value {
                    Value::String(text) if text == MASK => {
                        if !merged.secrets.contains_key(&name) {
                            problems.push(FieldProblem::new(
                                format!("config.{name}"),
                                "there is no stored value to keep: give it",
                            ));
                        }
                    }
                    Value::String(text) => {
                        renewed.push(name.clone());
                        merged.secrets.insert(name, text.into());
                    }
                    Value::Null => {
                        merged.secrets.remove(&name);
                    }
                    _ => problems.push(FieldProblem::new(format!("config.{name}"), "must be a string")),
                }
            } else if value.is_null() {
                merged.open.remove(&name);
            } else {
                merged.open.insert(name, value);
            }
        }
        let moved = self.address.iter().filter(|f| stored.open.get(**f) != merged.open.get(**f));
        let moved: Vec<String> = moved.map(|field| format!("config.{field}")).collect();
        if had_secrets && !moved.is_empty() {
            for name in merged.secrets.keys().filter(|name| !renewed.contains(name)) {
                problems.push(FieldProblem::new(
                    format!("config.{name}"),
                    format!(
                        "must be given anew, because {} changed: a stored secret goes to no other place, and with no other protection",
                        moved.join(" and ")
                    ),
                ));
            }
        }
        if problems.is_empty() { Ok(merged) } else { Err(problems) }
    }
}

impl SplitConfig {
    /// The config as clients see it.
    pub fn masked(open: &Map<String, Value>, secret_names: impl IntoIterator<Item = String>) -> Map<String, Value> {
        let mut shown = open.clone();
        shown.extend(secret_names.into_iter().map(|name| (name, Value::String(MASK.to_owned()))));
        shown
    }

    /// The secrets, sealed for the row `context`; `None` when there are none.
    pub fn seal(&self, key: &SealKey, context: &str) -> Option<Vec<u8>> {
        if self.secrets.is_empty() {
            return None;
        }
        let plain: BTreeMap<&str, &str> = self.secrets.iter().map(|(k, v)| (k.as_str(), v.expose_secret())).collect();
        let text = serde_json::to_vec(&plain).expect("a map of strings is JSON");
        Some(key.seal(context, &text))
    }

    /// Opens a stored row.
    pub fn open(
        open: Map<String, Value>,
        sealed: Option<&[u8]>,
        key: &SealKey,
        context: &str,
    ) -> Result<Self, SealError> {
        let secrets = match sealed {
            None => BTreeMap::new(),
            Some(sealed) => {
                let plain: BTreeMap<String, String> =
                    serde_json::from_slice(&key.open(context, sealed)?).map_err(|_| SealError::DoesNotOpen)?;
                plain.into_iter().map(|(k, v)| (k, v.into())).collect()
            }
        };
        Ok(Self { open, secrets })
    }

    /// The open part as a typed value.
    pub fn typed<T: serde::de::DeserializeOwned>(&self) -> Result<T, FieldProblem> {
        serde_path_to_error::deserialize(Value::Object(self.open.clone())).map_err(|e| {
            let field = match e.path().to_string() {
                path if path == "." => "config".to_owned(),
                path => format!("config.{path}"),
            };
            FieldProblem::new(field, e.into_inner().to_string())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SHAPE: Shape = Shape { secrets: &["password"], address: &["host", "port"] };

    fn stored() -> SplitConfig {
        let object = |v: Value| v.as_object().cloned().expect("object");
        SHAPE
            .merge(SplitConfig::default(), object(json!({"host": "db", "username": "u", "password": "s3cret"})))
            .expect("valid")
    }

    fn put(sent: Value) -> Result<SplitConfig, Vec<FieldProblem>> {
        SHAPE.merge(stored(), sent.as_object().cloned().expect("object"))
    }

    #[test]
    fn the_mask_keeps_a_stored_secret_and_an_absent_field_stays() {
        let kept = put(json!({"username": "v", "password": MASK})).expect("valid");
        assert_eq!(kept.secrets["password"].expose_secret(), "s3cret");
        assert_eq!((kept.open["host"].as_str(), kept.open["username"].as_str()), (Some("db"), Some("v")));
        let changed = put(json!({"host": "other", "password": "new"})).expect("valid");
        assert_eq!(changed.secrets["password"].expose_secret(), "new");
    }

    #[test]
    fn a_stored_secret_is_not_sent_to_another_address_and_what_changes_is_named() {
        for (sent, named) in [
            (json!({"host": "evil"}), "because config.host changed"),
            (json!({"host": "evil", "password": MASK}), "because config.host changed"),
            (json!({"port": 1}), "because config.port changed"),
            (json!({"host": "evil", "port": 1}), "because config.host and config.port changed"),
        ] {
            let problems = put(sent).expect_err("must be refused");
            assert_eq!(problems[0].field, "config.password");
            assert!(problems[0].message.contains(named), "{problems:?}");
        }
    }

    #[test]
    fn the_mask_without_a_stored_secret_is_refused() {
        let sent = json!({"host": "db", "password": MASK}).as_object().cloned().expect("object");
        assert!(SHAPE.merge(SplitConfig::default(), sent).is_err());
    }
}
