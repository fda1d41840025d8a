//! What the API reads from its flags and environment.

use std::net::SocketAddr;

use common::config::{ConfigError, Timing, TimingArgs};

/// Flags of the API; each is also an environment variable.
#[derive(clap::Args, Clone, Debug)]
pub struct ApiArgs {
    /// Address and port to listen on
    #[arg(long, env = "DBACKUP_LISTEN", default_value = "127.0.0.1:3000")]
    pub listen: SocketAddr,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub timing: TimingArgs,
}

/// Validated configuration of the API.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The clockwork; an API process rescues lost runs too.
    pub timing: Timing,
}

impl ApiArgs {
    /// Checks everything.
    pub fn validate(self) -> Result<ApiConfig, ConfigError> {
        Ok(ApiConfig { listen: self.listen, timing: self.timing.validate()? })
    }
}
