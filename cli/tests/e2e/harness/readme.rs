//! What people paste out of the README.

/// The shell function that replaces every container of a Compose cluster.
pub fn roll() -> String {
    let readme = include_str!("../../../../README.md");
    let body = readme.split_once("\nroll() (").and_then(|(_, rest)| rest.split_once("\n)\n")).expect("README has it").0;
    assert!(body.contains("in api worker;"), "{body}");
    format!("roll() ({body}\n)\n")
}
