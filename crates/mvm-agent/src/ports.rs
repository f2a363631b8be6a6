//! The ports that images say they serve, for whoever looks at pools and instances.
//!
//! A revision never changes, so what one says is read once. A list of thousands of instances reads
//! no file.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use mvm_core::name::RevisionId;
use mvm_host::images::Images;
use mvm_wire::view::{InstanceView, PoolView};

use crate::node::Node;

/// What is known of revisions' ports.
#[derive(Default)]
pub(crate) struct ExposedPorts {
    known: Mutex<BTreeMap<RevisionId, BTreeSet<String>>>,
}

impl ExposedPorts {
    /// A revision's ports; none while it cannot be read, which those say who need it.
    async fn of(&self, images: &dyn Images, revision: Option<&RevisionId>) -> BTreeSet<String> {
        let Some(revision) = revision else { return BTreeSet::new() };
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ports) = known().get(revision) {
            return ports.clone();
        }
        let Ok(files) = images.files(revision).await else { return BTreeSet::new() };
        let ports = files.config.exposed_ports;
        known().insert(revision.clone(), ports.clone());
        ports
    }
}

/// Adds their images' ports to pools.
pub(crate) async fn add_to_pools(node: &Node, views: &mut [PoolView]) {
    for view in views {
        let revision = view.revision.as_ref();
        view.exposed_ports = node.exposed_ports.of(node.host.images.as_ref(), revision).await;
    }
}

/// Adds their images' ports to instances.
pub(crate) async fn add_to_instances(node: &Node, views: &mut [InstanceView]) {
    for view in views {
        let revision = view.revision.as_ref();
        view.exposed_ports = node.exposed_ports.of(node.host.images.as_ref(), revision).await;
    }
}
