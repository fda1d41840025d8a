//! The plans of everything that processes asked of their database, as PostgreSQL carried them out: its `auto_explain`
//! tells each to the session that asked, and so they come with the process's log. Statements within functions too.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Cluster, process::Process, sql};

/// Has every session that begins from now on told its plans.
pub async fn explain(cluster: &Cluster) {
    for (name, value) in [
        ("session_preload_libraries", "auto_explain"),
        ("auto_explain.log_min_duration", "0"),
        ("auto_explain.log_analyze", "on"),
        ("auto_explain.log_timing", "off"),
        ("auto_explain.log_nested_statements", "on"),
        ("auto_explain.log_format", "json"),
        ("auto_explain.log_level", "notice"),
    ] {
        sql(&cluster.database, &format!("alter database {} set {name} = '{value}'", cluster.database)).await;
    }
}

/// The `RUST_LOG` with which a process puts them into its log.
pub const TOLD: &str = "info,sqlx::postgres::notice=info";

/// A statement that was carried out.
#[derive(Debug)]
pub struct Plan {
    /// Its text.
    pub query: String,
    /// The tables that were walked as a whole.
    pub walked: Vec<String>,
    /// Rows read of each table, also those that were not wanted.
    pub read: BTreeMap<String, u64>,
    whole: Value,
}

impl Plan {
    /// All that a process told.
    pub fn of(process: &Process) -> Vec<Self> {
        process.log().lines().filter_map(Self::parse).collect()
    }

    fn parse(line: &str) -> Option<Self> {
        let line: Value = serde_json::from_str(line).ok()?;
        let (_, plan) = line["fields"]["message"].as_str()?.split_once("plan:\n")?;
        let plan: Value = serde_json::from_str(plan).expect("auto_explain writes JSON");
        let query = plan["Query Text"].as_str().expect("a statement has a text");
        let query = query.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut told = Self { query, walked: Vec::new(), read: BTreeMap::new(), whole: plan["Plan"].clone() };
        told.add(&plan["Plan"]);
        Some(told)
    }

    fn add(&mut self, node: &Value) {
        if let Some(table) = node["Relation Name"].as_str().filter(|_| node["Node Type"] != "ModifyTable") {
            let number = |key: &str| node[key].as_f64().unwrap_or(0.0);
            let of_loop =
                number("Actual Rows") + number("Rows Removed by Filter") + number("Rows Removed by Index Recheck");
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
            let rows = (of_loop * number("Actual Loops")) as u64;
            *self.read.entry(table.to_owned()).or_default() += rows;
            if node["Node Type"] == "Seq Scan" && number("Actual Loops") > 0.0 {
                self.walked.push(table.to_owned());
            }
        }
        node["Plans"].as_array().into_iter().flatten().for_each(|child| self.add(child));
    }

    /// For a failure: the statement and how it was carried out.
    pub fn told(&self) -> String {
        format!("{}\nread {:?}, walked {:?}\n{:#}", self.query, self.read, self.walked, self.whole)
    }
}
