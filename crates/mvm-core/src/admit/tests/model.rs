//! An independent reference model of admission: flat lists, and every rule asked of the whole of them after
//! each request. It knows no documents, drafts or differences, and says yes or no without a reason.

mod limits;
mod own;
mod requests;

use std::collections::{BTreeMap, BTreeSet};

use super::generate::{Asked, Seen};
use super::*;
use crate::name::SnapshotId;
use crate::record::Purpose;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tenant {
    pub(super) quota: Quota,
    /// As asked for, or as chosen by the tested code.
    pub(super) subnet: Option<Ipv4Net>,
    pub(super) is_going: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pool {
    pub(super) spec: PoolSpec,
    pub(super) builds: u64,
    pub(super) bases: u64,
    pub(super) rolled_back_to: Option<RevisionId>,
    pub(super) is_going: bool,
    /// What is known of its image.
    image: PoolStatus,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) size_mib: u64,
    pub(super) is_going: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Instance {
    pub(super) spec: PoolSpec,
    pub(super) slot: u16,
    pub(super) desired: DesiredState,
    pub(super) purpose: Purpose,
    pub(super) is_pinned: bool,
    pub(super) origin: Option<SnapshotId>,
    pub(super) revision: Option<RevisionId>,
    /// How often it was to start or end afresh.
    pub(super) wishes: u64,
    born: u64,
    /// What is known of it, as of which wish.
    seen: Option<(Seen, u64)>,
}

impl Instance {
    fn is_alive(&self) -> bool {
        matches!(self.desired, DesiredState::Running | DesiredState::Warm | DesiredState::Sleeping)
    }

    fn is_seen(&self, any: &[Seen]) -> bool {
        self.seen.is_some_and(|(seen, _)| any.contains(&seen))
    }

    /// Whether it was to run and has ended by itself since.
    fn has_ended(&self) -> bool {
        let is_of_this_wish = self.seen.is_some_and(|(_, wish)| wish == self.wishes);
        self.is_alive() && is_of_this_wish && self.is_seen(&[Seen::Stopped, Seen::Failed])
    }

    /// Whether it needs processors and memory, now or as soon as it can have them.
    fn is_running(&self) -> bool {
        use crate::spec::RestartPolicy::{Always, Never, OnFailure};
        let is_up = matches!(self.desired, DesiredState::Running | DesiredState::Warm);
        let is_left_ended = match self.spec.restart {
            Always => false,
            OnFailure => self.is_seen(&[Seen::Stopped]),
            Never => true,
        };
        is_up && !(self.has_ended() && is_left_ended)
    }

    fn is_kept(&self) -> bool {
        self.desired != DesiredState::Destroyed
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    pub(super) tenants: BTreeMap<TenantName, Tenant>,
    pub(super) pools: BTreeMap<PoolPath, Pool>,
    pub(super) disks: BTreeMap<DiskPath, Disk>,
    pub(super) instances: BTreeMap<InstancePath, Instance>,
    pub(super) forks: BTreeMap<RequestId, (InstancePath, u32)>,
    /// Those that had ended by themselves before the request.
    ended: BTreeSet<InstancePath>,
    requests: u64,
}

/// What a new instance is for, and what it begins with.
struct New {
    desired: DesiredState,
    purpose: Purpose,
    /// Whether the pool's base will do, and an instance that stands by.
    takes_base: bool,
}

impl New {
    fn to_be(desired: DesiredState) -> Self {
        Self { desired, purpose: Purpose::Use, takes_base: true }
    }
}

/// Yes, or `None` for no.
fn require(holds: bool) -> Option<()> {
    holds.then_some(())
}

fn range(subnet: Ipv4Net) -> (u32, u32) {
    (subnet.network().into(), subnet.broadcast().into())
}

fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    let ((low, high), (first, last)) = (range(one), range(other));
    first <= high && low <= last
}

/// Of the specs that are generated.
fn is_sound(spec: &PoolSpec) -> bool {
    let policy = &spec.sleep_policy;
    let is_ordered = match (policy.warm_after_s, policy.sleep_after_s) {
        (Some(warm), Some(sleep)) => warm < sleep,
        _ => true,
    };
    spec.vcpus > 0 && spec.ready <= 64 && is_ordered
}

fn can_be_mounted(mounts: &[DiskMount]) -> bool {
    let disks: BTreeSet<_> = mounts.iter().map(|mount| &mount.name).collect();
    let paths: BTreeSet<_> = mounts.iter().map(|mount| mount.path.as_str()).collect();
    disks.len() == mounts.len() && paths.len() == mounts.len()
}

/// What differs between specs of one pool inside the guest.
fn inside(spec: &PoolSpec) -> (&ImageSpec, &[DiskMount], &Settings) {
    (&spec.image, &spec.disks, &spec.settings)
}

fn is_data_disk(size_mib: u64) -> bool {
    (16..16 << 20).contains(&size_mib)
}

impl Model {
    /// The model after the request, or `None` if it is to be denied.
    pub(super) fn after(&self, asked: &Asked, facts: &NodeFacts) -> Option<Self> {
        let mut next = self.clone();
        next.requests += 1;
        let ended = self.instances.iter().filter(|(_, instance)| instance.has_ended());
        next.ended = ended.map(|(path, _)| path.clone()).collect();
        match asked {
            Asked::Outside(request) => next.carry_out(request, facts)?,
            Asked::Own(request) => next.carry_out_own(request, self, facts.capacity)?,
        }
        require(next.shares_well() && next.is_within_limits(self, facts.capacity))?;
        Some(next)
    }

    /// Drops what is going, as if it were gone.
    pub(super) fn forget_the_gone(&mut self) {
        self.instances.retain(|_, instance| instance.is_kept());
        self.disks.retain(|_, disk| !disk.is_going);
        self.pools.retain(|_, pool| !pool.is_going);
        self.tenants.retain(|_, tenant| !tenant.is_going);
    }

    pub(super) fn see(&mut self, path: &InstancePath, seen: Seen) {
        if let Some(instance) = self.instances.get_mut(path) {
            instance.seen = Some((seen, instance.wishes));
        }
    }

    pub(super) fn build(&mut self, path: &PoolPath, image: &PoolStatus) {
        if let Some(pool) = self.pools.get_mut(path) {
            pool.image = image.clone();
        }
    }

    fn tenant(&mut self, name: &TenantName) -> Option<&mut Tenant> {
        self.tenants.get_mut(name).filter(|tenant| !tenant.is_going)
    }

    fn pool(&mut self, path: &PoolPath) -> Option<&mut Pool> {
        self.tenant(&path.tenant)?;
        self.pools.get_mut(path).filter(|pool| !pool.is_going)
    }

    fn disk(&mut self, path: &DiskPath) -> Option<&mut Disk> {
        self.tenant(&path.tenant)?;
        self.disks.get_mut(path).filter(|disk| !disk.is_going)
    }

    fn of_pool(&self, pool: &PoolPath, is_meant: impl Fn(&Instance) -> bool) -> Vec<InstancePath> {
        let instances = self.instances.iter();
        let instances = instances.filter(|(path, it)| path.pool == *pool && is_meant(it));
        instances.map(|(path, _)| path.clone()).collect()
    }

    fn in_use(&self, pool: &PoolPath, desired: DesiredState) -> u64 {
        self.of_pool(pool, |it| it.purpose == Purpose::Use && it.desired == desired).len() as u64
    }

    /// How many of a pool are to run.
    pub(super) fn running(&self, pool: &PoolPath) -> u64 {
        self.in_use(pool, DesiredState::Running)
    }

    /// Each instance that a selector covers, without regard to what it is to do.
    fn covered(&self, selector: &Selector) -> Vec<InstancePath> {
        let is_covered = |path: &&InstancePath| match selector {
            Selector::All => true,
            Selector::Tenant(tenant) => path.pool.tenant == *tenant,
            Selector::Pool(pool) => path.pool == *pool,
            Selector::Id { pool, prefix } => {
                pool.as_ref().is_none_or(|pool| path.pool == *pool)
                    && path.id.as_str().starts_with(prefix)
            }
        };
        self.instances.keys().filter(is_covered).cloned().collect()
    }

    fn selected(&self, selector: &Selector, all: bool) -> Option<Vec<InstancePath>> {
        let is_named = matches!(selector, Selector::Id { .. });
        let is_meant = |path: &InstancePath| {
            let instance = &self.instances[path];
            instance.is_kept() && (is_named || instance.purpose == Purpose::Use)
        };
        let mut paths = self.covered(selector);
        paths.retain(is_meant);
        require(!paths.is_empty() && (all || paths.len() == 1))?;
        Some(paths)
    }

    /// Of what is selected, what can be put to rest.
    fn awake(&self, selector: &Selector, all: bool) -> Option<Vec<InstancePath>> {
        let mut paths = self.selected(selector, all)?;
        paths.retain(|path| self.instances[path].is_alive() && !self.ended.contains(path));
        require(!paths.is_empty())?;
        Some(paths)
    }

    /// An instance is to do this from now on; it starts or ends afresh unless it just goes on.
    fn want(&mut self, path: &InstancePath, desired: DesiredState) {
        let has_ended = self.ended.contains(path);
        let Some(instance) = self.instances.get_mut(path) else { return };
        let was_alive = instance.is_alive();
        let before = std::mem::replace(&mut instance.desired, desired);
        let goes_on = was_alive && instance.is_alive() && !has_ended;
        let is_restarted = instance.is_alive() && has_ended;
        if is_restarted || (before != desired && !goes_on) {
            instance.wishes += 1;
        }
        if instance.is_kept() {
            self.take(path);
        }
    }

    /// What stands by and is asked for is in use.
    fn take(&mut self, path: &InstancePath) {
        let instance = self.instances.get_mut(path).filter(|it| it.purpose == Purpose::Spare);
        if let Some(instance) = instance {
            instance.purpose = Purpose::Use;
        }
    }

    fn clear(&mut self, path: &PoolPath) {
        for instance in self.of_pool(path, |_| true) {
            self.want(&instance, DesiredState::Destroyed);
        }
        if let Some(pool) = self.pools.get_mut(path) {
            pool.is_going = true;
        }
    }

    fn add_tenant(&mut self, name: &TenantName, tenant: Tenant, facts: &NodeFacts) -> Option<()> {
        require(!self.tenants.contains_key(name))?;
        if let Some(subnet) = tenant.subnet {
            require(self.is_free(subnet, facts))?;
        }
        self.tenants.insert(name.clone(), tenant);
        Some(())
    }

    fn is_free(&self, subnet: Ipv4Net, facts: &NodeFacts) -> bool {
        let is_plain =
            subnet.addr() == subnet.network() && (16..=29).contains(&subnet.prefix_len());
        let tenants = self.tenants.values().filter_map(|tenant| tenant.subnet);
        let mut taken = tenants.chain(facts.foreign_subnets.iter().copied());
        is_plain && !taken.any(|other| overlap(subnet, other))
    }

    fn add_pool(&mut self, path: &PoolPath, spec: &PoolSpec) -> Option<()> {
        self.tenant(&path.tenant)?;
        require(!self.pools.contains_key(path) && is_sound(spec))?;
        self.require_disks(&path.tenant, &spec.disks)?;
        let pool = Pool {
            spec: spec.clone(),
            builds: 0,
            bases: 0,
            rolled_back_to: None,
            is_going: false,
            image: PoolStatus::default(),
        };
        self.pools.insert(path.clone(), pool);
        Some(())
    }

    fn add_disk(&mut self, path: &DiskPath, size_mib: u64) -> Option<()> {
        self.tenant(&path.tenant)?;
        require(!self.disks.contains_key(path) && is_data_disk(size_mib))?;
        self.disks.insert(path.clone(), Disk { size_mib, is_going: false });
        Some(())
    }

    fn grow_disk(&mut self, path: &DiskPath, size_mib: u64) -> Option<()> {
        let is_held = !self.holders(path).is_empty();
        let disk = self.disk(path)?;
        let is_larger = size_mib > disk.size_mib;
        require(is_data_disk(size_mib) && size_mib >= disk.size_mib && !(is_larger && is_held))?;
        disk.size_mib = size_mib;
        Some(())
    }

    fn require_disks(&mut self, tenant: &TenantName, mounts: &[DiskMount]) -> Option<()> {
        require(can_be_mounted(mounts))?;
        for mount in mounts {
            self.disk(&DiskPath { tenant: tenant.clone(), disk: mount.name.clone() })?;
        }
        Some(())
    }

    /// Whether each instance that has a disk, or would lose what it has not written yet, writes it.
    fn holders(&self, disk: &DiskPath) -> Vec<bool> {
        let alive = self.instances.iter().filter(|(_, instance)| instance.is_alive());
        let its = alive.filter(|(path, _)| path.pool.tenant == disk.tenant);
        let mounts = its.flat_map(|(_, instance)| &instance.spec.disks);
        mounts.filter(|mount| mount.name == disk.disk).map(|mount| !mount.read_only).collect()
    }

    fn is_attached(&self, disk: &DiskPath) -> bool {
        let names = |tenant: &TenantName, spec: &PoolSpec| {
            *tenant == disk.tenant && spec.disks.iter().any(|mount| mount.name == disk.disk)
        };
        let mut pools = self.pools.iter().filter(|(_, pool)| !pool.is_going);
        let mut instances = self.instances.iter().filter(|(_, instance)| instance.is_kept());
        pools.any(|(path, pool)| names(&path.tenant, &pool.spec))
            || instances.any(|(path, instance)| names(&path.pool.tenant, &instance.spec))
    }

    /// The base that an instance of this spec may begin with.
    fn base_for(&self, pool: &PoolPath, spec: &PoolSpec) -> Option<(SnapshotId, RevisionId)> {
        let image = &self.pools[pool].image;
        let base = image.base.clone().filter(|base| base.given_up.is_none())?;
        require(
            inside(&base.spec) == inside(spec) && image.revision == Some(base.revision.clone()),
        )?;
        Some((base.id, base.revision))
    }

    fn add_instances(
        &mut self,
        pool: &PoolPath,
        count: u64,
        own_disks: &[DiskMount],
        new: &New,
    ) -> Option<()> {
        let mut spec = self.pool(pool)?.spec.clone();
        spec.disks.extend(own_disks.iter().cloned());
        self.require_disks(&pool.tenant, &spec.disks)?;
        let base = self.base_for(pool, &spec).filter(|_| new.takes_base).unzip();
        let spares = self.of_pool(pool, |it| {
            it.purpose == Purpose::Spare
                && it.is_kept()
                && it.is_seen(&[Seen::Warm])
                && it.origin == base.0
                && inside(&it.spec) == inside(&spec)
        });
        let is_served = new.purpose == Purpose::Use
            && base.0.is_some()
            && matches!(new.desired, DesiredState::Running | DesiredState::Warm);
        let most = if is_served { count as usize } else { 0 };
        let taken: Vec<InstancePath> = spares.into_iter().take(most).collect();
        for path in &taken {
            self.want(path, new.desired);
            if let Some(instance) = self.instances.get_mut(path) {
                (instance.spec, instance.born) = (spec.clone(), self.requests);
            }
        }
        for _ in taken.len() as u64..count {
            let wishes = u64::from(new.desired != DesiredState::Stopped);
            self.add_instance(
                pool,
                Instance {
                    spec: spec.clone(),
                    slot: 0,
                    desired: new.desired,
                    purpose: new.purpose,
                    is_pinned: false,
                    origin: base.0.clone(),
                    revision: base.1.clone(),
                    wishes,
                    born: self.requests,
                    seen: None,
                },
            )?;
        }
        Some(())
    }

    /// At the lowest address that is free, with the lowest id.
    fn add_instance(&mut self, pool: &PoolPath, instance: Instance) -> Option<()> {
        let used: BTreeSet<u16> = {
            let its = self.instances.iter().filter(|(path, _)| path.pool.tenant == pool.tenant);
            its.map(|(_, instance)| instance.slot).collect()
        };
        // Until the tested code has chosen one, the tenant has the usual number of addresses.
        let prefix = self.tenant(&pool.tenant)?.subnet.map_or(24, |subnet| subnet.prefix_len());
        let last = (1u16 << (32 - prefix)) - 2;
        let slot = (3..=last).find(|slot| !used.contains(slot))?;
        let id = (1..).map(InstanceId::from_bits);
        let id = { id }.find(|id| self.instances.keys().all(|path| path.id != *id))?;
        self.instances.insert(pool.instance(id), Instance { slot, ..instance });
        Some(())
    }

    fn retry_failed_build(&mut self, path: &PoolPath) {
        if let Some(pool) = self.pools.get_mut(path)
            && matches!(pool.image.build, crate::record::BuildState::Failed { .. })
        {
            pool.builds += 1;
        }
    }

    /// Takes those that are nearest to what is wanted, the oldest of them first, and makes the rest.
    fn scale(
        &mut self,
        path: &PoolPath,
        running: u32,
        warm: Option<u32>,
        sleeping: Option<u32>,
    ) -> Option<()> {
        use DesiredState::{Running, Sleeping, Stopped, Warm};
        self.pool(path)?;
        let sum = [Some(running), warm, sleeping].into_iter().flatten().map(u64::from).sum::<u64>();
        require(sum <= 1_000)?;
        self.retry_failed_build(path);
        let mut left = self.of_pool(path, |it| it.purpose == Purpose::Use && it.is_kept());
        for (count, order) in [
            (Some(running), [Running, Warm, Sleeping, Stopped]),
            (warm, [Warm, Running, Sleeping, Stopped]),
            (sleeping, [Sleeping, Warm, Running, Stopped]),
        ] {
            let Some(count) = count else { continue };
            left.sort_by_key(|path| {
                let instance = &self.instances[path];
                let rank = order.iter().position(|state| *state == instance.desired);
                (rank, instance.born, instance.slot)
            });
            let taken: Vec<InstancePath> = left.drain(..left.len().min(count as usize)).collect();
            taken.iter().for_each(|instance| self.want(instance, order[0]));
            let missing = u64::from(count) - taken.len() as u64;
            self.add_instances(path, missing, &[], &New::to_be(order[0]))?;
        }
        for instance in left {
            let stays = match self.instances[&instance].desired {
                Running => false,
                Warm => warm.is_none(),
                Sleeping => sleeping.is_none(),
                _ => true,
            };
            if !stays {
                self.want(&instance, Stopped);
            }
        }
        Some(())
    }
}
