use super::*;

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn schedule(expression: &str, zone: &str) -> Schedule {
    Schedule::parse(expression, zone).unwrap_or_else(|e| panic!("{expression} {zone}: {e}"))
}

/// All times of a schedule between two moments, on its zone's clock.
fn times(expression: &str, zone: &str, from: &str, to: &str) -> Vec<String> {
    let schedule = schedule(expression, zone);
    let mut found = Vec::new();
    let mut now = at(from);
    while let Some(next) = schedule.next_after(now).filter(|next| *next < at(to)) {
        assert!(next > now, "{expression}: {next} is not after {now}");
        found.push(next.with_timezone(&schedule.zone).format("%dT%H:%M%z").to_string());
        now = next;
    }
    found
}

#[test]
fn a_time_that_the_spring_skips_comes_once_right_after_the_gap() {
    let berlin = |cron| times(cron, "Europe/Berlin", "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
    assert_eq!(berlin("30 2 * * *"), ["29T03:00+0200", "30T02:30+0200"]);
    assert_eq!(berlin("0 2,14 * * *"), ["28T14:00+0100", "29T03:00+0200", "29T14:00+0200", "30T02:00+0200"]);
    assert_eq!(berlin("*/20 2 * * *").len(), 4, "the skipped hour is one firing: {:?}", berlin("*/20 2 * * *"));
    assert_eq!(berlin("0 2,3 * * *"), ["29T03:00+0200", "30T02:00+0200", "30T03:00+0200"]);
    let new_york = times("30 2 * * *", "America/New_York", "2026-03-07T12:00:00Z", "2026-03-09T12:00:00Z");
    assert_eq!(new_york, ["08T03:00-0400", "09T02:30-0400"]);
}

#[test]
fn a_time_that_the_autumn_repeats_comes_once() {
    let berlin = |cron| times(cron, "Europe/Berlin", "2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
    assert_eq!(berlin("30 2 * * *"), ["25T02:30+0200", "26T02:30+0100"]);
    assert_eq!(berlin("0 2,14 * * *"), ["25T02:00+0200", "25T14:00+0100", "26T02:00+0100"]);
    assert_eq!(berlin("0,30 2 * * *"), ["25T02:00+0200", "25T02:30+0200", "26T02:00+0100", "26T02:30+0100"]);
    let new_york = times("30 1 * * *", "America/New_York", "2026-10-31T12:00:00Z", "2026-11-02T12:00:00Z");
    assert_eq!(new_york, ["01T01:30-0400", "02T01:30-0500"]);
}

#[test]
fn a_schedule_of_every_hour_follows_the_time_that_passes() {
    let spring = times("30 * * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", "2026-03-29T03:00:00Z");
    assert_eq!(spring, ["29T01:30+0100", "29T03:30+0200", "29T04:30+0200"]);
    let autumn = times("30 * * * *", "America/New_York", "2026-11-01T04:00:00Z", "2026-11-01T08:00:00Z");
    assert_eq!(autumn, ["01T00:30-0400", "01T01:30-0400", "01T01:30-0500", "01T02:30-0500"]);
    assert_eq!(times("@hourly", "Europe/Berlin", "2026-10-24T22:00:00Z", "2026-10-25T23:00:01Z").len(), 25);
}

#[test]
fn a_midnight_and_a_whole_day_that_are_skipped_are_made_up_after_the_gap() {
    // Cairo's clocks go forward at midnight; Samoa left out 30 December 2011.
    let cairo = times("0 0 * * *", "Africa/Cairo", "2026-04-23T12:00:00Z", "2026-04-25T12:00:00Z");
    assert_eq!(cairo, ["24T01:00+0300", "25T00:00+0300"]);
    let apia = times("0 3 * * *", "Pacific/Apia", "2011-12-29T00:00:00Z", "2012-01-01T00:00:00Z");
    assert_eq!(apia, ["29T03:00-1000", "31T00:00+1400", "31T03:00+1400", "01T03:00+1400"]);
}

#[test]
fn the_latest_time_until_now_is_the_one_that_fired_last() {
    for expression in ["30 2 * * *", "0,45 1-3 * * *", "15 0,2,23 * * *", "*/25 * * * *", "0 */2 * * *", "@daily"] {
        for (zone, from) in [
            ("Europe/Berlin", "2026-03-28T12:00:00Z"),
            ("Europe/Berlin", "2026-10-24T12:00:00Z"),
            ("America/New_York", "2026-03-07T17:00:00Z"),
            ("America/New_York", "2026-10-31T17:00:00Z"),
            ("Australia/Lord_Howe", "2026-04-04T00:00:00Z"),
        ] {
            let schedule = schedule(expression, zone);
            let mut last = schedule.next_after(at(from)).expect("it fires");
            for minute in (0..2 * 24 * 60).step_by(5) {
                let now = last.max(at(from) + TimeDelta::minutes(minute) + TimeDelta::milliseconds(700));
                while let Some(next) = schedule.next_after(last).filter(|next| *next <= now) {
                    last = next;
                }
                assert_eq!(schedule.latest_until(now), Some(last), "{expression} {zone} at {now}");
            }
        }
    }
}

#[test]
fn what_cannot_be_a_schedule_is_refused_with_its_field() {
    let fields = |schedule, zone| -> Vec<String> {
        let refused = problems(schedule, zone);
        assert!(refused.iter().all(|p| !p.message.is_empty() && !p.message.contains("Pattern")), "{refused:?}");
        refused.into_iter().map(|p| p.field).collect()
    };
    for good in [
        "0 3 * * *",
        "*/15 8-18 * * MON-FRI",
        "0 0 L * *",
        "0 0 15W * *",
        "0 0 * * 5#2",
        "0 4 1,15 * *",
        "0 0 29 2 *",
        "0 0 29 2 +MON",
        "@daily",
        " @weekly ",
    ] {
        assert_eq!(fields(Some(good), "Europe/Berlin"), [""; 0], "{good}");
    }
    let long = "0,".repeat(200) + "0 3 * * *";
    for bad in [
        "",
        "daily",
        "0 3 * *",
        "0 0 3 * * *",
        "60 3 * * *",
        "0 24 * * *",
        "0 3 32 * *",
        "0 3 * 13 *",
        "0 3 * * 8",
        "0 3-1 * * *",
        "@reboot",
        "0 0 31 2 *",
        "0 0 30 2 *",
        "0 0 31 4,6,9,11 *",
        "0 0 31W 2 *",
        "0 0 31 2 +MON#1",
        "*/0 * * * *",
        "0 3 * * \u{1F4A9}",
        &long,
    ] {
        assert_eq!(fields(Some(bad), "UTC"), ["schedule"], "{bad}");
    }
    for bad in ["", "Berlin", "europe/berlin", "Europe/Berlin ", "+01:00", "Mars/Olympus"] {
        assert_eq!(fields(None, bad), ["timezone"], "{bad}");
    }
    assert_eq!(fields(Some("x"), "y"), ["schedule", "timezone"]);
    assert_eq!(parse_expression("0 0 31 2 *"), Err(ScheduleError::Never));
}
