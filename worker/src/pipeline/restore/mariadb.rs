//! MariaDB and MySQL by their own client, which stops at the first error. There is no transaction around it: these servers
//! commit with every `create table`.

use std::path::PathBuf;

use common::source::{Engine, SourceAccess};

use super::{target::Holds, unpack::Rename};
use crate::{
    failure::RunError,
    lease::ProcessGroups,
    pipeline::dump::{Tool, child::Program, find_tools, mariadb, missing},
};

/// A server, and the client for it.
pub struct Server {
    /// As the server says.
    pub version: String,
    /// The client.
    pub tool: Tool,
}

/// Signs in and finds the client.
pub async fn open(access: &SourceAccess, bins: &[PathBuf], groups: &ProcessGroups) -> Result<Server, RunError> {
    let (clients, _) = mariadb::names(access.engine);
    let mut tool = None;
    for name in clients {
        tool = tool.or(find_tools(bins, name, groups).await.into_iter().next());
    }
    let package = if access.engine == Engine::Mysql { "mysql-client or mariadb-client" } else { "mariadb-client" };
    let tool = tool.ok_or_else(|| missing(clients[0], bins, "DBACKUP_MARIADB_BIN", package))?;
    let mut server = Server { version: String::new(), tool };
    server.version = server.ask(access, "select version()", groups).await?.trim().to_owned();
    Ok(server)
}

/// A value that no quoting rule of the server touches.
fn literal(name: &str) -> String {
    format!("convert(x'{}' using utf8)", hex::encode(name))
}

impl Server {
    async fn ask(&self, access: &SourceAccess, query: &str, groups: &ProcessGroups) -> Result<String, RunError> {
        let mut program = Program::new(&self.tool.path);
        mariadb::connect(access, &mut program, &self.tool.version)?;
        program.arg("--batch").arg("--skip-column-names").arg("--raw").arg("--connect-timeout=10").arg("-e").arg(query);
        let printed = program.output(groups).await?.printed();
        printed.map_err(|said| mariadb::classify(&said, format!("could not ask the server: {said}")))
    }

    /// What is in a database.
    pub async fn holds(
        &self,
        access: &SourceAccess,
        database: &str,
        groups: &ProcessGroups,
    ) -> Result<Holds, RunError> {
        let name = literal(database);
        let query = format!(
            "select (select count(*) from information_schema.schemata where schema_name = {name}),
                    (select count(*) from information_schema.tables where table_schema = {name})
                    + (select count(*) from information_schema.routines where routine_schema = {name})
                    + (select count(*) from information_schema.events where event_schema = {name})"
        );
        let answer = self.ask(access, &query, groups).await?;
        match answer.trim().split('\t').collect::<Vec<_>>()[..] {
            ["0", _] => Ok(Holds::Missing),
            [_, "0"] => Ok(Holds::Nothing),
            [_, n] if n.parse::<u64>().is_ok() => Ok(Holds::Something),
            _ => Err(RunError::retry(
                "source_failed",
                format!("the server's answer was not understood: {}", answer.trim()),
            )),
        }
    }

    /// Makes an empty database.
    pub async fn create(&self, access: &SourceAccess, database: &str, groups: &ProcessGroups) -> Result<(), RunError> {
        let query = format!("create database `{}`", database.replace('`', "``"));
        self.ask(access, &query, groups).await.map(drop)
    }

    /// Runs the dump's statements.
    pub fn restore(&self, access: &SourceAccess, database: &str) -> Result<Program, RunError> {
        let mut program = Program::new(&self.tool.path);
        mariadb::connect(access, &mut program, &self.tool.version)?;
        // A line of data must never be taken for a command of the client.
        program
            .arg("--batch")
            .arg("--binary-mode")
            .arg("--default-character-set=utf8mb4")
            .arg("--max-allowed-packet=1G");
        program.arg("--connect-timeout=10").arg("--").arg(database);
        Ok(program)
    }
}

/// Routines, triggers and events that were made while the database had another collation stand between two statements that
/// change it, by name: of the database that was dumped, which may be somebody's on this very server.
pub fn rename(from: &str, into: &str) -> Rename {
    let statement = |name: &str| format!("\nALTER DATABASE `{}` CHARACTER SET ", name.replace('`', "``")).into_bytes();
    Rename { from: statement(from), into: statement(into) }
}

/// Sorts what the client says, by MySQL's error numbers.
pub fn classify(stderr: &str, doing: String) -> RunError {
    let told = |n: &str| stderr.contains(&format!("ERROR {n} "));
    if ["1044", "1142", "1227", "1370", "1410", "1419"].iter().any(|n| told(n)) {
        RunError::give_up(
            "source_denied",
            format!(
                "{doing}\nThe user of the source needs the right to make these objects; views, routines and triggers of another definer need SET USER or SUPER."
            ),
        )
    } else {
        match mariadb::classify(stderr, doing.clone()) {
            error if error.code == "dump_failed" => RunError::give_up("restore_failed", doing),
            error => error,
        }
    }
}
