//! What images say about being run, for whoever looks at pools and instances or runs programs.
//!
//! A revision never changes, so what one says is read once. A list of thousands of instances reads
//! no file.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use mvm_core::image::ImageConfig;
use mvm_core::main_process;
use mvm_core::name::{InstancePath, RevisionId};
use mvm_host::images::Images;
use mvm_wire::view::{InstanceView, PoolView};

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

/// Adds what their images say to pools.
pub(crate) async fn add_to_pools(node: &Node, views: &mut [PoolView]) {
    for view in views {
        let config = config(node, view.revision.as_ref()).await;
        view.exposed_ports.clone_from(&config.exposed_ports);
        view.volumes.clone_from(&config.volumes);
        view.has_healthcheck = config.has_healthcheck;
    }
}

/// Adds their images' ports to instances.
pub(crate) async fn add_ports_to_instances(node: &Node, views: &mut [InstanceView]) {
    for view in views {
        view.exposed_ports = ports(node, view.revision.as_ref()).await;
    }
}

async fn ports(node: &Node, revision: Option<&RevisionId>) -> BTreeSet<String> {
    config(node, revision).await.exposed_ports.clone()
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
