//! Child processes. This is the one place that starts them, so that every one is in a process group of its own,
//! dies with the worker (`PR_SET_PDEATHSIG`) and with its lease, and gets its secrets by environment or by a file
//! that exists only in memory, never in its arguments.

use std::{
    ffi::OsString,
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        prctl::set_pdeathsig,
        signal::{Signal, killpg},
        stat::{Mode, fchmod},
    },
    unistd::{Pid, getppid},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command},
    task::JoinHandle,
};

use crate::{
    failure::RunError,
    lease::{Lease, ProcessGroups},
    run_log::RunLog,
};

/// A program about to be started.
pub struct Program {
    command: Command,
    name: String,
    files: Vec<OwnedFd>,
}

impl Program {
    /// An empty environment but for PATH and the C locale: messages are read by this program too.
    #[allow(clippy::disallowed_methods, reason = "the one place that starts processes")]
    pub fn new(path: &Path) -> Self {
        let mut command = Command::new(path);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LC_ALL", "C")
            .env("HOME", "/nonexistent")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        Self { command, name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(), files: Vec::new() }
    }

    /// An argument; never a secret.
    pub fn arg(&mut self, arg: impl Into<OsString>) -> &mut Self {
        self.command.arg(arg.into());
        self
    }

    /// A variable of its environment.
    pub fn env(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.command.env(name, value.into());
        self
    }

    /// A file that exists only in memory and only for this program; gives the path under which it finds it.
    pub fn secret_file(&mut self, text: &str) -> std::io::Result<String> {
        let file = memfd_create(c"dbackup", MFdFlags::MFD_CLOEXEC)?;
        // MariaDB's tools ignore an option file that others could write, and a memfd begins as 0777.
        fchmod(&file, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let mut file = std::fs::File::from(file);
        file.write_all(text.as_bytes())?;
        let path = format!("/dev/fd/{}", file.as_raw_fd());
        self.files.push(file.into());
        Ok(path)
    }

    /// It will be fed: see [`Running::stdin`].
    pub fn fed(&mut self) -> &mut Self {
        self.command.stdin(Stdio::piped());
        self
    }

    /// What it prints is not wanted.
    pub fn unheard(&mut self) -> &mut Self {
        self.command.stdout(Stdio::null());
        self
    }

    fn spawn(mut self, groups: &ProcessGroups) -> Result<(Child, i32, String), RunError> {
        let parent = Pid::this();
        let files: Vec<i32> = self.files.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; these three are plain system
        // calls and allocate nothing.
        unsafe {
            self.command.pre_exec(move || {
                set_pdeathsig(Signal::SIGKILL)?;
                // The worker may have died before the line above.
                if getppid() != parent {
                    return Err(nix::Error::ESRCH.into());
                }
                for file in &files {
                    fcntl(std::os::fd::BorrowedFd::borrow_raw(*file), FcntlArg::F_SETFD(FdFlag::empty()))?;
                }
                Ok(())
            });
        }
        // The death signal comes when the *thread* that forked ends: this runs on a runtime thread, which lives as
        // long as the process, and must never move to a blocking thread.
        let child = self.command.spawn().map_err(|error| {
            RunError::give_up(
                "tool_missing",
                format!("could not start {}: {error}; is it installed on this worker?", self.name),
            )
        })?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).unwrap_or(0);
        if !groups.add(group) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        Ok((child, group, self.name))
    }

    /// Runs to the end and gives what it wrote. For short questions.
    pub async fn output(self, groups: &ProcessGroups) -> Result<Output, RunError> {
        let (mut child, group, name) = self.spawn(groups)?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
        let read_out = async {
            if let Some(out) = &mut out {
                let _ = out.take(8 << 20).read_to_end(&mut stdout).await;
            }
        };
        let read_err = async {
            if let Some(err) = &mut err {
                let _ = err.take(1 << 20).read_to_end(&mut stderr).await;
            }
        };
        tokio::join!(read_out, read_err);
        let status = child.wait().await;
        groups.remove(group);
        let status = status.map_err(|e| RunError::retry("tool_failed", format!("{name}: {e}")))?;
        Ok(Output {
            status,
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }

    /// Starts a dump, whose standard output is the dump, or a restore; its standard error goes to the log line by line.
    pub fn start(self, lease: &Arc<Lease>, log: &RunLog) -> Result<Running, RunError> {
        let (mut child, group, name) = self.spawn(&lease.groups)?;
        let stdout = child.stdout.take();
        if let Some(stdout) = &stdout {
            // A quarter of the wake-ups of the usual 64 KiB. A system that allows no more is as good, only slower.
            let _ = fcntl(stdout, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        }
        let stdin = child.stdin.take();
        if let Some(stdin) = &stdin {
            let _ = fcntl(stdin, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        }
        let stderr = child.stderr.take().map(|stderr| Said::listen(stderr, name.clone(), log.clone()));
        Ok(Running { child, group, name, stdin, stdout, stderr, lease: lease.clone() })
    }
}

/// What a short program wrote.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// What it printed; or, when it failed, what it complained of.
    pub fn printed(self) -> Result<String, String> {
        if self.status.success() { Ok(self.stdout) } else { Err(self.stderr.trim().to_owned()) }
    }
}

/// A dump or a restore that runs. Dropping it kills it.
pub struct Running {
    child: Child,
    group: i32,
    name: String,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<Said>,
    lease: Arc<Lease>,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// The end of its standard error.
    pub stderr: String,
    /// Its name.
    pub name: String,
    /// The id that it had.
    pub pid: i32,
}

impl Running {
    /// The dump itself; may be taken once.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.stdout.take()
    }

    /// What it reads; may be taken once.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.stdin.take()
    }

    /// Ends it here and now.
    pub fn kill(&self) {
        if self.child.id().is_some() {
            let _ = killpg(Pid::from_raw(self.group), Signal::SIGKILL);
        }
    }

    /// Waits for the end.
    pub async fn wait(&mut self) -> Result<Ended, RunError> {
        let status =
            self.child.wait().await.map_err(|e| RunError::retry("tool_failed", format!("{}: {e}", self.name)))?;
        self.lease.groups.remove(self.group);
        let stderr = match self.stderr.take() {
            Some(said) => said.end().await,
            None => String::new(),
        };
        // It leads its group.
        Ok(Ended { status, stderr, name: self.name.clone(), pid: self.group })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Still unreaped here unless `wait` came to its end, so the id cannot belong to somebody else yet.
        if self.child.id().is_some() {
            self.kill();
            self.lease.groups.remove(self.group);
        }
    }
}

/// Room of the pipe between a dump tool and this process: one read takes 256 KiB.
const PIPE_BYTES: i32 = 512 << 10;
/// Most that is kept of a tool's complaints for the error of the execution.
const TAIL_BYTES: usize = 2_000;
/// Lines of one tool that go to the log.
const MOST_LINES: usize = 1_000;

/// Longest wait for the rest of what a tool that has ended said: a process that it left behind may keep its standard error
/// open for ever.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a tool says on its standard error.
struct Said {
    reader: JoinHandle<()>,
    tail: Arc<Mutex<String>>,
}

impl Said {
    fn listen(stderr: ChildStderr, name: String, log: RunLog) -> Self {
        let tail = Arc::<Mutex<String>>::default();
        Self { reader: tokio::spawn(tell(stderr, name, log, tail.clone())), tail }
    }

    /// The end of it.
    async fn end(mut self) -> String {
        if tokio::time::timeout(LAST_WORDS, &mut self.reader).await.is_err() {
            self.reader.abort();
        }
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).trim_end().to_owned()
    }
}

async fn tell(stderr: ChildStderr, name: String, log: RunLog, tail: Arc<Mutex<String>>) {
    let mut lines = BufReader::new(stderr.take(64 << 20)).split(b'\n');
    let mut count = 0;
    while let Ok(Some(line)) = lines.next_segment().await {
        let line: String = String::from_utf8_lossy(&line).trim_end().chars().take(2_000).collect();
        if line.is_empty() {
            continue;
        }
        count += 1;
        if count <= MOST_LINES {
            log.warn(format!("{name}: {line}"));
        }
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.push_str(&line);
        tail.push('\n');
        if tail.len() > 2 * TAIL_BYTES {
            let cut = tail.floor_char_boundary(tail.len() - TAIL_BYTES);
            tail.drain(..cut);
        }
    }
}
