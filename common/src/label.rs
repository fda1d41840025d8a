//! Labels: free text by name on sources, destinations, jobs and executions.

use std::collections::BTreeMap;

/// Labels in a fixed order.
pub type Labels = BTreeMap<String, String>;

/// What is wrong with a set of labels, if anything.
pub fn problem(labels: &Labels) -> Option<String> {
    if labels.len() > 64 {
        return Some("at most 64 labels".to_owned());
    }
    let bad = |text: &str, longest| text.chars().count() > longest || text.chars().any(char::is_control);
    labels.iter().find_map(|(name, value)| {
        if name.is_empty() || bad(name, 63) {
            Some("a label's name has 1 to 63 characters and no control character".to_owned())
        } else if bad(value, 255) {
            Some(format!("the value of '{name}' has more than 255 characters or a control character"))
        } else {
            None
        }
    })
}
