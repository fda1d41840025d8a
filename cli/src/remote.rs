//! An instance that is reached over HTTP, as a script reaches it: asked again through restarts and a network that breaks.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use common::{
    config::{self, ConfigError},
    db::StartError,
};
use reqwest::{Client, RequestBuilder, Response, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value, json};
use url::Url;

/// Seconds that the instance may keep a question for the state back.
const WAIT: u64 = 30;
/// How long an instance that does not answer is asked again.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Time between two tries, where the instance names none.
pub const AGAIN: Duration = Duration::from_secs(2);

/// Flag of every command that asks an instance.
#[derive(clap::Args)]
pub struct RemoteArgs {
    /// The instance, such as https://backup.example.com. DBACKUP_API_KEY (or DBACKUP_API_KEY_FILE, a file) holds the key
    #[arg(long, env = "DBACKUP_URL")]
    url: Url,
}

/// Flags of every command that starts something and waits for its end.
#[derive(clap::Args)]
pub struct FollowArgs {
    /// Print the run's log on standard error as it is written
    #[arg(long)]
    log: bool,
    /// Print the execution's id and do not wait for its end
    #[arg(long)]
    no_wait: bool,
}

/// See the module.
pub struct Instance {
    client: Client,
    url: Url,
    key: SecretString,
}

/// Something that went wrong, for the exit status.
pub fn failed(why: impl Into<String>) -> StartError {
    std::io::Error::other(why.into()).into()
}

impl Instance {
    /// The instance of the arguments; `needs` says what its key must be allowed.
    pub fn new(args: RemoteArgs, needs: &str) -> Result<Self, StartError> {
        let key = config::required_secret("DBACKUP_API_KEY", needs)?;
        let url = args.url;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(ConfigError(format!("--url: '{url}' is not a URL such as https://backup.example.com")).into());
        }
        let client = Client::builder()
            .user_agent(concat!("dbackup/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(10))
            .timeout(Duration::from_secs(WAIT + 30))
            // A connection that is open at this end alone never says that it is gone.
            .read_timeout(Duration::from_secs(WAIT + 30))
            .build()
            .map_err(|error| failed(common::error::Chain(&error).to_string()))?;
        Ok(Self { client, url, key })
    }

    /// A request that is sent once: for what is more than an answer of JSON.
    pub fn get(&self, path: &[&str]) -> Result<RequestBuilder, StartError> {
        Ok(self.client.get(self.at(path)?).bearer_auth(self.key.expose_secret()))
    }

    fn at(&self, path: &[&str]) -> Result<Url, StartError> {
        let mut url = self.url.clone();
        url.path_segments_mut().map_err(|()| failed("--url cannot be a base"))?.pop_if_empty().extend(path);
        Ok(url)
    }

    /// Asks until there is an answer, or a refusal that would stay the same.
    pub async fn ask(
        &self,
        request: impl Fn(&Client, Url) -> RequestBuilder,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Value, StartError> {
        let mut url = self.at(path)?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let end = Instant::now() + PATIENCE;
        loop {
            let sent = request(&self.client, url.clone()).bearer_auth(self.key.expose_secret()).send().await;
            let (why, again) = match read(sent).await {
                Ok(answer) => return Ok(answer),
                Err(Refused { why, again: None, .. }) => return Err(failed(why)),
                Err(Refused { why, again: Some(again), .. }) => (why, again),
            };
            if Instant::now() + again > end {
                return Err(failed(format!("{why}; asked for {} s", PATIENCE.as_secs())));
            }
            eprintln!("{why}; asking again in {} s", again.as_secs());
            tokio::time::sleep(again).await;
        }
    }

    /// Starts an execution by a request whose lost answer may be asked for again, and follows it to its end, where that is
    /// wanted. `noun` is what it is called.
    pub async fn start(
        &self,
        path: &[&str],
        body: &Map<String, Value>,
        noun: &str,
        follow: &FollowArgs,
    ) -> Result<(), StartError> {
        // One key for all tries: they make one execution.
        let once = uuid::Uuid::now_v7().to_string();
        let answer =
            self.ask(|client, url| client.post(url).header("Idempotency-Key", &once).json(body), path, &[]).await?;
        let id = answer["executionId"].as_str().ok_or_else(|| no_instance("no executionId"))?;
        if follow.no_wait {
            println!("{id}");
            return Ok(());
        }
        println!("Execution started: {id}");
        self.follow(id, noun, follow.log).await
    }

    /// Tells how far a run is, until its end; `noun` is what it is called when it fails.
    async fn follow(&self, id: &str, noun: &str, log: bool) -> Result<(), StartError> {
        let wait = WAIT.to_string();
        let mut after = "0".to_owned();
        let mut told = String::new();
        loop {
            let mut query = vec![("wait", if log { "2" } else { &wait })];
            if log {
                query.push(("logsAfter", after.as_str()));
            }
            let answer = self.ask(|client, url| client.get(url), &["api", "executions", id], &query).await?;
            let run = &answer["data"];
            for line in run["logs"].as_array().into_iter().flatten() {
                eprintln!("{}", log_line(line));
            }
            if let Some(cursor) = run["logsCursor"].as_str() {
                after = cursor.to_owned();
            }
            let text = |name: &str| run[name].as_str().unwrap_or_default().to_owned();
            let state =
                format!("Status: {} | Progress: {} | Stage: {}", text("status"), run["progress"], text("stage"));
            if state != told {
                println!("{state}");
                let _ = std::io::stdout().flush();
                told = state;
            }
            match run["status"].as_str() {
                Some("Success") => return Ok(()),
                Some("Failed") => return Err(failed(format!("{noun} failed: {}", text("error")))),
                Some("Pending" | "Running") => {}
                _ => return Err(no_instance("no status")),
            }
        }
    }
}

/// Something else listens there.
fn no_instance(what: &str) -> StartError {
    failed(format!("the answer holds {what}: does --url (DBACKUP_URL) name an instance of DBackup?"))
}

fn log_line(line: &Value) -> String {
    let text = |name: &str| line[name].as_str().unwrap_or_default();
    format!("{} {:<7} {}", text("timestamp"), text("level"), text("message"))
}

/// What there is instead of an answer.
pub struct Refused {
    /// For people.
    pub why: String,
    /// After how long the same question may be answered; `None` for never.
    pub again: Option<Duration>,
    /// Of the answer, where one came.
    pub status: Option<u16>,
}

/// What came back: JSON, or why not.
pub async fn read(sent: Result<Response, reqwest::Error>) -> Result<Value, Refused> {
    let lost = |error: reqwest::Error| Refused {
        why: format!("the instance does not answer: {}", common::error::Chain(&error.without_url())),
        again: Some(AGAIN),
        status: None,
    };
    let response = sent.map_err(lost)?;
    let status = response.status();
    let named = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let body = response.bytes().await.map_err(lost)?;
    let answer: Option<Value> = serde_json::from_slice(&body).ok();
    if status.is_success()
        && let Some(answer) = answer
    {
        return Ok(answer);
    }
    let answer = answer.unwrap_or_else(|| json!({}));
    let why = match answer["error"].as_str() {
        Some(error) => error.to_owned(),
        None => format!("the instance answers {status} without a word of dbackup: is --url right?"),
    };
    let passing = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
    let again = passing.then(|| named.map_or(AGAIN, Duration::from_secs));
    Err(Refused { why, again, status: Some(status.as_u16()) })
}
