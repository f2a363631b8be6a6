//! What is desired and what is observed, put together: control and nodes decide and answer from it.
//!
//! Control makes it out of its own records and of what nodes report, a node out of its own records and of the
//! document that it was given. A record that does not parse is kept aside, by key: its object is not
//! touched until it is mended.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use imbl::OrdMap;

use crate::document::{NodeDocument, NodeNotes, NodeReport};
use crate::lifecycle::{InstanceStatus, Outcome, Phase};
use crate::local::LocalIntent;
use crate::name::{DiskPath, InstancePath, PoolPath, RequestId, TenantName};
use crate::net::{NetworkConflict, NodeNetwork};
use crate::plan::has_ended_for_good;
use crate::record::{self, Desired, Existence, InstanceRecord, Observed, RequestRecord};
use crate::stored::{self, Stored};

/// Everything that is known, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mirror {
    /// The version of the store whose records it is made of.
    pub version: u64,
    /// What is desired; on a node, with what it decided by itself on top.
    pub desired: Desired,
    /// What is observed.
    pub observed: Observed,
    /// What the node decided by itself, and control has not taken over yet.
    pub local: OrdMap<InstancePath, LocalIntent>,
    /// Requests that were carried out lately.
    pub requests: OrdMap<RequestId, RequestRecord>,
    /// Keys of records that do not parse, with the reason.
    pub bad: OrdMap<String, String>,
    /// What the node says besides records.
    pub notes: NodeNotes,
    /// The node's document as it was given.
    given: Desired,
}

/// Which object a key names.
enum Key {
    Tenant(TenantName),
    Pool(PoolPath),
    Instance(InstancePath),
    Disk(DiskPath),
    Fork(RequestId),
    Request(RequestId),
    PoolStatus(PoolPath),
    InstanceStatus(InstancePath),
    DiskStatus(DiskPath),
    Capture(RequestId),
    Local(InstancePath),
}

impl Key {
    fn parse(key: &str) -> Result<Self, String> {
        let (half, rest) = key.split_once('/').ok_or("the key has no kind")?;
        let (kind, path) = rest.split_once('/').ok_or("the key has no name")?;
        let bad = |error: crate::name::NameError| error.to_string();
        let request = || {
            let (_tenant, id) = path.split_once('/').ok_or("the key has no request")?;
            id.parse().map_err(bad)
        };
        match (half, kind) {
            ("desired", "tenant") => Ok(Self::Tenant(path.parse().map_err(bad)?)),
            ("desired", "pool") => Ok(Self::Pool(path.parse().map_err(bad)?)),
            ("desired", "instance") => Ok(Self::Instance(path.parse().map_err(bad)?)),
            ("desired", "disk") => Ok(Self::Disk(path.parse().map_err(bad)?)),
            ("desired", "fork") => Ok(Self::Fork(request()?)),
            ("request", "change") => Ok(Self::Request(path.parse().map_err(bad)?)),
            ("observed", "disk") => Ok(Self::DiskStatus(path.parse().map_err(bad)?)),
            ("observed", "pool") => Ok(Self::PoolStatus(path.parse().map_err(bad)?)),
            ("observed", "instance") => Ok(Self::InstanceStatus(path.parse().map_err(bad)?)),
            ("observed", "capture") => Ok(Self::Capture(request()?)),
            ("local", "instance") => Ok(Self::Local(path.parse().map_err(bad)?)),
            _ => Err(format!("`{half}/{kind}` is not a kind of record")),
        }
    }
}

impl Mirror {
    /// Takes over one record, or its removal.
    pub fn apply(&mut self, key: &str, value: Option<&[u8]>) {
        match self.try_apply(key, value) {
            Ok(()) => {
                self.bad.remove(key);
            }
            // Nothing rests on it: the same request is carried out again.
            Err(_) if record::is_request(key) => {}
            Err(reason) => {
                let _ = self.try_apply(key, None);
                self.bad.insert(key.to_owned(), reason);
            }
        }
    }

    fn try_apply(&mut self, key: &str, value: Option<&[u8]>) -> Result<(), String> {
        fn put<K: Ord + Clone, V: Stored + Clone>(
            map: &mut OrdMap<K, V>,
            key: K,
            value: Option<&[u8]>,
        ) -> Result<(), String> {
            match value {
                None => drop(map.remove(&key)),
                Some(bytes) => drop(map.insert(key, stored::decode(bytes)?)),
            }
            Ok(())
        }
        if value.is_none() && Key::parse(key).is_err() {
            return Ok(());
        }
        match Key::parse(key)? {
            Key::Tenant(name) => put(&mut self.desired.tenants, name, value),
            Key::Pool(path) => put(&mut self.desired.pools, path, value),
            Key::Instance(path) => put(&mut self.desired.instances, path, value),
            Key::Disk(path) => put(&mut self.desired.disks, path, value),
            Key::Fork(id) => put(&mut self.desired.forks, id, value),
            Key::Request(id) => put(&mut self.requests, id, value),
            Key::DiskStatus(path) => put(&mut self.observed.disks, path, value),
            Key::PoolStatus(path) => put(&mut self.observed.pools, path, value),
            Key::InstanceStatus(path) => put(&mut self.observed.instances, path, value),
            Key::Capture(id) => put(&mut self.observed.captures, id, value),
            Key::Local(path) => {
                put(&mut self.local, path.clone(), value)?;
                self.overlay(&path);
                Ok(())
            }
        }
    }

    /// On a node: from now on this is what it is given.
    pub fn set_document(&mut self, document: &NodeDocument) {
        self.given = document.desired.clone();
        self.desired = self.given.clone();
        let decided: Vec<InstancePath> = self.local.keys().cloned().collect();
        decided.iter().for_each(|path| self.overlay(path));
        self.replace_bad(|key| key.starts_with(record::DESIRED), &document.bad);
    }

    /// In control: from now on this is what its node says.
    pub fn set_report(&mut self, report: &NodeReport) {
        self.observed = report.observed.clone();
        self.local = report.local.clone();
        self.notes = report.notes.clone();
        self.replace_bad(|key| !key.starts_with(record::DESIRED), &report.bad);
    }

    fn replace_bad(&mut self, is_of: impl Fn(&str) -> bool, by: &OrdMap<String, String>) {
        if self.bad.is_empty() && by.is_empty() {
            return;
        }
        let kept = self.bad.iter().filter(|(key, _)| !is_of(key));
        let kept = kept.map(|(key, reason)| (key.clone(), reason.clone()));
        self.bad = kept.collect::<OrdMap<_, _>>().union(by.clone());
    }

    /// Puts what the node decided of an instance on top of what it was given, as far as that still holds.
    fn overlay(&mut self, path: &InstancePath) {
        match (self.given.instances.get(path), self.local.get(path)) {
            (Some(given), Some(local)) => {
                self.desired.instances.insert(path.clone(), local.over(given));
            }
            (Some(given), None) => drop(self.desired.instances.insert(path.clone(), given.clone())),
            (None, _) => drop(self.desired.instances.remove(path)),
        }
    }

    /// The keys of what the node decided that is settled: control has taken it over, somebody has asked for
    /// something else, or the instance is gone.
    pub fn settled_local(&self) -> Vec<String> {
        let is_settled = |path: &InstancePath, local: &LocalIntent| {
            self.given.instances.get(path).is_none_or(|given| !local.holds(given))
        };
        let settled = self.local.iter().filter(|(path, local)| is_settled(path, local));
        settled.map(|(path, _)| record::local_key(path)).collect()
    }

    /// Requests that need no longer be known at this time, or are too many.
    pub fn old_requests(&self, now: u64) -> Vec<RequestId> {
        let is_old = |at: u64| at.saturating_add(record::REQUEST_KEPT_MS) < now;
        let mut by_age: Vec<(u64, &RequestId)> =
            self.requests.iter().map(|(id, request)| (request.at_unix_ms, id)).collect();
        by_age.sort_unstable();
        let surplus = by_age.len().saturating_sub(record::MAX_REQUESTS);
        let mut by_age = by_age.into_iter().enumerate();
        let old = by_age.by_ref().filter(|(nth, (at, _))| *nth < surplus || is_old(*at));
        old.map(|(_, (_, id))| id.clone()).collect()
    }

    /// An instance's status; one that was never acted upon has the default.
    pub fn status(&self, path: &InstancePath) -> &InstanceStatus {
        static NEVER: LazyLock<InstanceStatus> = LazyLock::new(InstanceStatus::default);
        self.observed.instances.get(path).unwrap_or(&NEVER)
    }

    /// The first record of a tenant that does not parse.
    pub fn bad_record_of(&self, tenant: &TenantName) -> Option<(&str, &str)> {
        let mut bad = self.bad.iter();
        bad.find(|(key, _)| record::tenant_of_key(key).is_none_or(|owner| owner == *tenant))
            .map(|(key, reason)| (key.as_str(), reason.as_str()))
    }

    /// Whether what is known of an instance besides its desired record does not parse.
    pub fn is_untouchable(&self, path: &InstancePath) -> bool {
        self.bad.contains_key(&record::instance_status_key(path))
            || self.bad.contains_key(&record::local_key(path))
    }

    /// Whether an instance was to run and has ended for good.
    pub fn is_finished(&self, path: &InstancePath) -> bool {
        let record = self.desired.instances.get(path);
        let has_ended = record.is_some_and(|record| has_ended_for_good(record, self.status(path)));
        has_ended && !self.is_untouchable(path)
    }

    /// The instances of which [`is_untouchable`](Self::is_untouchable) is so.
    pub fn untouchable(&self) -> BTreeSet<InstancePath> {
        let of_key = |key: &String| match Key::parse(key) {
            Ok(Key::InstanceStatus(path) | Key::Local(path)) => Some(path),
            _ => None,
        };
        self.bad.keys().filter_map(of_key).collect()
    }

    /// What is desired without what must not be touched: instances whose status does not parse, and tenants
    /// of which a record does not.
    pub fn touchable(&self) -> Desired {
        if self.bad.is_empty() {
            return self.desired.clone();
        }
        let Desired { tenants, pools, instances, disks, forks } = self.desired.clone();
        let bad = |tenant: &TenantName| self.bad_record_of(tenant).is_some();
        let is_made = |path: &DiskPath, size_mib| {
            let status = self.observed.disks.get(path);
            status.is_some_and(|status| status.size_mib == Some(size_mib))
        };
        Desired {
            tenants: tenants.into_iter().filter(|(name, _)| !bad(name)).collect(),
            pools: pools.into_iter().filter(|(path, _)| !bad(&path.tenant)).collect(),
            instances: instances
                .into_iter()
                .filter(|(path, _)| !self.is_untouchable(path))
                .collect(),
            // What has a disk may be among what does not parse: one that needs nothing done to it
            // may be used, and no other is touched.
            disks: disks
                .into_iter()
                .filter(|(path, disk)| {
                    let may_be_used =
                        disk.existence == Existence::Kept && is_made(path, disk.size_mib);
                    !bad(&path.tenant) || may_be_used
                })
                .collect(),
            forks: forks.into_iter().filter(|(_, it)| !bad(&it.source.pool.tenant)).collect(),
        }
    }

    /// The network that the machine should have: each tenant's bridge, a tap for each instance that
    /// has, or is getting, a VM, and rules for those and for what sleeps. An instance whose status
    /// does not parse may have a tap.
    ///
    /// # Errors
    /// Two of them would be in each other's way.
    pub fn expected_network(&self) -> Result<NodeNetwork, NetworkConflict> {
        let desired = &self.desired;
        let sleeps = |record: &&InstanceRecord| {
            !self.is_untouchable(&record.path)
                && matches!(
                    self.status(&record.path).phase,
                    Phase::Sleeping { .. } | Phase::Releasing { outcome: Outcome::Asleep, .. }
                )
        };
        let holds_tap = |record: &&InstanceRecord| {
            self.is_untouchable(&record.path)
                || matches!(
                    self.status(&record.path).phase,
                    Phase::Starting { .. }
                        | Phase::Running { .. }
                        | Phase::Warm { .. }
                        | Phase::Suspending { .. }
                        | Phase::Stopping { .. }
                )
        };
        let instances = desired.instances.values().filter(holds_tap);
        let tenants = desired.tenants.values().map(|tenant| tenant.network);
        let awake = instances.filter_map(|record| desired.network_of(record));
        let mut network = NodeNetwork::of(tenants, awake)?;
        let asleep = desired.instances.values().filter(sleeps);
        for instance in asleep.filter_map(|record| desired.network_of(record)) {
            network.add_asleep(instance)?;
        }
        Ok(network)
    }
}

#[cfg(test)]
mod tests;
