//! The database that a backup goes back into.

use common::{
    execution::claim::RestoreAssignment,
    source::{Engine, SourceAccess},
    telemetry::Span,
};

use super::{mariadb, postgres, touched::Now, unpack::Rename};
use crate::{
    failure::RunError,
    lease::Lease,
    pipeline::{
        dump::{
            child::{Ended, Program, Running},
            describe_exit, describe_source,
            postgres::tell_of_former,
        },
        manifest::Manifest,
        source_access,
    },
    run_log::RunLog,
    service::Shared,
};

/// A server, signed in to, and the tool that restores.
pub struct Target<'a> {
    lease: &'a std::sync::Arc<Lease>,
    assignment: &'a RestoreAssignment,
    access: SourceAccess,
    server: Server,
}

/// What a look at a server told, and what tools there are for it.
pub enum Server {
    /// PostgreSQL.
    Postgres(postgres::Server),
    /// MariaDB or MySQL.
    Mariadb(mariadb::Server),
}

/// What restores a database.
pub struct Tools {
    /// Speaks to the server.
    pub tool: Running,
    /// Where that is psql: pg_restore, which is fed, and writes the script that psql runs.
    pub reader: Option<Running>,
}

/// What a database holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// It is not there.
    Missing,
    /// It is there, with nothing in it.
    Nothing,
    /// Somebody's data.
    Something,
}

/// That a missing database was not made. What another try may mend stays what it is.
fn not_made(database: &str, error: RunError, right: &str) -> RunError {
    if error.code == "source_unreachable" {
        return error;
    }
    // The last line of a denial says what they need who back up.
    let said = match error.code {
        "source_denied" => error.message.rsplit_once('\n').map_or(error.message.as_str(), |(said, _)| said),
        _ => &error.message,
    };
    let text = format!(
        "database '{database}' is not there and could not be made: {said}\nMake it, or give the user of the source {right}."
    );
    RunError::give_up("database_missing", text)
}

impl<'a> Target<'a> {
    /// Signs in and finds the tool. Refuses a server of another engine than the backup's.
    pub async fn open(
        shared: &Shared,
        lease: &'a std::sync::Arc<Lease>,
        assignment: &'a RestoreAssignment,
        manifest: &Manifest,
    ) -> Result<Self, RunError> {
        let source = &assignment.target;
        if source.engine != manifest.engine {
            return Err(RunError::give_up(
                "engine_differs",
                format!(
                    "the backup is of {}, but source '{}' is {}: restore into a source of the same engine",
                    manifest.engine.as_str(),
                    source.slug,
                    source.engine.as_str()
                ),
            ));
        }
        let access = source_access(shared, source, assignment.claim.execution)?;
        let config = &shared.config;
        let server = match source.engine {
            Engine::Postgres => Server::Postgres(
                postgres::open(&access, &config.postgres_bin, &lease.groups, &manifest.tool_version).await?,
            ),
            Engine::Mysql | Engine::Mariadb => {
                Server::Mariadb(mariadb::open(&access, &config.mariadb_bin, &lease.groups).await?)
            }
        };
        Ok(Self { lease, assignment, access, server })
    }

    /// Ends what an attempt before has left on the server: its transaction would be waited for.
    pub async fn end_former(&self, log: &RunLog) {
        if let Server::Postgres(server) = &self.server {
            tell_of_former(server.end_former(&self.access, &self.lease.groups).await, log);
        }
    }

    /// As the server says.
    pub fn server_version(&self) -> &str {
        match &self.server {
            Server::Postgres(server) => &server.version,
            Server::Mariadb(server) => &server.version,
        }
    }

    /// As the tool says.
    pub fn tool_version(&self) -> &str {
        match &self.server {
            Server::Postgres(server) => &server.tool.version,
            Server::Mariadb(server) => &server.tool.version,
        }
    }

    /// By the conventions of OpenTelemetry for databases.
    pub fn describe(&self, span: &mut Span, database: Option<&str>) {
        describe_source(&self.access, span, database);
    }

    async fn holds(&self, database: &str) -> Result<Holds, RunError> {
        match &self.server {
            Server::Postgres(server) => server.holds(&self.access, database, &self.lease.groups).await,
            Server::Mariadb(server) => server.holds(&self.access, database, &self.lease.groups).await,
        }
    }

    /// Refuses a database that holds something, unless the order says otherwise.
    pub async fn check(&self, database: &str) -> Result<Holds, RunError> {
        let holds = self.holds(database).await?;
        if holds != Holds::Something || self.assignment.order.overwrite {
            return Ok(holds);
        }
        let so = match self.assignment.claim.attempt {
            1 => "is not empty, and nothing was changed",
            _ => "is not empty; an attempt of this restore was lost before, and what is there may be its work",
        };
        Err(RunError::give_up(
            "target_not_empty",
            format!(
                "database '{database}' of '{}' {so}: restore under another name (into), or say overwrite to replace what the backup contains",
                self.assignment.target.slug
            ),
        ))
    }

    /// Makes the database where it is missing.
    pub async fn prepare(&self, database: &str, log: &RunLog) -> Result<(), RunError> {
        if self.check(database).await? != Holds::Missing {
            return Ok(());
        }
        let groups = &self.lease.groups;
        let (made, right) = match &self.server {
            Server::Postgres(server) => (server.create(&self.access, database, groups).await, "CREATEDB"),
            Server::Mariadb(server) => (server.create(&self.access, database, groups).await, "the right CREATE"),
        };
        made.map_err(|error| not_made(database, error, right))?;
        log.info(format!("database '{database}' was not there and is made"));
        Ok(())
    }

    /// Starts the tool; it restores what it is fed.
    pub fn start(&self, database: &str, log: &RunLog) -> Result<Tools, RunError> {
        let (order, lease) = (&self.assignment.order, self.lease);
        let quiet = |mut program: Program| {
            program.fed().unheard();
            program.start(lease, log)
        };
        let mut reader = None;
        let tool = match &self.server {
            Server::Postgres(server) if server.by_script => {
                log.info("by a script through psql: this pg_restore sends what a server before 17 does not know");
                let mut script = server.script(&self.access, database, order)?;
                script.fed();
                reader = Some(script.start(lease, log)?);
                quiet(server.run(&self.access, database)?)
            }
            Server::Postgres(server) => quiet(server.restore(&self.access, database, order)?),
            Server::Mariadb(server) => quiet(server.restore(&self.access, database)?),
        };
        Ok(Tools { tool: tool?, reader })
    }

    /// Judges how the tool ended.
    pub fn ended(&self, database: &str, ended: Ended) -> Result<(), RunError> {
        let Ended { status, stderr, name, .. } = ended;
        if status.success() {
            return Ok(());
        }
        let said = if stderr.is_empty() { String::new() } else { format!(": {stderr}") };
        let doing = format!("{name} into '{database}' {}{said}", describe_exit(status));
        Err(match &self.server {
            Server::Postgres(_) => postgres::classify(&stderr, doing, self.assignment.order.overwrite),
            Server::Mariadb(_) => mariadb::classify(&stderr, doing),
        })
    }

    /// What the target is like while it is restored.
    pub fn begun(&self) -> Now {
        match &self.server {
            Server::Postgres(_) => Now::Open,
            Server::Mariadb(_) => Now::Piecemeal,
        }
    }

    /// What it is like from when the end is sent.
    pub fn ending(&self) -> Now {
        match &self.server {
            Server::Postgres(_) => Now::Sent,
            Server::Mariadb(_) => Now::Piecemeal,
        }
    }

    /// What in a dump must be changed for another name than the one it was dumped under.
    pub fn rename(&self, from: &str, into: &str) -> Option<Rename> {
        match &self.server {
            Server::Mariadb(_) if from != into => Some(mariadb::rename(from, into)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Class;

    #[test]
    fn a_server_that_went_away_before_the_database_was_made_is_tried_again() {
        let away = RunError::retry("source_unreachable", "connection refused");
        assert_eq!(not_made("shop", away, "CREATEDB").class, Class::Retry);
        let full = not_made("shop", RunError::retry("dump_failed", "could not extend file"), "CREATEDB");
        assert!(full.class == Class::GiveUp && full.message.contains("could not extend file"), "{}", full.message);
    }
}
