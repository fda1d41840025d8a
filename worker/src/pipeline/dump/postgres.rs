//! PostgreSQL by `pg_dump -Fc -Z0`: its custom format without its compression, which is ours.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use chrono::DateTime;
use common::source::{Engine, SourceAccess, TlsMode};
use secrecy::ExposeSecret;

use super::{Database, Inspected, TLS_HINT, Tool, child::Program, find_tools, missing};
use crate::{failure::RunError, lease::ProcessGroups, run_log::RunLog};

/// First bytes of the custom format.
pub const MAGIC: &[u8] = b"PGDMP";

const QUESTION: &str = "select current_setting('server_version_num'), current_setting('server_version'), \
     pg_database_size(current_database()), extract(epoch from clock_timestamp())::numeric(20,6), \
     (select json_agg(datname) from pg_database where datallowconn and not datistemplate)";

/// Ends the sessions that earlier attempts of a run have left, and counts them. A worker whose machine was lost, or is cut
/// off, closes no connection: the server would keep its transaction and its locks until TCP's own keep-alive gives up,
/// after two hours. And one that only stood still commits nothing any more.
pub const END_FORMER: &str = "select count(pg_terminate_backend(pid)) from pg_stat_activity
     where application_name = current_setting('application_name') and usename = session_user and pid <> pg_backend_pid()";

/// Tells what became of [`END_FORMER`]. Without it a run still comes to its end, only perhaps later.
pub fn tell_of_former(ended: Result<String, RunError>, log: &RunLog) {
    match ended.as_deref().map(str::trim) {
        Ok("0") => {}
        Ok(count) => log.info(format!("{count} session(s) that an earlier attempt had left on the server are ended")),
        Err(error) => log.warn(format!("what an earlier attempt may have left on the server was not ended: {error}")),
    }
}

/// See [`END_FORMER`].
pub async fn end_former(access: &SourceAccess, bins: &[PathBuf], groups: &ProcessGroups, log: &RunLog) {
    // Whatever is wrong with these the inspection tells, too.
    let (Ok(psql), Some(database)) = (find_psql(bins), access.config.databases.first()) else { return };
    tell_of_former(ask(access, &psql, database, END_FORMER, "sign in to", groups).await, log);
}

/// The psql of the first folder that has one.
pub fn find_psql(bins: &[PathBuf]) -> Result<PathBuf, RunError> {
    bins.iter().map(|bin| bin.join("psql")).find(|path| path.is_file()).ok_or_else(|| absent("psql", bins))
}

/// That a tool of PostgreSQL is not there.
pub fn absent(tool: &str, bins: &[PathBuf]) -> RunError {
    missing(tool, bins, "DBACKUP_POSTGRES_BIN", "postgresql-client")
}

/// Asks every database for its size and the server for its version, and chooses the pg_dump: the server's own
/// major where it is installed, else the next newer with a warning, never an older one.
pub async fn inspect(
    access: &SourceAccess,
    bins: &[PathBuf],
    groups: &ProcessGroups,
) -> Result<(Inspected, Option<String>), RunError> {
    let psql = find_psql(bins)?;
    let mut databases = Vec::new();
    let mut server: Option<(u32, String, DateTime<chrono::Utc>)> = None;
    let mut all_databases = Vec::new();
    for name in &access.config.databases {
        let answer = ask(access, &psql, name, QUESTION, "sign in to", groups).await?;
        // The last may hold the separator.
        let fields: Vec<&str> = answer.trim().splitn(5, '|').collect();
        let parsed = match fields[..] {
            [number, version, size, at, all] => {
                all_databases = serde_json::from_str(all).unwrap_or_default();
                parse(number, size, at).map(|(major, size, at)| (major, version.to_owned(), size, at))
            }
            _ => None,
        };
        let (major, version, size, at) = parsed.ok_or_else(|| {
            RunError::retry(
                "source_failed",
                format!("psql's answer about '{name}' was not understood: {}", answer.trim()),
            )
        })?;
        server.get_or_insert((major, version, at));
        databases.push(Database { name: name.clone(), estimate: size });
    }
    let Some((major, version, snapshot_at)) = server else {
        return Err(RunError::give_up("source_config", "the source names no database"));
    };
    let tools = find_tools(bins, "pg_dump", groups).await;
    if tools.is_empty() {
        return Err(absent("pg_dump", bins));
    }
    let (tool, warning) = choose(&tools, major)?;
    Ok((
        Inspected {
            server_version: version,
            tool_version: tool.version,
            tool: tool.path,
            snapshot_at,
            databases,
            all_databases,
            most_frozen: None,
        },
        warning,
    ))
}

fn parse(number: &str, size: &str, at: &str) -> Option<(u32, u64, DateTime<chrono::Utc>)> {
    let at: f64 = at.parse().ok()?;
    #[allow(clippy::cast_possible_truncation, reason = "microseconds of our century fit")]
    let at = DateTime::from_timestamp_micros((at * 1e6) as i64)?;
    Some((number.parse::<u32>().ok()? / 10_000, size.parse().ok()?, at))
}

/// What psql prints, with `|` between columns; `doing` is for the error.
pub async fn ask(
    access: &SourceAccess,
    psql: &Path,
    database: &str,
    query: &str,
    doing: &str,
    groups: &ProcessGroups,
) -> Result<String, RunError> {
    let mut program = Program::new(psql);
    connect(access, &mut program, database)?;
    program.arg("-XAtqw").arg("-F|").arg("-c").arg(query);
    let printed = program.output(groups).await?.printed();
    printed.map_err(|said| classify(&said, format!("could not {doing} '{database}': {said}")))
}

/// The dump of one database. It waits no longer than `lock_wait` for tables that others hold.
pub fn dump(access: &SourceAccess, tool: &Path, database: &str, lock_wait: Duration) -> Result<Program, RunError> {
    let mut program = Program::new(tool);
    connect(access, &mut program, database)?;
    program.arg("--format=custom").arg("--compress=0").arg("--no-password");
    program.arg(format!("--lock-wait-timeout={}", lock_wait.as_millis()));
    Ok(program)
}

/// A server that has gone without a word is noticed after two minutes of silence, and not after the two hours of the system,
/// which a run would wait with its slot. libpq takes these from a service file alone, without a connection string.
const SERVICE: &str = "[source]\nkeepalives_idle=60\nkeepalives_interval=15\nkeepalives_count=4\n";

/// libpq takes the connection from its environment. A database's name must not go by `--dbname`, where one that
/// holds `=` would be read as a connection string.
pub fn connect(access: &SourceAccess, program: &mut Program, database: &str) -> Result<(), RunError> {
    let config = &access.config;
    let host = config.socket.as_ref().map(|s| s.as_os_str().to_owned());
    let host = host.unwrap_or_else(|| config.host.clone().unwrap_or_default().into());
    let failed = |what| move |e| RunError::retry("tool_failed", format!("could not hand the {what} to the tool: {e}"));
    let service = program.secret_file(SERVICE).map_err(failed("settings"))?;
    program
        .env("PGSERVICEFILE", service)
        .env("PGSERVICE", "source")
        .env("PGHOST", host)
        .env("PGPORT", config.port.unwrap_or(Engine::Postgres.default_port()).to_string())
        .env("PGUSER", config.username.clone())
        .env("PGDATABASE", database)
        .env("PGCONNECT_TIMEOUT", "10")
        .env("PGAPPNAME", access.session.clone())
        .env("PGPASSFILE", "/dev/null")
        .env(
            "PGSSLMODE",
            match config.tls.mode {
                TlsMode::Disable => "disable",
                TlsMode::Prefer => "prefer",
                TlsMode::Require => "require",
                TlsMode::VerifyCa => "verify-ca",
                TlsMode::VerifyFull => "verify-full",
            },
        );
    if let Some(password) = &access.password {
        program.env("PGPASSWORD", password.expose_secret());
    }
    if let Some(certificate) = &config.tls.ca_certificate {
        let path = program.secret_file(certificate).map_err(failed("certificate"))?;
        program.env("PGSSLROOTCERT", path);
    }
    Ok(())
}

fn choose(tools: &[Tool], server_major: u32) -> Result<(Tool, Option<String>), RunError> {
    match nearest(tools, server_major) {
        Ok((major, tool)) if major == server_major => Ok((tool.clone(), None)),
        Ok((major, tool)) => Ok((
            tool.clone(),
            Some(format!(
                "the server is PostgreSQL {server_major}, but the nearest pg_dump here is {major}: restore with pg_restore {major} or newer"
            )),
        )),
        Err(newest) => Err(RunError::give_up(
            "client_too_old",
            format!(
                "the server is PostgreSQL {server_major}, but the newest pg_dump on this worker is {newest}: install postgresql-client-{server_major}"
            ),
        )),
    }
}

/// The tool of a major, or of the next newer one, with its major; else the newest major that there is.
pub fn nearest(tools: &[Tool], major: u32) -> Result<(u32, &Tool), u32> {
    let mut known: Vec<(u32, &Tool)> = tools.iter().filter_map(|tool| Some((major_of(&tool.version)?, tool))).collect();
    // Stable: of two with the same major the one whose folder comes first.
    known.sort_by_key(|(major, _)| *major);
    let newest = known.last().map_or(0, |(major, _)| *major);
    known.into_iter().find(|(found, _)| *found >= major).ok_or(newest)
}

/// From `pg_dump (PostgreSQL) 15.18 (Debian …)`.
pub fn major_of(version: &str) -> Option<u32> {
    version.split_once(") ")?.1.split(['.', ' ', 'b', 'r']).next()?.parse().ok()
}

/// Sorts what libpq and pg_dump say. Locale C, so the words are fixed.
pub fn classify(stderr: &str, doing: String) -> RunError {
    let says = |words: &[&str]| words.iter().any(|word| stderr.contains(word));
    if says(&[
        "password authentication failed",
        "no password supplied",
        "no pg_hba.conf entry",
        "authentication failed",
    ]) {
        RunError::give_up(
            "source_auth",
            format!("{doing}\nCheck username and password of the source, and pg_hba.conf of the server."),
        )
    } else if stderr.contains("database \"") && stderr.contains("does not exist") {
        RunError::give_up("database_missing", format!("{doing}\nCheck the databases of the source."))
    } else if says(&[
        "certificate verify failed",
        "server certificate for",
        "root certificate file",
        "server does not support SSL",
    ]) {
        // Before the words of the network: these come with "connection to server" too.
        RunError::give_up("source_tls", format!("{doing}\n{TLS_HINT}"))
    } else if says(&["due to statement timeout"]) && says(&["LOCK TABLE"]) {
        // What becomes of --lock-wait-timeout.
        RunError::retry(
            "source_locked",
            format!(
                "{doing}\nSomebody holds a table (pg_locks on the server shows who): end that session, back up at another time, or raise DBACKUP_LOCK_WAIT_SECONDS."
            ),
        )
    } else if says(&["server version mismatch"]) {
        RunError::give_up(
            "client_too_old",
            format!("{doing}\nInstall the server's own major of postgresql-client on the worker."),
        )
    } else if says(&["permission denied"]) {
        RunError::give_up(
            "source_denied",
            format!("{doing}\nThe user of the source needs the right to read every table (pg_read_all_data)."),
        )
    } else if says(&[
        "could not translate host name",
        "Connection refused",
        "No route to host",
        "timeout expired",
        "could not connect",
        "connection to server",
        "Network is unreachable",
        "server closed the connection",
        "SSL SYSCALL",
        "the database system is",
    ]) {
        RunError::retry(
            "source_unreachable",
            format!("{doing}\nCheck host and port of the source, and that this worker's pool reaches it."),
        )
    } else {
        RunError::retry("dump_failed", doing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(version: &str) -> Tool {
        Tool {
            path: format!("/usr/lib/postgresql/{version}/bin/pg_dump").into(),
            version: format!("pg_dump (PostgreSQL) {version} (Debian)"),
        }
    }

    #[test]
    fn the_servers_own_major_is_chosen_then_the_next_newer_never_an_older() {
        let tools = [tool("17.2"), tool("15.18"), tool("16beta1")];
        assert_eq!(choose(&tools, 15).map(|(t, w)| (t.path, w)).ok(), Some((tool("15.18").path, None)));
        let (newer, warning) = choose(&tools, 14).expect("a newer one serves");
        assert!(newer == tools[1] && warning.is_some_and(|w| w.contains("14") && w.contains("15")));
        assert_eq!(choose(&tools, 16).map(|(t, _)| t).ok(), Some(tools[2].clone()));
        let error = choose(&tools, 18).expect_err("none is new enough");
        assert_eq!(error.code, "client_too_old");
        assert!(error.message.contains("postgresql-client-18"), "{error}");
    }
}
