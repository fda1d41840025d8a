//! A private PostgreSQL in a folder: the machine's own server binaries, a Unix socket only, as user `postgres`
//! when started by root. It is a process group of its own, so that a killed `dbackup up` leaves it running and
//! the next one adopts it.

use std::{
    fs, io,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::config::ConfigError;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User},
};
use secrecy::{ExposeSecret, SecretString};

/// Role and database of the instance.
const NAME: &str = "dbackup";
/// Folder of the socket.
const SOCKET_FOLDER: &str = "run";
/// Longest path of a Unix socket, less the name that PostgreSQL appends.
const MAX_SOCKET_FOLDER: usize = 107 - "/.s.PGSQL.5432.lock".len();
const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the private PostgreSQL does not run.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// The folder or the machine is not fit for it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file or process could not be made.
    #[error("could not {doing}")]
    Io { doing: String, source: io::Error },
    /// A program of PostgreSQL failed.
    #[error("{0}")]
    Failed(String),
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> EmbeddedError {
    let doing = doing.into();
    move |source| EmbeddedError::Io { doing, source }
}

/// A running private PostgreSQL.
pub struct Embedded {
    pid: Pid,
    /// `None` when it was adopted.
    child: Option<Child>,
}

struct Layout {
    bin: PathBuf,
    cluster: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    user: Option<User>,
}

impl Embedded {
    /// Starts the cluster of a folder, makes it the first time, or adopts one that runs. Its address is [`url`].
    pub fn start(folder: &Path, password: &SecretString) -> Result<Self, EmbeddedError> {
        let layout = Layout::prepare(folder)?;
        if !layout.cluster.join("PG_VERSION").exists() {
            layout.init(password)?;
        }
        if let Some(pid) = layout.running() {
            layout.wait_until_ready(pid)?;
            return Ok(Self { pid, child: None });
        }
        let child = layout.spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
        let embedded = Self { pid, child: Some(child) };
        layout.wait_until_ready(pid)?;
        Ok(embedded)
    }

    /// Stops it (fast shutdown: sessions are ended, everything committed is kept).
    pub fn stop(mut self) {
        let _ = kill(self.pid, Signal::SIGINT);
        let give_up = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < give_up {
            let gone = match &mut self.child {
                Some(child) => child.try_wait().is_ok_and(|status| status.is_some()),
                None => kill(self.pid, None).is_err(),
            };
            if gone {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        tracing::warn!(
            pid = self.pid.as_raw(),
            "the private PostgreSQL did not stop in time; it is left running and adopted at the next start"
        );
    }
}

impl Layout {
    fn prepare(folder: &Path) -> Result<Self, EmbeddedError> {
        let cluster = folder.join("pg");
        let bin = server_bin(&cluster)?;
        let user = if nix::unistd::geteuid().is_root() {
            let user = User::from_name("postgres").ok().flatten();
            Some(user.ok_or_else(|| {
                ConfigError(
                    "PostgreSQL refuses to run as root, and there is no user postgres: install the postgresql package"
                        .into(),
                )
            })?)
        } else {
            None
        };
        let layout = Self { bin, cluster, socket: folder.join(SOCKET_FOLDER), log: folder.join("postgres.log"), user };
        if layout.socket.as_os_str().len() > MAX_SOCKET_FOLDER {
            return Err(ConfigError(format!(
                "--data (DBACKUP_DATA): {} is too long for a Unix socket; at most {} characters",
                folder.display(),
                MAX_SOCKET_FOLDER - "/run".len()
            ))
            .into());
        }
        layout.check_reachable(folder)?;
        for path in [&layout.cluster, &layout.socket] {
            if !path.exists() {
                fs::DirBuilder::new().mode(0o700).create(path).map_err(io_error(format!("make {}", path.display())))?;
            }
            layout.give(path)?;
        }
        Ok(layout)
    }

    fn give(&self, path: &Path) -> Result<(), EmbeddedError> {
        match &self.user {
            Some(user) => chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                .map_err(io_error(format!("give {} to postgres", path.display()))),
            None => Ok(()),
        }
    }

    /// The server's user must be able to walk to its folder: PostgreSQL's own message is hard to read.
    fn check_reachable(&self, folder: &Path) -> Result<(), EmbeddedError> {
        let Some(user) = &self.user else { return Ok(()) };
        for path in folder.ancestors() {
            let Ok(metadata) = fs::metadata(path) else { continue };
            let mode = metadata.permissions().mode();
            let may = mode & 0o001 != 0
                || (metadata.uid() == user.uid.as_raw() && mode & 0o100 != 0)
                || (metadata.gid() == user.gid.as_raw() && mode & 0o010 != 0);
            if !may {
                return Err(ConfigError(format!("--data (DBACKUP_DATA): the user postgres cannot enter {}: run chmod o+x on it or choose another folder", path.display())).into());
            }
        }
        Ok(())
    }

    #[allow(clippy::disallowed_methods, reason = "PostgreSQL's own programs, started by an administrator's command")]
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            .current_dir("/")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC");
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }

    fn init(&self, password: &SecretString) -> Result<(), EmbeddedError> {
        // initdb wants an empty folder; what a killed first start left behind is not a cluster yet.
        let _ = fs::remove_dir_all(&self.cluster);
        fs::DirBuilder::new().mode(0o700).create(&self.cluster).map_err(io_error("make the cluster's folder"))?;
        self.give(&self.cluster)?;
        let secret = self.socket.join(".password");
        let write = || -> io::Result<()> {
            use std::os::unix::fs::OpenOptionsExt;
            let _ = fs::remove_file(&secret);
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&secret)?;
            io::Write::write_all(&mut file, password.expose_secret().as_bytes())
        };
        write().map_err(io_error("write the password for initdb"))?;
        self.give(&secret)?;
        let output = self
            .command("initdb")
            .args(["--username", NAME, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--pwfile"])
            .arg(&secret)
            .arg("--pgdata")
            .arg(&self.cluster)
            .output();
        let _ = fs::remove_file(&secret);
        let output = output.map_err(io_error("run initdb"))?;
        if !output.status.success() {
            let _ = fs::remove_dir_all(&self.cluster);
            return Err(EmbeddedError::Failed(format!(
                "initdb failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        Ok(())
    }

    fn spawn(&self) -> Result<Child, EmbeddedError> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(io_error(format!("open {}", self.log.display())))?;
        let errors = log.try_clone().map_err(io_error("open the log twice"))?;
        self.command("postgres")
            .arg("-D")
            .arg(&self.cluster)
            .args([
                "-c",
                "listen_addresses=",
                "-c",
                "unix_socket_permissions=0700",
                "-c",
                "max_connections=300",
                "-p",
                "5432",
            ])
            .arg("-k")
            .arg(&self.socket)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // Ctrl-C at the terminal reaches the whole foreground group; the server must outlive its clients.
            .process_group(0)
            .spawn()
            .map_err(io_error("start PostgreSQL"))
    }

    /// The process of a server that was left running.
    fn running(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.cluster.join("postmaster.pid")).ok()?;
        let pid = Pid::from_raw(text.lines().next()?.trim().parse().ok()?);
        kill(pid, None).ok()?;
        // The id may have gone to a stranger since.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let text = String::from_utf8_lossy(&command);
        (text.contains("postgres") && text.contains(&*self.cluster.to_string_lossy())).then_some(pid)
    }

    fn wait_until_ready(&self, pid: Pid) -> Result<(), EmbeddedError> {
        let give_up = Instant::now() + START_TIMEOUT;
        let mut isready = self.command("pg_isready");
        isready.arg("-q").arg("-h").arg(&self.socket).args(["-p", "5432"]).stdout(Stdio::null()).stderr(Stdio::null());
        loop {
            if isready.status().map_err(io_error("run pg_isready"))?.success() {
                return Ok(());
            }
            if is_dead(pid) || Instant::now() > give_up {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(5).collect();
                let last: Vec<&str> = last.into_iter().rev().collect();
                return Err(EmbeddedError::Failed(format!(
                    "PostgreSQL did not start; the end of {}:\n{}",
                    self.log.display(),
                    last.join("\n")
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Where the cluster of a folder listens.
pub fn url(folder: &Path, password: &SecretString) -> SecretString {
    let socket = folder.join(SOCKET_FOLDER);
    let socket: String = url::form_urlencoded::byte_serialize(socket.as_os_str().as_encoded_bytes()).collect();
    format!("postgres://{NAME}:{}@localhost/postgres?host={socket}", password.expose_secret()).into()
}

/// Gone, or a zombie that this process has not reaped.
fn is_dead(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}

/// The programs of the server: those that are named, those of the major that made the cluster, or the newest. A server does
/// not start on the files of another major.
fn server_bin(cluster: &Path) -> Result<PathBuf, ConfigError> {
    if let Some(bin) = std::env::var_os("DBACKUP_PG_BIN") {
        let bin = PathBuf::from(bin);
        return match bin.join("postgres").is_file() {
            true => Ok(bin),
            false => Err(ConfigError(format!("DBACKUP_PG_BIN: there is no postgres in {}", bin.display()))),
        };
    }
    let made_by = fs::read_to_string(cluster.join("PG_VERSION")).ok().and_then(|major| major.trim().parse().ok());
    choose_bin(Path::new("/usr/lib/postgresql"), made_by)
}

/// Debian's layout: a folder for each major.
fn choose_bin(majors: &Path, made_by: Option<u32>) -> Result<PathBuf, ConfigError> {
    let versions = fs::read_dir(majors).into_iter().flatten().flatten();
    let found = versions
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("postgres").is_file() && bin.join("initdb").is_file())
        .filter(|(major, _)| made_by.is_none_or(|made_by| made_by == *major));
    let found = found.max().map(|(_, bin)| bin);
    found.ok_or_else(|| {
        let (what, package) = match made_by {
            Some(major) => (format!("PostgreSQL {major} server, which made the data,"), format!("postgresql-{major}")),
            None => ("PostgreSQL server".to_owned(), "postgresql".to_owned()),
        };
        let folder = majors.display();
        ConfigError(format!(
            "no {what} found in {folder}: install the package {package}, or name its folder in DBACKUP_PG_BIN"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_served_by_the_major_that_made_it_and_a_new_one_by_the_newest() {
        let majors = std::env::temp_dir().join(format!("majors-{}", std::process::id()));
        for (major, programs) in [("9", 2), ("15", 2), ("17", 2), ("18", 1), ("common", 2)] {
            let bin = majors.join(major).join("bin");
            fs::create_dir_all(&bin).expect("a folder");
            for program in ["initdb", "postgres"].iter().take(programs) {
                fs::write(bin.join(program), "").expect("a file");
            }
        }
        let chosen = |made_by| choose_bin(&majors, made_by).map_err(|error| error.to_string());
        assert_eq!(chosen(None), Ok(majors.join("17/bin")));
        assert_eq!(chosen(Some(15)), Ok(majors.join("15/bin")));
        let error = chosen(Some(16)).expect_err("there is none");
        assert!(error.contains("PostgreSQL 16") && error.contains("postgresql-16"), "{error}");
        fs::remove_dir_all(&majors).expect("removes");
    }
}
