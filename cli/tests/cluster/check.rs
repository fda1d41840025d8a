//! The cluster's own record, read at the end: an audit that triggers wrote, the executions, and what lies in the stores.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::Value;
use sha2::Digest;

use crate::{
    harness::{
        audit::{self, Audited},
        until,
    },
    project::{A_WHILE, BACKUPS, End, Project, SKEWED, compose},
    stages::Stage,
};

/// SHA-256 of every stored file, by path, and every manifest.
struct Store {
    destination: String,
    files: BTreeMap<String, String>,
    manifests: Vec<Value>,
}

impl Store {
    async fn local(destination: &str) -> Self {
        let list = format!("cd {BACKUPS} && find . -type f ! -name .dbackup-store -exec sha256sum {{}} +");
        let sums = compose(&["exec", "-T", "worker", "sh", "-c", &list]).await;
        let files = sums.lines().filter_map(|line| {
            let (sum, path) = line.split_once("  ./")?;
            Some((path.to_owned(), sum.to_owned()))
        });
        let print = format!("cd {BACKUPS} && find . -type f -name '*.json' -exec cat {{}} +");
        let text = compose(&["exec", "-T", "worker", "sh", "-c", &print]).await;
        let manifests = serde_json::Deserializer::from_str(&text).into_iter().map(|m| m.expect("a manifest is JSON"));
        Self { destination: destination.to_owned(), files: files.collect(), manifests: manifests.collect() }
    }

    fn of_stage(stage: &Stage) -> Option<Self> {
        let server = stage.store()?;
        let (mut files, mut manifests) = (BTreeMap::new(), Vec::new());
        for object in server.objects() {
            let bytes = std::fs::read(server.file(&object.display().to_string())).expect("an object");
            let path = object.strip_prefix("nightly").unwrap_or(&object).display().to_string();
            if Path::new(&path).extension().is_some_and(|e| e == "json") {
                manifests.push(serde_json::from_slice(&bytes).expect("a manifest is JSON"));
            }
            files.insert(path, hex::encode(sha2::Sha256::digest(&bytes)));
        }
        Some(Self { destination: stage.destination.clone(), files, manifests })
    }

    /// Recorded and stored are the same, and every manifest tells the truth.
    async fn check(&self, project: &Project) -> Vec<String> {
        let recorded = "select path, sha256 from artifacts where destination_id = $1::uuid";
        let recorded: BTreeSet<(String, String)> = sqlx::query_as(recorded)
            .bind(&self.destination)
            .fetch_all(&project.pool)
            .await
            .expect("rows")
            .into_iter()
            .collect();
        let stored: BTreeSet<(String, String)> = self.files.clone().into_iter().collect();
        let differing = recorded.symmetric_difference(&stored);
        let mut wrong: Vec<String> =
            differing.map(|(path, sum)| format!("{path} with {sum} is recorded or stored, but not both")).collect();
        for manifest in &self.manifests {
            if manifest["objects"].as_array().is_none_or(|objects| objects.len() != 1) {
                wrong.push(format!("a manifest that is not of one object: {manifest}"));
            }
            for object in manifest["objects"].as_array().into_iter().flatten() {
                let path =
                    format!("{}/{}", manifest["job"].as_str().unwrap_or("?"), object["file"].as_str().unwrap_or("?"));
                if self.files.get(&path).map(String::as_str) != object["storedSha256"].as_str() {
                    wrong.push(format!("{path} is not what its manifest says"));
                }
            }
        }
        if self.manifests.len() * 2 != self.files.len() {
            wrong.push(format!("{} files with {} manifests", self.files.len(), self.manifests.len()));
        }
        wrong
    }
}

/// Everything that is wrong; empty when all is well.
pub async fn everything(project: &Project, local: &str, stages: &[Stage]) -> Vec<String> {
    // Twice, a minute apart: what a store was completing while it was told to abort is there only then.
    until("nothing is left to sweep", A_WHILE, || async {
        (project.number("select count(*) from staged_objects").await == 0).then_some(())
    })
    .await;
    let mut wrong = Vec::new();
    let mut none = |what: &str, found: i64| {
        if found != 0 {
            wrong.push(format!("{what}: {found}"));
        }
    };
    none("claims over the limit", audit::claims_over_the_limit(project).await);
    none("leases left", project.number("select count(*) from execution_leases").await);
    // Of restores, their own check tells.
    let failed =
        "select status, outcome, error_code, rescues::int from executions where status = 'Failed' and type = 'Backup'";
    let failed: Vec<End> = sqlx::query_as(failed).fetch_all(&project.pool).await.expect("rows");
    let undue = failed.iter().filter(|end| !end.is_cancelled() && !end.is_lost()).count();
    none("backups that failed", i64::try_from(undue).expect("a number"));
    let twice = "select count(*) from (select from artifacts where database_name is not null group by execution_id having count(*) > 1) x";
    none("runs with two backups", project.number(twice).await);
    let unlike = "select count(*) from executions e where type = 'Backup' and (status = 'Success') <> exists (select from artifacts a where a.execution_id = e.id)";
    none("runs with a success and no backup, or the reverse", project.number(unlike).await);
    let ended = "select count(*) from executions where ended_at is not null and id = any($1::uuid[])";
    let acknowledged = project.acknowledged.lock().expect("not poisoned").clone();
    let ended: i64 = sqlx::query_scalar(ended).bind(&acknowledged).fetch_one(&project.pool).await.expect("a number");
    none("acknowledged triggers that did not end", i64::try_from(acknowledged.len()).expect("a number") - ended);
    let rescues = project.number("select coalesce(sum(rescues), 0)::bigint from executions").await;
    for (stage, store) in stages.iter().filter_map(|stage| Some((stage, stage.store()?))) {
        let (open, filled) = (store.open_uploads(), store.filled_uploads());
        if !filled.is_empty() {
            wrong.push(format!("uploads of {} are open: {filled:?}", stage.name));
        }
        // Each of them is a worker that died.
        if open.len() as i64 > rescues {
            wrong.push(format!("{} uploads of {} were begun and left, of {rescues} rescues", open.len(), stage.name));
        }
    }
    let mut stores = vec![Store::local(local).await];
    stores.extend(stages.iter().filter_map(Store::of_stage));
    for store in stores {
        wrong.extend(store.check(project).await);
    }
    for restores in stages.iter().filter_map(|stage| stage.restores.as_ref()) {
        wrong.extend(restores.wrong(project).await);
    }
    wrong
}

/// What was to be disturbed all the while and was not: a run in which nothing was wrong proves nothing then.
pub async fn disturbances(project: &Project, (wanted, changed): (usize, usize)) -> Vec<String> {
    let mut wrong = Vec::new();
    // While PostgreSQL is away it cannot be.
    if changed * 10 < wanted * 8 {
        wrong.push(format!("the limit was to be changed {wanted} times, and was changed {changed} times"));
    }
    let limits = "select count(distinct max_concurrency) from lease_audit";
    let limits = project.number(limits).await;
    if limits != 10 {
        wrong.push(format!("leases came and went under {limits} different limits, and not under each from 1 to 10"));
    }
    let full =
        "select count(distinct max_concurrency) from lease_history where change = 1 and running = max_concurrency";
    let full = project.number(full).await;
    if full < 5 {
        wrong.push(format!("only {full} of the limits were ever reached"));
    }
    let skewed = format!("select count(*) from lease_audit where change = 1 and worker like '{SKEWED}-%'");
    let skewed = project.number(&skewed).await;
    if skewed == 0 {
        wrong.push("the worker whose clock is wrong ran nothing".to_owned());
    }
    println!(
        "the limit was changed {changed} times of {wanted}; leases under {limits} limits, {full} of them reached; {skewed} of the worker whose clock is wrong"
    );
    wrong
}
