//! Sees to it that an image's layers are in the cache: downloads and unpacks what is missing,
//! several layers at once.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::blob::Blob;
use super::document::unusable;
use super::layer::LayerCache;
use super::registry::Downloads;
use super::{LayerSource, OciError, OciSource};
use crate::image::ImageError;
use crate::image::digest::Digest;
use crate::image::durable::Named;
use crate::image::progress::{OnProgress, Progress, human_size};

/// Most layers that are downloaded at once.
const MAX_DOWNLOADS: usize = 4;
/// How often the state of downloads is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// Most layers that are unpacked at once.
const MAX_UNPACKING: usize = 4;

impl OciSource {
    /// Downloads and unpacks the layers that are not there yet, several at once.
    pub(super) async fn ensure_layers(
        &self,
        stop: &CancellationToken,
        progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        let mut wanted = BTreeSet::new();
        let mut missing: Vec<&(Digest, LayerSource)> = Vec::new();
        for layer in &self.image.layers {
            if wanted.insert(layer.0) && !self.cache.has(&layer.0)? {
                missing.push(layer);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        let slots = Slots {
            downloads: Arc::new(Semaphore::new(MAX_DOWNLOADS)),
            unpacking: Arc::new(Semaphore::new(at_once.min(MAX_UNPACKING))),
        };
        let received = Arc::new(AtomicU64::new(0));
        let size = missing.iter().map(|(_, source)| source.remote_size()).sum();
        let count = missing.len();
        let mut work = JoinSet::new();
        for (diff_id, source) in missing {
            let layer = LayerWork {
                diff_id: *diff_id,
                source: source.clone(),
                cache: self.cache.clone(),
                stop: stop.clone(),
                received: received.clone(),
            };
            work.spawn(layer.run(slots.clone()));
        }
        let mut done = 0;
        let mut shown = String::new();
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        while !work.is_empty() {
            let joined = tokio::select! {
                joined = work.join_next() => joined,
                _ = tick.tick() => None,
            };
            if let Some(layer) = joined {
                layer.map_err(io::Error::other).named("unpack in", self.cache.dir())??;
                done += 1;
                continue;
            }
            let text = layers_step(done, count, received.load(Ordering::Relaxed), size);
            if text != shown {
                progress(Progress::Began(text.clone()));
                shown = text;
            }
        }
        progress(Progress::Ended);
        Ok(())
    }
}

/// Where the work on layers stands, for people.
fn layers_step(done: usize, count: usize, received: u64, size: u64) -> String {
    if size == 0 {
        return format!("unpacking layers: {done} of {count}");
    }
    let (received, size) = (human_size(received), human_size(size));
    format!("pulling layers: {received} of {size}, {done} of {count} unpacked")
}

/// Bounds on what happens at once.
#[derive(Clone)]
struct Slots {
    downloads: Arc<Semaphore>,
    unpacking: Arc<Semaphore>,
}

/// One layer that is not in the cache yet.
struct LayerWork {
    diff_id: Digest,
    source: LayerSource,
    cache: LayerCache,
    stop: CancellationToken,
    received: Arc<AtomicU64>,
}

impl LayerWork {
    async fn run(self, slots: Slots) -> Result<(), ImageError> {
        let (remote, digest, size) = match &self.source {
            LayerSource::Cached => {
                let problem = format!("its layer sha256:{} was removed", self.diff_id);
                return Err(unusable("the image", problem).into());
            }
            LayerSource::Here(blob) => return self.unpack(blob.clone(), &slots).await,
            LayerSource::Remote { remote, digest, size } => (remote.clone(), *digest, *size),
        };
        let downloads = Downloads::new(self.cache.dir());
        let mut is_first = true;
        loop {
            let slot = slots.downloads.acquire().await;
            let download = downloads.fetch(&remote, digest, size, &self.received).await?;
            drop(slot);
            let blob = download.blob.clone();
            match self.unpack(blob, &slots).await {
                Ok(()) => {
                    download.remove();
                    return Ok(());
                }
                // What an earlier attempt left behind may be damaged; a new download is not.
                Err(ImageError::Oci(OciError::Layer { .. })) if is_first => {
                    download.remove();
                    self.received.fetch_sub(size, Ordering::Relaxed);
                    is_first = false;
                }
                Err(error @ ImageError::Oci(OciError::Layer { .. })) => {
                    download.remove();
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn unpack(&self, blob: Blob, slots: &Slots) -> Result<(), ImageError> {
        let slot = slots.unpacking.acquire().await;
        let (cache, diff_id, stop) = (self.cache.clone(), self.diff_id, self.stop.clone());
        let unpacked = tokio::task::spawn_blocking(move || cache.unpack(&diff_id, &blob, &stop));
        let unpacked = unpacked.await;
        drop(slot);
        unpacked.map_err(io::Error::other).named("unpack in", self.cache.dir())?
    }
}
