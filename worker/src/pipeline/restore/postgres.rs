//! PostgreSQL by `pg_restore --single-transaction`.

use std::path::{Path, PathBuf};

use common::{execution::restore::Order, source::SourceAccess};

use super::target::Holds;
use crate::{
    failure::RunError,
    lease::ProcessGroups,
    pipeline::dump::{Tool, child::Program, find_tools, postgres},
};

/// Databases by which a server is asked about one that is not there.
const MAINTENANCE: [&str; 2] = ["postgres", "template1"];

/// Whether somebody made something: no system catalog counts, and nothing that an extension brought.
const QUESTION: &str = "with spaces as (
        select oid, nspname from pg_namespace where nspname <> 'information_schema' and nspname !~ '^pg_'
    ), things (class, thing) as (
        select 'pg_namespace'::regclass, oid from spaces where nspname <> 'public'
        union all
        select 'pg_class'::regclass, oid from pg_class
         where relnamespace in (select oid from spaces) and relkind in ('r', 'p', 'v', 'm', 'S', 'f', 'c')
        union all
        select 'pg_proc'::regclass, oid from pg_proc where pronamespace in (select oid from spaces)
        union all
        select 'pg_type'::regclass, oid from pg_type
         where typnamespace in (select oid from spaces) and (typtype in ('e', 'd', 'r', 'm') or typtype = 'b' and typcategory <> 'A')
    )
    select exists (
        select from things
         where not exists (select from pg_depend d where d.classid = class and d.objid = thing and d.deptype = 'e')
        union all
        select from pg_largeobject_metadata)";

/// A server, and the tool for it.
pub struct Server {
    psql: PathBuf,
    /// As the server says.
    pub version: String,
    /// pg_restore.
    pub tool: Tool,
    /// Whether the tool would send what the server does not know: see [`Server::script`].
    pub by_script: bool,
}

/// From this major on pg_restore sets `transaction_timeout`, which servers before it refuse.
const NEEDS_TIMEOUT: u32 = 17;

/// Signs in, and chooses the pg_restore: of the server's major or of the tool's that wrote the dump, whichever is newer,
/// or the next newer one. An older one cannot read the dump.
pub async fn open(
    access: &SourceAccess,
    bins: &[PathBuf],
    groups: &ProcessGroups,
    dumped_by: &str,
) -> Result<Server, RunError> {
    let psql = postgres::find_psql(bins)?;
    let version = ask_server(access, &psql, "select current_setting('server_version')", None, groups).await?;
    let version = version.trim().to_owned();
    let tools = find_tools(bins, "pg_restore", groups).await;
    if tools.is_empty() {
        return Err(postgres::absent("pg_restore", bins));
    }
    let server = version.split(['.', ' ']).next().and_then(|major| major.parse().ok()).unwrap_or(0);
    let tool = choose(&tools, server, postgres::major_of(dumped_by).unwrap_or(0))?;
    let by_script =
        server < NEEDS_TIMEOUT && postgres::major_of(&tool.version).is_some_and(|tool| tool >= NEEDS_TIMEOUT);
    Ok(Server { psql, version, tool, by_script })
}

fn choose(tools: &[Tool], server: u32, dumped_by: u32) -> Result<Tool, RunError> {
    let needed = server.max(dumped_by);
    postgres::nearest(tools, needed).map(|(_, tool)| tool.clone()).map_err(|newest| {
        RunError::give_up(
            "client_too_old",
            format!("the backup was written by pg_dump {dumped_by} and the server is PostgreSQL {server}, but the newest pg_restore on this worker is {newest}: install postgresql-client-{needed}"),
        )
    })
}

/// Asks the server by the first of its databases that lets the user in; not by `but`.
async fn ask_server(
    access: &SourceAccess,
    psql: &Path,
    query: &str,
    but: Option<&str>,
    groups: &ProcessGroups,
) -> Result<String, RunError> {
    let own = access.config.databases.iter().map(String::as_str);
    let mut asked = Err(RunError::give_up("source_config", "the source names no database"));
    for entrance in MAINTENANCE.into_iter().chain(own).filter(|entrance| Some(*entrance) != but) {
        asked = postgres::ask(access, psql, entrance, query, "ask", groups).await;
        // One that the user may not enter, or that is not there, says nothing of the others.
        let shut = |error: &RunError| matches!(error.code, "source_auth" | "source_denied" | "database_missing");
        if !asked.as_ref().is_err_and(shut) {
            break;
        }
    }
    asked
}

impl Server {
    /// What is in a database.
    pub async fn holds(
        &self,
        access: &SourceAccess,
        database: &str,
        groups: &ProcessGroups,
    ) -> Result<Holds, RunError> {
        match postgres::ask(access, &self.psql, database, QUESTION, "ask", groups).await {
            Ok(answer) if answer.trim() == "f" => Ok(Holds::Nothing),
            Ok(answer) if answer.trim() == "t" => Ok(Holds::Something),
            Ok(answer) => {
                Err(RunError::retry("source_failed", format!("psql's answer was not understood: {}", answer.trim())))
            }
            Err(error) if error.code == "database_missing" => Ok(Holds::Missing),
            Err(error) => Err(error),
        }
    }

    /// See [`postgres::END_FORMER`].
    pub async fn end_former(&self, access: &SourceAccess, groups: &ProcessGroups) -> Result<String, RunError> {
        ask_server(access, &self.psql, postgres::END_FORMER, None, groups).await
    }

    /// Makes an empty database, with the server's own encoding.
    pub async fn create(&self, access: &SourceAccess, database: &str, groups: &ProcessGroups) -> Result<(), RunError> {
        let name = database.replace('"', "\"\"");
        let query = format!("create database \"{name}\" template template0");
        ask_server(access, &self.psql, &query, Some(database), groups).await.map(drop)
    }

    /// All of it or nothing.
    pub fn restore(&self, access: &SourceAccess, database: &str, order: &Order) -> Result<Program, RunError> {
        let mut program = Program::new(&self.tool.path);
        postgres::connect(access, &mut program, database)?;
        // An empty name: that of the environment counts, see `connect`.
        program.arg("--dbname=").arg("--no-password").arg("--single-transaction").arg("--exit-on-error");
        choices(&mut program, order);
        Ok(program)
    }

    /// The same as a script on its standard output.
    pub fn script(&self, access: &SourceAccess, database: &str, order: &Order) -> Result<Program, RunError> {
        let mut program = Program::new(&self.tool.path);
        postgres::connect(access, &mut program, database)?;
        program.arg("--file=-");
        choices(&mut program, order);
        Ok(program)
    }

    /// Runs a script: all of it or nothing. The psql beside the tool, which knows what that one writes.
    pub fn run(&self, access: &SourceAccess, database: &str) -> Result<Program, RunError> {
        let beside = self.tool.path.with_file_name("psql");
        let mut program = Program::new(if beside.is_file() { &beside } else { &self.psql });
        postgres::connect(access, &mut program, database)?;
        program.arg("-Xqw").arg("--single-transaction").arg("--set=ON_ERROR_STOP=1").arg("--file=-");
        Ok(program)
    }
}

fn choices(program: &mut Program, order: &Order) {
    if order.overwrite {
        program.arg("--clean").arg("--if-exists");
    }
    if !order.keep_owners {
        program.arg("--no-owner").arg("--no-privileges");
    }
}

/// Sorts what pg_restore says. Locale C, so the words are fixed.
pub fn classify(stderr: &str, doing: String, overwrite: bool) -> RunError {
    let hint = |code, hint: &str| RunError::give_up(code, format!("{doing}\n{hint}"));
    let says = |words: &str| stderr.contains(words);
    if says("role \"") && says("does not exist") {
        hint("role_missing", "A role of the backup is not on this server: make it, or restore without keepOwners.")
    } else if says("already exists") && overwrite {
        hint(
            "target_in_use",
            "Something that the backup would not replace has one of its names: drop that, or restore under another name (into).",
        )
    } else if says("already exists") {
        hint("target_not_empty", "The target is not empty: restore under another name (into), or say overwrite.")
    } else if says("cannot drop") {
        hint(
            "target_in_use",
            "Something outside the backup depends on what it would replace: drop that first, or restore under another name (into).",
        )
    } else if says("permission denied") || says("must be owner") || says("must be member") || says("must be superuser")
    {
        hint("source_denied", "The user of the source needs the right to make these objects.")
    } else if says("No space left on device") {
        hint("target_full", "The server's disk is full.")
    } else {
        let error = postgres::classify(stderr, doing.clone());
        match error.code {
            "dump_failed" => RunError::give_up("restore_failed", doing),
            _ => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tool_is_as_new_as_server_and_dump() {
        let tool = |major: u32| Tool {
            path: format!("/usr/lib/postgresql/{major}/bin/pg_restore").into(),
            version: format!("pg_restore (PostgreSQL) {major}.2 (Debian)"),
        };
        let tools = [tool(17), tool(15), tool(16)];
        let chosen = |server, dumped_by| choose(&tools, server, dumped_by).map(|t| t.path).map_err(|e| e.message);
        assert_eq!(chosen(15, 15), Ok(tool(15).path));
        assert_eq!(chosen(15, 16), Ok(tool(16).path));
        assert_eq!(chosen(17, 13), Ok(tool(17).path));
        assert!(chosen(15, 18).is_err_and(|text| text.contains("postgresql-client-18")));
    }
}
