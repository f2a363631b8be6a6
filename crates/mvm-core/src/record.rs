//! What the store holds: the desired documents, and what is observed of each object.
//!
//! Desired records have one writer, admission; observed ones have one writer each, the instance's
//! actor or the pool's builder; what a node decides by itself is the node's. Keys are `desired/…`,
//! `observed/…` and `local/…`.

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use crate::disk::DiskMount;
use crate::image::ImageSpec;
use crate::lifecycle::InstanceStatus;
use crate::name::{
    DiskPath, InstancePath, PoolPath, RequestId, RevisionId, Selector, SnapshotId, TenantName,
};
use crate::net::{InstanceNetwork, Slot, TenantNetwork};
use crate::sleep_policy::Rested;
use crate::spec::{NetMode, PoolSpec, Quota};

/// Prefix of every desired record.
pub const DESIRED: &str = "desired/";
/// Prefix of every observed record.
pub const OBSERVED: &str = "observed/";
/// Prefix of every record of a request that was carried out.
pub const REQUEST: &str = "request/";
/// Prefix of every record of what a node decided by itself.
pub const LOCAL: &str = "local/";

/// Whether an object is to exist.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Existence {
    /// It is to exist.
    #[default]
    Kept,
    /// It is to be removed once nothing depends on it.
    Removed,
}

/// A tenant, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantRecord {
    /// The tenant's name.
    pub name: TenantName,
    /// The tenant's limits.
    pub quota: Quota,
    /// The tenant's network.
    pub network: TenantNetwork,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Whether it is to exist.
    #[serde(default)]
    pub existence: Existence,
}

/// A pool, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    /// The pool's path.
    pub path: PoolPath,
    /// What its instances are like.
    pub spec: PoolSpec,
    /// How many of its instances are to run.
    pub running: u32,
    /// Raised by each request to build; the builder reports the last one that it carried out.
    pub build_generation: u64,
    /// Raised by each request for a base; the node reports the last one that it carried out.
    #[serde(default)]
    pub base_generation: u64,
    /// The earlier revision that new instances get, instead of what the image is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rolled_back_to: Option<RevisionId>,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Whether it is to exist.
    #[serde(default)]
    pub existence: Existence,
}

/// What an instance is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DesiredState {
    /// Run.
    Running,
    /// Stand still: its vCPUs do not run, its memory is kept.
    Warm,
    /// Sleep: go on some time from a snapshot, and take no memory until then.
    Sleeping,
    /// Not run; its disk and address are kept.
    Stopped,
    /// Be removed with everything that it has.
    Destroyed,
}

/// What an instance is there for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// To be used: it is one of those that its pool is to have.
    #[default]
    Use,
    /// For its pool's base to be saved from it.
    Base,
    /// To stand by, ready, until a new instance of its pool is asked for, which it then is.
    Spare,
}

impl Purpose {
    /// Whether it is one of those that its pool is to have.
    pub fn is_use(&self) -> bool {
        *self == Self::Use
    }
}

/// An instance, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// The instance's path.
    pub path: InstancePath,
    /// What it is like: its pool's spec when it was created.
    pub spec: PoolSpec,
    /// The disks of the spec that its pool did not have: those that it was made with besides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own_disks: Vec<DiskMount>,
    /// Its place in the tenant's network; kept for life, also without an interface.
    pub slot: Slot,
    /// What it is to do.
    pub desired: DesiredState,
    /// Raised by each request that wants a fresh start; a status of a lower generation is of an
    /// earlier wish.
    pub generation: u64,
    /// How long the guest has to shut down, in milliseconds; 0 ends the VMM at once.
    pub grace_ms: u64,
    /// Raised by each request to sleep; a failure that answers an earlier one is of no account.
    #[serde(default)]
    pub sleep_request: u64,
    /// How long the guest has to prepare for its sleep, in milliseconds; 0 puts it to sleep as it is.
    #[serde(default = "default_hooks_ms")]
    pub hooks_ms: u64,
    /// The snapshot that it begins with, instead of booting, when it runs for the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<SnapshotId>,
    /// The revision that it boots, if that is not the one that its pool has when it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<RevisionId>,
    /// Raised by each request about what it is to do: what a node decided before is void then.
    #[serde(default)]
    pub intent: u64,
    /// The last decision of its node that was taken over.
    #[serde(default)]
    pub local_number: u64,
    /// What it is there for.
    #[serde(default, skip_serializing_if = "Purpose::is_use")]
    pub purpose: Purpose,
    /// Whether its pool's sleep policy leaves it alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// What its pool's sleep policy did to it, if what it is to do is the policy's wish.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rested: Option<Rested>,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
}

/// How long a guest has to prepare for its sleep unless a request says otherwise, in milliseconds.
pub const DEFAULT_HOOKS_MS: u64 = 10_000;

fn default_hooks_ms() -> u64 {
    DEFAULT_HOOKS_MS
}

impl DesiredState {
    /// Whether an instance that is to do this has memory and processors reserved for it.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Warm)
    }

    /// Whether it keeps what the guest has in memory.
    pub fn is_alive(self) -> bool {
        matches!(self, Self::Running | Self::Warm | Self::Sleeping)
    }
}

/// A data disk, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The disk's path.
    pub path: DiskPath,
    /// Its size in MiB; it only grows.
    pub size_mib: u64,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Whether it is to exist.
    #[serde(default)]
    pub existence: Existence,
}

/// Forks that were asked for and cannot be made yet: their source is being saved first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkRecord {
    /// The instance that they begin where it is.
    pub source: InstancePath,
    /// How many.
    pub count: u32,
    /// When they were asked for, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
}

/// What came of saving an instance for forks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    /// The instance.
    pub source: InstancePath,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Captured,
}

/// How an instance was saved, or why it was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Captured {
    /// It is saved.
    Saved {
        /// As this snapshot.
        snapshot: SnapshotId,
        /// The revision that it runs.
        revision: RevisionId,
    },
    /// It cannot be saved.
    Failed {
        /// Why, with sources.
        error: String,
    },
}

/// What is known of a data disk's file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskStatus {
    /// The file's size in MiB, once it is made. A file that was made and is lost is not made
    /// again: an empty disk in place of a full one would hide the loss.
    pub size_mib: Option<u64>,
    /// Why it could not be made or grown at last.
    pub failure: Option<DiskFailure>,
}

/// Why a data disk could not be made or grown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFailure {
    /// Why, with sources.
    pub error: String,
    /// When, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// Failures in a row.
    pub failures: u32,
}

/// Most earlier revisions that a pool can go back to.
pub const MAX_HISTORY: usize = 5;

/// A revision that a pool had before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastRevision {
    /// The revision.
    pub revision: RevisionId,
    /// The image that it was built from.
    pub image: ImageSpec,
}

/// What is known of a pool's image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolStatus {
    /// The revision that new instances get.
    pub revision: Option<RevisionId>,
    /// The image that the revision was built from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSpec>,
    /// Earlier revisions, the latest last; at most [`MAX_HISTORY`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<PastRevision>,
    /// The last build request that was carried out, successfully or not.
    pub build_generation: u64,
    /// What the builder is doing or has met.
    pub build: BuildState,
    /// What new instances begin with instead of booting, if it still is what a boot would make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// The last request for a base that was carried out, successfully or not.
    pub base_generation: u64,
    /// Why that request came to nothing, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_failure: Option<String>,
}

/// A pool's base: the snapshot of an instance that has booted and done nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The snapshot.
    pub id: SnapshotId,
    /// The revision that it booted.
    pub revision: RevisionId,
    /// What it was like.
    pub spec: PoolSpec,
    /// When it was saved, in milliseconds since the Unix epoch.
    pub made_unix_ms: u64,
    /// Why an instance could not begin with it, and so no other is to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<String>,
}

impl PoolStatus {
    /// The base that a new instance of this spec may begin with: what was saved has to be what a
    /// boot would make now.
    pub fn base_for(&self, spec: &PoolSpec) -> Option<&Base> {
        let base = self.base.as_ref()?;
        let is_present = self.revision.as_ref() == Some(&base.revision) && base.given_up.is_none();
        (is_present && base.spec.makes_same_guest(spec)).then_some(base)
    }

    /// After a request for a base was carried out. One that came to nothing leaves the base before.
    #[must_use]
    pub fn with_base(mut self, generation: u64, made: Result<Base, String>) -> Self {
        self.base_generation = generation;
        self.base_failure = made.as_ref().err().cloned();
        self.base = made.ok().or(self.base);
        self
    }

    /// After an instance could not begin with this base, whatever became of the pool's since.
    #[must_use]
    pub fn without_base(mut self, id: &SnapshotId, reason: &str) -> Self {
        if let Some(base) = self.base.as_mut().filter(|base| base.id == *id) {
            base.given_up = Some(reason.to_owned());
        }
        self
    }

    /// After a build that made or found a revision of `image`.
    #[must_use]
    pub fn built(mut self, revision: RevisionId, image: &ImageSpec) -> Self {
        let before = self.revision.replace(revision.clone()).zip(self.image.replace(image.clone()));
        self.history.retain(|past| past.revision != revision);
        if let Some((before, image)) = before.filter(|(before, _)| *before != revision) {
            self.history.retain(|past| past.revision != before);
            self.history.push(PastRevision { revision: before, image });
            let surplus = self.history.len().saturating_sub(MAX_HISTORY);
            self.history.drain(..surplus);
        }
        self
    }

    /// After going back to an earlier revision: what came after it is not gone back to again.
    #[must_use]
    pub fn rolled_back(mut self, revision: RevisionId, image: &ImageSpec) -> Self {
        if let Some(at) = self.history.iter().position(|past| past.revision == revision) {
            self.history.truncate(at);
        }
        self.revision = Some(revision);
        self.image = Some(image.clone());
        self
    }
}

/// The state of a pool's image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum BuildState {
    /// No build was needed yet.
    #[default]
    Idle,
    /// A build runs.
    Building {
        /// What it is doing, in words.
        step: String,
    },
    /// The last build made or found the revision.
    Built {
        /// Whether the revision was already there.
        already_there: bool,
        /// How long the build took in milliseconds.
        took_ms: u64,
    },
    /// The last build failed.
    Failed {
        /// Why, with sources.
        error: String,
        /// When, in milliseconds since the Unix epoch.
        at_unix_ms: u64,
        /// Failures in a row.
        failures: u32,
    },
    /// A state of a newer version.
    #[serde(other)]
    Unknown,
}

/// A request that was carried out, and what was answered: the same one again, by its id, is answered with
/// that and changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// The answer.
    pub answer: serde_json::Value,
    /// When it was carried out, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

/// How long a request's id is known, in milliseconds: an hour.
pub const REQUEST_KEPT_MS: u64 = 3_600_000;
/// Most requests whose ids are known.
pub const MAX_REQUESTS: usize = 1_000;

/// Every desired record of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// Tenants by name.
    pub tenants: OrdMap<TenantName, TenantRecord>,
    /// Pools by path.
    pub pools: OrdMap<PoolPath, PoolRecord>,
    /// Instances by path.
    pub instances: OrdMap<InstancePath, InstanceRecord>,
    /// Data disks by path.
    pub disks: OrdMap<DiskPath, DiskRecord>,
    /// Forks that are being made, by the request for them.
    #[serde(default)]
    pub forks: OrdMap<RequestId, ForkRecord>,
}

/// Every observed record of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Pools by path.
    pub pools: OrdMap<PoolPath, PoolStatus>,
    /// Instances by path.
    pub instances: OrdMap<InstancePath, InstanceStatus>,
    /// Data disks by path.
    pub disks: OrdMap<DiskPath, DiskStatus>,
    /// What was saved for forks, by the request for them.
    #[serde(default)]
    pub captures: OrdMap<RequestId, Capture>,
}

impl Desired {
    /// What a selector means here: a name alone is a tenant's, or else that of a pool in
    /// [`DEFAULT_TENANT`](crate::name::DEFAULT_TENANT).
    pub fn meant(&self, selector: Selector) -> Selector {
        let Selector::Tenant(name) = &selector else { return selector };
        let pool = PoolPath::typed(name.as_str());
        match pool.ok().filter(|pool| self.pools.contains_key(pool)) {
            Some(pool) if !self.tenants.contains_key(name) => Selector::Pool(pool),
            _ => selector,
        }
    }

    /// The pools of a tenant.
    pub fn pools_of<'a>(&'a self, tenant: &TenantName) -> impl Iterator<Item = &'a PoolRecord> {
        let is_its = |path: &PoolPath| path.tenant == *tenant;
        values_from(&self.pools, tenant.before_pools(), is_its)
    }

    /// The instances of a tenant.
    pub fn instances_of<'a>(
        &'a self,
        tenant: &TenantName,
    ) -> impl Iterator<Item = &'a InstanceRecord> {
        let is_its = |path: &InstancePath| path.pool.tenant == *tenant;
        values_from(&self.instances, tenant.before_pools().before_instances(), is_its)
    }

    /// The data disks of a tenant.
    pub fn disks_of<'a>(&'a self, tenant: &TenantName) -> impl Iterator<Item = &'a DiskRecord> {
        let is_its = |path: &DiskPath| path.tenant == *tenant;
        values_from(&self.disks, tenant.before_disks(), is_its)
    }

    /// The instances of a pool.
    pub fn instances_in<'a>(&'a self, pool: &PoolPath) -> impl Iterator<Item = &'a InstanceRecord> {
        let is_its = |path: &InstancePath| path.pool == *pool;
        values_from(&self.instances, pool.before_instances(), is_its)
    }

    /// The instances that a selector covers.
    pub fn instances_meant<'a>(
        &'a self,
        selector: &'a Selector,
    ) -> impl Iterator<Item = &'a InstanceRecord> {
        let candidates: Box<dyn Iterator<Item = &InstanceRecord>> = match selector {
            Selector::All | Selector::Id { pool: None, .. } => Box::new(self.instances.values()),
            Selector::Tenant(tenant) => Box::new(self.instances_of(tenant)),
            Selector::Pool(pool) | Selector::Id { pool: Some(pool), .. } => {
                Box::new(self.instances_in(pool))
            }
        };
        candidates.filter(|record| selector.matches(&record.path))
    }

    /// An instance's place in its tenant's network, or `None` if it has no interface.
    pub fn network_of(&self, instance: &InstanceRecord) -> Option<InstanceNetwork> {
        match instance.spec.net {
            NetMode::None => None,
            NetMode::Tenant => {
                self.tenants.get(&instance.path.pool.tenant).map(|tenant| InstanceNetwork {
                    rate_mbit_s: instance.spec.rates.net_mbit_s,
                    ..InstanceNetwork::new(tenant.network, instance.slot)
                })
            }
        }
    }
}

/// The values from this key on, as far as their keys are wanted: those of one owner lie side by side.
fn values_from<K: Ord, V>(
    map: &OrdMap<K, V>,
    first: K,
    is_wanted: impl Fn(&K) -> bool,
) -> impl Iterator<Item = &V> {
    map.range(first..).take_while(move |(key, _)| is_wanted(key)).map(|(_, value)| value)
}

/// The key of a tenant's desired record.
pub fn tenant_key(name: &TenantName) -> String {
    format!("{DESIRED}tenant/{name}")
}

/// The key of a pool's desired record.
pub fn pool_key(path: &PoolPath) -> String {
    format!("{DESIRED}pool/{path}")
}

/// Whether a key is that of a desired record which the node's network rests on: a tenant's or an
/// instance's.
pub fn has_network(key: &str) -> bool {
    let of_another =
        |rest: &str| ["pool/", "disk/", "fork/"].iter().any(|kind| rest.starts_with(kind));
    key.strip_prefix(DESIRED).is_some_and(|rest| !of_another(rest))
}

/// The key of a request that was carried out.
pub fn request_key(id: &RequestId) -> String {
    format!("{REQUEST}change/{id}")
}

/// The key of an instance's desired record.
pub fn instance_key(path: &InstancePath) -> String {
    format!("{DESIRED}instance/{path}")
}

/// The key of a data disk's desired record.
pub fn disk_key(path: &DiskPath) -> String {
    format!("{DESIRED}disk/{path}")
}

/// The key of the record of forks that are being made.
pub fn fork_key(tenant: &TenantName, id: &RequestId) -> String {
    format!("{DESIRED}fork/{tenant}/{id}")
}

/// The key of what was saved for forks.
pub fn capture_key(tenant: &TenantName, id: &RequestId) -> String {
    format!("{OBSERVED}capture/{tenant}/{id}")
}

/// The key of a data disk's observed record.
pub fn disk_status_key(path: &DiskPath) -> String {
    format!("{OBSERVED}disk/{path}")
}

/// The key of a pool's observed record.
pub fn pool_status_key(path: &PoolPath) -> String {
    format!("{OBSERVED}pool/{path}")
}

/// The key of an instance's observed record.
pub fn instance_status_key(path: &InstancePath) -> String {
    format!("{OBSERVED}instance/{path}")
}

/// The key of what a node decided of an instance by itself.
pub fn local_key(path: &InstancePath) -> String {
    format!("{LOCAL}instance/{path}")
}

/// Whether a key is that of a request that was carried out: nothing of a tenant's rests on it.
pub fn is_request(key: &str) -> bool {
    key.starts_with(REQUEST)
}

/// The tenant that a record belongs to, taken from its key alone.
pub fn tenant_of_key(key: &str) -> Option<TenantName> {
    key.split('/').nth(2).and_then(|name| name.parse().ok())
}

/// Changes every value of a map.
#[cfg(test)]
pub(crate) fn change_all<K: Ord + Clone, V: Clone>(
    map: &mut OrdMap<K, V>,
    change: impl Fn(&mut V),
) {
    let keys: Vec<K> = map.keys().cloned().collect();
    keys.iter().filter_map(|key| map.get_mut(key).map(&change)).for_each(drop);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tenant_of_a_record_is_told_by_its_key_alone() {
        let pool: PoolPath = "demo/web".parse().unwrap();
        let disk: DiskPath = "demo/data".parse().unwrap();
        assert!(!has_network(&pool_key(&pool)) && !has_network(&disk_key(&disk)));
        let tenant: TenantName = "demo".parse().unwrap();
        let instance: InstancePath = "demo/web/i-00000001".parse().unwrap();
        let request = RequestId::from_bits(1);
        assert!(!has_network(&fork_key(&tenant, &request)));
        for key in [
            fork_key(&tenant, &request),
            capture_key(&tenant, &request),
            tenant_key(&tenant),
            pool_key(&instance.pool),
            instance_key(&instance),
            disk_key(&disk),
            disk_status_key(&disk),
            pool_status_key(&instance.pool),
            instance_status_key(&instance),
            local_key(&instance),
        ] {
            assert_eq!(tenant_of_key(&key), Some(tenant.clone()), "{key}");
        }
        assert!(has_network(&tenant_key(&tenant)) && has_network(&instance_key(&instance)));
        for key in ["", "desired/", "desired/tenant/", "node/name"] {
            assert_eq!(tenant_of_key(key), None, "{key}");
        }
    }

    #[test]
    fn a_pool_remembers_its_last_few_revisions() {
        let id = |number: u8| RevisionId::from_digest([number; 8]);
        let image = |number: u8| format!("app:{number}").parse::<ImageSpec>().unwrap();
        let past = |status: &PoolStatus| -> Vec<RevisionId> {
            status.history.iter().map(|past| past.revision.clone()).collect()
        };
        let mut status = PoolStatus::default();
        for number in [1, 2, 2, 3] {
            status = status.built(id(number), &image(number));
        }
        assert_eq!(past(&status), [id(1), id(2)], "the same again is no news");
        assert_eq!(status.history[1].image, image(2));
        status = status.built(id(1), &image(1));
        assert_eq!(past(&status), [id(2), id(3)], "each revision is there once");
        status = status.rolled_back(id(2), &image(2));
        assert_eq!((status.revision.clone(), past(&status)), (Some(id(2)), vec![]));
        for number in 10..20 {
            status = status.built(id(number), &image(number));
        }
        assert_eq!(past(&status), [14, 15, 16, 17, 18].map(id));
    }

    #[test]
    fn the_state_of_an_image_round_trips_through_json() {
        let error = "no mirror".to_owned();
        for build in [
            BuildState::Idle,
            BuildState::Building { step: "unpacking".to_owned() },
            BuildState::Built { already_there: true, took_ms: 7 },
            BuildState::Failed { error, at_unix_ms: 1, failures: 2 },
        ] {
            let revision = Some(RevisionId::from_digest([1; 8]));
            let status =
                PoolStatus { revision, build_generation: 3, build, ..PoolStatus::default() };
            let json = serde_json::to_string(&status).unwrap();
            assert_eq!(serde_json::from_str::<PoolStatus>(&json).unwrap(), status, "{json}");
        }
    }
}
