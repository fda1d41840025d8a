//! A real S3 server (s3s) on a folder, with a policy of allowed operations, so that a test can tell what rights a
//! backup needs.

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{
    S3Request, S3Result,
    access::{S3Access, S3AccessContext},
    auth::SimpleAuth,
    dto::{AbortMultipartUploadInput, CompleteMultipartUploadInput},
    host::MultiDomain,
    s3_error,
    service::S3ServiceBuilder,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};

/// The key of the tests.
pub const ACCESS_KEY: &str = "AKIATEST";
/// Its secret.
pub const SECRET_KEY: &str = "s3-secret-of-the-tests";

struct Policy {
    allowed: Option<&'static [&'static str]>,
    held: watch::Receiver<Option<&'static str>>,
    root: PathBuf,
    aborts: Arc<AtomicUsize>,
}

impl Policy {
    /// An upload that was completed or aborted is unknown to S3; the server of these tests would deny it instead.
    fn knows(&self, upload: &str) -> S3Result<()> {
        match self.root.join(format!(".upload-{upload}.json")).exists() {
            true => Ok(()),
            false => Err(s3_error!(NoSuchUpload)),
        }
    }
}

#[async_trait::async_trait]
impl S3Access for Policy {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        let operation = context.s3_op().name();
        let mut held = self.held.clone();
        let _ = held.wait_for(|held| *held != Some(operation)).await;
        let allowed = self.allowed.is_none_or(|operations| operations.contains(&operation));
        match context.credentials() {
            Some(_) if allowed => Ok(()),
            _ => Err(s3_error!(AccessDenied)),
        }
    }

    async fn abort_multipart_upload(&self, request: &mut S3Request<AbortMultipartUploadInput>) -> S3Result<()> {
        self.aborts.fetch_add(1, Ordering::Relaxed);
        self.knows(&request.input.upload_id)
    }

    async fn complete_multipart_upload(&self, request: &mut S3Request<CompleteMultipartUploadInput>) -> S3Result<()> {
        self.knows(&request.input.upload_id)
    }
}

/// A running server.
pub struct S3Server {
    /// Its port.
    pub port: u16,
    address: IpAddr,
    root: PathBuf,
    held: watch::Sender<Option<&'static str>>,
    aborts: Arc<AtomicUsize>,
}

/// The bucket that every server has.
pub const BUCKET: &str = "backups";

impl S3Server {
    /// Serves a folder. `allowed` are the only operations that are not denied.
    pub async fn start(root: PathBuf, allowed: Option<&'static [&'static str]>) -> Self {
        Self::start_on([127, 0, 0, 1].into(), root, allowed).await
    }

    /// On another address of this machine.
    pub async fn start_on(address: IpAddr, root: PathBuf, allowed: Option<&'static [&'static str]>) -> Self {
        std::fs::create_dir_all(root.join(BUCKET)).expect("a bucket");
        let files = s3s_fs::FileSystem::new(&root).expect("a folder");
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let (held, watched) = watch::channel(None);
        let aborts = Arc::new(AtomicUsize::new(0));
        builder.set_access(Policy { allowed, held: watched, root: root.clone(), aborts: aborts.clone() });
        let listener = TcpListener::bind((address, 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        // `backups.s3.test` for virtual-host style; path style goes by address.
        builder.set_host(MultiDomain::new([format!("{address}:{port}"), "s3.test".to_owned()]).expect("domains"));
        let service = builder.build();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { port, address, root, held, aborts }
    }

    #[allow(dead_code, reason = "the test of the Compose cluster holds runs in a stage by it")]
    /// Leaves requests of this operation unanswered, until another or none is held.
    pub fn hold(&self, operation: Option<&'static str>) {
        self.held.send_replace(operation);
    }

    #[allow(dead_code, reason = "the test of the Compose cluster does not count them")]
    /// Requests to abort an upload so far, of one that is open or not.
    pub fn aborts(&self) -> usize {
        self.aborts.load(Ordering::Relaxed)
    }

    /// As a destination's config.
    pub fn config(&self) -> Value {
        json!({
            "bucket": BUCKET, "endpoint": format!("http://{}:{}", self.address, self.port), "region": "us-east-1",
            "accessKeyId": ACCESS_KEY, "secretAccessKey": SECRET_KEY, "prefix": "nightly", "pathStyle": true
        })
    }

    /// Objects in the bucket, by key.
    pub fn objects(&self) -> Vec<PathBuf> {
        super::files(&self.root.join(BUCKET))
    }

    /// An object's file.
    pub fn file(&self, key: &str) -> PathBuf {
        self.root.join(BUCKET).join(key)
    }

    /// Multipart uploads that are open, as the server's own files show them. A part that it was still writing when its
    /// upload was aborted stays, and is of no upload any more: S3 too says that such parts may or may not succeed.
    pub fn open_uploads(&self) -> Vec<PathBuf> {
        self.of_uploads(".upload-")
    }

    /// Parts of uploads, also of such a one.
    #[allow(dead_code, reason = "the test of the Compose cluster does not look at them")]
    pub fn parts(&self) -> Vec<PathBuf> {
        self.of_uploads(".upload_id-")
    }

    /// Open uploads that hold something. One without a part may be of a worker that died between the store's answer and its
    /// record of it: nobody knows its id, and it costs nothing.
    #[allow(dead_code, reason = "for the test of the Compose cluster")]
    pub fn filled_uploads(&self) -> Vec<PathBuf> {
        let parts: Vec<String> = self.parts().iter().map(|part| part.display().to_string()).collect();
        let id =
            |open: &PathBuf| open.display().to_string().replace(".upload-", ".upload_id-").replace(".json", ".part-");
        self.open_uploads().into_iter().filter(|open| parts.iter().any(|part| part.starts_with(&id(open)))).collect()
    }

    fn of_uploads(&self, prefix: &str) -> Vec<PathBuf> {
        let begins = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
        super::files(&self.root).into_iter().filter(begins).collect()
    }
}
