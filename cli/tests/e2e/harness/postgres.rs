//! A PostgreSQL of a test's own, to be stopped and started: the shared one has other tests on it.

use std::{
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{SOON, unique, until};

/// A server in a folder of its own.
pub struct OwnPostgres {
    folder: PathBuf,
    port: u16,
    child: Option<Child>,
}

/// A program of PostgreSQL, as the user who may run it, and dying with the test.
fn program(name: &str) -> Command {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .expect("PostgreSQL is installed")
        .flatten()
        .map(|e| e.path())
        .collect();
    versions.sort();
    let path = versions.pop().expect("a version").join("bin").join(name);
    let mut command = Command::new("setpriv");
    command.arg("--pdeathsig=KILL");
    if nix::unistd::geteuid().is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
    }
    command.arg("--").arg(path).current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

impl OwnPostgres {
    /// Makes and starts one on a free port.
    pub async fn start() -> Self {
        let mut server = Self::unmade();
        let made = program("initdb")
            .args(["-U", "postgres", "-A", "trust", "-N", "--locale=C.UTF-8", "-D"])
            .arg(&server.folder)
            .status();
        assert!(made.expect("initdb runs").success(), "initdb");
        server.bring_back().await;
        server
    }

    /// Makes and starts a standby of this server, which it follows through `port`, and has every commit wait for it.
    pub async fn standby(&self, port: u16) -> Self {
        let mut standby = Self::unmade();
        let address = format!("host=127.0.0.1 port={port} user=postgres");
        let copied = program("pg_basebackup")
            .args(["--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "-d", &address, "-D"])
            .arg(&standby.folder)
            .status();
        assert!(copied.expect("pg_basebackup runs").success(), "pg_basebackup");
        standby.bring_back().await;
        self.execute("alter system set synchronous_standby_names = '*'").await;
        self.execute("select pg_reload_conf()").await;
        until("the standby is synchronous", SOON, || async {
            self.count("select count(*) from pg_stat_replication where sync_state = 'sync'").await.eq(&1).then_some(())
        })
        .await;
        standby
    }

    /// Makes a standby the server that others write to.
    pub async fn promote(&self) {
        assert_eq!(self.count("select pg_promote()::int::bigint").await, 1, "it was not promoted");
    }

    /// Runs a statement.
    pub async fn execute(&self, statement: &str) {
        let mut conn = PgConnection::connect(&self.url("postgres")).await.expect("connects");
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut conn).await.expect("runs");
    }

    /// One number from it.
    pub async fn count(&self, query: &str) -> i64 {
        let mut conn = PgConnection::connect(&self.url("postgres")).await.expect("connects");
        sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(&mut conn).await.expect("answers")
    }

    fn unmade() -> Self {
        let folder = std::env::temp_dir().join(unique("dbackup-postgres"));
        std::fs::create_dir(&folder).expect("a folder");
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).expect("its mode");
        if nix::unistd::geteuid().is_root() {
            let user = nix::unistd::User::from_name("postgres").expect("answers").expect("a user postgres");
            std::os::unix::fs::chown(&folder, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("gives it away");
        }
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = free.local_addr().expect("an address").port();
        drop(free);
        Self { folder, port, child: None }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its address, for a database of it.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Stops it at once, as its own operators would; what was committed stays.
    pub async fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        kill(Pid::from_raw(i32::try_from(child.id()).expect("a small id")), Signal::SIGINT).expect("it runs");
        until("PostgreSQL stops", SOON, || {
            let ended = child.try_wait().expect("a status").map(|_| ());
            async move { ended }
        })
        .await;
    }

    /// Stops it as a crash would: whatever it has not written yet is lost.
    pub fn crash(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        kill(Pid::from_raw(i32::try_from(child.id()).expect("a small id")), Signal::SIGQUIT).expect("it runs");
        child.wait().expect("a status");
    }

    /// Starts it again.
    pub async fn bring_back(&mut self) {
        let mut command = program("postgres");
        command.arg("-D").arg(&self.folder).args(["-p", &self.port.to_string()]);
        command.args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]);
        self.child = Some(command.spawn().expect("postgres starts"));
        let url = self.url("postgres");
        until("PostgreSQL answers", SOON, || async {
            let connected = tokio::time::timeout(Duration::from_secs(2), PgConnection::connect(&url)).await;
            connected.ok()?.ok().map(|_| ())
        })
        .await;
    }
}

impl Drop for OwnPostgres {
    fn drop(&mut self) {
        self.crash();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
