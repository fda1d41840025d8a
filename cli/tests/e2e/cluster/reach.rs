//! Who may leave a run to whom, by what workers reach: folders that are not mounted everywhere, servers that are newer than
//! the tools of some.

use std::{
    os::unix::fs::symlink,
    path::PathBuf,
    time::{Duration, Instant},
};

use common::{
    destination,
    execution::claim::{self, Claimant},
    id::ExecutionId,
    source::Engine,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{last_seen, named, register, untested_destination, waits_for, worker_is};
use crate::{
    bad_dumps::{tools, write_script},
    harness::{
        Cluster, LEASE, SOON, as_root, claimant, files, id, postgres_port,
        process::binary,
        proxy::{Mode, Proxy},
        source::PostgresSource,
        sql, until,
    },
    restores::{empty_database, restore},
};

/// A worker whose folders are where a link leads, and which looks at them seldom.
async fn add_linked_worker(cluster: &mut Cluster, name: &str) -> std::path::PathBuf {
    let link = cluster.scratch.join(name);
    symlink(&cluster.scratch, &link).expect("links");
    let paths = ("DBACKUP_LOCAL_PATHS", link.display().to_string());
    cluster.add_worker(&[named(name)[0].clone(), paths, ("DBACKUP_TICKER_MS", LEASE.as_millis().to_string())]).await;
    link
}

fn lacks(worker: &Value, id: &str) -> bool {
    worker["outOfReach"].get(id).is_some()
}

/// Waits until runs wait for the cordoned worker that can: they may be claimed before, and are given back.
async fn are_left(cluster: &Cluster, runs: &[String]) {
    for run in runs {
        until(&format!("{run} is left to others"), SOON, || async {
            let state = cluster.execution(run).await;
            (state["status"] == "Pending" && state["waitingFor"]["reason"] == "workers_cordoned").then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_misses_a_mount_fails_nothing_that_another_can_do() {
    let mut cluster = Cluster::build().workers(0).env("DBACKUP_METRICS_LISTEN", "127.0.0.1:0").start().await;
    let link = add_linked_worker(&mut cluster, "lacking").await;
    cluster.add_worker(&named("able")).await;
    let (destination, _) = cluster.local_destination().await;
    let source = PostgresSource::with_rows(10).await;
    let held = cluster.source("postgres", source.config()).await;
    let job = cluster.job(&held, &[&destination], json!({ "overlap": "allow" })).await;
    let backup = cluster.backup(&job).await;

    // It goes while both work, faster than the worker looks.
    cluster.ok("POST", "/api/cluster/workers/able/cordon", None).await;
    std::fs::remove_file(&link).expect("unmounts");
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(cluster.trigger(&job).await);
    }
    are_left(&cluster, &waiting).await;
    // After that: a restore that it claims before it knows what it lacks is out of its reach until it is over.
    let into = empty_database(&source).await;
    waiting.push(restore(&cluster, &backup, json!({ "into": into })).await);
    are_left(&cluster, &waiting).await;
    let seen = worker_is(&cluster, "lacking", "hindered", |worker| lacks(worker, &destination)).await;
    let why = seen["outOfReach"][&destination].as_str().expect("a sentence");
    assert!(why.contains("DBACKUP_LOCAL_PATHS") && why.contains("destination '"), "{why}");
    // Not for everybody: it names destinations and their folders.
    let scoped = cluster.scoped_key(&["*"], Some(vec![job.parse().expect("an id")])).await;
    let (_, cordoned) = cluster.request_as(&scoped, "POST", "/api/cluster/workers/lacking/cordon", None).await;
    assert_eq!(cordoned["data"]["outOfReach"], json!({}), "{cordoned:#}");
    cluster.ok("POST", "/api/cluster/workers/lacking/uncordon", None).await;
    let (_, hidden) = cluster.request_as(&scoped, "GET", "/api/cluster", None).await;
    let workers = hidden["data"]["workers"].as_array().expect("workers");
    assert!(workers.len() == 2 && workers.iter().all(|worker| worker["outOfReach"] == json!({})), "{hidden:#}");
    until("a scrape tells", SOON, || async {
        (cluster.told("dbackup_workers_hindered", &[]).await == Some(1.0)).then_some(())
    })
    .await;
    let (_, status, _) = cluster.dbackup(&["status"], "");
    assert!(status.contains(&destination) && status.contains(why), "{status}");
    cluster.ok("POST", "/api/cluster/workers/able/uncordon", None).await;
    for run in &waiting {
        cluster.in_status(run, "Success", SOON).await;
    }
    let failed = "select count(*) from executions where failures > 0 or rescues > 0";
    assert_eq!(cluster.count(failed).await, 0, "a run was failed for the worker's lack");

    // Back again, it takes its part.
    cluster.ok("POST", "/api/cluster/workers/able/cordon", None).await;
    symlink(&cluster.scratch, &link).expect("mounts");
    worker_is(&cluster, "lacking", "whole", |worker| worker["outOfReach"] == json!({})).await;
    assert!(cluster.backup(&job).await["logs"].to_string().contains("on worker lacking"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_one_worker_has_lost_fails_nothing_that_another_can_do() {
    let mut cluster = Cluster::build().workers(0).start().await;
    // A worker with mounts of its own, as in a container.
    let programs = cluster.scratch.join("programs");
    std::fs::create_dir(&programs).expect("a folder");
    let script = format!("#!/bin/bash\nexec unshare --mount {} \"$@\"\n", binary("dbackup-worker").display());
    write_script(&programs.join("dbackup-worker"), &script);
    cluster.use_programs(Some(&programs));
    let seldom = ("DBACKUP_TICKER_MS", LEASE.as_millis().to_string());
    let lacking = cluster.add_worker(&[named("lacking")[0].clone(), seldom]).await.pid().to_string();
    cluster.use_programs(None);
    cluster.add_worker(&named("able")).await;
    let (destination, root) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    cluster.ok("POST", "/api/cluster/workers/able/cordon", None).await;
    assert!(cluster.backup(&job).await["logs"].to_string().contains("on worker lacking"));
    // An empty folder lies there from now on, as under a mount that is gone.
    let root = root.display().to_string();
    as_root("nsenter", &["--target", &lacking, "--mount", "mount", "-t", "tmpfs", "tmpfs", &root]);
    let waiting = [cluster.trigger(&job).await, cluster.trigger(&job).await, cluster.trigger(&job).await];
    are_left(&cluster, &waiting).await;
    let seen = worker_is(&cluster, "lacking", "hindered", |worker| lacks(worker, &destination)).await;
    assert!(seen["outOfReach"].to_string().contains("is the mount missing?"), "{seen:#}");
    cluster.ok("POST", "/api/cluster/workers/able/uncordon", None).await;
    for run in &waiting {
        cluster.in_status(run, "Success", SOON).await;
    }
    assert_eq!(cluster.count("select count(*) from executions where failures > 0").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_no_worker_reaches_ends_with_what_is_in_the_way() {
    let mut cluster = Cluster::build().workers(0).start().await;
    cluster.add_worker(&named("able")).await;
    let (destination, root) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let job = cluster.job(&source, &[&destination], json!({ "maxAttempts": 3 })).await;
    let link = add_linked_worker(&mut cluster, "lacking").await;
    std::fs::remove_file(&link).expect("unmounts");
    worker_is(&cluster, "lacking", "hindered", |worker| lacks(worker, &destination)).await;
    cluster.workers[0].signal(Signal::SIGTERM);
    cluster.workers[0].end(SOON).await;
    last_seen(&cluster, "able", "now").await;
    // Its successor is waited for.
    let waiting = cluster.trigger(&job).await;
    let said = waits_for(&cluster, &waiting, "out_of_reach").await;
    assert!(said.contains("'default'") && said.contains("outOfReach"), "{said}");
    last_seen(&cluster, "able", "four leases ago").await;
    let ended = cluster.ended(&waiting, SOON).await;
    assert_eq!(
        (ended["errorCode"].as_str(), ended["attempt"].as_i64()),
        (Some("path_not_allowed"), Some(1)),
        "{ended:#}"
    );

    // The mount that everybody misses.
    symlink(&cluster.scratch, &link).expect("mounts");
    cluster.add_worker(&named("able")).await;
    worker_is(&cluster, "lacking", "whole", |worker| worker["outOfReach"] == json!({})).await;
    std::fs::remove_file(root.join(".dbackup-store")).expect("unmounts");
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!(ended["errorCode"], "store_missing", "{ended:#}");
}

/// A worker whose tools are older than the server, and one that is cordoned; the folder of the old tools, a source and a
/// destination.
async fn with_old_tools() -> (Cluster, PathBuf, String, String) {
    let mut cluster = Cluster::build().workers(0).start().await;
    let bin = tools(&cluster.scratch, "exit 7");
    write_script(&bin.join("pg_dump"), "#!/bin/bash\necho 'pg_dump (PostgreSQL) 9.6.24'\n");
    cluster.add_worker(&[named("old")[0].clone(), ("DBACKUP_POSTGRES_BIN", bin.display().to_string())]).await;
    cluster.add_worker(&named("able")).await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    cluster.ok("POST", "/api/cluster/workers/able/cordon", None).await;
    (cluster, bin, source, destination)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_server_is_newer_than_the_tools_of_a_worker_is_left_to_one_with_newer_tools() {
    let (cluster, bin, source, destination) = with_old_tools().await;
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    let waiting = [cluster.trigger(&job).await, cluster.trigger(&job).await];
    are_left(&cluster, &waiting).await;
    let seen = worker_is(&cluster, "old", "hindered", |worker| lacks(worker, &source)).await;
    let why = seen["outOfReach"][&source].as_str().expect("a sentence");
    assert!(why.contains("install postgresql-client-"), "{why}");
    cluster.ok("POST", "/api/cluster/workers/able/uncordon", None).await;
    for run in &waiting {
        cluster.in_status(run, "Success", SOON).await;
    }
    // With other tools it is asked again.
    std::fs::remove_file(bin.join("pg_dump")).expect("removes");
    worker_is(&cluster, "old", "without a dump tool", |worker| worker["outOfReach"] == json!({})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_given_back_again_and_again_ends_with_its_own_error() {
    let (cluster, _, source, destination) = with_old_tools().await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": true }))).await;
    let run = cluster.trigger(&job).await;
    sql(&cluster.database, "update executions set attempt = 30").await;
    cluster.ok("PATCH", "/api/settings", Some(json!({ "paused": false }))).await;
    let ended = cluster.ended(&run, SOON).await;
    assert_eq!((&ended["errorCode"], &ended["attempt"]), (&json!("client_too_old"), &json!(31)), "{ended:#}");
}

/// Whether `mine` takes a run that it would leave to `another`.
async fn takes_beside(conn: &mut PgConnection, mine: &Claimant, another: &Claimant, taken: bool) {
    // Out of the way: the cluster's own workers, and those of the round before.
    sqlx::query("update workers set pools = '{elsewhere}'").execute(&mut *conn).await.expect("updates");
    for worker in [mine, another] {
        register(conn, worker, &worker.engines).await;
    }
    assert_eq!(takes(conn, mine).await, taken, "{mine:?} beside {another:?}");
}

/// Whether the next claim of `me` takes a run; it is given back.
async fn takes(conn: &mut PgConnection, me: &Claimant) -> bool {
    let claims = claim::claim(conn, me, LEASE, 1).await.expect("answers");
    for query in ["delete from execution_leases", "update executions set status = 'Pending' where status = 'Running'"] {
        sqlx::query(query).execute(&mut *conn).await.expect("gives back");
    }
    !claims.is_empty()
}

/// The folders that workers of a pool look at.
async fn folders(conn: &mut PgConnection, pool: &str) -> Vec<Uuid> {
    let folders = destination::folders(conn, &[pool.to_owned()]).await.expect("answers");
    folders.iter().map(|folder| folder.id.0).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_left_only_to_a_worker_that_can_do_all_of_it() {
    let cluster = Cluster::build().workers(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let stores = [untested_destination(&cluster).await, untested_destination(&cluster).await];
    let [one, other] = [0, 1].map(|at| stores[at].parse::<Uuid>().expect("an id"));
    let source_id: Uuid = source.parse().expect("an id");
    let job = cluster.job(&source, &[&stores[0], &stores[1]], json!({})).await;
    cluster.trigger(&job).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let postgres = || vec![Engine::Postgres];
    let of = |engines: Vec<Engine>, out_of_reach: &[Uuid]| Claimant {
        engines,
        out_of_reach: out_of_reach.to_vec(),
        ..claimant()
    };
    for (mine, another, taken) in [
        (of(postgres(), &[]), of(postgres(), &[]), true),
        (of(postgres(), &[one]), of(postgres(), &[]), false),
        (of(postgres(), &[source_id]), of(postgres(), &[]), false),
        (of(postgres(), &[one]), of(postgres(), &[one]), true),
        // Each can what the other cannot: it must not wait for ever.
        (of(postgres(), &[one]), of(postgres(), &[other]), true),
        (of(postgres(), &[one]), of(postgres(), &[source_id]), true),
        (of(postgres(), &[one]), of(vec![Engine::Mariadb], &[]), true),
        // Another pool.
        (of(postgres(), &[one]), Claimant { pools: vec!["far".to_owned()], ..of(postgres(), &[]) }, true),
    ] {
        takes_beside(&mut conn, &mine, &another, taken).await;
        let four_leases_ago = "update workers set seen_at = clock_timestamp() - $1 * interval '1 second'";
        sqlx::query(four_leases_ago).bind(4.0 * LEASE.as_secs_f64()).execute(&mut *conn).await.expect("updates");
        assert!(takes(&mut conn, &mine).await, "{another:?} was not seen for long");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_job_has_another_source_now_is_left_by_where_it_goes_itself() {
    let cluster = Cluster::build().workers(0).start().await;
    let [source, another] = [
        cluster.source("postgres", PostgresSource::empty().await.config()).await,
        cluster.source("postgres", PostgresSource::empty().await.config()).await,
    ];
    let [before, now] = [untested_destination(&cluster).await, untested_destination(&cluster).await];
    sql(&cluster.database, "update destinations set ready_at = now()").await;
    let job = cluster.job(&source, &[&before], json!({})).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let run = ExecutionId(cluster.trigger(&job).await.parse().expect("an id"));
    let of = |id: &str| Claimant { out_of_reach: vec![id.parse().expect("an id")], ..claimant() };
    let far = || Claimant { pools: vec!["far".to_owned()], ..claimant() };
    let mariadb = || Claimant { engines: vec![Engine::Mariadb], ..claimant() };
    let elsewhere = [
        (of(&before), claimant(), false),
        (of(&source), claimant(), false),
        (of(&before), of(&before), true),
        (of(&before), of(&source), true),
        (of(&before), mariadb(), true),
        (of(&before), far(), true),
        (of(&now), claimant(), true),
        (of(&another), claimant(), true),
    ];
    // With the source that it was triggered for a run follows its job again.
    let back = [(of(&before), claimant(), true), (of(&now), claimant(), false), (of(&source), claimant(), false)];
    for (source, cases) in [(&another, &elsewhere[..]), (&source, &back[..])] {
        let change = json!({ "sourceId": source, "destinationIds": [now] });
        cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(change)).await;
        for (mine, other, taken) in cases {
            takes_beside(&mut conn, mine, other, *taken).await;
            let left = claim::is_for_others(&mut conn, run, mine, LEASE).await.expect("answers");
            assert_eq!(left, !taken, "{mine:?} gives it back to {other:?}");
        }
    }
    cluster.ok("PUT", &format!("/api/jobs/{job}"), Some(json!({ "sourceId": another }))).await;
    sqlx::query("delete from job_destinations").execute(&mut *conn).await.expect("deletes");
    assert_eq!(
        (folders(&mut conn, "default").await, folders(&mut conn, "far").await),
        (of(&now).out_of_reach, vec![]),
        "where the run goes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_many_runs_to_others_is_not_slow_about_it() {
    let cluster = Cluster::build().workers(0).start().await;
    let [source, another] = [
        cluster.source("postgres", PostgresSource::empty().await.config()).await,
        cluster.source("postgres", PostgresSource::empty().await.config()).await,
    ];
    let destination = untested_destination(&cluster).await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    crate::harness::history::fill(&cluster, &job, 0, 100_000).await;
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let lacking = Claimant { out_of_reach: vec![destination.parse().expect("an id")], ..claimant() };
    let whole = claimant();
    takes_beside(&mut conn, &lacking, &whole, false).await;
    for source in [&source, &another] {
        sqlx::query("update jobs set source_id = $1::uuid").bind(source).execute(&mut *conn).await.expect("updates");
        // PostgreSQL may take another plan from the sixth call on. A worker gives a claim up after five seconds.
        for round in 0..8 {
            let began = Instant::now();
            assert!(!takes(&mut conn, &lacking).await);
            assert!(began.elapsed() < Duration::from_secs(5), "round {round}: {:?}", began.elapsed());
        }
    }
    assert!(takes(&mut conn, &whole).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_left_to_others_also_when_the_database_is_away_in_that_moment() {
    let mut cluster = Cluster::build().workers(0).start().await;
    let (bin, gate) = (tools(&cluster.scratch, "exit 7"), cluster.scratch.join("gate"));
    let asked = cluster.scratch.join("asked");
    let script = format!(
        "#!/bin/bash\nwhile [ -e {} ]; do touch {}; sleep 0.02; done\necho 'pg_dump (PostgreSQL) 9.6.24'\n",
        gate.display(),
        asked.display()
    );
    write_script(&bin.join("pg_dump"), &script);
    let proxy = Proxy::start(postgres_port()).await;
    let url = ("DATABASE_URL", cluster.database_url_at(proxy.port));
    let bins = ("DBACKUP_POSTGRES_BIN", bin.display().to_string());
    cluster.add_worker(&[named("old")[0].clone(), bins, url]).await;
    cluster.add_worker(&named("able")).await;
    let (destination, _) = cluster.local_destination().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let job = cluster.job(&source, &[&destination], json!({})).await;
    cluster.ok("POST", "/api/cluster/workers/able/cordon", None).await;
    std::fs::write(&gate, "").expect("closes");
    let run = cluster.trigger(&job).await;
    until("its tool is asked", SOON, || async { asked.exists().then_some(()) }).await;
    proxy.set(Mode::Cut);
    std::fs::remove_file(&gate).expect("opens");
    cluster.workers[0].says("a heartbeat failed", SOON).await;
    proxy.set(Mode::Pass);
    are_left(&cluster, &[run]).await;
    assert_eq!(cluster.count("select count(*) from executions where failures > 0").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_left_to_a_worker_that_reaches_the_copy_that_is_whole() {
    let mut cluster = Cluster::build().workers(0).start().await;
    cluster.add_worker(&named("able")).await;
    let [(first, damaged), (second, _)] = [cluster.local_destination().await, cluster.local_destination().await];
    let source = PostgresSource::with_rows(10).await;
    let held = cluster.source("postgres", source.config()).await;
    let backup = cluster.backup(&cluster.job(&held, &[&first, &second], json!({})).await).await;
    for file in files(&damaged).into_iter().map(|file| damaged.join(file)) {
        std::fs::write(file, "damaged").expect("damages");
    }
    let paths = ("DBACKUP_LOCAL_PATHS", damaged.display().to_string());
    cluster.add_worker(&[named("lacking")[0].clone(), paths]).await;
    cluster.ok("POST", "/api/cluster/workers/able/cordon", None).await;
    let into = empty_database(&source).await;
    let run = restore(&cluster, &backup, json!({ "into": into })).await;
    are_left(&cluster, std::slice::from_ref(&run)).await;
    worker_is(&cluster, "lacking", "hindered", |worker| lacks(worker, &run) && lacks(worker, &second)).await;
    cluster.ok("POST", "/api/cluster/workers/able/uncordon", None).await;
    cluster.in_status(&run, "Success", SOON).await;
    source.assert_same(&into).await;
    // What is over is nothing that a worker could lack.
    worker_is(&cluster, "lacking", "hindered", |worker| !lacks(worker, &run) && lacks(worker, &second)).await;
    // With no such worker it ends, and says what is wrong with both.
    let into = empty_database(&source).await;
    cluster.workers[0].signal(Signal::SIGTERM);
    cluster.workers[0].end(SOON).await;
    last_seen(&cluster, "able", "four leases ago").await;
    let run = restore(&cluster, &backup, json!({ "into": into })).await;
    let ended = cluster.ended(&run, SOON).await;
    let error = ended["error"].as_str().expect("an error");
    assert!(error.contains("is cut off") && error.contains("DBACKUP_LOCAL_PATHS"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_needs_one_copy_within_reach() {
    let cluster = Cluster::start().await;
    let [(first, _), (second, _)] = [cluster.local_destination().await, cluster.local_destination().await];
    let source = PostgresSource::with_rows(10).await;
    let held = cluster.source("postgres", source.config()).await;
    let job = cluster.job(&held, &[&first, &second], json!({})).await;
    let backup = cluster.backup(&job).await;
    for worker in super::view(&cluster).await["workers"].as_array().expect("workers") {
        cluster.ok("POST", &format!("/api/cluster/workers/{}/cordon", id(worker)), None).await;
    }
    let restore: Uuid = restore(&cluster, &backup, json!({ "into": "elsewhere" })).await.parse().expect("an id");
    let [one, other] = [&first, &second].map(|text| text.parse::<Uuid>().expect("an id"));
    let mut conn = cluster.pool.acquire().await.expect("a connection");
    let of = |out_of_reach: &[Uuid]| Claimant { out_of_reach: out_of_reach.to_vec(), ..claimant() };
    for (mine, another, taken) in [
        (of(&[one]), of(&[]), true),
        (of(&[one, other]), of(&[]), false),
        (of(&[one, other]), of(&[other]), false),
        (of(&[one, other]), of(&[one, other]), true),
        (of(&[held.parse().expect("an id")]), of(&[one]), false),
        // Tools that are too old for the backup.
        (of(&[restore]), of(&[]), false),
        (of(&[restore]), of(&[restore]), true),
    ] {
        takes_beside(&mut conn, &mine, &another, taken).await;
    }
    // The folders count though no job names them any more, for the pool of the restore alone.
    sqlx::query("delete from job_destinations").execute(&cluster.pool).await.expect("deletes");
    let mut seen = folders(&mut conn, "default").await;
    seen.sort();
    assert_eq!((seen, folders(&mut conn, "far").await), (vec![one, other], vec![]));
    // A copy whose destination is gone is none.
    cluster.ok("DELETE", &format!("/api/destinations/{second}"), None).await;
    takes_beside(&mut conn, &of(&[one]), &of(&[]), false).await;
    takes_beside(&mut conn, &of(&[one]), &of(&[one]), true).await;
}
