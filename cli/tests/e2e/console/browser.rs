//! A headless Chromium, driven through chromedriver: what the tests do with a page, each waiting for its condition.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use thirtyfour::{
    By, ChromeCapabilities, ChromiumLikeCapabilities, LoggingPrefsLogLevel, TypingData, WebDriver, WebElement,
    cdp::Cdp, error::WebDriverResult, session::handle::SessionHandle,
};

use crate::harness::{SOON, process::children_of, unique, until};

const ARGUMENTS: [&str; 10] = [
    "--headless=new",
    // As root there is no sandbox; what is shown is our own.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--no-proxy-server",
    "--lang=en-GB",
    "--force-prefers-reduced-motion",
    "--window-size=1280,900",
];

/// A browser with one window; it ends with the test.
pub struct Browser {
    session: Arc<SessionHandle>,
    base: String,
    _driver: Driver,
}

/// The chromedriver, which ends with all that it has started, also when a browser does not start.
struct Driver {
    child: Child,
    /// Kept open: the driver may have more to say.
    _said: BufReader<ChildStdout>,
    scratch: PathBuf,
}

/// Starts the driver on a port that it chooses itself. It looks for one that is free by IPv4 and then wants the same by IPv6:
/// one that somebody takes in between makes it end, and it is started again.
#[allow(clippy::zombie_processes, reason = "a driver that does not start ends the test, and so itself")]
fn start_driver(scratch: &Path) -> (Child, BufReader<ChildStdout>, u16) {
    loop {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .env("TMPDIR", scratch)
            .env("HOME", scratch)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("chromedriver: {e}: run make setup"));
        let mut said = BufReader::new(driver.stdout.take().expect("piped"));
        let mut all = String::new();
        loop {
            let mut line = String::new();
            if said.read_line(&mut line).expect("reads") == 0 {
                let _ = driver.wait();
                assert!(all.contains("port not available"), "chromedriver ended: {all}");
                break;
            }
            if let Some((_, port)) = line.trim_end().trim_end_matches('.').split_once("started successfully on port ") {
                return (driver, said, port.parse().expect("a port"));
            }
            all += &line;
        }
    }
}

impl Browser {
    /// One that has never been anywhere, for the pages of a server.
    pub async fn start(base: &str) -> Self {
        let scratch = std::env::temp_dir().join(unique("dbackup-browser"));
        std::fs::create_dir(&scratch).expect("a scratch folder");
        let (child, said, port) = start_driver(&scratch);
        let driver = Driver { child, _said: said, scratch };
        let mut wanted = ChromeCapabilities::new();
        for arg in ARGUMENTS {
            wanted.add_arg(arg).expect("an argument");
        }
        wanted.set_browser_log_level(LoggingPrefsLogLevel::All).expect("a level");
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().expect("a client");
        let connect = WebDriver::builder(format!("http://127.0.0.1:{port}"), wanted).client(http).connect();
        let browser = connect.await.expect("a browser");
        let session = Arc::clone(browser.handle());
        // It ends with the driver.
        browser.leak().expect("nobody has ended it");
        Self { session, base: base.to_owned(), _driver: driver }
    }

    /// Goes to a page of the server, and waits until its script listens.
    pub async fn go(&self, path: &str) {
        self.session.goto(format!("{}{path}", self.base)).await.unwrap_or_else(|e| panic!("{path}: {e}"));
        self.until(&format!("the script of {path} listens"), "return document.documentElement.dataset.ready === ''")
            .await;
    }

    async fn try_js(&self, script: &str) -> WebDriverResult<Value> {
        Ok(self.session.execute(script, Vec::new()).await?.json().clone())
    }

    /// Runs a script in the page; gives what it returns.
    pub async fn js(&self, script: &str) -> Value {
        self.try_js(script).await.unwrap_or_else(|e| panic!("{script}: {e}"))
    }

    /// Waits until a script in the page returns something true, and gives that. A page that is being left counts as no.
    pub async fn until(&self, what: &str, script: &str) -> Value {
        let look = || async {
            let answer = self.try_js(script).await.unwrap_or_default();
            let no = answer.is_null() || answer == false || answer == "";
            (!no).then_some(answer)
        };
        let end = std::time::Instant::now() + SOON;
        loop {
            if let Some(found) = look().await {
                return found;
            }
            if std::time::Instant::now() >= end {
                let (path, text, complaints) = (self.path().await, self.text().await, self.complaints().await);
                panic!("not within {SOON:?}: {what}; the page {path} says:\n{text}\n{complaints:#?}");
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Waits until a text is in the page.
    pub async fn until_text(&self, text: &str) {
        let script = format!("return document.body.innerText.includes({})", json!(text));
        self.until(&format!("the page says '{text}'"), &script).await;
    }

    /// Waits until the browser is on a page that begins with this path, and its script listens.
    pub async fn until_path(&self, path: &str) {
        let script = format!(
            "return location.pathname.startsWith({}) && document.documentElement.dataset.ready === ''",
            json!(path)
        );
        self.until(&format!("the browser is on {path}"), &script).await;
    }

    /// The path that it is on.
    pub async fn path(&self) -> String {
        self.js("return location.pathname").await.as_str().expect("a path").to_owned()
    }

    /// What the page says.
    pub async fn text(&self) -> String {
        self.js("return document.body.innerText").await.as_str().unwrap_or_default().to_owned()
    }

    /// Does something to the first element for which that works.
    async fn with_first(&self, by: By, what: &str, act: impl AsyncFn(&WebElement) -> WebDriverResult<()>) {
        until(what, SOON, || async {
            for element in self.session.find_all(by.clone()).await.ok()? {
                if act(&element).await.is_ok() {
                    return Some(());
                }
            }
            None
        })
        .await;
    }

    /// Clicks the first of what a selector of CSS names that can be clicked: what is hidden cannot.
    pub async fn click(&self, css: &str) {
        self.with_first(By::Css(css), &format!("{css} is clicked"), async |it| it.click().await).await;
    }

    /// Clicks the first button or link with this text that can be clicked.
    pub async fn press(&self, text: &str) {
        let xpath = format!("//*[self::button or self::a][normalize-space()='{text}']");
        self.with_first(By::XPath(xpath), &format!("'{text}' is clicked"), async |it| it.click().await).await;
    }

    /// Types into an input, in place of what is there.
    pub async fn fill(&self, css: &str, text: &str) {
        let type_into = async |it: &WebElement| {
            it.clear().await?;
            if text.is_empty() { Ok(()) } else { it.send_keys(text).await }
        };
        self.with_first(By::Css(css), &format!("{css} is filled in"), type_into).await;
    }

    /// Types into the input of a field of the body.
    pub async fn field(&self, name: &str, text: &str) {
        self.fill(&format!("[name='{name}']"), text).await;
    }

    /// Presses keys, wherever the focus is.
    pub async fn keys(&self, keys: impl Into<TypingData>) {
        self.session.action_chain().send_keys(keys).perform().await.expect("keys are pressed");
    }

    /// Lets the page use the clipboard.
    pub async fn allow_clipboard(&self) {
        let permissions = json!({ "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"] });
        self.cdp("Browser.grantPermissions", permissions).await;
    }

    /// What was copied last.
    pub async fn copied(&self) -> String {
        self.js("navigator.clipboard.readText().then((text) => { window.copied = text; })").await;
        self.until("what was copied", "return window.copied").await.as_str().expect("text").to_owned()
    }

    /// A command of Chromium's own protocol.
    pub async fn cdp(&self, command: &str, params: Value) {
        let chromium = Cdp::new(Arc::clone(&self.session));
        chromium.send_raw(command, params).await.unwrap_or_else(|e| panic!("{command}: {e}"));
    }

    /// How the page is looked at.
    pub async fn look(&self, dark: bool, width: u32, height: u32) {
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }, { "name": "prefers-reduced-motion", "value": "reduce" }]);
        self.cdp("Emulation.setEmulatedMedia", json!({ "features": features })).await;
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500 });
        self.cdp("Emulation.setDeviceMetricsOverride", size).await;
    }

    /// A picture of the window.
    pub async fn picture(&self, file: &Path) {
        self.session.screenshot(file).await.expect("a picture");
    }

    /// What the console of the browser has complained of since the last time: errors, and everything that the policy of
    /// the page refused.
    pub async fn complaints(&self) -> Vec<String> {
        let mut entries = self.session.browser_log().await.expect("the log");
        entries.retain(|entry| {
            entry.level == "SEVERE" || matches!(entry.source.as_deref(), Some("security" | "violation"))
        });
        entries.into_iter().map(|entry| entry.message).collect()
    }

    /// Demands that there was nothing to complain of.
    pub async fn assert_clean(&self) {
        let (complaints, path) = (self.complaints().await, self.path().await);
        assert!(complaints.is_empty(), "on {path}: {complaints:#?}");
    }

    /// Demands that nothing but answers of this status were complained of, and at least one.
    pub async fn assert_only(&self, status: u16) {
        let complaints = self.complaints().await;
        let text = format!("status of {status}");
        assert!(!complaints.is_empty() && complaints.iter().all(|c| c.contains(&text)), "{complaints:?}");
    }
}

/// A process with all that it started.
fn tree(pid: Pid) -> Vec<Pid> {
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        found.extend(children_of(found[at]));
        at += 1;
    }
    found
}

impl Drop for Driver {
    fn drop(&mut self) {
        let driver = Pid::from_raw(i32::try_from(self.child.id()).expect("a small id"));
        for pid in tree(driver) {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.scratch);
    }
}
