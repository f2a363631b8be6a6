//! Data disks: made, grown and removed by name; held by the instances that are to run with them.
//!
//! A disk is *attached* to every pool and instance whose spec names it, and *held* by those
//! instances that are to run: by one that writes, or by any number that only read. What holds a
//! disk is judged on the whole result of a request, so that no verb can be a way around it.

use std::collections::BTreeSet;

use imbl::ordmap::DiffItem;

use super::{Denial, DiskConflict, Draft};
use crate::disk::{DATA_DISK_MIB_MAX, DATA_DISK_MIB_MIN, DiskMount, check_mounts};
use crate::name::{DiskPath, InstancePath, TenantName};
use crate::record::{Desired, DesiredState, DiskRecord, Existence};

impl Draft<'_> {
    pub(super) fn disk_create(&mut self, path: &DiskPath, size_mib: u64) -> Result<(), Denial> {
        self.require_tenant(&path.tenant)?;
        check_size(size_mib)?;
        match self.edit.desired.disks.get(path).map(|disk| disk.existence) {
            Some(Existence::Kept) => {
                return Err(Denial::Exists { object: format!("disk {path}") });
            }
            Some(Existence::Removed) => {
                return Err(Denial::BeingRemoved { object: format!("disk {path}") });
            }
            None => {}
        }
        let record = DiskRecord {
            path: path.clone(),
            size_mib,
            created_unix_ms: self.now,
            existence: Existence::Kept,
        };
        self.edit.desired.disks.insert(path.clone(), record);
        self.edit.disks.push(path.clone());
        Ok(())
    }

    /// A file system grows when it is mounted next, so nothing may hold the disk.
    pub(super) fn disk_resize(&mut self, path: &DiskPath, size_mib: u64) -> Result<(), Denial> {
        self.require_tenant(&path.tenant)?;
        self.require_disk(path)?;
        check_size(size_mib)?;
        let holders = holders(&self.edit.desired, path);
        let Some(disk) = self.edit.desired.disks.get_mut(path) else { return Ok(()) };
        let has_mib = disk.size_mib;
        if size_mib < has_mib {
            return Err(Denial::DiskShrinks { path: path.clone(), has_mib, size_mib });
        }
        if size_mib > has_mib {
            if !holders.is_empty() {
                let holders = holders.into_iter().map(|holder| holder.instance).collect();
                return Err(Denial::DiskHeld { path: path.clone(), holders });
            }
            disk.size_mib = size_mib;
        }
        self.edit.disks.push(path.clone());
        Ok(())
    }

    pub(super) fn disk_remove(&mut self, path: &DiskPath) -> Result<(), Denial> {
        let Some(disk) = self.edit.desired.disks.get(path) else {
            self.require_tenant(&path.tenant)?;
            return Err(Denial::NoSuchDisk { path: path.clone() });
        };
        // Once more is no error: who asks wants it gone, and it is going.
        if disk.existence == Existence::Kept {
            let to = attached_to(&self.edit.desired, path);
            if !to.is_empty() {
                return Err(Denial::DiskAttached { path: path.clone(), to });
            }
        }
        self.remove_disk(path);
        Ok(())
    }

    /// Marks a disk for removal.
    pub(super) fn remove_disk(&mut self, path: &DiskPath) {
        if let Some(disk) = self.edit.desired.disks.get_mut(path) {
            disk.existence = Existence::Removed;
        }
        self.edit.disks.push(path.clone());
    }

    /// The disks exist and can be mounted beside each other.
    pub(super) fn require_mounts(
        &self,
        object: &dyn std::fmt::Display,
        tenant: &TenantName,
        mounts: &[DiskMount],
    ) -> Result<(), Denial> {
        check_mounts(mounts)
            .map_err(|error| Denial::Mounts { object: object.to_string(), error })?;
        mounts.iter().try_for_each(|mount| self.require_disk(&mount.disk(tenant)))
    }

    fn require_disk(&self, path: &DiskPath) -> Result<(), Denial> {
        match self.edit.desired.disks.get(path) {
            Some(disk) if disk.existence == Existence::Kept => Ok(()),
            Some(_) => Err(Denial::BeingRemoved { object: format!("disk {path}") }),
            None => Err(Denial::NoSuchDisk { path: path.clone() }),
        }
    }
}

fn check_size(size_mib: u64) -> Result<(), Denial> {
    if (DATA_DISK_MIB_MIN..=DATA_DISK_MIB_MAX).contains(&size_mib) {
        return Ok(());
    }
    let expected = format!("{DATA_DISK_MIB_MIN} to {DATA_DISK_MIB_MAX}");
    Err(Denial::Number { what: "the disk's size in MiB", value: size_mib, expected })
}

/// What names a disk in its spec, in words.
fn attached_to(desired: &Desired, path: &DiskPath) -> Vec<String> {
    let names = |mounts: &[DiskMount]| mounts.iter().any(|mount| mount.name == path.disk);
    let pools = desired
        .pools_of(&path.tenant)
        .filter(|pool| pool.existence == Existence::Kept && names(&pool.spec.disks))
        .map(|pool| format!("pool {}", pool.path));
    let instances = desired
        .instances_of(&path.tenant)
        .filter(|i| i.desired != DesiredState::Destroyed && names(&i.spec.disks))
        .map(|instance| format!("instance {}", instance.path));
    pools.chain(instances).collect()
}

/// An instance that is to run with a disk, or sleeps with what it has not written to it yet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    instance: InstancePath,
    read_only: bool,
}

fn holders(desired: &Desired, path: &DiskPath) -> Vec<Holder> {
    let alive = desired.instances_of(&path.tenant).filter(|i| i.desired.is_alive());
    let held = alive.flat_map(|instance| {
        let mounts = instance.spec.disks.iter().filter(|mount| mount.name == path.disk);
        mounts.map(|mount| Holder { instance: instance.path.clone(), read_only: mount.read_only })
    });
    held.collect()
}

/// The disks of instances that a request changes or makes: only those may have other holders than before.
fn disks_of_changed(before: &Desired, after: &Desired) -> BTreeSet<DiskPath> {
    let changes = before.instances.diff(&after.instances);
    let changed = changes.filter_map(|change| match change {
        DiffItem::Add(_, instance) | DiffItem::Update { new: (_, instance), .. } => Some(instance),
        DiffItem::Remove(..) => None,
    });
    let disks = changed.flat_map(|instance| {
        let tenant = &instance.path.pool.tenant;
        instance.spec.disks.iter().map(|mount| mount.disk(tenant))
    });
    disks.collect()
}

/// Refuses a result in which an instance that writes a disk is not the only one to hold it.
pub(super) fn check_holders(before: &Desired, after: &Desired) -> Result<(), Denial> {
    for path in disks_of_changed(before, after) {
        let holders = holders(after, &path);
        if holders.len() < 2 || holders.iter().all(|holder| holder.read_only) {
            continue;
        }
        let earlier = self::holders(before, &path);
        // Who held it before is the one to name; what newly comes is what is refused.
        let (had, new): (Vec<&Holder>, Vec<&Holder>) =
            holders.iter().partition(|holder| earlier.contains(holder));
        let Some(&instance) = new.last() else { continue };
        let in_the_way =
            |other: &&&Holder| **other != instance && !(other.read_only && instance.read_only);
        let holder = had.iter().find(in_the_way).or_else(|| new.iter().find(in_the_way));
        let Some(holder) = holder else { continue };
        return Err(Denial::DiskConflict(Box::new(DiskConflict {
            path,
            instance: instance.instance.clone(),
            read_only: instance.read_only,
            holder: holder.instance.clone(),
            holder_read_only: holder.read_only,
            holder_is_new: !earlier.contains(holder),
        })));
    }
    Ok(())
}
