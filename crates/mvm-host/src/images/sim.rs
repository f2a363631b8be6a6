//! Images that exist by name only.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use mvm_core::image::{ImageConfig, ImageSpec};
use mvm_core::name::RevisionId;

use crate::image::digest::Digest;

use super::{
    BuiltImage, Collected, CollectedKind, Images, ImagesError, InUse, OnStep, RevisionFiles,
    StoredImage,
};
use crate::state_dir::StateDir;

/// Images that are empty files, and layers that are empty at first.
#[derive(Debug, Clone)]
pub struct SimImages {
    state: StateDir,
    built: Arc<Mutex<BTreeSet<RevisionId>>>,
    failure: Arc<Mutex<Option<String>>>,
}

impl SimImages {
    /// Images that keep their empty files in this directory.
    pub fn new(state: impl Into<StateDir>) -> Self {
        Self { state: state.into(), built: Arc::default(), failure: Arc::default() }
    }

    /// Makes builds fail with this message, or succeed again.
    pub fn fail_builds(&self, message: Option<&str>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = message.map(str::to_owned);
    }
}

#[async_trait]
impl Images for SimImages {
    async fn build(
        &self,
        spec: &ImageSpec,
        on_step: OnStep<'_>,
    ) -> Result<BuiltImage, ImagesError> {
        on_step(format!("simulating a build of {spec}"));
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(message) = failure {
            return Err(ImagesError { message });
        }
        let digest = Digest::of(spec.to_string().as_bytes());
        let revision = RevisionId::from_digest(digest.prefix());
        let mut built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        let already_there = !built.insert(revision.clone());
        Ok(BuiltImage { revision, already_there })
    }

    async fn files(&self, revision: &RevisionId) -> Result<RevisionFiles, ImagesError> {
        let dir = self.state.revision(revision);
        let files = RevisionFiles {
            kernel: dir.vmlinuz(),
            initrd: dir.initrd(),
            root: dir.root(),
            modules: Some(dir.modules()),
            config: ImageConfig::default(),
        };
        std::fs::create_dir_all(&dir).map_err(|error| cannot_create(&dir, &error))?;
        let own = [&files.kernel, &files.initrd, &files.root];
        for file in own.into_iter().chain(&files.modules) {
            // A snapshot that reads one would not fit a file that was made anew.
            let mut options = std::fs::File::options();
            let opened = options.write(true).create(true).truncate(false).open(file);
            opened.map_err(|error| cannot_create(file, &error))?;
        }
        Ok(files)
    }

    async fn list(&self) -> Result<Vec<StoredImage>, ImagesError> {
        let built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = |revision: &RevisionId| StoredImage {
            revision: revision.clone(),
            source: "simulated".to_owned(),
            bytes: 0,
            built_unix_ms: 0,
            kernel: "simulated".to_owned(),
            config: ImageConfig::default(),
            layers: Vec::new(),
            damage: None,
        };
        Ok(built.iter().map(stored).collect())
    }

    async fn remove(&self, revision: &RevisionId) -> Result<u64, ImagesError> {
        let mut built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        match built.remove(revision) {
            true => Ok(0),
            false => Err(ImagesError { message: format!("there is no revision {revision}") }),
        }
    }

    async fn collect(&self, in_use: &InUse, dry_run: bool) -> Result<Vec<Collected>, ImagesError> {
        let mut built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        let unused: Vec<_> = built.difference(&in_use.revisions).cloned().collect();
        if !dry_run {
            built.retain(|revision| in_use.revisions.contains(revision));
        }
        let revision = |id: RevisionId| Collected {
            kind: CollectedKind::Revision,
            name: id.to_string(),
            bytes: 0,
        };
        Ok(unused.into_iter().map(revision).collect())
    }

    async fn ensure_layer(
        &self,
        path: &Path,
        _size_mib: u32,
        _uid: u32,
    ) -> Result<(), ImagesError> {
        let mut options = std::fs::File::options();
        let opened = options.write(true).create(true).truncate(false).open(path);
        opened.map(drop).map_err(|error| cannot_create(path, &error))
    }

    async fn copy_layer(&self, from: &Path, to: &Path, _uid: u32) -> Result<(), ImagesError> {
        std::fs::copy(from, to).map(drop).map_err(|error| cannot_create(to, &error))
    }
}

fn cannot_create(path: &Path, error: &std::io::Error) -> ImagesError {
    ImagesError { message: format!("cannot create {}: {error}", path.display()) }
}
