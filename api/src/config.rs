//! What the API reads from its flags and environment.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use common::config::{self, ConfigError, Timing, TimingArgs};
use ipnet::IpNet;

use crate::rate_limit::RedisConfig;

/// Flags of the API; each is also an environment variable.
#[derive(clap::Args, Clone, Debug)]
pub struct ApiArgs {
    /// Address and port to listen on
    #[arg(long, env = "DBACKUP_LISTEN", default_value = "127.0.0.1:3000")]
    pub listen: SocketAddr,
    /// Folders under which local destinations may lie, separated by colons: for downloads
    #[arg(long, env = "DBACKUP_LOCAL_PATHS", default_value = "/var/backups/dbackup", value_delimiter = ':')]
    pub local_paths: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub http: HttpArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub timing: TimingArgs,
}

/// Flags of the API that `dbackup up` has too.
#[derive(clap::Args, Clone, Debug)]
pub struct HttpArgs {
    /// Proxies (CIDR, separated by commas) whose Forwarded or X-Forwarded-For header names the client
    #[arg(long, env = "DBACKUP_TRUSTED_PROXIES", value_delimiter = ',')]
    pub trusted_proxies: Vec<String>,
    /// Longest time that Redis may take for a rate limit before this process decides by itself, in milliseconds
    #[arg(long, env = "DBACKUP_REDIS_TIMEOUT_MS", default_value_t = 20)]
    pub redis_timeout_ms: u64,
    /// How long requests are still taken after SIGTERM while /readyz says 503, so that a proxy can turn away, in seconds
    #[arg(long, env = "DBACKUP_SHUTDOWN_DELAY_SECONDS", default_value_t = 0)]
    pub shutdown_delay_seconds: u64,
}

/// Validated configuration of the API.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Proxies whose word about the client's address counts.
    pub trusted_proxies: Vec<IpNet>,
    /// Where the rate limits are counted, if not in each process.
    pub redis: Option<RedisConfig>,
    /// Folders under which local destinations may lie.
    pub local_paths: Vec<PathBuf>,
    /// Time between the stop and the end of taking requests.
    pub shutdown_delay: Duration,
    /// The clockwork; an API process rescues lost runs too.
    pub timing: Timing,
}

impl ApiArgs {
    /// Checks everything.
    pub fn validate(self) -> Result<ApiConfig, ConfigError> {
        self.http.validate(self.listen, self.local_paths, self.timing.validate()?)
    }
}

impl HttpArgs {
    /// Checks everything, `REDIS_URL` too.
    pub fn validate(
        self,
        listen: SocketAddr,
        local_paths: Vec<PathBuf>,
        timing: Timing,
    ) -> Result<ApiConfig, ConfigError> {
        if !(1..=10_000).contains(&self.redis_timeout_ms) {
            return Err(ConfigError(format!(
                "DBACKUP_REDIS_TIMEOUT_MS is {} but must be between 1 and 10000",
                self.redis_timeout_ms
            )));
        }
        if self.shutdown_delay_seconds > 600 {
            return Err(ConfigError(format!(
                "DBACKUP_SHUTDOWN_DELAY_SECONDS is {} but must be at most 600",
                self.shutdown_delay_seconds
            )));
        }
        let timeout = Duration::from_millis(self.redis_timeout_ms);
        Ok(ApiConfig {
            listen,
            trusted_proxies: self
                .trusted_proxies
                .iter()
                .flat_map(|text| text.split_whitespace())
                .map(network)
                .collect::<Result<_, _>>()?,
            redis: config::redis_url()?.map(|url| RedisConfig { url, timeout }),
            local_paths: config::local_paths(local_paths)?,
            shutdown_delay: Duration::from_secs(self.shutdown_delay_seconds),
            timing,
        })
    }
}

fn network(text: &str) -> Result<IpNet, ConfigError> {
    common::network::parse(text).ok_or_else(|| {
        ConfigError(format!("DBACKUP_TRUSTED_PROXIES: '{text}' is neither an address nor a network such as 10.0.0.0/8"))
    })
}
