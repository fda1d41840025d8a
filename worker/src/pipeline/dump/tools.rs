//! Which tools this worker has, told to the cluster.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use common::{source::Engine, worker::Tool};
use futures::future::join_all;

use super::find_tools;
use crate::{config::WorkerConfig, lease::ProcessGroups};

/// Longest time for all the tools to tell their versions.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The tools of an engine; a dump needs one that dumps and one that asks.
struct Kit {
    engines: &'static [Engine],
    dumps: &'static [&'static str],
    asks: &'static [&'static str],
}

const POSTGRES: Kit = Kit { engines: &[Engine::Postgres], dumps: &["pg_dump"], asks: &["psql"] };
/// MariaDB's tools serve both, and so do MySQL's.
const MARIADB: Kit = Kit {
    engines: &[Engine::Mysql, Engine::Mariadb],
    dumps: &["mariadb-dump", "mysqldump"],
    asks: &["mariadb", "mysql"],
};

fn kits(config: &WorkerConfig) -> [(&'static Kit, &[PathBuf]); 2] {
    [(&POSTGRES, &config.postgres_bin), (&MARIADB, &config.mariadb_bin)]
}

fn found<'a>(names: &'a [&'static str], bins: &'a [PathBuf]) -> impl Iterator<Item = PathBuf> + 'a {
    names.iter().flat_map(move |name| bins.iter().map(move |bin| bin.join(name))).filter(|path| path.is_file())
}

/// What this worker can dump, by the files that it has.
pub fn engines(config: &WorkerConfig) -> Vec<Engine> {
    let able = kits(config)
        .into_iter()
        .filter(|(kit, bins)| found(kit.dumps, bins).next().is_some() && found(kit.asks, bins).next().is_some());
    able.flat_map(|(kit, _)| kit.engines).copied().collect()
}

/// The files of the tools and when they were written: what is installed or removed shows here without asking any.
pub fn files(config: &WorkerConfig) -> Vec<(PathBuf, Option<SystemTime>)> {
    let written = |path: &Path| std::fs::metadata(path).and_then(|facts| facts.modified()).ok();
    kits(config)
        .into_iter()
        .flat_map(|(kit, bins)| found(kit.dumps, bins).chain(found(kit.asks, bins)))
        .map(|path| (path.clone(), written(&path)))
        .collect()
}

/// All tools with the versions that they tell. One that does not answer in time hides them all: it is looked for again
/// when a file changes.
pub async fn inventory(config: &WorkerConfig) -> Vec<Tool> {
    let groups = ProcessGroups::default();
    let asked = kits(config)
        .into_iter()
        .flat_map(|(kit, bins)| kit.dumps.iter().chain(kit.asks).map(move |name| (*name, bins)));
    let groups = &groups;
    let asked = asked.map(async |(name, bins)| (name, find_tools(bins, name, groups).await));
    let told = tokio::time::timeout(TIMEOUT, join_all(asked)).await;
    groups.kill();
    let told = told.unwrap_or_else(|_| {
        tracing::warn!("the tools did not tell their versions within {} s", TIMEOUT.as_secs());
        Vec::new()
    });
    told.into_iter()
        .flat_map(|(name, tools)| {
            tools.into_iter().map(|tool| Tool {
                name: name.to_owned(),
                version: tool.version,
                path: tool.path.display().to_string(),
            })
        })
        .collect()
}
