//! Schedules: the times at which a job runs by itself, as a cron expression on the wall clock of a time zone.
//!
//! When the clocks change, a schedule that names its hours (`30 2 * * *`, `0 2,14 * * 1-5`) fires once for each time
//! that it names: one that the day skips comes right after the gap, and of one that comes twice the first counts. A
//! schedule of every hour or every few (`*/15 * * * *`, `0 */6 * * *`) follows the time that passes: nothing is made
//! up for an hour that the day skips, and an hour that comes twice fires twice.
//!
//! What is absent on purpose: seconds (a backup is no heartbeat), and this process's clock. Whoever asks brings the
//! time, which is the database's.

pub mod fire;

use chrono::{DateTime, Datelike, Days, LocalResult, NaiveDate, NaiveDateTime, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;
use croner::{
    Cron, Weekday,
    errors::CronError,
    parser::{CronParser, Seconds, Year},
};

use crate::connection::FieldProblem;

/// Longest expression that is read.
const MOST_CHARACTERS: usize = 200;
const FIELDS: [&str; 5] = ["minute", "hour", "day of month", "month", "day of week"];
/// No zone sets its clock back by more.
const LONGEST_REPEAT: TimeDelta = TimeDelta::hours(3);

/// Times at which a job runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    cron: Cron,
    zone: Tz,
}

/// Why a schedule is refused; the text goes on after the name of the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// Not understood.
    #[error(
        "is not a cron expression ({0}): write minute, hour, day of month, month and day of week, such as \"0 3 * * *\", or a nickname such as @daily"
    )]
    Expression(String),
    /// No day is so.
    #[error("never fires: there is no such day")]
    Never,
    /// Not in the database of zones.
    #[error("is not an IANA time zone: write a name such as \"Europe/Berlin\" or \"UTC\"")]
    Zone,
}

impl Schedule {
    /// Reads a stored or sent schedule.
    pub fn parse(expression: &str, timezone: &str) -> Result<Self, ScheduleError> {
        Ok(Self { cron: parse_expression(expression)?, zone: parse_zone(timezone)? })
    }

    /// The first time after `time`; `None` when there is none until the end of the calendar.
    pub fn next_after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let local = time.with_timezone(&self.zone);
        if self.follows_time() {
            return Some(self.cron.find_next_occurrence(&local, false).ok()?.to_utc());
        }
        // Later wall clock times are never earlier instants, so the first one that is after `time` is the next.
        let mut named = local.naive_local();
        loop {
            named = self.cron.find_next_occurrence(&named, false).ok()?;
            let instant = self.instant_of(named)?;
            if instant > time {
                return Some(instant);
            }
        }
    }

    /// The last time that is not after `time`.
    pub fn latest_until(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let local = time.with_timezone(&self.zone);
        if self.follows_time() {
            return Some(self.cron.find_previous_occurrence(&local, true).ok()?.to_utc());
        }
        // In an hour that comes a second time, the times that it names were all in the first one: look from behind it.
        let mut named = local.naive_local().checked_add_signed(LONGEST_REPEAT)?;
        loop {
            named = self.cron.find_previous_occurrence(&named, false).ok()?;
            let instant = self.instant_of(named)?;
            if instant <= time {
                return Some(instant);
            }
        }
    }

    /// Every hour or every few, instead of hours by name.
    fn follows_time(&self) -> bool {
        self.cron.pattern.hours.from_wildcard
    }

    /// The moment at which the zone's wall clock shows this for the first time, or, when it skips it, the moment
    /// right after the gap.
    fn instant_of(&self, named: NaiveDateTime) -> Option<DateTime<Utc>> {
        match self.zone.from_local_datetime(&named) {
            LocalResult::Single(instant) | LocalResult::Ambiguous(instant, _) => Some(instant.to_utc()),
            LocalResult::None => self.end_of_gap(named),
        }
    }

    fn end_of_gap(&self, skipped: NaiveDateTime) -> Option<DateTime<Utc>> {
        let exists = |time: &NaiveDateTime| !matches!(self.zone.from_local_datetime(time), LocalResult::None);
        // A day may be left out whole where the date line was moved. Two days on, the clock is past any gap.
        let mut before = skipped;
        let mut after = skipped.checked_add_days(Days::new(2))?;
        while after - before > TimeDelta::seconds(1) {
            let middle = before + TimeDelta::seconds((after - before).num_seconds() / 2);
            if exists(&middle) { after = middle } else { before = middle }
        }
        Some(self.zone.from_local_datetime(&after).earliest()?.to_utc())
    }
}

fn parse_expression(text: &str) -> Result<Cron, ScheduleError> {
    if text.len() > MOST_CHARACTERS {
        return Err(ScheduleError::Expression(format!("longer than {MOST_CHARACTERS} characters")));
    }
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    let cron = parser.parse(text).map_err(|error| ScheduleError::Expression(reason(&parser, text, error)))?;
    if has_a_day(&cron) { Ok(cron) } else { Err(ScheduleError::Never) }
}

/// Whether there is a day that the expression means. Within 40 years every date falls on every day of the week,
/// 29 February too; the search for the next time would go on for thousands of years.
fn has_a_day(cron: &Cron) -> bool {
    NaiveDate::default().iter_days().take(40 * 366).any(|day| {
        let weekday = Weekday::from_days_from_sunday(day.weekday().num_days_from_sunday());
        let of_the_month = cron.pattern.day_match(day.year(), day.month(), day.day(), weekday);
        cron.pattern.month_match(day.month()).unwrap_or(false) && of_the_month.unwrap_or(false)
    })
}

/// The parser's words, without its own name, and with the name of the field that it stumbled over: it tells none.
fn reason(parser: &CronParser, text: &str, error: CronError) -> String {
    let words = match error {
        CronError::EmptyPattern => "it is empty".to_owned(),
        CronError::InvalidPattern(text) | CronError::IllegalCharacters(text) | CronError::ComponentError(text) => {
            text.trim_end_matches('.').replace("CronPattern", "it").replace("Pattern", "it")
        }
        error => error.to_string(),
    };
    let parts: Vec<&str> = text.split_whitespace().collect();
    if parts.len() != FIELDS.len() {
        return words;
    }
    let refused = |at: &usize| {
        let mut alone = ["*"; FIELDS.len()];
        alone[*at] = parts[*at];
        parser.parse(&alone.join(" ")).is_err()
    };
    match (0..FIELDS.len()).find(refused) {
        Some(at) => format!("{} \"{}\": {words}", FIELDS[at], parts[at]),
        None => words,
    }
}

fn parse_zone(name: &str) -> Result<Tz, ScheduleError> {
    name.parse().map_err(|_| ScheduleError::Zone)
}

/// When a job fires next, planned at the time `now`; `None` without a schedule, and for one that is paused.
pub fn plan(enabled: bool, schedule: Option<&str>, timezone: &str, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    let schedule = schedule.filter(|_| enabled)?;
    Schedule::parse(schedule, timezone).ok()?.next_after(now)
}

/// What is wrong with a schedule that a client sent, by field.
pub fn problems(schedule: Option<&str>, timezone: &str) -> Vec<FieldProblem> {
    let expression = schedule.and_then(|text| parse_expression(text).err()).map(|error| ("schedule", error));
    let zone = parse_zone(timezone).err().map(|error| ("timezone", error));
    expression.into_iter().chain(zone).map(|(field, error)| FieldProblem::new(field, error.to_string())).collect()
}

#[cfg(test)]
mod tests;
