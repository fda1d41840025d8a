//! What people paste out of the README.

/// All of it.
pub const README: &str = include_str!("../../../../README.md");

/// The shell function that replaces every container of a Compose cluster.
pub fn roll() -> String {
    let body = README.split_once("\nroll() (").and_then(|(_, rest)| rest.split_once("\n)\n")).expect("README has it").0;
    assert!(body.contains("in api worker;"), "{body}");
    format!("roll() ({body}\n)\n")
}
