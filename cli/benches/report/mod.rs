//! What a bench found, as a section of BENCHMARKS.md. Each bench writes its own and leaves the others alone.

use std::{fmt::Write, path::Path};

/// A section under way; every line is printed at once, too.
pub struct Report {
    title: &'static str,
    text: String,
}

impl Report {
    /// Begins a section: how it is measured, in sentences.
    pub fn new(title: &'static str, how: &str) -> Self {
        println!("\n## {title}\n\n{how}\n");
        Self { title, text: format!("{how}\n\n") }
    }

    /// One line of Markdown.
    pub fn line(&mut self, line: impl AsRef<str>) {
        println!("{}", line.as_ref());
        let _ = writeln!(self.text, "{}", line.as_ref());
    }

    /// Writes it in place of the section of the last run.
    pub fn write(self) {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../BENCHMARKS.md");
        let before = std::fs::read_to_string(&file).unwrap_or_default();
        let mut sections: Vec<String> = before.split("\n## ").map(|s| s.trim_end().to_owned()).collect();
        // What all have in common may have changed since.
        sections[0] = HEAD.replace("VERSION", &postgres_major());
        let section = format!("{}\n\n{}", self.title, self.text.trim_end());
        let same = |s: &&mut String| s.lines().next() == Some(self.title);
        match sections.iter_mut().skip(1).find(same) {
            Some(old) => *old = section,
            None => sections.push(section),
        }
        std::fs::write(file, sections.join("\n\n## ") + "\n").expect("BENCHMARKS.md can be written");
    }
}

/// Of the server that `make bench` has started.
fn postgres_major() -> String {
    let program = Path::new(&std::env::var("DBACKUP_PG_BIN").expect("DBACKUP_PG_BIN")).join("postgres");
    let output = std::process::Command::new(program).arg("--version").output().expect("PostgreSQL says its version");
    let version = String::from_utf8(output.stdout).expect("text");
    let number = version.split_whitespace().nth(2).expect("a version").to_owned();
    number.split('.').next().expect("a major").to_owned()
}

const HEAD: &str = "# Benchmarks

Written by `make bench`: ratios of what is measured side by side in one run on one PostgreSQL (VERSION, `fsync` on), since
absolute figures are those of the machine. Build profile `release`, as it ships; clients, servers and PostgreSQL
share the machine's cores.";
