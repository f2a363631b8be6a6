//! What the tests of admission share: a node that accepts requests and forgets what is gone.

mod bases;
mod copies;
mod denials;
mod disks;
mod documents;
mod generate;
mod instances;
mod model;
mod properties;
mod published;
mod sleep_policy;
mod spares;
mod tenants;

use super::*;
use crate::document::Gone;
use crate::name::{RequestId, RevisionId, SnapshotId};
use crate::record::{DesiredState, InstanceRecord};

/// A node as admission sees it.
#[derive(Debug, Clone)]
struct Node {
    desired: Desired,
    facts: NodeFacts,
    now: u64,
    ids: u32,
}

impl Node {
    fn new() -> Self {
        let capacity = Capacity { vcpus: 1_000, mem_mib: 1_000_000, disk_mib: 10_000_000 };
        let facts = NodeFacts { capacity, ..NodeFacts::default() };
        Self { desired: Desired::default(), facts, now: 1, ids: 0 }
    }

    /// A node with the tenant `demo` and its pool `demo/web`.
    fn with_pool() -> Self {
        let mut node = Self::new();
        node.accept(tenant("demo"));
        node.accept(pool("demo/web"));
        node
    }

    fn try_accept(&mut self, request: &Request) -> Result<Edit, Denial> {
        let ids = &mut self.ids;
        let mut entropy = || {
            *ids += 1;
            *ids
        };
        self.now += 1;
        let edit = admit(&self.desired, &self.facts, request, &mut entropy, self.now)?;
        self.desired = edit.desired.clone();
        Ok(edit)
    }

    #[track_caller]
    fn accept(&mut self, request: Request) -> Edit {
        match self.try_accept(&request) {
            Ok(edit) => edit,
            Err(denial) => panic!("{request:?} is denied: {denial}"),
        }
    }

    #[track_caller]
    fn deny(&mut self, request: Request) -> Denial {
        match self.try_accept(&request) {
            Ok(edit) => panic!("{request:?} is accepted: {edit:?}"),
            Err(denial) => denial,
        }
    }

    /// The same for what control asks of itself.
    fn try_accept_own(&mut self, request: &OwnRequest) -> Result<Edit, Denial> {
        let ids = &mut self.ids;
        let mut entropy = || {
            *ids += 1;
            *ids
        };
        self.now += 1;
        let edit = admit_own(&self.desired, &self.facts, request, &mut entropy, self.now)?;
        self.desired = edit.desired.clone();
        Ok(edit)
    }

    /// Makes one fork of an instance, which is saved at once.
    fn try_fork(&mut self, source: &InstancePath) -> Result<Edit, Denial> {
        let id = RequestId::from_bits(1);
        let (snapshot, revision) = (SnapshotId::from_bits(9), RevisionId::from_digest([1; 8]));
        let begin = OwnRequest::BeginFork { id: id.clone(), source: source.clone(), count: 1 };
        assert!(self.try_accept_own(&begin)?.instances.is_empty(), "it is not saved yet");
        assert_eq!(self.desired.forks.len(), 1);
        let edit = self.try_accept_own(&OwnRequest::MakeForks { id, snapshot, revision })?;
        assert!(self.desired.forks.is_empty());
        Ok(edit)
    }

    /// An instance is seen in a phase, of what was asked of it last.
    fn observe(&mut self, path: &InstancePath, phase: Phase) {
        let generation = self.desired.instances[path].generation;
        let status = InstanceStatus { phase, generation, ..InstanceStatus::default() };
        self.facts.observed.instances.insert(path.clone(), status);
    }

    /// Removes the records of what is to go, as the executor does once it is gone.
    fn forget_the_gone(&mut self) {
        let Desired { tenants, pools, instances, disks, forks: _ } = &self.desired;
        // All of them: what is to stay is not forgotten.
        let gone = Gone {
            tenants: tenants.iter().map(|(name, it)| (name.clone(), it.created_unix_ms)).collect(),
            pools: pools.iter().map(|(path, it)| (path.clone(), it.created_unix_ms)).collect(),
            instances: instances
                .iter()
                .map(|(path, it)| (path.clone(), it.created_unix_ms))
                .collect(),
            disks: disks.iter().map(|(path, it)| (path.clone(), it.created_unix_ms)).collect(),
        };
        self.desired = forget(&self.desired, &gone);
    }

    /// The pool's instances, oldest first.
    fn instances(&self, pool: &str) -> Vec<&InstanceRecord> {
        let pool: PoolPath = pool.parse().unwrap();
        let mut instances: Vec<_> =
            self.desired.instances.values().filter(|i| i.path.pool == pool).collect();
        instances.sort_by_key(|instance| (instance.created_unix_ms, instance.slot));
        instances
    }

    /// The ids of the pool's instances that are to do this, oldest first.
    fn ids(&self, pool: &str, state: DesiredState) -> Vec<InstanceId> {
        let instances = self.instances(pool).into_iter();
        instances.filter(|i| i.desired == state).map(|i| i.path.id.clone()).collect()
    }
}

fn tenant(name: &str) -> Request {
    Request::TenantCreate { name: name.parse().unwrap(), quota: Quota::default(), subnet: None }
}

fn tenant_with(name: &str, quota: Quota, subnet: Option<&str>) -> Request {
    let subnet = subnet.map(|subnet| subnet.parse().unwrap());
    Request::TenantCreate { name: name.parse().unwrap(), quota, subnet }
}

fn pool(path: &str) -> Request {
    Request::PoolCreate { path: path.parse().unwrap(), spec: Box::default() }
}

fn scale(path: &str, running: u32) -> Request {
    Request::PoolScale { path: path.parse().unwrap(), running, warm: None, sleeping: None }
}

fn create(pool: &str, count: u32, start: bool) -> Request {
    Request::InstanceCreate {
        pool: pool.parse().unwrap(),
        count,
        start,
        disks: vec![],
        cold: false,
    }
}

fn start(selector: &str, all: bool) -> Request {
    Request::InstanceStart { selector: selector.parse().unwrap(), all }
}

fn stop(selector: &str, all: bool) -> Request {
    Request::InstanceStop { selector: selector.parse().unwrap(), all, grace_ms: 500 }
}

fn destroy(selector: &str, all: bool, force: bool) -> Request {
    Request::InstanceDestroy { selector: selector.parse().unwrap(), all, force }
}

fn document(json: serde_json::Value) -> Document {
    serde_json::from_value(json).unwrap()
}
