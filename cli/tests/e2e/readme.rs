//! What the README promises of what people paste out of it.

use std::process::Command;

use crate::harness::readme::roll;

/// Runs `roll` with a `docker` that fails at this command, as part of a list as the README has it; gives what `docker` was
/// called with, and whether what comes after it was reached.
fn rolled(fails: &str) -> (Vec<String>, bool) {
    let docker = r#"docker() {
        echo "$*" >&2
        [ "$*" != "$FAILS" ] || return 1
        case "$*" in "compose ps -aq api") echo a; echo b ;; "compose ps -aq worker") echo w ;; esac
    }"#;
    let script = format!("{docker}\n{}\nroll && echo reached", roll());
    let output = Command::new("bash").args(["-c", &script]).env("FAILS", fails).output().expect("bash runs");
    let calls = String::from_utf8(output.stderr).expect("text").lines().map(str::to_owned).collect();
    let reached = output.stdout.ends_with(b"reached\n");
    assert_eq!(output.status.success(), reached);
    (calls, reached)
}

#[test]
fn a_roll_replaces_one_container_after_the_other_and_ends_at_its_first_failure() {
    let up = |service: &str, count: usize| {
        format!("compose up -d --no-deps --no-recreate --wait --scale {service}={count} {service}")
    };
    let (all, reached) = rolled("nothing");
    let wanted = [
        "compose ps -aq api".to_owned(),
        "stop a".to_owned(),
        "rm a".to_owned(),
        up("api", 2),
        "stop b".to_owned(),
        "rm b".to_owned(),
        up("api", 2),
        "compose ps -aq worker".to_owned(),
        "stop w".to_owned(),
        "rm w".to_owned(),
        up("worker", 1),
    ];
    assert_eq!((&all[..], reached), (&wanted[..], true));
    for fails in &all {
        let first = all.iter().position(|call| call == fails).expect("it is called");
        assert_eq!(rolled(fails), (all[..=first].to_vec(), false), "{fails}");
    }
}
