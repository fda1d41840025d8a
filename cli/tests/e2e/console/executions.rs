//! A run that is watched.

use nix::sys::signal::Signal;
use serde_json::json;

use super::signed_in;
use crate::harness::{
    Cluster, SOON,
    held::Held,
    proxy::Mode,
    source::{PostgresSource, job_without_workers},
    until,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_watched_live_and_cancelled_without_a_poll() {
    let cluster = Cluster::start().await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/executions").await;
    browser.until_text("Nothing has run yet").await;
    let held = Held::new(&cluster, json!({ "name": "Held" })).await;
    let id = held.run(&cluster).await;
    // The list hears of it by itself.
    browser
        .until(
            "the list shows it running",
            &format!("return document.querySelector('[data-execution=\"{id}\"]')?.dataset.status === 'Running'"),
        )
        .await;
    browser.press("Held").await;
    browser.until_path("/executions/").await;
    browser
        .until("its stage is told", "return document.querySelector('.stages .now')?.dataset.stage === 'Dumping'")
        .await;
    let stages = "return [...document.querySelectorAll('.stages li')].map((s) => `${s.dataset.stage} ${s.className} ${s.ariaCurrent ?? ''}`.trim())";
    assert_eq!(
        browser.js(stages).await,
        json!([
            "Queued done",
            "Initializing done",
            "Dumping now step",
            "Uploading to-come",
            "Verifying to-come",
            "Completed to-come"
        ])
    );
    browser.until("its log is there", "return document.querySelectorAll('#log li').length > 1").await;
    browser
        .until(
            "how much was read and how fast is told",
            "return /^\\d[\\d.]* [kM]B, \\d[\\d.]* [kM]?B\\/s$/.test(document.querySelector('[data-part=moved]').textContent)",
        )
        .await;
    browser
        .until(
            "how far it is",
            "const at = document.querySelector('[data-part=progress]').value; \
             return at > 0 && document.querySelector('[data-part=percent]').textContent === String(at)",
        )
        .await;
    // A poll would have come by then.
    browser.until("the page is five seconds old", "return performance.now() > 5000").await;
    let asked = "return performance.getEntriesByType('resource').map((r) => r.name).filter((name) => !name.includes('/assets/') && !name.endsWith('/events'))";
    assert_eq!(browser.js(asked).await, json!([]), "it asks for nothing while nothing happens");

    browser.press("Cancel").await;
    browser.until_text("no backup comes of it").await;
    browser.press("Cancel the run").await;
    browser.until_text("Cancelled").await;
    browser.until("it is shown as ended", "return !!document.getElementById('retry')").await;
    assert_eq!(cluster.ended(&id, SOON).await["outcome"], "Cancelled");

    // Searched.
    let shown = "return [...document.querySelectorAll('#log li')].filter((l) => !l.hidden).length";
    let before = browser.js(shown).await.as_u64().expect("a number");
    browser.fill("#log-search", "cancel").await;
    let found = browser.js(shown).await.as_u64().expect("a number");
    assert!(0 < found && found < before, "{found} of {before}");
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_shows_its_files_with_their_checksums_and_is_run_again() {
    let cluster = Cluster::start().await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::with_rows(100).await.config()).await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let run = cluster.backup(&job).await;
    let id = run["id"].as_str().expect("an id");
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go(&format!("/executions/{id}")).await;
    browser.until("its log is there", "return document.querySelectorAll('#log li').length > 1").await;
    let text = browser.text().await;
    for artifact in run["artifacts"].as_array().expect("artifacts") {
        for shown in ["path", "sha256"] {
            let value = artifact[shown].as_str().expect("text");
            assert!(text.contains(value), "{shown} {value} is not in {text}");
        }
    }
    let lines = run["logs"].as_array().expect("a log").len();
    assert_eq!(browser.js("return document.querySelectorAll('#log li').length").await, lines);
    browser.press("Run again").await;
    browser
        .until(
            "the new run is shown",
            &format!("return location.pathname.startsWith('/executions/') && !location.pathname.endsWith('{id}')"),
        )
        .await;
    browser.until("the new run succeeds", "return !!document.querySelector('#execution > .head .status.good')").await;
    until("both are there", SOON, || async {
        (cluster.count("select count(*) from executions where status = 'Success'").await == 2).then_some(())
    })
    .await;
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_lost_its_worker_shows_what_became_of_each_attempt() {
    let cluster = Cluster::start().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go(&format!("/executions/{id}")).await;
    assert_eq!(browser.js("return !!document.getElementById('attempts')").await, false);
    let lost = &cluster.workers[cluster.busy_worker()];
    lost.signal(Signal::SIGKILL);
    held.proxy.set(Mode::Pass);
    assert_eq!(cluster.ended(&id, SOON).await["status"], "Success");
    let rows = "return [...document.querySelectorAll('#attempts tbody tr')].map((row) => [0, 1, 3, 6].map((n) => row.children[n].innerText.trim()))";
    browser
        .until("both attempts are shown", "return document.querySelectorAll('#attempts tbody tr').length === 2")
        .await;
    let rows = browser.js(rows).await;
    let lost = rows[0][3].as_str().expect("an error").to_owned();
    assert!(lost.ends_with("stopped answering"), "{rows}");
    assert_eq!(rows, json!([["1", "Worker lost", "Dumping", lost], ["2", "Success", "Completed", "–"]]));
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_followed_copied_and_downloaded() {
    let cluster = Cluster::start().await;
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    let browser = signed_in(&cluster, &["*"]).await;
    // So low that every line has to be scrolled to.
    browser.look(false, 1280, 900).await;
    browser.go(&format!("/executions/{id}")).await;
    browser.js("const s = new CSSStyleSheet(); s.replaceSync('#log { height: 3em; overflow: auto }'); document.adoptedStyleSheets = [s]").await;
    browser.until("its log is there", "return document.querySelectorAll('#log li').length > 1").await;
    browser.click("#log-follow").await;
    browser.js("document.getElementById('log').scrollTop = 0").await;
    let before = browser.js("return document.querySelectorAll('#log li').length").await;
    held.proxy.set(Mode::Pass);
    browser.until("more lines come", &format!("return document.querySelectorAll('#log li').length > {before}")).await;
    assert_eq!(
        browser.js("return document.getElementById('log').scrollTop").await,
        0,
        "the reader is left where they read"
    );
    let lines = cluster.ended(&id, SOON).await["logs"].clone();
    let all = lines.as_array().expect("lines").len();
    browser
        .until("all lines are there", &format!("return document.querySelectorAll('#log li').length === {all}"))
        .await;

    browser.allow_clipboard().await;
    browser.press("Copy").await;
    browser.until_text("Copied.").await;
    let copied = browser.copied().await;
    let downloads = cluster.scratch.join("downloads");
    std::fs::create_dir(&downloads).expect("a folder");
    let to = json!({ "behavior": "allow", "downloadPath": downloads });
    browser.cdp("Browser.setDownloadBehavior", to).await;
    browser.click("#log-save").await;
    let file = downloads.join(format!("{id}.log"));
    let saved = until("the log is saved", SOON, || async {
        std::fs::read_to_string(&file).ok().filter(|text| !text.is_empty())
    })
    .await;
    assert_eq!(saved, copied);
    for line in lines.as_array().expect("lines") {
        for part in ["timestamp", "message"] {
            let part = line[part].as_str().expect("text");
            assert!(saved.contains(part), "{part} is not in {saved}");
        }
    }
    browser.assert_clean().await;
    drop(browser);

    // Followed: the newest line is in sight.
    let held = Held::new(&cluster, json!({})).await;
    let id = held.run(&cluster).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go(&format!("/executions/{id}")).await;
    browser.js("const s = new CSSStyleSheet(); s.replaceSync('#log { height: 3em; overflow: auto }'); document.adoptedStyleSheets = [s]").await;
    held.proxy.set(Mode::Pass);
    let all = cluster.ended(&id, SOON).await["logs"].as_array().expect("lines").len();
    browser
        .until("all lines are there", &format!("return document.querySelectorAll('#log li').length === {all}"))
        .await;
    browser.until("the last is in sight", "const l = document.getElementById('log'); return l.scrollTop > 0 && l.scrollTop + l.clientHeight >= l.scrollHeight - 1").await;
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn executions_are_filtered_by_job_status_and_outcome_and_all_are_shown_again() {
    let cluster = Cluster::build().workers(0).start().await;
    let job = job_without_workers(&cluster, json!({ "name": "Shop", "overlap": "allow" })).await;
    let other = job_without_workers(&cluster, json!({ "name": "Other" })).await;
    let (waiting, cancelled, others) =
        (cluster.trigger(&job).await, cluster.trigger(&job).await, cluster.trigger(&other).await);
    cluster.ok("POST", &format!("/api/executions/{cancelled}/cancel"), None).await;
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go("/executions").await;
    let choose = async |name: &str, value: &str| {
        let set = format!(
            "const f = document.querySelector('select[name={name}]'); f.value = '{value}'; f.dispatchEvent(new Event('change', {{ bubbles: true }}))"
        );
        browser.js(&set).await;
    };
    let shows = async |what: &str, ids: &[&String]| {
        let shown =
            "JSON.stringify([...document.querySelectorAll('[data-execution]')].map((row) => row.dataset.execution))";
        browser
            .until(
                what,
                &format!("return document.documentElement.dataset.ready === '' && {shown} === '{}'", json!(ids)),
            )
            .await;
    };
    shows("all of them", &[&others, &cancelled, &waiting]).await;
    choose("jobId", &job).await;
    shows("those of the job", &[&cancelled, &waiting]).await;
    choose("status", "Pending").await;
    shows("the one that waits", &[&waiting]).await;
    choose("status", "").await;
    shows("those of the job again", &[&cancelled, &waiting]).await;
    choose("outcome", "Cancelled").await;
    shows("the one that was cancelled", &[&cancelled]).await;
    choose("outcome", "Expired").await;
    browser.until_text("Nothing fits these filters").await;
    browser.press("Show all").await;
    shows("all of them again", &[&others, &cancelled, &waiting]).await;
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn executions_are_found_by_the_days_of_the_reader() {
    let cluster = Cluster::build().workers(0).start().await;
    let job = job_without_workers(&cluster, json!({ "overlap": "allow" })).await;
    let browser = signed_in(&cluster, &["*"]).await;
    // Half an hour before and after midnight, there.
    browser.cdp("Emulation.setTimezoneOverride", json!({ "timezoneId": "America/New_York" })).await;
    let (ninth, tenth) = (cluster.trigger(&job).await, cluster.trigger(&job).await);
    for (id, at) in [(&ninth, "2026-03-10T03:30:00Z"), (&tenth, "2026-03-10T04:30:00Z")] {
        let set = format!("update executions set queued_at = '{at}' where id = '{id}'");
        crate::harness::sql(&cluster.database, &set).await;
    }
    browser.go("/executions").await;
    let choose = async |name: &str, day: &str| {
        let set = format!(
            "const f = document.querySelector('[data-instant={name}]'); f.value = '{day}'; f.dispatchEvent(new Event('change', {{ bubbles: true }}))"
        );
        browser.js(&set).await;
    };
    let shows = async |what: &str, ids: &[&String]| {
        let shown =
            "JSON.stringify([...document.querySelectorAll('[data-execution]')].map((row) => row.dataset.execution))";
        browser
            .until(what, &format!("return document.readyState === 'complete' && {shown} === '{}'", json!(ids)))
            .await;
    };
    shows("both", &[&tenth, &ninth]).await;
    choose("from", "2026-03-10").await;
    shows("the one of the tenth", &[&tenth]).await;
    choose("to", "2026-03-10").await;
    browser.until("the last day is kept", "return location.search.includes('&to=2026-03-11T04')").await;
    shows("the one of the tenth, still", &[&tenth]).await;
    let days = "return [...document.querySelectorAll('[data-instant]')].map((field) => field.value)";
    assert_eq!(browser.js(days).await, json!(["2026-03-10", "2026-03-10"]));
    browser.go("/executions").await;
    choose("to", "2026-03-09").await;
    shows("the one of the ninth", &[&ninth]).await;
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn times_are_those_of_the_reader_and_the_exact_one_is_shown_on_hover() {
    let cluster = Cluster::build().workers(0).start().await;
    let job = job_without_workers(&cluster, json!({})).await;
    let id = cluster.trigger(&job).await;
    let set = format!("update executions set queued_at = '2025-03-10T03:30:00.125Z' where id = '{id}'");
    crate::harness::sql(&cluster.database, &set).await;
    let browser = signed_in(&cluster, &["*"]).await;
    let shown = "const t = document.querySelector('.facts time'); return [t.textContent, t.title]";
    browser.cdp("Emulation.setLocaleOverride", json!({ "locale": "en-GB" })).await;
    for (zone, text, day) in [
        ("America/New_York", "9 Mar 2025, 23:30", "9 March 2025"),
        ("Asia/Tokyo", "10 Mar 2025, 12:30", "10 March 2025"),
    ] {
        browser.cdp("Emulation.setTimezoneOverride", json!({ "timezoneId": zone })).await;
        browser.go(&format!("/executions/{id}")).await;
        let shown = browser.js(shown).await;
        let hover = shown[1].as_str().expect("text");
        assert_eq!(shown[0], text, "{zone}");
        assert!(hover.contains(day) && hover.ends_with("(2025-03-10T03:30:00.125Z)"), "{zone}: {hover}");
    }
    browser.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_downloaded_and_restored_and_what_would_be_replaced_is_asked_first() {
    let cluster = Cluster::start().await;
    let (destination, root) = cluster.local_destination().await;
    let shop = PostgresSource::with_rows(100).await;
    let source = cluster.source("postgres", shop.config()).await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    let run = cluster.backup(&job).await;
    let page = format!("/executions/{}", run["id"].as_str().expect("an id"));
    let browser = signed_in(&cluster, &["*"]).await;
    browser.go(&page).await;
    // What the link gives is what is stored: with the session, and from the place of this page.
    let fetched = "const a = document.querySelector('a[download]'); const r = await fetch(a.href); const b = await r.arrayBuffer();
                   const h = new Uint8Array(await crypto.subtle.digest('SHA-256', b));
                   window.fetched = [r.status, r.headers.get('content-disposition'), [...h].map((n) => n.toString(16).padStart(2, '0')).join('')]";
    browser.js(&format!("(async () => {{ {fetched} }})()")).await;
    let seen = browser.until("it is fetched", "return window.fetched").await;
    let path = run["path"].as_str().expect("a path");
    let stored = std::fs::read(root.join(path)).expect("a file");
    assert_eq!(seen[0], 200);
    assert!(seen[1].as_str().is_some_and(|name| name.contains(path.rsplit('/').next().expect("a name"))), "{seen}");
    assert_eq!(seen[2], hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&stored)));

    // Where everything is still there it is refused, in words.
    browser.press("Restore").await;
    browser.until_text("its checksum compared before anything is touched").await;
    browser.click("form button[type=submit]").await;
    browser.until_text("is not empty").await;
    browser.until_text("Restore again").await;
    crate::harness::source::psql(&shop.database, "delete from item where id > 10");

    browser.go(&format!("{page}/restore")).await;
    browser.click("[name=overwrite]").await;
    browser.click("form button[type=submit]").await;
    browser.until_text("with all that was written since").await;
    assert_eq!(cluster.count("select count(*) from restores").await, 1, "it was sent before the answer");
    browser.press("Replace and restore").await;
    browser
        .until("the restore is shown", "return document.querySelector('.stages')?.textContent.includes('Restoring')")
        .await;
    browser.until("it succeeds", "return !!document.querySelector('#execution > .head .status.good')").await;
    browser.until_text("replacing what is there").await;
    assert_eq!(crate::harness::source::psql(&shop.database, "select count(*) from item").trim(), "100");
    browser.assert_clean().await;

    // Whoever may not, sees neither.
    let reader = signed_in(&cluster, &["history:read", "jobs:execute"]).await;
    reader.go(&page).await;
    reader.until_text("Stored files").await;
    assert_eq!(reader.js("return document.querySelectorAll('#restore, a[download]').length").await, 0);
    reader.assert_clean().await;
}
