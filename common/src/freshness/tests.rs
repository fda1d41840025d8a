use serde_json::json;

use super::*;

fn time(text: &str) -> DateTime<Utc> {
    text.parse().expect("a time")
}

/// A job made on a Wednesday.
fn job(now: &str) -> Row {
    Row {
        id: JobId::new(),
        slug: "shop".to_owned(),
        name: "Shop".to_owned(),
        source_id: SourceId::new(),
        schedule: None,
        timezone: "Europe/Berlin".to_owned(),
        enabled: true,
        expect_every_seconds: None,
        created_at: time("2025-01-01T09:00:00Z"),
        snapshot_at: None,
        duration_ms: None,
        size_bytes: None,
        now: time(now),
    }
}

fn judged(job: Row) -> (State, bool, Option<String>) {
    let job = job.judge();
    (job.state, job.healthy, job.expected_by.map(|by| by.to_rfc3339()))
}

#[test]
fn a_job_is_overdue_by_its_snapshot_whether_it_has_a_schedule_or_is_paused_or_not() {
    let snapshot = Some(time("2025-01-10T00:00:00Z"));
    let by = Some("2025-01-10T01:00:00+00:00".to_owned());
    for (schedule, enabled) in [(None, true), (None, false), (Some("0 3 * * *".to_owned()), false)] {
        let job = |now| Row {
            snapshot_at: snapshot,
            expect_every_seconds: Some(3_600),
            schedule: schedule.clone(),
            enabled,
            ..job(now)
        };
        let fine = if enabled { State::Fresh } else { State::Paused };
        assert_eq!(judged(job("2025-01-10T01:00:00Z")), (fine, true, by.clone()));
        assert_eq!(judged(job("2025-01-10T01:00:01Z")), (State::Overdue, false, by.clone()));
    }
    assert_eq!(judged(Row { snapshot_at: snapshot, ..job("2035-01-01T00:00:00Z") }), (State::Fresh, true, None));
}

#[test]
fn a_schedule_expects_the_backup_of_each_of_its_times_by_the_next_one_over_weekends_and_changes_of_the_clock() {
    let daily = |snapshot: &str, now: &str| Row {
        snapshot_at: Some(time(snapshot)),
        schedule: Some("0 3 * * 1-5".to_owned()),
        ..job(now)
    };
    // From Friday: Monday's at three is to be there by Tuesday at three.
    let by = Some("2025-01-14T02:00:00+00:00".to_owned());
    assert_eq!(judged(daily("2025-01-10T02:00:01Z", "2025-01-14T02:00:00Z")), (State::Fresh, true, by.clone()));
    let late = daily("2025-01-10T02:00:01Z", "2025-01-14T02:00:01Z");
    assert_eq!(late.due().map(|due| due.interval.num_hours()), Some(71), "the weekend is not an outage");
    assert_eq!(judged(late), (State::Overdue, false, by));
    // In summer three o'clock in Berlin is an hour earlier.
    let by = judged(daily("2025-03-28T02:00:01Z", "2025-03-29T00:00:00Z")).2;
    assert_eq!(by.as_deref(), Some("2025-04-01T01:00:00+00:00"));
}

#[test]
fn a_job_without_a_good_backup_is_told_and_needs_somebody_once_one_was_expected() {
    let expects = |now| Row { expect_every_seconds: Some(86_400), ..job(now) };
    assert!(matches!(judged(expects("2025-01-02T08:00:00Z")), (State::NeverSucceeded, true, Some(_))));
    assert!(matches!(judged(expects("2025-01-02T10:00:00Z")), (State::NeverSucceeded, false, Some(_))));
    assert_eq!(judged(job("2025-01-01T09:00:01Z")), (State::NeverSucceeded, false, None), "nothing says when");
    let paused = Row { enabled: false, schedule: Some("@daily".to_owned()), ..job("2025-06-01T00:00:00Z") };
    assert_eq!(judged(paused), (State::Paused, true, None));
}

fn source(slug: &str, host: &str, named: &[&str], has_job: bool, seen: &[&str]) -> Inventory {
    let Value::Object(config) = json!({ "host": host, "databases": named }) else { unreachable!() };
    let seen = (!seen.is_empty()).then(|| seen.iter().map(|name| (*name).to_owned()).collect());
    Inventory {
        id: SourceId::new(),
        slug: slug.to_owned(),
        engine: Engine::Postgres,
        config,
        has_job,
        seen,
        seen_at: None,
    }
}

#[test]
fn a_database_is_uncovered_when_no_job_of_any_source_of_its_server_names_it_and_is_told_once() {
    let all = ["crm", "postgres", "shop", "wiki"];
    let mut sources = vec![
        source("shop", "db", &["shop"], true, &all),
        source("wiki", "DB", &["wiki"], true, &all),
        source("spare", "db", &["shop", "old"], false, &all),
    ];
    // The same port as the others, by its number.
    sources[1].config.insert("port".to_owned(), json!(5432));
    sources.push(source("far", "elsewhere", &["shop"], false, &[]));
    let told: Vec<(String, Vec<String>)> =
        gaps(sources).into_iter().map(|gap| (gap.source_slug, gap.databases)).collect();
    let expected = [("shop", "crm"), ("spare", "old"), ("far", "shop")];
    let expected: Vec<_> = expected.map(|(slug, name)| (slug.to_owned(), vec![name.to_owned()])).into();
    assert_eq!(told, expected);
}
