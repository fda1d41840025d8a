//! A job whose dump a proxy holds in its middle.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{
    Cluster, mariadb_port, postgres_port,
    proxy::{Mode, Proxy},
    source::{MariadbSource, PostgresSource},
};

/// The dump is held after this many bytes.
pub const HELD_AFTER: u64 = 1_000_000;

/// A job whose dump a proxy holds after its first megabyte.
pub struct Held {
    /// Between the worker and the source.
    pub proxy: Proxy,
    /// The job.
    pub job: String,
    /// Where its backups go.
    pub root: PathBuf,
}

impl Held {
    /// Of a PostgreSQL database.
    pub async fn new(cluster: &Cluster, more: Value) -> Self {
        let source = PostgresSource::with_rows(60_000).await;
        Self::of(cluster, "postgres", source.config(), postgres_port(), more).await
    }

    /// Of a MariaDB database.
    pub async fn mariadb(cluster: &Cluster) -> Self {
        let source = MariadbSource::with_rows(60_000);
        Self::of(cluster, "mariadb", source.config(), mariadb_port(), json!({})).await
    }

    /// Of several databases; the first is held.
    pub async fn databases(cluster: &Cluster, mut config: Value, names: &[&str]) -> Self {
        config["databases"] = json!(names);
        Self::of(cluster, "postgres", config, postgres_port(), json!({})).await
    }

    async fn of(cluster: &Cluster, engine: &str, mut config: Value, port: u16, more: Value) -> Self {
        let proxy = Proxy::start(port).await;
        config["port"] = json!(proxy.port);
        let (destination, root) = cluster.local_destination().await;
        let job = cluster.job(&cluster.source(engine, config).await, &[&destination], more).await;
        Self { proxy, job, root }
    }

    /// Triggers the job, and waits until its dump is held.
    pub async fn run(&self, cluster: &Cluster) -> String {
        self.proxy.set(Mode::HoldAfter(HELD_AFTER));
        let id = cluster.trigger(&self.job).await;
        self.proxy.passes(HELD_AFTER).await;
        id
    }
}
