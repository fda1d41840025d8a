//! What attempts left behind is removed, and nothing else.

use serde_json::json;

use crate::harness::{Cluster, SOON, held::Held, postgres_url, proxy::Mode, source::shell, sql, unique, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_restored_from_a_dump_leaves_alone_what_was_published_after_the_dump() {
    let cluster = Cluster::start().await;
    let held = Held::new(&cluster, json!({})).await;
    let run = held.run(&cluster).await;
    until("its object is on record", SOON, || async {
        (cluster.count("select count(*) from staged_objects").await == 1).then_some(())
    })
    .await;
    let dump = cluster.scratch.join("own.dump");
    shell(&format!("pg_dump -Fc -f '{}' '{}'", dump.display(), postgres_url(&cluster.database)));
    held.proxy.set(Mode::Pass);
    let ended = cluster.ended(&run, SOON).await;
    let backup = held.root.join(ended["path"].as_str().expect("a path"));
    assert!(backup.exists(), "{ended:#}");

    // Its database is lost, and comes back as it was in the midst of the run.
    let (restored, env) = (unique("restored"), cluster.env().clone());
    sql("postgres", &format!("create database {restored}")).await;
    shell(&format!("pg_restore --exit-on-error -d '{}' '{}'", postgres_url(&restored), dump.display()));
    let mut again = Cluster::build().on(postgres_url(&restored)).limit(0);
    for name in ["DBACKUP_ENCRYPTION_KEY", "DBACKUP_LOCAL_PATHS"] {
        again = again.env(name, &env[name]);
    }
    sql(&restored, "delete from settings where name = 'rateLimit'").await;
    let again = again.start().await;
    until("nothing is left to be swept", SOON, || async {
        assert!(backup.exists(), "it was taken for litter");
        (again.count("select count(*) from staged_objects").await == 0).then_some(())
    })
    .await;
    until("somebody is told", SOON, || async { again.logs().contains("was restored from a dump").then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_removed_keeps_nothing_else_from_being_removed() {
    let mut cluster = Cluster::build().workers(1).start().await;
    let (good, root) = cluster.local_destination().await;
    let (missing, gone) = cluster.local_destination().await;
    cluster.workers.clear();
    std::fs::remove_dir_all(&gone).expect("removes");
    std::fs::write(root.join("late"), "left by a worker that died").expect("writes");
    let litter = format!(
        "with run as (
             insert into executions (id, job_id, job_name, job_slug, source_id, pool, serial, status, attempt, max_attempts,
                                     last_token, trigger_kind, started_at, ended_at, error)
             select gen_random_uuid(), gen_random_uuid(), 'x', 'x', gen_random_uuid(), 'default', true, 'Failed', 1, 3, 0, 'Api',
                    clock_timestamp(), clock_timestamp(), 'it failed'
             returning id
         )
         insert into staged_objects (id, execution_id, token, destination_id, path)
         select gen_random_uuid(), run.id, 0, '{missing}'::uuid, 'x' || n from run, generate_series(1, 1000) n
         union all select 'ffffffff-0000-7000-8000-000000000000'::uuid, run.id, 0, '{good}'::uuid, 'late' from run"
    );
    sql(&cluster.database, &litter).await;
    cluster.add_worker(&[]).await;
    until("it is removed", SOON, || async { (!root.join("late").exists()).then_some(()) }).await;
    assert_eq!(cluster.count("select count(*) from staged_objects where swept_at is null").await, 1_000);
}
