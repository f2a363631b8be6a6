//! Images and layers in a state directory.

use std::path::Path;

use async_trait::async_trait;
use mvm_core::image::ImageSpec;
use mvm_core::name::RevisionId;

use super::stored::Kept;
use super::{
    BuiltImage, Collected, Images, ImagesError, InUse, OnStep, RevisionFiles, StoredImage,
};
use crate::bootstrap::{KernelStore, Outcome};
use crate::guest::AGENT_BINARY;
use crate::image::build::{BuildInputs, ImageStore};
use crate::image::debian;
use crate::image::disk::{LayerTemplates, create_layer};
use crate::image::durable::{FileError, Named};
use crate::image::progress::{OnProgress, Progress};
use crate::image::{BuiltinSource, ImageError, ImageSource, LayerCache, OciSource, RegistryConfig};
use crate::state_dir::StateDir;

/// The images of one state directory.
#[derive(Debug)]
pub struct LocalImages {
    state_dir: StateDir,
    store: ImageStore,
    layers: LayerCache,
    templates: LayerTemplates,
}

impl LocalImages {
    /// For this state directory; nothing is made yet.
    pub fn new(state_dir: impl Into<StateDir>) -> Self {
        let state_dir = state_dir.into();
        Self {
            store: ImageStore::new(&state_dir),
            layers: LayerCache::new(&state_dir),
            templates: LayerTemplates::new(&state_dir),
            state_dir,
        }
    }

    /// Removes what builds of an earlier agent left behind, mounts included. No build may run yet.
    ///
    /// # Errors
    /// Something cannot be removed; everything else is.
    pub async fn sweep(&self) -> Result<(), ImagesError> {
        let left = self.kept(|kept| kept.sweep()).await?;
        for path in left {
            tracing::info!(path = %path.display(), "an interrupted build's leftover is removed");
        }
        Ok(())
    }

    /// Works on what is kept, on a thread that may block.
    async fn kept<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Kept<'_>) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImagesError> {
        let (state, store, layers) =
            (self.state_dir.clone(), self.store.clone(), self.layers.clone());
        let work = move || work(&Kept { state: &state, store: &store, layers: &layers });
        let done = tokio::task::spawn_blocking(work).await.map_err(|error| failed(&error))?;
        done.map_err(|error| failed(&error))
    }

    /// Finds out what an image is now; a tag of a registry may mean another image every time.
    async fn source(
        &self,
        spec: &ImageSpec,
        progress: OnProgress<'_>,
    ) -> Result<Box<dyn ImageSource>, ImageError> {
        let layers = &self.layers;
        Ok(match spec {
            ImageSpec::Builtin => {
                let cache = self.state_dir.package_cache();
                Box::new(BuiltinSource::resolve(&cache, progress).await?)
            }
            ImageSpec::OciLayout { path, tag } => {
                Box::new(OciSource::layout(Path::new(path), tag.as_deref(), layers).await?)
            }
            ImageSpec::OciArchive { path, tag } => {
                Box::new(OciSource::oci_archive(Path::new(path), tag.as_deref(), layers).await?)
            }
            ImageSpec::DockerArchive { path, name } => {
                let name = name.as_deref();
                Box::new(OciSource::docker_archive(Path::new(path), name, layers).await?)
            }
            ImageSpec::Registry(reference) => {
                let config = RegistryConfig::from_environment(&self.state_dir);
                Box::new(OciSource::pull(reference, &config, layers, progress).await?)
            }
            ImageSpec::Debian { suite, packages } => {
                Box::new(debian::make(suite, packages, layers, progress).await?)
            }
            ImageSpec::RootFs { path } => {
                let file = Path::new(path);
                Box::new(match file.metadata().named("read", file)?.is_dir() {
                    true => OciSource::root_dir(file, layers, progress).await?,
                    false => {
                        let description = format!("archive {path}");
                        OciSource::root_archive(file, description, layers, progress).await?
                    }
                })
            }
        })
    }
}

#[async_trait]
impl Images for LocalImages {
    async fn build(
        &self,
        spec: &ImageSpec,
        on_step: OnStep<'_>,
    ) -> Result<BuiltImage, ImagesError> {
        let on_progress = |progress| {
            if let Progress::Began(step) = progress {
                on_step(one_line(&step));
            }
        };
        let kernel = KernelStore::new(&self.state_dir)
            .default_kernel()
            .map_err(|error| failed(&error))?
            .ok_or_else(|| ImagesError {
                message: "no guest kernel is installed: run `mvm bootstrap`".to_owned(),
            })?;
        let source = self.source(spec, &on_progress).await.map_err(|error| failed(&error))?;
        let version = env!("CARGO_PKG_VERSION");
        let inputs = BuildInputs {
            source: source.as_ref(),
            kernel: &kernel,
            agent: AGENT_BINARY,
            agent_version: version,
            created_by: version,
        };
        let (revision, outcome) =
            self.store.build(&inputs, &on_progress).await.map_err(|error| failed(&error))?;
        Ok(BuiltImage {
            revision: revision.id().clone(),
            already_there: outcome == Outcome::AlreadyThere,
        })
    }

    async fn files(&self, revision: &RevisionId) -> Result<RevisionFiles, ImagesError> {
        let revision = self.store.open(revision).map_err(|error| failed(&error))?;
        Ok(RevisionFiles {
            kernel: revision.vmlinuz(),
            initrd: revision.initrd(),
            root: revision.root(),
            modules: revision.modules(),
            config: revision.manifest().config.clone(),
        })
    }

    async fn list(&self) -> Result<Vec<StoredImage>, ImagesError> {
        self.kept(|kept| kept.list()).await
    }

    async fn remove(&self, revision: &RevisionId) -> Result<u64, ImagesError> {
        let revision = revision.clone();
        self.kept(move |kept| kept.remove(&revision)).await
    }

    async fn collect(&self, in_use: &InUse, dry_run: bool) -> Result<Vec<Collected>, ImagesError> {
        let in_use = in_use.clone();
        self.kept(move |kept| kept.collect(&in_use, dry_run)).await
    }

    async fn ensure_layer(&self, path: &Path, size_mib: u32, uid: u32) -> Result<(), ImagesError> {
        if path.exists() {
            return Ok(());
        }
        let template =
            self.templates.ensure(size_mib.into()).await.map_err(|error| failed(&error))?;
        match create_layer(&template, path, uid) {
            Ok(()) | Err(ImageError::LayerExists { .. }) => Ok(()),
            Err(error) => Err(failed(&error)),
        }
    }

    async fn copy_layer(&self, from: &Path, to: &Path, uid: u32) -> Result<(), ImagesError> {
        let (from, to) = (from.to_owned(), to.to_owned());
        let copy = move || {
            match std::fs::remove_file(&to) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(FileError::new("remove", &to, error).into());
                }
                _ => {}
            }
            create_layer(&from, &to, uid)
        };
        let copied = tokio::task::spawn_blocking(copy).await.map_err(|error| failed(&error))?;
        copied.map_err(|error| failed(&error))
    }
}

fn failed(error: &dyn std::error::Error) -> ImagesError {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message.push_str(&format!(": {error}"));
        source = error.source();
    }
    ImagesError { message: one_line(&message) }
}

/// Text with names of an image or words of a registry in it, which may hold anything, as one line
/// without control characters.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_says_is_one_line() {
        let said = std::io::Error::other("entry `a\n\u{1b}[2J\u{9b}b` is odd");
        assert_eq!(failed(&said).message, "entry `a\\n\\u{1b}[2J\\u{9b}b` is odd");
    }
}
