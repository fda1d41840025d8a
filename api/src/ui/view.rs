//! What all pages are made of: small marks in the text, and the navigation.

use std::fmt;

use askama::filters::{Html, HtmlSafe, escape};
use chrono::{DateTime, SecondsFormat, Utc};
use common::{
    execution::{Execution, Outcome, Status},
    permission::Permission,
};

use super::assets;

/// HTML that is whole: it is not escaped again.
pub struct Markup(pub String);

impl fmt::Display for Markup {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl HtmlSafe for Markup {}

/// Address of a file.
pub fn asset(name: &str) -> String {
    format!("/assets/{}/{name}", *assets::VERSION)
}

/// An icon of the sprite, which says nothing to a screen reader: the text beside it does.
pub fn icon(name: &str) -> Markup {
    Markup(format!("<svg class=\"icon\" aria-hidden=\"true\"><use href=\"{}#{name}\"></use></svg>", asset("icons.svg")))
}

/// A time, which the page's script shows in the zone of its reader.
pub fn when(at: &DateTime<Utc>) -> Markup {
    let exact = at.to_rfc3339_opts(SecondsFormat::Millis, true);
    Markup(format!("<time datetime=\"{exact}\">{}</time>", at.format("%Y-%m-%d %H:%M UTC")))
}

/// A text in which the times, as the API writes them, are those of the reader.
pub fn with_times(text: &str) -> Markup {
    let shown = |word: &str| match DateTime::parse_from_rfc3339(word) {
        Ok(at) => when(&at.to_utc()).0,
        Err(_) => escaped(word),
    };
    Markup(text.split(' ').map(shown).collect::<Vec<_>>().join(" "))
}

fn escaped(text: &str) -> String {
    let Ok(safe) = escape(text, Html);
    safe.to_string()
}

/// A time or a dash.
pub fn when_or_dash(at: &Option<DateTime<Utc>>) -> Markup {
    at.as_ref().map_or_else(dash, when)
}

/// Where there is nothing to show.
pub fn dash() -> Markup {
    Markup("<span class=\"quiet\" aria-label=\"none\">–</span>".to_owned())
}

/// A size in units of 1000 with three digits, as stores and disks count.
pub fn bytes(size: &i64) -> String {
    let mut value = *size as f64;
    let mut unit = 0;
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A size or a dash.
pub fn bytes_or_dash(size: &Option<i64>) -> Markup {
    size.as_ref().map_or_else(dash, |size| Markup(bytes(size)))
}

/// A duration in its two largest units.
pub fn duration(ms: &i64) -> String {
    let seconds = ms / 1000;
    match seconds {
        ..10 => format!("{seconds}.{} s", (ms % 1000) / 100),
        10..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

/// The status of a run, with what is finer than it.
pub fn status_mark(status: &Status, outcome: &Option<Outcome>) -> Markup {
    let (class, sign) = match status {
        Status::Pending => ("waiting", "clock"),
        Status::Running => ("running", "spin"),
        Status::Success if *outcome == Some(Outcome::Partial) => ("warning", "alert"),
        Status::Success => ("good", "check"),
        Status::Failed => ("bad", "cross"),
    };
    let text = match outcome {
        Some(Outcome::TimedOut) => "Timed out",
        Some(Outcome::WorkerLost) => "Worker lost",
        Some(outcome) => outcome.as_str(),
        None => status.as_str(),
    };
    mark(class, sign, text)
}

/// A word with a sign, in a colour.
pub fn mark(class: &str, sign: &str, text: &str) -> Markup {
    Markup(format!("<span class=\"status {class}\">{}{text}</span>", icon(sign)))
}

/// See [`status_mark`].
pub fn status(execution: &Execution) -> Markup {
    status_mark(&execution.status, &execution.outcome)
}

/// A path with one more pair in its query.
pub fn with_query(path: &str, name: &str, value: &str) -> String {
    let mut encoded = String::new();
    for byte in value.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => encoded.push(byte.into()),
            _ => encoded += &format!("%{byte:02X}"),
        }
    }
    format!("{path}{}{name}={encoded}", if path.contains('?') { '&' } else { '?' })
}

/// A path with those of the pairs that say something in its query.
pub fn filtered(path: &str, pairs: &[(&str, &str)]) -> String {
    let said = pairs.iter().filter(|(_, value)| !value.is_empty());
    said.fold(path.to_owned(), |path, (name, value)| with_query(&path, name, value))
}

/// Pages that belong together.
pub struct NavGroup {
    /// Its title; empty for the first.
    pub title: &'static str,
    /// Its pages.
    pub items: Vec<NavItem>,
}

/// A page in the navigation.
pub struct NavItem {
    /// Where it is.
    pub path: &'static str,
    /// Its name.
    pub label: &'static str,
    /// Its icon.
    pub icon: &'static str,
    /// Whether its reader is there.
    pub current: bool,
}

type Entry = (&'static str, &'static str, &'static str, Option<Permission>);

const NAVIGATION: &[(&str, &[Entry])] = &[
    (
        "",
        &[
            ("/", "Overview", "overview", None),
            ("/jobs", "Jobs", "job", Some(Permission::JobsRead)),
            ("/executions", "Executions", "run", Some(Permission::HistoryRead)),
        ],
    ),
    (
        "Connections",
        &[
            ("/sources", "Sources", "source", Some(Permission::SourcesRead)),
            ("/destinations", "Destinations", "destination", Some(Permission::DestinationsRead)),
        ],
    ),
    (
        "Access Management",
        &[
            ("/access/api-keys", "API Keys", "key", Some(Permission::ApiKeysRead)),
            ("/access/users", "Users", "user", Some(Permission::UsersRead)),
            ("/access/sessions", "Sessions", "session", None),
            ("/access/audit-log", "Audit Log", "audit", Some(Permission::AuditRead)),
        ],
    ),
    (
        "Settings",
        &[
            ("/settings/system", "System", "settings", Some(Permission::SettingsRead)),
            ("/settings/webhooks", "Webhooks", "webhook", Some(Permission::SettingsRead)),
            ("/settings/cluster", "Cluster", "cluster", Some(Permission::ClusterRead)),
        ],
    ),
];

/// The navigation of whoever may see what `sees` says, at a path.
pub fn navigation(here: &str, sees: impl Fn(Option<Permission>) -> bool) -> Vec<NavGroup> {
    let below =
        |path: &str| here == path || (path != "/" && here.starts_with(path) && here[path.len()..].starts_with('/'));
    let groups = NAVIGATION.iter().map(|(title, entries)| {
        let seen = entries.iter().filter(|entry| sees(entry.3));
        let items = seen.map(|(path, label, icon, _)| NavItem { path, label, icon, current: below(path) });
        NavGroup { title, items: items.collect() }
    });
    groups.filter(|group| !group.items.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_durations_two_units() {
        for (size, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.00 kB"),
            (12_345, "12.3 kB"),
            (999_999, "1.00 MB"),
            (123_456_789, "123 MB"),
        ] {
            assert_eq!(bytes(&size), text);
        }
        for (ms, text) in [
            (0, "0.0 s"),
            (9_950, "9.9 s"),
            (59_999, "59 s"),
            (61_000, "1 min 1 s"),
            (3_660_000, "1 h 1 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(&ms), text);
        }
    }

    #[test]
    fn a_page_that_was_asked_for_comes_back_whole_from_a_query() {
        assert_eq!(with_query("/sign-in", "next", "/jobs?q=a b&x=1"), "/sign-in?next=/jobs%3Fq%3Da%20b%26x%3D1");
    }

    #[test]
    fn times_in_a_text_are_shown_as_times_and_nothing_of_it_as_html() {
        let shown = with_times("it <fails> & is tried at 2026-03-10T04:30:00Z");
        let time = "<time datetime=\"2026-03-10T04:30:00.000Z\">2026-03-10 04:30 UTC</time>";
        assert_eq!(shown.0, format!("it &#60;fails&#62; &#38; is tried at {time}"));
    }

    #[test]
    fn the_navigation_shows_where_its_reader_is_and_nothing_that_they_may_not_see() {
        let groups = navigation("/jobs/new", |permission| permission != Some(Permission::AuditRead));
        let items: Vec<&NavItem> = groups.iter().flat_map(|group| &group.items).collect();
        assert_eq!(items.iter().filter(|item| item.current).map(|item| item.path).collect::<Vec<_>>(), ["/jobs"]);
        assert!(items.iter().all(|item| item.path != "/access/audit-log"));
    }
}
