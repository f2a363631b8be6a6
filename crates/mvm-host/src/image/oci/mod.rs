//! Container images: layers out of archives and registries, merged into one tree.
//!
//! ```text
//!  layout, archive ─┐   descriptors   ┌─ layer cache ─┐  entries          hard links
//!  registry ────────┴─> OciImage ────>│ unpack once,  │────────> merge ──────────────> tree
//!                                     │ in parallel   │          (pure)
//!                                     └───────────────┘
//! ```
//!
//! `LocalImages` calls it for the image sources that are container images. Nothing that an image
//! says is believed before it is checked: sizes, digests, names and links come from strangers.

mod blob;
mod cpu_level;
mod document;
mod ensure;
mod entry;
mod error;
mod import;
mod layer;
mod layout;
mod limits;
mod materialise;
mod registry;
mod tar;
mod tree;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use mvm_core::image::{ImageConfig, Reference};

pub use error::{LayerProblem, MergeProblem, OciError, TarProblem};
pub use layer::{LayerCache, StoredLayer};
pub use layout::name_in_archive;
pub use registry::{RegistryConfig, RegistryError};
use tokio_util::sync::CancellationToken;

use super::ImageError;
use super::digest::{Digest, InputDigest};
use super::durable::Named;
use super::progress::{OnProgress, step};
use super::source::{ImageSource, Ownership, Times};
use blob::{Blob, Bounded, Decompressed};
use layer::Layer;
use layout::{Archive, Files};
use registry::Remote;
use tree::Tree;

/// The version of what layers mean; part of each image's fingerprint.
const MERGE_VERSION: u32 = 1;
/// Directories that the guest mounts filesystems on, with their modes.
const MOUNT_POINTS: [(&str, u32); 6] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
];

/// The program that boots a system whose maker says nothing about it.
const INIT: &str = "sbin/init";

/// Where a layer is.
#[derive(Debug, Clone)]
pub(crate) enum LayerSource {
    /// In the cache only.
    Cached,
    /// On this machine.
    Here(Blob),
    /// At a registry.
    Remote { remote: Arc<Remote>, digest: Digest, size: u64 },
}

impl LayerSource {
    /// What has to be downloaded, in bytes.
    fn remote_size(&self) -> u64 {
        match self {
            Self::Cached | Self::Here(_) => 0,
            Self::Remote { size, .. } => *size,
        }
    }
}

/// An image whose documents were read, and whose layers can be had.
#[derive(Debug)]
pub(crate) struct OciImage {
    pub(crate) description: String,
    pub(crate) config: ImageConfig,
    /// The layers from the bottom, with the digests of their tar archives.
    pub(crate) layers: Vec<(Digest, LayerSource)>,
}

/// A container image as an image source.
#[derive(Debug)]
pub struct OciSource {
    image: OciImage,
    cache: LayerCache,
}

impl OciSource {
    /// Opens an image in a directory of the OCI layout.
    ///
    /// # Errors
    /// It cannot be read, has no such image, or is for another platform.
    pub async fn layout(
        dir: &Path,
        tag: Option<&str>,
        cache: &LayerCache,
    ) -> Result<Self, ImageError> {
        let (dir, tag) = (dir.to_owned(), tag.map(str::to_owned));
        Self::open(cache, move |_| {
            // Says what is wrong with the path itself before anything that is in it.
            std::fs::read_dir(&dir).named("read directory", &dir)?;
            layout::open_oci(&Files::Dir(dir), tag.as_deref())
        })
        .await
    }

    /// Opens an image in a tar archive of the OCI layout.
    ///
    /// # Errors
    /// It cannot be read, has no such image, or is for another platform.
    pub async fn oci_archive(
        file: &Path,
        tag: Option<&str>,
        cache: &LayerCache,
    ) -> Result<Self, ImageError> {
        let (file, tag) = (file.to_owned(), tag.map(str::to_owned));
        Self::open(cache, move |scratch| {
            let archive = Archive::open(&file, scratch)?;
            layout::open_oci(&Files::Archive(archive), tag.as_deref())
        })
        .await
    }

    /// Opens an image in an archive that `docker save` wrote.
    ///
    /// # Errors
    /// It cannot be read, has no such image, or is for another platform.
    pub async fn docker_archive(
        file: &Path,
        name: Option<&str>,
        cache: &LayerCache,
    ) -> Result<Self, ImageError> {
        let (file, name) = (file.to_owned(), name.map(str::to_owned));
        Self::open(cache, move |scratch| {
            let archive = Archive::open(&file, scratch)?;
            layout::open_docker(&Files::Archive(archive), name.as_deref())
        })
        .await
    }

    /// Takes over a directory as an image of one layer.
    ///
    /// # Errors
    /// It cannot be read as a whole.
    pub async fn root_dir(
        dir: &Path,
        cache: &LayerCache,
        progress: OnProgress<'_>,
    ) -> Result<Self, ImageError> {
        let (dir, into) = (dir.to_owned(), cache.clone());
        let description = format!("directory {}", dir.display());
        let stop = CancellationToken::new();
        let _guard = stop.clone().drop_guard();
        step(progress, format!("copying {}", dir.display()), async {
            Self::open(cache, move |_| {
                let diff_id = into.import(|writer| import::import_dir(&dir, writer, &stop))?;
                one_layer(description, diff_id, &into)
            })
            .await
        })
        .await
    }

    /// Takes over a tar archive of a whole tree, plain or compressed, as an image of one layer.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn root_archive(
        file: &Path,
        description: String,
        cache: &LayerCache,
        progress: OnProgress<'_>,
    ) -> Result<Self, ImageError> {
        let (file, into) = (file.to_owned(), cache.clone());
        let stop = CancellationToken::new();
        let _guard = stop.clone().drop_guard();
        step(progress, format!("reading {}", file.display()), async {
            Self::open(cache, move |_| {
                let blob = Blob::open(&file, None).named("open", &file)?;
                let plain = Decompressed::new(blob.reader()).named("read", &file)?;
                let plain = Bounded::new(plain, blob.length);
                let diff_id = import::archive_digest(plain, &stop).named("read", &file)?;
                // Now, as the file may be gone later.
                into.unpack(&diff_id, &blob, &stop)?;
                one_layer(description, diff_id, &into)
            })
            .await
        })
        .await
    }

    async fn open(
        cache: &LayerCache,
        open: impl FnOnce(&Path) -> Result<OciImage, ImageError> + Send + 'static,
    ) -> Result<Self, ImageError> {
        let scratch = cache.dir().to_owned();
        let image = tokio::task::spawn_blocking(move || open(&scratch)).await;
        let image = image.map_err(io::Error::other).named("read an image in", cache.dir())??;
        Ok(Self { image, cache: cache.clone() })
    }

    /// Finds out what an image of a registry is now.
    ///
    /// # Errors
    /// No registry or mirror gives it, or it is for another platform.
    pub async fn pull(
        reference: &Reference,
        config: &RegistryConfig,
        cache: &LayerCache,
        progress: OnProgress<'_>,
    ) -> Result<Self, ImageError> {
        let image = step(progress, format!("looking up {reference}"), async {
            registry::resolve(reference, config).await
        });
        Ok(Self { image: image.await?, cache: cache.clone() })
    }
}

#[async_trait]
impl ImageSource for OciSource {
    fn describe(&self) -> String {
        self.image.description.clone()
    }

    fn config(&self) -> ImageConfig {
        self.image.config.clone()
    }

    fn layers(&self) -> Vec<Digest> {
        self.image.layers.iter().map(|(diff_id, _)| *diff_id).collect()
    }

    fn ownership(&self) -> Ownership {
        Ownership::AsWritten
    }

    fn times(&self) -> Times {
        Times::AsWritten
    }

    async fn fingerprint(&self) -> Result<Digest, ImageError> {
        let mut digest = InputDigest::new("container image");
        digest.add("merge", &MERGE_VERSION.to_be_bytes());
        let config = serde_json::to_vec(&self.image.config);
        let config = config.named("encode", Path::new(&self.image.description))?;
        digest.add("config", &config);
        for (diff_id, _) in &self.image.layers {
            digest.add("layer", diff_id.to_string().as_bytes());
        }
        Ok(digest.finish())
    }

    async fn write_root(&self, dest: &Path, progress: OnProgress<'_>) -> Result<(), ImageError> {
        let stop = CancellationToken::new();
        let _guard = stop.clone().drop_guard();
        self.ensure_layers(&stop, progress).await?;
        let (cache, layers) = (self.cache.clone(), self.layers());
        let (image, dest_owned) = (self.image.description.clone(), dest.to_owned());
        let volumes = self.image.config.volumes.clone();
        step(progress, format!("merging {} layers", layers.len()), async {
            let work = move || merge(&image, &cache, &layers, &volumes, &dest_owned, &stop);
            let merged = tokio::task::spawn_blocking(work).await;
            merged.map_err(io::Error::other).named("write", dest)?
        })
        .await
    }

    async fn written(&self) {
        let (cache, layers) = (self.cache.clone(), self.layers());
        // Nobody waits for the disk: a layer that is lost is unpacked again.
        tokio::task::spawn_blocking(move || cache.make_durable(&layers));
    }
}

/// An image of one cached layer, which nobody told how to run: if it has an init, that runs.
fn one_layer(
    description: String,
    diff_id: Digest,
    cache: &LayerCache,
) -> Result<OciImage, ImageError> {
    let (tree, _) = merged(&description, cache, &[diff_id])?;
    let init = tree.has_file(INIT).then(|| format!("/{INIT}"));
    let config = ImageConfig { init, ..ImageConfig::default() };
    Ok(OciImage { description, config, layers: vec![(diff_id, LayerSource::Cached)] })
}

fn merge(
    image: &str,
    cache: &LayerCache,
    diff_ids: &[Digest],
    volumes: &BTreeSet<String>,
    dest: &Path,
    stop: &CancellationToken,
) -> Result<(), ImageError> {
    let (mut tree, layers) = merged(image, cache, diff_ids)?;
    for (name, mode) in MOUNT_POINTS {
        tree.ensure_mount_point(name, mode);
    }
    for volume in volumes {
        // One that cannot be is as missing in the guest as it is in a container.
        let _ = tree.ensure_named_dir(volume);
    }
    Ok(materialise::materialise(&tree, &layers, dest, stop)?)
}

/// The tree of these layers, and the layers without their entries.
fn merged(
    image: &str,
    cache: &LayerCache,
    diff_ids: &[Digest],
) -> Result<(Tree, Vec<Layer>), ImageError> {
    let mut tree = Tree::new();
    let mut layers = Vec::with_capacity(diff_ids.len());
    for (number, diff_id) in diff_ids.iter().enumerate() {
        let gone = || document::unusable(image, format!("its layer sha256:{diff_id} was removed"));
        let mut layer = cache.open(diff_id)?.ok_or_else(gone)?;
        tree.apply(std::mem::take(&mut layer.entries)).map_err(|problem| OciError::Merge {
            number: number + 1,
            image: image.to_owned(),
            problem: problem.into(),
        })?;
        layers.push(layer);
    }
    Ok((tree, layers))
}
