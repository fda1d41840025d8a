//! MariaDB and MySQL by `mariadb-dump` or `mysqldump --single-transaction`: consistent for InnoDB tables.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use chrono::DateTime;
use common::source::{Engine, SourceAccess, TlsMode};
use secrecy::ExposeSecret;

use super::{Database, Inspected, TLS_HINT, child::Program, find_tools, missing};
use crate::{failure::RunError, lease::ProcessGroups};

/// Last line of a whole dump.
pub const LAST_LINE: &[u8] = b"-- Dump completed";

const QUESTION: &str = "select 'server', version(), unix_timestamp(now(6)), @@net_write_timeout; \
     select 'database', s.schema_name, coalesce(sum(t.data_length + t.index_length), 0) \
       from information_schema.schemata s left join information_schema.tables t on t.table_schema = s.schema_name \
      group by s.schema_name; \
     show session status like 'Ssl_cipher'; show grants";

/// MariaDB's tools serve both engines; MySQL's own come first for MySQL.
pub fn names(engine: Engine) -> ([&'static str; 2], [&'static str; 2]) {
    match engine {
        Engine::Mysql => (["mysql", "mariadb"], ["mysqldump", "mariadb-dump"]),
        _ => (["mariadb", "mysql"], ["mariadb-dump", "mysqldump"]),
    }
}

/// Asks the server for its version and the size of its databases, and finds the tool. Warns of what the user may not
/// see.
pub async fn inspect(
    access: &SourceAccess,
    bins: &[PathBuf],
    groups: &ProcessGroups,
) -> Result<(Inspected, Option<String>), RunError> {
    let (clients, dumpers) = names(access.engine);
    let mut tool = None;
    for name in dumpers {
        tool = find_tools(bins, name, groups).await.into_iter().next();
        if tool.is_some() {
            break;
        }
    }
    let package = if access.engine == Engine::Mysql { "mysql-client or mariadb-client" } else { "mariadb-client" };
    let tool = tool.ok_or_else(|| missing(dumpers[0], bins, "DBACKUP_MARIADB_BIN", package))?;
    let client = clients.iter().flat_map(|name| bins.iter().map(move |bin| bin.join(name))).find(|path| path.is_file());
    let client = client.ok_or_else(|| missing(clients[0], bins, "DBACKUP_MARIADB_BIN", package))?;

    let mut program = Program::new(&client);
    connect(access, &mut program, &tool.version)?;
    program.arg("--batch").arg("--skip-column-names").arg("--raw").arg("--connect-timeout=10").arg("-e").arg(QUESTION);
    let printed = program.output(groups).await?.printed();
    let answer = printed.map_err(|said| classify(&said, format!("could not sign in: {said}")))?;
    let unseen = unseen(&answer);
    Ok((read_answer(access, &answer, tool.path, tool.version)?, unseen))
}

/// What the tools leave out of a dump without a word, because the server does not show it to this user.
fn unseen(answer: &str) -> Option<String> {
    let grants: Vec<&str> = answer.lines().filter(|line| line.starts_with("GRANT ")).collect();
    let holds = |right: &dyn Fn(&str) -> bool| grants.iter().any(|g| g.contains("ALL PRIVILEGES") || right(g));
    let mut unseen = Vec::new();
    if !holds(&|grant| grant.contains("TRIGGER")) {
        unseen.push("triggers (right TRIGGER)");
    }
    let everywhere = |grant: &str| grant.contains("SELECT") && grant.contains("ON *.*");
    if !holds(&|grant| grant.contains("`proc`") || grant.contains("SHOW_ROUTINE") || everywhere(grant)) {
        unseen.push("routines (SELECT on mysql.proc, with MySQL SHOW_ROUTINE)");
    }
    (!unseen.is_empty()).then(|| {
        format!("the user of the source may not see every object, so the backup may lack {}", unseen.join(" and "))
    })
}

fn read_answer(
    access: &SourceAccess,
    answer: &str,
    tool: PathBuf,
    tool_version: String,
) -> Result<Inspected, RunError> {
    let (mut server, mut sizes) = (None, std::collections::HashMap::new());
    let mut encrypted = false;
    for line in answer.lines() {
        match line.split('\t').collect::<Vec<_>>()[..] {
            ["server", version, at, write_timeout] => {
                #[allow(clippy::cast_possible_truncation, reason = "microseconds of our century fit")]
                let at = at.parse::<f64>().ok().and_then(|at| DateTime::from_timestamp_micros((at * 1e6) as i64));
                server = at.map(|at| (version.to_owned(), at, write_timeout.parse().unwrap_or(60)));
            }
            ["database", name, size] => {
                sizes.insert(name.to_owned(), size.parse::<f64>().unwrap_or(0.0));
            }
            ["Ssl_cipher", cipher] => encrypted = !cipher.is_empty(),
            _ => {}
        }
    }
    let Some((server_version, snapshot_at, write_timeout)) = server else {
        return Err(RunError::retry("source_failed", "the server's answer about its version was not understood"));
    };
    // MariaDB's tools take `ssl` for a wish and go on in the clear where the server has none.
    if access.config.tls.mode == TlsMode::Require && !encrypted {
        return Err(RunError::give_up("source_tls", format!("the server offers no TLS\n{TLS_HINT}")));
    }
    let mut databases = Vec::new();
    for name in &access.config.databases {
        let size = sizes.get(name).ok_or_else(|| {
            RunError::give_up(
                "database_missing",
                format!(
                    "the server has no database '{name}', or '{}' may not see it\nCheck the databases of the source.",
                    access.config.username
                ),
            )
        })?;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate")]
        databases.push(Database { name: name.clone(), estimate: *size as u64 });
    }
    // A server that cannot send to a tool that stands still gives it up after net_write_timeout.
    let most_frozen = Some(Duration::from_secs(write_timeout) * 5 / 6);
    let all_databases = sizes.into_keys().collect();
    Ok(Inspected { server_version, tool_version, tool, snapshot_at, databases, all_databases, most_frozen })
}

/// The dump of one database, without `create database` or `use`, so that it can be restored under another name.
pub fn dump(access: &SourceAccess, tool: &Path, tool_version: &str, database: &str) -> Result<Program, RunError> {
    let mut program = Program::new(tool);
    connect(access, &mut program, tool_version)?;
    for option in [
        "--single-transaction",
        "--quick",
        "--routines",
        "--events",
        "--triggers",
        "--hex-blob",
        "--no-tablespaces",
        "--default-character-set=utf8mb4",
        "--max-allowed-packet=1G",
    ] {
        program.arg(option);
    }
    // MySQL's own tool would have the restore set the server's history of transactions, which the server that the dump came
    // from refuses, and keep it from replicas; MariaDB's does not know the option.
    if !tool_version.contains("MariaDB") {
        program.arg("--set-gtid-purged=OFF");
    }
    // After `--` a name that begins with a hyphen is still a name.
    program.arg("--").arg(database);
    Ok(program)
}

/// Connection and password in an option file that exists only in memory; it must be the first argument.
pub fn connect(access: &SourceAccess, program: &mut Program, tool_version: &str) -> Result<(), RunError> {
    let config = &access.config;
    let failed =
        |e: std::io::Error| RunError::retry("tool_failed", format!("could not hand the options to the tool: {e}"));
    let mut options = vec![("user", config.username.clone())];
    if let Some(password) = &access.password {
        options.push(("password", password.expose_secret().to_owned()));
    }
    match &config.socket {
        Some(socket) => options.extend([("socket", socket.display().to_string()), ("protocol", "socket".to_owned())]),
        None => options.extend([
            ("host", config.host.clone().unwrap_or_default()),
            ("port", config.port.unwrap_or(access.engine.default_port()).to_string()),
            // 'localhost' would mean the socket otherwise.
            ("protocol", "tcp".to_owned()),
        ]),
    }
    if let Some(certificate) = &config.tls.ca_certificate {
        options.push(("ssl-ca", program.secret_file(certificate).map_err(failed)?));
    }
    let flags = tls_flags(config.tls.mode, tool_version.contains("MariaDB"));
    let mut text = String::from("[client]\n");
    for (name, value) in options {
        text.push_str(&format!("{name}={}\n", quote(&value)));
    }
    for flag in flags {
        text.push_str(&format!("{flag}\n"));
    }
    let path = program.secret_file(&text).map_err(failed)?;
    program.arg(format!("--defaults-file={path}"));
    Ok(())
}

fn tls_flags(mode: TlsMode, mariadb: bool) -> &'static [&'static str] {
    match (mode, mariadb) {
        (TlsMode::Disable, true) => &["skip-ssl"],
        // Newer tools would check the certificate unless told not to.
        (TlsMode::Prefer | TlsMode::Require, true) => &["ssl", "disable-ssl-verify-server-cert"],
        // MariaDB's tools check authority and name together or let a server without TLS pass: the stricter of both.
        (TlsMode::VerifyCa | TlsMode::VerifyFull, true) => &["ssl", "ssl-verify-server-cert"],
        (TlsMode::Disable, false) => &["ssl-mode=DISABLED"],
        (TlsMode::Prefer, false) => &["ssl-mode=PREFERRED"],
        (TlsMode::Require, false) => &["ssl-mode=REQUIRED"],
        (TlsMode::VerifyCa, false) => &["ssl-mode=VERIFY_CA"],
        (TlsMode::VerifyFull, false) => &["ssl-mode=VERIFY_IDENTITY"],
    }
}

/// A value of an option file: in double quotes, with backslash escapes.
fn quote(value: &str) -> String {
    let mut quoted = String::from("\"");
    for c in value.chars() {
        match c {
            '\\' => quoted.push_str("\\\\"),
            '"' => quoted.push_str("\\\""),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Sorts what the tools say, by MySQL's error numbers.
pub fn classify(stderr: &str, doing: String) -> RunError {
    // The client, and three ways of the dump tool.
    let told = |n: &str| {
        stderr.contains(&format!("ERROR {n} "))
            || stderr.contains(&format!("error: {n}:"))
            || stderr.contains(&format!("Error {n}:"))
            || stderr.lines().any(|line| line.ends_with(&format!("({n})")))
    };
    let has = |numbers: &[&str]| numbers.iter().any(|n| told(n));
    if has(&["1045", "1698", "1251", "2059"]) {
        RunError::give_up("source_auth", format!("{doing}\nCheck username and password of the source."))
    } else if has(&["1049"]) {
        RunError::give_up("database_missing", format!("{doing}\nCheck the databases of the source."))
    } else if has(&["1044", "1142", "1143", "1227", "1370"]) || stderr.contains("insufficient privileges") {
        RunError::give_up(
            "source_denied",
            format!(
                "{doing}\nThe user of the source needs SELECT, SHOW VIEW, TRIGGER, EVENT and LOCK TABLES, and SELECT on mysql.proc (MariaDB) or SHOW_ROUTINE (MySQL) for routines."
            ),
        )
    } else if has(&["1205"]) {
        // The server's own lock_wait_timeout, a day unless it was set: the tool has no option for it.
        RunError::retry(
            "source_locked",
            format!(
                "{doing}\nSomebody holds a table (show processlist shows who): end that session, or back up at another time."
            ),
        )
    } else if has(&["2026"]) && ["certificate", "SSL is required"].iter().any(|word| stderr.contains(word)) {
        RunError::give_up("source_tls", format!("{doing}\n{TLS_HINT}"))
    } else if has(&["2026", "2002", "2003", "2005", "2006", "2013", "1040", "1053"]) {
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
    use crate::failure::Class;

    #[test]
    fn what_the_tools_say_is_sorted_by_whether_another_try_helps() {
        for (stderr, code, class) in [
            ("ERROR 1045 (28000): Access denied for user 'u'@'localhost'", "source_auth", Class::GiveUp),
            (
                "mariadb-dump: Got error: 1049: \"Unknown database 'x'\" when selecting the database",
                "database_missing",
                Class::GiveUp,
            ),
            ("ERROR 2003 (HY000): Can't connect to server", "source_unreachable", Class::Retry),
            ("mysqldump: Error 2013: Lost connection", "source_unreachable", Class::Retry),
            ("mariadb-dump: Couldn't execute 'SHOW EVENTS': Access denied (1044)", "source_denied", Class::GiveUp),
            ("mariadb-dump: Error 1969: Query execution was interrupted", "dump_failed", Class::Retry),
        ] {
            let error = classify(stderr, stderr.to_owned());
            assert_eq!((error.code, error.class), (code, class), "{stderr}");
        }
    }

    #[test]
    fn a_dump_stands_still_for_less_than_the_server_waits_for_it() {
        let config = serde_json::json!({ "username": "u", "databases": ["shop"] });
        let config = serde_json::from_value(config).expect("a config");
        let access = SourceAccess { engine: Engine::Mariadb, config, password: None, session: String::new() };
        let answer = "server\t10.11.1-MariaDB\t1736937000.5\t60\ndatabase\tshop\t16384\nSsl_cipher\t\n";
        let inspected = read_answer(&access, answer, PathBuf::new(), String::new()).expect("understood");
        assert_eq!(inspected.most_frozen, Some(Duration::from_secs(50)));
    }

    #[test]
    fn a_password_of_any_characters_stays_one_value_of_the_option_file() {
        assert_eq!(quote("p#a\"s\\s\nw"), "\"p#a\\\"s\\\\s\\nw\"");
    }
}
