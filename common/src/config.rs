//! What every program reads from its flags and environment: one line names what is wrong, exit status 2.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{
    Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};
use secrecy::{ExposeSecret, SecretString};

use crate::seal::SealKey;

/// Exit status for a mistake in flags or environment.
pub const EXIT_CONFIG: i32 = 2;

/// A mistake in the configuration: names the variable and says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Parses the command line and environment, or ends the process with one line on standard error.
pub fn parse_or_exit<T: Parser>() -> T {
    T::try_parse().unwrap_or_else(|e| {
        // Help that somebody asked for, or should see, is more than a line.
        if !e.use_stderr() || e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            e.exit();
        }
        exit_with(&ConfigError(one_line(&e, &T::command())))
    })
}

/// Prints a configuration mistake as one line and ends the process with [`EXIT_CONFIG`].
pub fn exit_with(error: &ConfigError) -> ! {
    eprintln!("error: {error}");
    std::process::exit(EXIT_CONFIG)
}

/// clap's own text has several lines and names only the flag; people set the variable.
fn one_line(error: &clap::Error, command: &clap::Command) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag)) => match variable_of(flag, command) {
            Some(variable) => format!("{variable}: {first}"),
            None => first,
        },
        Some(ContextValue::Strings(flags)) if error.kind() == ErrorKind::MissingRequiredArgument => {
            let named = flags.iter().map(|flag| match variable_of(flag, command) {
                Some(variable) => format!("{flag} (or {variable})"),
                None => flag.clone(),
            });
            format!("missing: {}; see --help", named.collect::<Vec<_>>().join(", "))
        }
        _ => first,
    }
}

/// The variable that stands for a flag, which clap writes as `--flag <VALUE>`.
fn variable_of(flag: &str, command: &clap::Command) -> Option<String> {
    all_args(command).into_iter().find_map(|arg| {
        let long = format!("--{}", arg.get_long()?);
        (flag == long || flag.starts_with(&format!("{long} "))).then(|| arg.get_env()?.to_str().map(str::to_owned))?
    })
}

fn all_args(command: &clap::Command) -> Vec<&clap::Arg> {
    command.get_arguments().chain(command.get_subcommands().flat_map(all_args)).collect()
}

/// A secret from the variable `name`, or from the file that `name_FILE` names (without its last newline).
pub fn secret(name: &str) -> Result<Option<SecretString>, ConfigError> {
    let file_variable = format!("{name}_FILE");
    let plain = std::env::var(name).ok().filter(|v| !v.is_empty());
    let file = std::env::var(&file_variable).ok().filter(|v| !v.is_empty());
    match (plain, file) {
        (Some(_), Some(_)) => Err(ConfigError(format!("{name} and {file_variable} are both set: keep one"))),
        (Some(value), None) => Ok(Some(value.into())),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(Path::new(&path))
                .map_err(|e| ConfigError(format!("{file_variable}: cannot read {path}: {e}")))?;
            Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned().into()))
        }
        (None, None) => Ok(None),
    }
}

/// [`secret`], or a line that says it is missing.
pub fn required_secret(name: &str, what: &str) -> Result<SecretString, ConfigError> {
    secret(name)?
        .ok_or_else(|| ConfigError(format!("{name} is not set: {what} (or {name}_FILE, a file that holds it)")))
}

/// `DATABASE_URL`.
pub fn database_url() -> Result<SecretString, ConfigError> {
    let url = required_secret("DATABASE_URL", "the PostgreSQL database, as postgres://user:password@host/name")?;
    match url::Url::parse(url.expose_secret()) {
        Ok(parsed) if matches!(parsed.scheme(), "postgres" | "postgresql") => Ok(url),
        // The URL itself is a secret, so the message must not quote it.
        _ => Err(ConfigError("DATABASE_URL is not a URL that begins with postgres://".into())),
    }
}

/// `REDIS_URL`, when set.
pub fn redis_url() -> Result<Option<SecretString>, ConfigError> {
    let Some(url) = secret("REDIS_URL")? else { return Ok(None) };
    match url::Url::parse(url.expose_secret()) {
        Ok(parsed) if matches!(parsed.scheme(), "redis" | "rediss" | "unix" | "redis+unix") => Ok(Some(url)),
        _ => Err(ConfigError("REDIS_URL is not a URL that begins with redis:// or rediss://".into())),
    }
}

/// The folders of `DBACKUP_LOCAL_PATHS`.
pub fn local_paths(paths: Vec<PathBuf>) -> Result<Vec<PathBuf>, ConfigError> {
    match paths.iter().find(|path| !path.is_absolute()) {
        Some(path) => Err(ConfigError(format!("DBACKUP_LOCAL_PATHS: {} is not an absolute path", path.display()))),
        None => Ok(paths),
    }
}

/// `DBACKUP_ENCRYPTION_KEY`, and while it is rotated `DBACKUP_OTHER_ENCRYPTION_KEY`.
pub fn encryption_key() -> Result<SealKey, ConfigError> {
    let text = required_secret("DBACKUP_ENCRYPTION_KEY", "32 bytes in base64, the same for every API and worker")?;
    key_of(&text)
}

/// The key of this text, which opens too, while it is rotated, what `DBACKUP_OTHER_ENCRYPTION_KEY` sealed.
pub fn key_of(text: &SecretString) -> Result<SealKey, ConfigError> {
    let key = parse_key("DBACKUP_ENCRYPTION_KEY", text)?;
    let Some(other) = secret("DBACKUP_OTHER_ENCRYPTION_KEY")? else { return Ok(key) };
    Ok(key.with_other(parse_key("DBACKUP_OTHER_ENCRYPTION_KEY", &other)?))
}

fn parse_key(name: &str, text: &SecretString) -> Result<SealKey, ConfigError> {
    SealKey::parse(text.expose_secret()).map_err(|e| ConfigError(format!("{name}: {e}")))
}

/// The clockwork of leases. What is left out follows from the lease in the proportions of the default.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct TimingArgs {
    /// How long a claim lasts without a heartbeat, in milliseconds
    #[arg(long, env = "DBACKUP_LEASE_MS", default_value_t = 15_000)]
    lease_ms: u64,
    /// Time between heartbeats, in milliseconds [default: 7/30 of the lease]
    #[arg(long, env = "DBACKUP_HEARTBEAT_MS")]
    heartbeat_ms: Option<u64>,
    /// Longest wait for the answer to a heartbeat, in milliseconds [default: 2/15 of the lease]
    #[arg(long, env = "DBACKUP_HEARTBEAT_TIMEOUT_MS")]
    heartbeat_timeout_ms: Option<u64>,
    /// A run without an acknowledged heartbeat stands still after this time, in milliseconds [default: 11/15 of the lease]
    #[arg(long, env = "DBACKUP_FENCE_MS")]
    fence_ms: Option<u64>,
    /// Longest time between looks at the queue, in milliseconds
    #[arg(long, env = "DBACKUP_POLL_MS", default_value_t = 1_000)]
    poll_ms: u64,
    /// Time between looks for lost runs and for new schedules, in milliseconds
    #[arg(long, env = "DBACKUP_TICKER_MS", default_value_t = 2_000)]
    ticker_ms: u64,
}

/// Validated times of the queue protocol.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long a claim lasts without a heartbeat.
    pub lease: Duration,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Longest wait for a heartbeat's answer.
    pub heartbeat_timeout: Duration,
    /// A run's activity ends this long after its last acknowledged heartbeat was sent.
    pub fence: Duration,
    /// Longest time between looks at the queue.
    pub poll: Duration,
    /// Time between looks for lost runs.
    pub ticker: Duration,
}

impl TimingArgs {
    /// Checks the times against each other.
    pub fn validate(&self) -> Result<Timing, ConfigError> {
        let ms = Duration::from_millis;
        let timing = Timing {
            lease: ms(self.lease_ms),
            heartbeat: ms(self.heartbeat_ms.unwrap_or(self.lease_ms * 7 / 30)),
            heartbeat_timeout: ms(self.heartbeat_timeout_ms.unwrap_or(self.lease_ms * 2 / 15)),
            fence: ms(self.fence_ms.unwrap_or(self.lease_ms * 11 / 15)),
            poll: ms(self.poll_ms),
            ticker: ms(self.ticker_ms),
        };
        let fail = |text: String| Err(ConfigError(text));
        if !(1_000..=600_000).contains(&self.lease_ms) {
            return fail(format!("DBACKUP_LEASE_MS is {} but must be between 1000 and 600000", self.lease_ms));
        }
        for (name, value) in [
            ("DBACKUP_POLL_MS", timing.poll),
            ("DBACKUP_TICKER_MS", timing.ticker),
            ("DBACKUP_HEARTBEAT_MS", timing.heartbeat),
            ("DBACKUP_HEARTBEAT_TIMEOUT_MS", timing.heartbeat_timeout),
        ] {
            if value < ms(10) || value > ms(60_000) {
                return fail(format!("{name} is {} but must be between 10 and 60000", value.as_millis()));
            }
        }
        // Two heartbeats may fail before the fence falls, and the fence leaves a seventh of the lease for the kill.
        if timing.heartbeat * 2 + timing.heartbeat_timeout > timing.fence {
            return fail(format!(
                "DBACKUP_HEARTBEAT_MS ({}) is too long: twice it plus DBACKUP_HEARTBEAT_TIMEOUT_MS ({}) must not exceed DBACKUP_FENCE_MS ({})",
                timing.heartbeat.as_millis(),
                timing.heartbeat_timeout.as_millis(),
                timing.fence.as_millis()
            ));
        }
        if timing.ticker > timing.lease {
            return fail(format!(
                "DBACKUP_TICKER_MS is {} but must be at most DBACKUP_LEASE_MS ({}): a dead run would stay in Running",
                timing.ticker.as_millis(),
                timing.lease.as_millis()
            ));
        }
        if timing.fence > timing.lease * 6 / 7 {
            return fail(format!(
                "DBACKUP_FENCE_MS is {} but must be at most six sevenths of DBACKUP_LEASE_MS ({}): a run must be dead before its lease is",
                timing.fence.as_millis(),
                timing.lease.as_millis()
            ));
        }
        Ok(timing)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        timing: TimingArgs,
    }

    fn timing(args: &[&str]) -> Result<Timing, String> {
        let args = [&["program"], args].concat();
        let program = Program::try_parse_from(args).map_err(|e| one_line(&e, &Program::command()))?;
        program.timing.validate().map_err(|e| e.to_string())
    }

    #[test]
    fn the_default_times_are_those_of_the_protocol() {
        let t = timing(&[]).expect("valid");
        assert_eq!((t.lease.as_millis(), t.heartbeat.as_millis()), (15_000, 3_500));
        assert_eq!((t.heartbeat_timeout.as_millis(), t.fence.as_millis()), (2_000, 11_000));
    }

    #[test]
    fn times_that_do_not_fit_each_other_are_one_line_that_names_the_variable() {
        for (args, variable) in [
            (&["--lease-ms", "10"][..], "DBACKUP_LEASE_MS"),
            (&["--lease-ms", "soon"], "DBACKUP_LEASE_MS"),
            (&["--heartbeat-ms", "9000"], "DBACKUP_HEARTBEAT_MS"),
            (&["--fence-ms", "14900"], "DBACKUP_FENCE_MS"),
            (&["--poll-ms", "0"], "DBACKUP_POLL_MS"),
            (&["--ticker-ms", "20000"], "DBACKUP_TICKER_MS"),
        ] {
            let text = timing(args).expect_err("must be refused");
            assert!(text.starts_with(variable) && !text.contains('\n'), "{args:?}: {text:?}");
        }
    }
}
