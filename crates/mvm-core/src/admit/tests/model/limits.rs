//! What no request may lead to.

use super::*;

impl Model {
    /// Whether each port has one pool, and each disk one writer or only readers.
    pub(super) fn shares_well(&self) -> bool {
        let kept = self.pools.values().filter(|pool| !pool.is_going);
        let ports: Vec<_> = kept.flat_map(|pool| &pool.spec.publish).collect();
        let is_alone = |at: usize| ports[..at].iter().all(|other| !other.collides_with(ports[at]));
        let disks_are_safe = self.disks.keys().all(|disk| {
            let holders = self.holders(disk);
            holders.len() < 2 || !holders.contains(&true)
        });
        disks_are_safe && (0..ports.len()).all(is_alone)
    }

    /// Whether nothing grew beyond its limit.
    pub(super) fn is_within_limits(&self, before: &Self, capacity: Capacity) -> bool {
        let fits = |now: u64, before: u64, limit: Option<u64>| {
            now <= before || limit.is_none_or(|limit| now <= limit)
        };
        let all_fit = |tenant: Option<&TenantName>, limits: [Option<u64>; 5]| {
            let amounts = self.amounts(tenant).into_iter().zip(before.amounts(tenant));
            amounts.zip(limits).all(|((now, before), limit)| fits(now, before, limit))
        };
        let Capacity { vcpus, mem_mib, disk_mib } = capacity;
        let node = [Some(vcpus), Some(mem_mib), Some(disk_mib), None, None];
        let tenants = self.tenants.iter().all(|(name, tenant)| {
            let Quota { vcpus, mem_mib, disk_mib, running, pools, instances_per_pool: _ } =
                tenant.quota;
            all_fit(Some(name), [vcpus, mem_mib, disk_mib, running, pools])
        });
        let pools = self.pools.keys().all(|path| {
            let limit = self.tenants[&path.tenant].quota.instances_per_pool;
            let count = |model: &Self| model.of_pool(path, |_| true).len() as u64;
            fits(count(self), count(before), limit)
        });
        tenants && pools && all_fit(None, node)
    }

    /// vCPUs, memory, disk, what runs and pools of a tenant or of all.
    fn amounts(&self, tenant: Option<&TenantName>) -> [u64; 5] {
        let is_its = |name: &TenantName| tenant.is_none_or(|tenant| tenant == name);
        let its: Vec<&Instance> = {
            let instances = self.instances.iter();
            instances.filter(|(path, _)| is_its(&path.pool.tenant)).map(|(_, it)| it).collect()
        };
        let running = || its.iter().filter(|instance| instance.is_running());
        let disks = self.disks.iter().filter(|(path, _)| is_its(&path.tenant));
        let pools = self.pools.iter().filter(|(path, pool)| is_its(&path.tenant) && !pool.is_going);
        let layers: u64 = its.iter().map(|instance| u64::from(instance.spec.disk_mib)).sum();
        [
            running().map(|instance| u64::from(instance.spec.vcpus)).sum(),
            running().map(|instance| u64::from(instance.spec.mem_mib)).sum(),
            layers + disks.map(|(_, disk)| disk.size_mib).sum::<u64>(),
            running().count() as u64,
            pools.count() as u64,
        ]
    }
}
