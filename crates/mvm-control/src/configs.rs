//! What images say about being run, for those who look at pools and instances.
//!
//! A revision never changes, so a node is asked once. A list of thousands of instances asks nobody.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_core::image::ImageConfig;
use mvm_core::name::RevisionId;
use mvm_wire::door::{Answer, Question};
use mvm_wire::view::{InstanceView, PoolView};

use crate::Control;

/// What is known of revisions.
#[derive(Default)]
pub(crate) struct ImageConfigs(Mutex<BTreeMap<RevisionId, Arc<ImageConfig>>>);

impl ImageConfigs {
    fn known(&self) -> MutexGuard<'_, BTreeMap<RevisionId, Arc<ImageConfig>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a revision says; nothing while it cannot be read, which those say who need its files.
async fn config(control: &Control, revision: Option<&RevisionId>) -> Arc<ImageConfig> {
    let Some(revision) = revision else { return Arc::default() };
    if let Some(config) = control.image_configs.known().get(revision) {
        return config.clone();
    }
    let question = Question::ImageConfig { revision: revision.clone() };
    let Ok(Answer::ImageConfig(Some(config))) = control.link.ask(question).await else {
        return Arc::default();
    };
    let config = Arc::new(*config);
    control.image_configs.known().insert(revision.clone(), config.clone());
    config
}

/// Adds what their images say to pools.
pub(crate) async fn add_to_pools(control: &Control, views: &mut [PoolView]) {
    for view in views {
        let config = config(control, view.revision.as_ref()).await;
        view.exposed_ports.clone_from(&config.exposed_ports);
        view.volumes.clone_from(&config.volumes);
        view.has_healthcheck = config.has_healthcheck;
    }
}

/// Adds their images' ports to instances.
pub(crate) async fn add_ports_to_instances(control: &Control, views: &mut [InstanceView]) {
    for view in views {
        let config = config(control, view.revision.as_ref()).await;
        view.exposed_ports = config.exposed_ports.clone();
    }
}
