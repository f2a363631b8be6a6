//! Data disks in the plan: made, grown and removed while nothing runs with them, and kept from
//! instances that would share them with a writer.
//!
//! Admission sees to it that no two wishes are in each other's way; here the same is done for what
//! is there: an instance that is to stop may still run.

use crate::disk::DiskMount;
use crate::lifecycle::Phase;
use crate::name::{DiskPath, InstancePath};
use crate::record::{Desired, DiskRecord, DiskStatus, Existence, InstanceRecord, Observed};

use super::{Action, Plan, Waiting, backoff_ms};

/// Plans for each disk's file.
pub(super) fn plan_disks(plan: &mut Plan, desired: &Desired, observed: &Observed, now: u64) {
    for disk in desired.disks.values() {
        match disk.existence {
            Existence::Removed => {
                if users(desired, &disk.path).next().is_none() {
                    plan.actions.push(Action::RemoveDisk(disk.path.clone()));
                }
            }
            Existence::Kept => {
                let in_use = users(desired, &disk.path)
                    .any(|(instance, _)| holds_disks(observed, &instance.path));
                plan_file(plan, disk, observed.disks.get(&disk.path), in_use, now);
            }
        }
    }
}

fn plan_file(
    plan: &mut Plan,
    disk: &DiskRecord,
    status: Option<&DiskStatus>,
    in_use: bool,
    now: u64,
) {
    if is_made(disk, status) || in_use {
        return;
    }
    if let Some(failure) = status.and_then(|status| status.failure.as_ref()) {
        let until = failure.at_unix_ms.saturating_add(backoff_ms(failure.failures));
        if now < until {
            return plan.due(until);
        }
    }
    plan.actions.push(Action::MakeDisk(disk.path.clone()));
}

/// Why an instance cannot have its disks now; `None` if it can.
pub(super) fn disks_wait(
    desired: &Desired,
    observed: &Observed,
    record: &InstanceRecord,
) -> Option<Waiting> {
    record.spec.disks.iter().find_map(|mount| {
        let path = mount.disk(&record.path.pool.tenant);
        let Some(disk) = desired.disks.get(&path) else {
            return Some(Waiting::Disk {
                disk: path,
                error: Some("its record is missing or does not parse".to_owned()),
            });
        };
        let status = observed.disks.get(&path);
        if !is_made(disk, status) {
            let error = status.and_then(|status| status.failure.as_ref());
            let error = error.map(|failure| failure.error.clone());
            return Some(Waiting::Disk { disk: path, error });
        }
        let holder = users(desired, &path).find(|(other, theirs)| {
            other.path != record.path
                && !(mount.read_only && theirs.read_only)
                && holds_disks(observed, &other.path)
        });
        let holder = holder.map(|(other, _)| other.path.clone())?;
        Some(Waiting::DiskHeld { disk: path, holder })
    })
}

fn is_made(disk: &DiskRecord, status: Option<&DiskStatus>) -> bool {
    status.and_then(|status| status.size_mib).is_some_and(|size_mib| size_mib >= disk.size_mib)
}

/// Every instance whose spec names the disk, and how.
fn users<'a>(
    desired: &'a Desired,
    disk: &'a DiskPath,
) -> impl Iterator<Item = (&'a InstanceRecord, &'a DiskMount)> {
    desired.instances_of(&disk.tenant).filter_map(|instance| {
        let mount = instance.spec.disks.iter().find(|mount| mount.name == disk.disk)?;
        Some((instance, mount))
    })
}

/// Whether an instance has, or is getting, a VM, or sleeps with what it has not written yet; a release may still find one that no record knew.
fn holds_disks(observed: &Observed, path: &InstancePath) -> bool {
    observed.instances.get(path).is_some_and(|status| {
        status.vm.is_some()
            || matches!(
                status.phase,
                Phase::Starting { .. }
                    | Phase::Running { .. }
                    | Phase::Warm { .. }
                    | Phase::Suspending { .. }
                    | Phase::Sleeping { .. }
                    | Phase::Stopping { .. }
                    | Phase::Releasing { .. }
            )
    })
}
