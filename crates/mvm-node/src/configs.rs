//! What images say about being run, for programs that run beside the main process.
//!
//! A revision never changes, so what one says is read once. A list of thousands of instances reads
//! no file.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use mvm_core::image::ImageConfig;
use mvm_core::main_process;
use mvm_core::name::{InstancePath, RevisionId};
use mvm_host::images::Images;

use crate::node::Node;

/// What is known of revisions.
#[derive(Default)]
pub(crate) struct ImageConfigs {
    known: Mutex<BTreeMap<RevisionId, Arc<ImageConfig>>>,
}

impl ImageConfigs {
    /// What a revision says; nothing while it cannot be read, which those say who need its files.
    async fn of(&self, images: &dyn Images, revision: &RevisionId) -> Arc<ImageConfig> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = known().get(revision) {
            return config.clone();
        }
        let Ok(files) = images.files(revision).await else { return Arc::default() };
        let config = Arc::new(files.config);
        known().insert(revision.clone(), config.clone());
        config
    }
}

async fn config(node: &Node, revision: Option<&RevisionId>) -> Arc<ImageConfig> {
    match revision {
        Some(revision) => node.image_configs.of(node.host.images.as_ref(), revision).await,
        None => Arc::default(),
    }
}

/// What programs in an instance find as its main process does.
#[derive(Default)]
pub(crate) struct Surroundings {
    /// The variables: the image's, and the pool's on top.
    pub(crate) env: Vec<(String, String)>,
    /// The directory that the pool, or else the image, names.
    pub(crate) cwd: Option<String>,
}

/// What programs in an instance find.
pub(crate) async fn surroundings(node: &Node, path: &InstancePath) -> Surroundings {
    let mirror = node.state.now();
    let Some(record) = mirror.desired.instances.get(path) else { return Surroundings::default() };
    let config = config(node, mirror.status(path).revision.as_ref()).await;
    let process = &record.spec.process;
    Surroundings {
        env: main_process::environment(&config, process),
        cwd: main_process::named_directory(&config, process),
    }
}
