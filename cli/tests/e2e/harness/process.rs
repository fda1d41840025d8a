//! The project's own programs, started and stopped by their ids.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use serde_json::Value;

use super::{Cluster, until};

/// A program in the target folder, beside this test.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let folder = test.parent().and_then(|p| p.parent()).expect("target/debug/deps");
    let path = folder.join(name);
    assert!(path.exists(), "{} is not built: run the tests with make test", path.display());
    path
}

/// A running program; killed when dropped.
pub struct Process {
    child: Child,
    name: String,
    log: Arc<Mutex<Vec<String>>>,
    /// Who reads its output, each to its end.
    readers: Vec<JoinHandle<()>>,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts a program beside this test with nothing but these variables.
    pub fn start(name: &str, args: &[&str], env: &BTreeMap<String, String>, extra: &[(&str, String)]) -> Self {
        Self::start_at(&binary(name), args, env, extra)
    }

    /// The same of a program anywhere.
    pub fn start_at(program: &Path, args: &[&str], env: &BTreeMap<String, String>, extra: &[(&str, String)]) -> Self {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs(env)
            .envs(extra.iter().map(|(k, v)| (*k, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
        let log = Arc::new(Mutex::new(Vec::new()));
        let readers = vec![
            collect(child.stdout.take().expect("piped"), log.clone()),
            collect(child.stderr.take().expect("piped"), log.clone()),
        ];
        Self { child, name, log, readers, ended: None }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a small id"))
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("not poisoned").join("\n")
    }

    /// Waits for a JSON line with a message and gives one of its fields.
    pub async fn wait_for_field(&mut self, message: &str, field: &str) -> String {
        let log = self.log.clone();
        let name = self.name.clone();
        let child = &mut self.child;
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let found = log.lock().expect("not poisoned").iter().find_map(|line| {
                let value: Value = serde_json::from_str(line).ok()?;
                let fields = &value["fields"];
                (fields["message"] == message).then(|| fields[field].as_str().map(str::to_owned))?
            });
            if let Some(found) = found {
                return found;
            }
            let status = child.try_wait().expect("a status");
            let text = || log.lock().expect("not poisoned").join("\n");
            assert!(status.is_none(), "{name} ended with {status:?}:\n{}", text());
            assert!(Instant::now() < end, "{name} did not say '{message}':\n{}", text());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a text is in its log.
    pub async fn says(&self, text: &str, limit: Duration) {
        until(&format!("{} says '{text}'", self.name), limit, || async { self.log().contains(text).then_some(()) })
            .await;
    }

    /// Sends a signal to it, and to it alone.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it runs");
    }

    /// Waits for its end and its last words, and gives its exit status.
    pub async fn end(&mut self, limit: Duration) -> ExitStatus {
        let end = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.try_end() {
                break status;
            }
            assert!(Instant::now() < end, "{} did not end within {limit:?}:\n{}", self.name, self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        // Not for ever: a process that it has left behind may hold its output open.
        let patience = Instant::now() + Duration::from_secs(5);
        while !self.readers.iter().all(JoinHandle::is_finished) && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        status
    }

    fn try_end(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("a status");
        }
        self.ended
    }

    /// Kills it as a crash would, and waits until it is gone.
    pub async fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.end(Duration::from_secs(5)).await;
    }

    /// Its live child processes.
    pub fn children(&self) -> Vec<Pid> {
        children_of(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.try_end().is_none() {
            let _ = kill(self.pid(), Signal::SIGCONT);
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

fn collect(stream: impl std::io::Read + Send + 'static, log: Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            log.lock().expect("not poisoned").push(line);
        }
    })
}

/// Variables that make a program's wall clock wrong by so many seconds and leave its monotonic clock alone.
pub fn wrong_clock(seconds: i64) -> [(&'static str, String); 3] {
    let folders = std::fs::read_dir("/usr/lib").expect("/usr/lib").flatten().map(|folder| folder.path());
    let mut libraries = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1"));
    let library = libraries.find(|path| path.exists()).expect("libfaketime is installed: run make setup");
    [
        ("LD_PRELOAD", library.display().to_string()),
        ("FAKETIME", format!("{seconds:+}")),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
}

/// Processes whose parent is `pid`, zombies left out.
pub fn children_of(pid: Pid) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").expect("/proc");
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|candidate| {
            let stat = std::fs::read_to_string(format!("/proc/{candidate}/stat")).unwrap_or_default();
            let Some((_, rest)) = stat.rsplit_once(") ") else { return false };
            let mut fields = rest.split(' ');
            let (state, parent) = (fields.next(), fields.next());
            state != Some("Z") && parent == Some(&pid.to_string())
        })
        .map(Pid::from_raw)
        .collect()
}

/// Whether a process lives; a zombie does not.
pub fn is_alive(pid: Pid) -> bool {
    state(pid).is_some_and(|state| state != 'Z')
}

/// Whether a process lives and does nothing, since somebody stopped it.
pub fn stands_still(pid: Pid) -> bool {
    state(pid) == Some('T')
}

fn state(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

impl Cluster {
    /// `dbackup` on this cluster.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary("dbackup"));
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).envs(&self.env).args(args);
        command
    }

    /// Runs `dbackup` with this on its standard input; gives its exit code, what it printed and what it complained of.
    pub fn dbackup(&self, args: &[&str], input: &str) -> (Option<i32>, String, String) {
        let mut command = self.command(args);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("dbackup runs");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("writes");
        let output = child.wait_with_output().expect("ends");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }
}
