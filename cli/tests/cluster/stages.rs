//! What can be held in one stage: backups by their source or their store, restores by the server that they go to.

use std::path::PathBuf;

use crate::{
    harness::{
        proxy::{Mode, Proxy},
        s3::S3Server,
        until,
    },
    project::{A_WHILE, POOLS, Project},
    restoring::Restores,
};

enum Gate {
    /// What the proxy before the databases does while it is closed.
    Source(Proxy, Mode),
    /// The operation that the store leaves unanswered while it is closed.
    Store(S3Server, &'static str),
}

/// A stage in which runs of a job, or restores of its backup, can be held.
pub struct Stage {
    /// As the lease tells it.
    pub name: &'static str,
    /// The job.
    pub job: String,
    /// Its destination.
    pub destination: String,
    /// What is restored, where restores are held.
    pub restores: Option<Restores>,
    gate: Gate,
}

impl Stage {
    /// All of them. The stores' folders are made under `scratch`.
    pub async fn all(project: &Project, local: &str, scratch: &std::path::Path) -> Vec<Stage> {
        vec![
            Self::at_source(project, local, "Initializing", Mode::Hold).await,
            Self::at_source(project, local, "Dumping", Mode::HoldAfter(500_000)).await,
            Self::at_store(project, "Uploading", "UploadPart", scratch.join("uploading")).await,
            Self::at_store(project, "Verifying", "CompleteMultipartUpload", scratch.join("verifying")).await,
            Self::restoring(project, local).await,
        ]
    }

    /// A job of its own with a dump that can be held in its middle.
    pub async fn dumping(project: &Project, local: &str) -> Stage {
        Self::at_source(project, local, "Dumping", Mode::HoldAfter(500_000)).await
    }

    async fn at_source(project: &Project, local: &str, name: &'static str, closed: Mode) -> Self {
        let (proxy, source) = Self::behind_a_proxy(project).await;
        let job = project.make_job(&source, local).await;
        Self { name, job, destination: local.to_owned(), restores: None, gate: Gate::Source(proxy, closed) }
    }

    /// Held in the midst of its data, in an open transaction.
    async fn restoring(project: &Project, local: &str) -> Self {
        let (proxy, source) = Self::behind_a_proxy(project).await;
        let job = project.make_job(&source, local).await;
        let restores = Some(Restores::new(project, &job, source).await);
        let gate = Gate::Source(proxy, Mode::HoldAfterSent(500_000));
        Self { name: "Restoring", job, destination: local.to_owned(), restores, gate }
    }

    async fn behind_a_proxy(project: &Project) -> (Proxy, String) {
        let proxy = Proxy::between(project.here, (project.source, 5432).into()).await;
        let source = project.make_source(project.here, proxy.port, POOLS[0]).await;
        (proxy, source)
    }

    async fn at_store(project: &Project, name: &'static str, operation: &'static str, root: PathBuf) -> Self {
        let store = S3Server::start_on(project.here, root, None).await;
        let destination = project.make_destination("s3", store.config(), POOLS[1]).await;
        let source = project.make_source(project.source, 5432, POOLS[1]).await;
        let job = project.make_job(&source, &destination).await;
        Self { name, job, destination, restores: None, gate: Gate::Store(store, operation) }
    }

    /// Triggers a run, or orders a restore; gives the execution's id.
    pub async fn begin(&self, project: &Project) -> String {
        match &self.restores {
            Some(restores) => restores.order(project).await,
            None => project.trigger(&self.job).await,
        }
    }

    /// Runs stop here.
    pub fn close(&self) {
        match &self.gate {
            Gate::Source(proxy, closed) => proxy.set(*closed),
            Gate::Store(store, operation) => store.hold(Some(operation)),
        }
    }

    /// Runs pass.
    pub fn open(&self) {
        match &self.gate {
            Gate::Source(proxy, _) => proxy.set(Mode::Pass),
            Gate::Store(store, _) => store.hold(None),
        }
    }

    /// The store, if it is one of this process.
    pub fn store(&self) -> Option<&S3Server> {
        match &self.gate {
            Gate::Source(..) => None,
            Gate::Store(store, _) => Some(store),
        }
    }

    /// Triggers a run and waits until it is held; gives the execution's id and its worker.
    pub async fn hold_one(&self, project: &Project) -> (String, String) {
        self.close();
        let execution = self.begin(project).await;
        let worker = until(&format!("{execution} is {}", self.name), A_WHILE, || async {
            project.worker_in(&execution, self.name).await
        })
        .await;
        (execution, worker)
    }
}
