//! S3 and what speaks its protocol.

use std::{ops::Range, sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use object_store::{
    BackoffConfig, ClientOptions, Error, ObjectStoreExt, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    path::Path,
};
use secrecy::{ExposeSecret, SecretString};

use super::{Bytestream, StoreError};
use crate::destination::S3Config;

/// Longest time of one request: a part of a hundred megabytes on a slow line.
const REQUEST: Duration = Duration::from_secs(240);
/// Within so long a request that failed is sent again, also one that went silent for all of its time; a signature is good
/// for 15 minutes.
const RETRIES: Duration = Duration::from_secs(600);
/// One request of a read: whole within the time of a request on any line worth a backup, and tried again by itself.
const READ_BYTES: u64 = 8 << 20;
/// Requests of one read under way at once: the next one's first byte is there when the last one's end is.
const READS_AT_ONCE: usize = 2;

/// A bucket, with a prefix.
#[derive(Clone, Debug)]
pub struct Bucket {
    client: Arc<AmazonS3>,
    bucket: String,
    prefix: String,
}

impl Bucket {
    /// Prepares the client without a request.
    pub fn open(config: &S3Config, secret: &SecretString) -> Result<Self, StoreError> {
        let path_style = config.path_style.unwrap_or(config.endpoint.is_some());
        let client = ClientOptions::new()
            .with_allow_http(true)
            .with_connect_timeout(Duration::from_secs(5))
            .with_timeout(REQUEST);
        let retry = RetryConfig { backoff: BackoffConfig::default(), max_retries: 5, retry_timeout: RETRIES };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&config.bucket)
            .with_region(config.region.as_deref().unwrap_or("us-east-1"))
            .with_access_key_id(&config.access_key_id)
            .with_secret_access_key(secret.expose_secret())
            .with_virtual_hosted_style_request(!path_style)
            .with_client_options(client)
            .with_retry(retry);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.with_endpoint(endpoint_for(endpoint, &config.bucket, path_style));
        }
        let client = builder.build().map_err(|e| {
            StoreError::give_up("store_config", format!("the S3 client refuses its configuration: {e}"))
        })?;
        let prefix = config.prefix.as_deref().unwrap_or("").trim_matches('/').to_owned();
        Ok(Self { client: Arc::new(client), bucket: config.bucket.clone(), prefix })
    }

    /// The client; requests name an object by [`Bucket::key`].
    pub fn client(&self) -> &Arc<AmazonS3> {
        &self.client
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.bucket
    }

    /// The whole name of an object.
    pub fn key(&self, path: &str) -> Path {
        match self.prefix.as_str() {
            "" => Path::from(path),
            prefix => Path::from(format!("{prefix}/{path}")),
        }
    }

    /// As a URL.
    pub fn describe(&self, path: &str) -> String {
        format!("s3://{}/{}", self.bucket, self.key(path))
    }

    /// Reads a part of an object in requests of a few megabytes: a single one for all of it would run out of its time.
    pub(super) fn read(&self, path: &str, range: Range<u64>) -> Bytestream {
        let starts = (range.start..range.end).step_by(usize::try_from(READ_BYTES).unwrap_or(usize::MAX));
        let (bucket, key, end) = (self.clone(), self.key(path), range.end);
        let parts = stream::iter(starts).map(move |start| {
            let (bucket, key) = (bucket.clone(), key.clone());
            let wanted = start..end.min(start + READ_BYTES);
            let part = async move {
                let part = bucket.client.get_range(&key, wanted.clone()).await;
                let part = part.map_err(|error| bucket.unread(&error, &key))?;
                match part.len() as u64 == wanted.end - wanted.start {
                    true => Ok(part),
                    false => Err(StoreError::give_up("object_damaged", format!("{key} is cut off"))),
                }
            };
            async move {
                // On its own: a reader that stands still for long must not make a request run out of its time.
                let read = tokio::spawn(part).await;
                read.unwrap_or_else(|e| Err(StoreError::retry("store_failed", format!("a read ended: {e}"))))
            }
        });
        parts.buffered(READS_AT_ONCE).boxed()
    }

    fn unread(&self, error: &Error, key: &Path) -> StoreError {
        match error {
            Error::NotFound { .. } => StoreError::give_up(
                "object_missing",
                format!("{key} is not in bucket '{}' any more: somebody removed or moved it", self.bucket),
            ),
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => StoreError::give_up(
                "store_denied",
                format!(
                    "could not read {key} in bucket '{}': {}; check the right to get objects, which a backup does not need",
                    self.bucket,
                    whole(error)
                ),
            ),
            _ => self.error(error, "read from"),
        }
    }

    /// A failure of a request, with what to do about it.
    pub fn error(&self, error: &Error, doing: &str) -> StoreError {
        let text = |hint: &str| format!("could not {doing} bucket '{}': {}{hint}", self.bucket, whole(error));
        match error {
            Error::NotFound { .. } => StoreError::give_up("bucket_missing", text("; does the bucket exist?")),
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => StoreError::give_up(
                "store_denied",
                text("; check accessKeyId, secretAccessKey and the rights to put objects and to abort uploads"),
            ),
            _ => StoreError::retry("store_failed", text("")),
        }
    }
}

/// With virtual-host style the endpoint names the bucket.
fn endpoint_for(endpoint: &str, bucket: &str, path_style: bool) -> String {
    let endpoint = endpoint.trim_end_matches('/');
    match endpoint.split_once("://") {
        Some((scheme, host)) if !path_style && !host.starts_with(&format!("{bucket}.")) => {
            format!("{scheme}://{bucket}.{host}")
        }
        _ => endpoint.to_owned(),
    }
}

/// The message with its causes; the crate's own `Display` often stops at the first. Response bodies and URLs are
/// shortened, and none of them holds the secret key: requests are signed in a header.
fn whole(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text.chars().take(600).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_host_endpoint_names_the_bucket_once() {
        assert_eq!(endpoint_for("https://s3.example", "b", false), "https://b.s3.example");
        assert_eq!(endpoint_for("https://b.s3.example/", "b", false), "https://b.s3.example");
        assert_eq!(endpoint_for("http://127.0.0.1:9000", "b", true), "http://127.0.0.1:9000");
    }
}
