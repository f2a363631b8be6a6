//! Downloads of layers: each once at a time, and from where the last attempt stopped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::StreamExt;
use oci_client::client::BlobResponse;

use super::{Place, RegistryError, Remote, error};
use crate::image::ImageError;
use crate::image::digest::Digest;
use crate::image::durable::{FileError, NameLock, Named, names};
use crate::image::oci::OciError;
use crate::image::oci::blob::Blob;

/// Below the directory of layers.
const DIR: &str = "downloads";
const PREFIX: &str = "sha256-";
/// How often a connection that breaks is made again, as long as bytes come.
const MAX_ATTEMPTS: u32 = 5;

/// The downloads of one state directory.
#[derive(Debug, Clone)]
pub(crate) struct Downloads {
    dir: PathBuf,
}

/// A complete download. Its file is removed by [`Download::remove`], and stays for the next
/// attempt if the process ends before that.
pub(crate) struct Download {
    pub(crate) blob: Blob,
    _lock: NameLock,
}

impl Download {
    /// Removes the file: the layer is unpacked, or turned out to be another one.
    pub(crate) fn remove(self) {
        // What cannot be removed is found by `image gc`.
        let _ = std::fs::remove_file(&self.blob.path);
    }
}

impl Downloads {
    pub(crate) fn new(layers: &Path) -> Self {
        Self { dir: layers.join(DIR) }
    }

    /// The downloads that are there, finished or not.
    pub(crate) fn list(&self) -> Result<Vec<PathBuf>, ImageError> {
        let names = names(&self.dir)?;
        Ok(names.iter().filter(|name| name.starts_with(PREFIX)).map(|n| self.dir.join(n)).collect())
    }

    /// Downloads a layer, or what is missing of it. `received` counts the bytes that are there.
    pub(crate) async fn fetch(
        &self,
        remote: &Remote,
        digest: Digest,
        size: u64,
        received: &AtomicU64,
    ) -> Result<Download, ImageError> {
        let name = format!("{PREFIX}{digest}");
        let lock = NameLock::wait(&self.dir, &name).await?;
        let path = self.dir.join(&name);
        let mut options = OpenOptions::new();
        options.append(true).read(true).create(true).mode(0o600);
        let file = options.open(&path).named("open", &path)?;
        let mut transfer = Transfer {
            remote,
            name: format!("sha256:{digest}"),
            size,
            file,
            path: path.clone(),
            received,
        };
        if transfer.have()? > size {
            transfer.start_again()?;
        }
        received.fetch_add(transfer.have()?, Ordering::Relaxed);
        let mut last = RegistryError::NotFound {
            image: remote.reference.to_string(),
            registry: remote.reference.registry().to_owned(),
        };
        for place in &remote.places {
            match transfer.from(place).await {
                Ok(()) => {
                    let blob = Blob::open(&path, Some(digest)).named("open", &path)?;
                    return Ok(Download { blob, _lock: lock });
                }
                Err(TransferError::Registry(error)) => last = error,
                Err(TransferError::File(error)) => return Err(error.into()),
            }
        }
        Err(OciError::Registry(last).into())
    }
}

enum TransferError {
    Registry(RegistryError),
    File(FileError),
}

impl From<FileError> for TransferError {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

impl From<RegistryError> for TransferError {
    fn from(error: RegistryError) -> Self {
        Self::Registry(error)
    }
}

/// One download, from whichever places.
struct Transfer<'a> {
    remote: &'a Remote,
    /// The layer's digest, as registries write it.
    name: String,
    size: u64,
    file: File,
    path: PathBuf,
    received: &'a AtomicU64,
}

impl Transfer<'_> {
    /// The bytes that are there.
    fn have(&self) -> Result<u64, FileError> {
        Ok(self.file.metadata().named("read", &self.path)?.len())
    }

    fn start_again(&self) -> Result<(), FileError> {
        self.file.set_len(0).named("write", &self.path)
    }

    /// Gets everything from one place, as long as it sends something.
    async fn from(&mut self, place: &Place) -> Result<(), TransferError> {
        let mut attempts = 0;
        loop {
            let before = self.have()?;
            if before == self.size {
                return Ok(());
            }
            match self.attempt(place, before).await {
                Ok(()) => {}
                Err(TransferError::Registry(error @ RegistryError::Unreachable { .. }))
                    if attempts < MAX_ATTEMPTS && self.have()? > before =>
                {
                    attempts += 1;
                    tracing::debug!(%error, "going on with a broken download");
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn attempt(&mut self, place: &Place, have: u64) -> Result<(), TransferError> {
        let Self { remote, name, size, .. } = self;
        let (remote, size) = (*remote, *size);
        let reference = place.top(&remote.reference);
        place.client.store_auth_if_needed(reference.resolve_registry(), &place.auth).await;
        let opened = if have == 0 {
            let opened = place.client.pull_blob_stream(&reference, name.as_str()).await;
            opened.map(BlobResponse::Full)
        } else {
            place.client.pull_blob_stream_partial(&reference, name.as_str(), have, None).await
        };
        let (mut stream, mut at) = match opened.map_err(|error| remote.sorted(place, &error))? {
            BlobResponse::Partial(stream) => (stream, have),
            // It cannot go on in the middle, so it begins again.
            BlobResponse::Full(stream) => {
                self.start_again()?;
                self.received.fetch_sub(have, Ordering::Relaxed);
                (stream, 0)
            }
        };
        let promised = stream.content_length.map(|length| at.saturating_add(length));
        if let Some(promised) = promised.filter(|promised| *promised != size) {
            let problem = format!("announces {promised} bytes for {} instead of {size}", self.name);
            return Err(remote.broken(place, problem).into());
        }
        let mut failure = None;
        while let Some(chunk) = stream.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    failure = Some((error::innermost(&error), error::is_timeout(&error)));
                    break;
                }
            };
            at += chunk.len() as u64;
            if at > size {
                self.start_again()?;
                let problem = format!("sends more than the {size} bytes of {}", self.name);
                return Err(remote.broken(place, problem).into());
            }
            self.file.write_all(&chunk).named("write", &self.path)?;
            self.received.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        }
        match failure {
            None if at == size => Ok(()),
            // All there, and not what was asked for.
            Some((problem, _)) if at == size => {
                self.start_again()?;
                self.received.fetch_sub(size, Ordering::Relaxed);
                Err(remote.broken(place, format!("lies about {}: {problem}", self.name)).into())
            }
            Some((_, true)) => Err(remote.stalled(place).into()),
            failure => {
                let why = failure.map_or_else(String::new, |(why, _)| format!(": {why}"));
                let problem = format!(
                    "the connection ended after {at} of {size} bytes of {}{why}",
                    self.name
                );
                let (image, registry) = (remote.reference.to_string(), place.endpoint.host.clone());
                Err(RegistryError::Unreachable { image, registry, problem }.into())
            }
        }
    }
}
