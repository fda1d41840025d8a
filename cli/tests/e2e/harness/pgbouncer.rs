//! PgBouncer in front of the tests' PostgreSQL, as its package configures it but for the session mode.

use std::{
    os::unix::fs::PermissionsExt,
    process::{Child, Command, Stdio},
};

use super::{postgres_url, unique, until};

/// A running PgBouncer; it ends with the test.
pub struct PgBouncer {
    /// Where clients connect.
    pub port: u16,
    process: Child,
    folder: std::path::PathBuf,
}

impl PgBouncer {
    /// Starts one whose pools have so many connections.
    pub async fn start(connections: u32) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let url = url::Url::parse(&postgres_url("postgres")).expect("a URL");
        let folder = std::env::temp_dir().join(unique("pgbouncer"));
        std::fs::create_dir(&folder).expect("a folder");
        let (users, ini) = (folder.join("users.txt"), folder.join("pgbouncer.ini"));
        let password = url.password().expect("a password");
        std::fs::write(&users, format!("\"{}\" \"{password}\"\n", url.username())).expect("writes");
        let config = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = md5\nauth_file = {}\npool_mode = session\ndefault_pool_size = {connections}\nmax_client_conn = 200\n",
            url.port().expect("a port"),
            users.display()
        );
        std::fs::write(&ini, config).expect("writes");
        // It refuses to run as root, and must read these.
        for (path, mode) in [(&folder, 0o755), (&users, 0o644), (&ini, 0o644)] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("sets the mode");
        }
        let mut command = Command::new("/usr/sbin/pgbouncer");
        if nix::unistd::geteuid().is_root() {
            command.args(["-u", "postgres"]);
        }
        let process = command.arg(&ini).stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("pgbouncer runs");
        until("pgbouncer listens", super::SOON, || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()
        })
        .await;
        Self { port, process, folder }
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
