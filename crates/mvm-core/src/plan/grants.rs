//! What a tenant may have running on this node: its quota, by what is up at present.
//!
//! A request is checked when it is admitted, and a wake when the node decides it; the two may happen at the same
//! moment and take the same last place. Then the one that is not up yet waits.

use std::collections::BTreeMap;

use crate::lifecycle::{InstanceStatus, Phase};
use crate::name::TenantName;
use crate::record::{Desired, InstanceRecord, Observed};

/// What tenants have up.
pub(super) struct Grants<'a> {
    desired: &'a Desired,
    used: BTreeMap<&'a TenantName, Used>,
}

#[derive(Default)]
struct Used {
    vcpus: u64,
    mem_mib: u64,
    running: u64,
}

impl Used {
    fn add(&mut self, record: &InstanceRecord) {
        self.vcpus += u64::from(record.spec.vcpus);
        self.mem_mib += u64::from(record.spec.mem_mib);
        self.running += 1;
    }
}

impl<'a> Grants<'a> {
    /// Counts what is up, or on its way there, and is to stay so.
    pub(super) fn of(desired: &'a Desired, observed: &Observed) -> Self {
        let mut used: BTreeMap<&TenantName, Used> = BTreeMap::new();
        for (path, status) in &observed.instances {
            let record = desired.instances.get(path);
            if let Some(record) = record.filter(|record| is_up(status) && record.desired.is_up()) {
                used.entry(&record.path.pool.tenant).or_default().add(record);
            }
        }
        Self { desired, used }
    }

    /// Counts one that is to start, if its tenant may have it.
    pub(super) fn take(&mut self, record: &'a InstanceRecord, status: &InstanceStatus) -> bool {
        let tenant = &record.path.pool.tenant;
        let Some(quota) = self.desired.tenants.get(tenant).map(|tenant| &tenant.quota) else {
            return true;
        };
        if is_up(status) {
            return true;
        }
        let used = self.used.entry(tenant).or_default();
        let fits = |used: u64, more: u64, allowed: Option<u64>| {
            allowed.is_none_or(|allowed| used + more <= allowed)
        };
        let is_granted = fits(used.vcpus, record.spec.vcpus.into(), quota.vcpus)
            && fits(used.mem_mib, record.spec.mem_mib.into(), quota.mem_mib)
            && fits(used.running, 1, quota.running);
        if is_granted {
            used.add(record);
        }
        is_granted
    }
}

fn is_up(status: &InstanceStatus) -> bool {
    matches!(
        status.phase,
        Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Warm { .. }
            | Phase::Suspending { .. }
    )
}
