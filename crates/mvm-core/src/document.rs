//! What control and a node say to each other: a whole document of what the node is to have goes down, a
//! report of what it has comes up.
//!
//! Both are levels: the latest one says everything, and a lost one costs nothing. A node does not know who
//! wrote its document, and control does not know how a node goes about it.

use std::collections::{BTreeMap, BTreeSet};

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use crate::local::LocalIntent;
use crate::name::{DiskPath, InstancePath, PoolPath, TenantName};
use crate::plan::Waiting;
use crate::record::{Desired, Observed};

/// Everything that one node is to have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDocument {
    /// Raised when the node may have been given up: one of a lower epoch is refused.
    pub epoch: u64,
    /// Raised with each document of an epoch: an earlier one is refused.
    pub generation: u64,
    /// What is desired.
    pub desired: Desired,
    /// Keys of desired records that do not parse, with the reason: what belongs to them is left as it is.
    pub bad: OrdMap<String, String>,
}

impl NodeDocument {
    /// Whether it takes the place of another one.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        (self.epoch, self.generation) > (other.epoch, other.generation)
    }
}

/// What one node has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The epoch and generation of the document that the node has taken over.
    pub document: (u64, u64),
    /// What is observed.
    pub observed: Observed,
    /// Keys of the node's own records that do not parse, with the reason.
    pub bad: OrdMap<String, String>,
    /// What the node decided by itself.
    pub local: OrdMap<InstancePath, LocalIntent>,
    /// What else there is to say.
    pub notes: NodeNotes,
    /// What was to go, and is gone.
    pub gone: Gone,
    /// What the node needs of control.
    pub needs: Needs,
}

/// What a node says of its instances besides their status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeNotes {
    /// Why instances wait.
    pub waiting: OrdMap<InstancePath, Waiting>,
    /// Instances that stand still because the host's filesystem is full.
    pub lacking_space: BTreeSet<InstancePath>,
    /// Running instances without a network, with the reason.
    pub cut_off: BTreeMap<InstancePath, String>,
}

/// What was to go and is gone: control forgets it. An object that has the same name and was made at
/// another time is another one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// Tenants, with the time at which they were created, in milliseconds since the Unix epoch.
    pub tenants: BTreeMap<TenantName, u64>,
    /// Pools, likewise.
    pub pools: BTreeMap<PoolPath, u64>,
    /// Instances, likewise.
    pub instances: BTreeMap<InstancePath, u64>,
    /// Data disks, likewise.
    pub disks: BTreeMap<DiskPath, u64>,
}

impl Gone {
    /// Forgets what is not to go according to these documents: it is another one, or control has forgotten it.
    pub fn retain_of(&mut self, desired: &Desired) {
        let made = |at: Option<u64>, gone: u64| at == Some(gone);
        self.tenants
            .retain(|name, at| made(desired.tenants.get(name).map(|it| it.created_unix_ms), *at));
        self.pools
            .retain(|path, at| made(desired.pools.get(path).map(|it| it.created_unix_ms), *at));
        self.instances
            .retain(|path, at| made(desired.instances.get(path).map(|it| it.created_unix_ms), *at));
        self.disks
            .retain(|path, at| made(desired.disks.get(path).map(|it| it.created_unix_ms), *at));
    }

    /// Whether nothing is gone.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What only control can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Instances that go at their end, and have ended for good; and those that were made for a base, after that.
    pub removal: BTreeSet<InstancePath>,
    /// How many instances of pools are to stand by, where others do.
    pub spares: BTreeMap<PoolPath, u32>,
}
