//! Jobs whose runs can be held in one stage: by the source for the first two, by the store for the last two.

use std::path::PathBuf;

use crate::{
    harness::{
        proxy::{Mode, Proxy},
        s3::S3Server,
        until,
    },
    project::{A_WHILE, POOLS, Project},
};

enum Gate {
    /// What the source's proxy does while it is closed.
    Source(Proxy, Mode),
    /// The operation that the store leaves unanswered while it is closed.
    Store(S3Server, &'static str),
}

/// A stage in which runs of a job can be held.
pub struct Stage {
    /// As the lease tells it.
    pub name: &'static str,
    /// The job.
    pub job: String,
    /// Its destination.
    pub destination: String,
    gate: Gate,
}

impl Stage {
    /// All four of them. The stores' folders are made under `scratch`.
    pub async fn all(project: &Project, local: &str, scratch: &std::path::Path) -> Vec<Stage> {
        vec![
            Self::at_source(project, local, "Initializing", Mode::Hold).await,
            Self::at_source(project, local, "Dumping", Mode::HoldAfter(500_000)).await,
            Self::at_store(project, "Uploading", "UploadPart", scratch.join("uploading")).await,
            Self::at_store(project, "Verifying", "CompleteMultipartUpload", scratch.join("verifying")).await,
        ]
    }

    /// A job of its own with a dump that can be held in its middle.
    pub async fn dumping(project: &Project, local: &str) -> Stage {
        Self::at_source(project, local, "Dumping", Mode::HoldAfter(500_000)).await
    }

    async fn at_source(project: &Project, local: &str, name: &'static str, closed: Mode) -> Self {
        let proxy = Proxy::between(project.here, (project.source, 5432).into()).await;
        let source = project.make_source(project.here, proxy.port, POOLS[0]).await;
        let job = project.make_job(&source, local).await;
        Self { name, job, destination: local.to_owned(), gate: Gate::Source(proxy, closed) }
    }

    async fn at_store(project: &Project, name: &'static str, operation: &'static str, root: PathBuf) -> Self {
        let store = S3Server::start_on(project.here, root, None).await;
        let destination = project.make_destination("s3", store.config(), POOLS[1]).await;
        let source = project.make_source(project.source, 5432, POOLS[1]).await;
        let job = project.make_job(&source, &destination).await;
        Self { name, job, destination, gate: Gate::Store(store, operation) }
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
        let execution = project.trigger(&self.job).await;
        let worker = until(&format!("{execution} is {}", self.name), A_WHILE, || async {
            project.worker_in(&execution, self.name).await
        })
        .await;
        (execution, worker)
    }
}
