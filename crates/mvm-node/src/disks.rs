//! Data disks: their files, which the loop makes and removes, and what an instance's VMM and guest
//! are told of them.

use std::sync::Arc;

use mvm_core::disk::DiskMount;
use mvm_core::guest::DiskConfiguration;
use mvm_core::name::DiskPath;
use mvm_core::record::{self, Desired, DesiredState, DiskFailure, DiskStatus, InstanceRecord};
use mvm_core::stored::versioned;
use mvm_host::vmm::{Disk, DiskAccess};
use mvm_store::{Op, StoreError, encode};

use crate::node::{Node, chain};

/// The guest's letter of the first data disk: the root's image and layer come before it.
const FIRST_LETTER: u8 = b'c';

/// Makes a disk's file, or grows it to its size, and records how that went.
pub(crate) async fn make(node: Arc<Node>, path: DiskPath) {
    let mirror = node.state.now();
    let Some(record) = mirror.desired.disks.get(&path) else { return };
    let before = mirror.observed.disks.get(&path).cloned().unwrap_or_default();
    let what = format!("making disk {path}");
    let status = match node.host.disks.ensure(&path, record.size_mib).await {
        Ok(size_mib) => {
            node.set_problem(&what, None);
            DiskStatus { size_mib: Some(size_mib), failure: None }
        }
        Err(error) => {
            let failures = before.failure.map_or(0, |failure| failure.failures).saturating_add(1);
            let (error, at_unix_ms) = (chain(&error), node.clock.now_ms());
            node.set_problem(&what, Some(error.clone()));
            DiskStatus { failure: Some(DiskFailure { error, at_unix_ms, failures }), ..before }
        }
    };
    let written = node
        .state
        .change(async |mirror| {
            // A disk that was removed meanwhile must not come back as a stray record.
            let is_there = mirror.desired.disks.contains_key(&path);
            let op = encode(record::disk_status_key(&path), &versioned(&status))?;
            Ok::<_, StoreError>((if is_there { vec![op] } else { vec![] }, ()))
        })
        .await;
    let problem = written.err().map(|error| chain(&error));
    node.set_problem(&format!("writing the status of disk {path}"), problem);
    node.poke();
}

/// Removes a disk's file, and then its status.
pub(crate) async fn remove(node: Arc<Node>, path: DiskPath) {
    let what = format!("removing disk {path}");
    let removed = match node.host.disks.remove(&path).await {
        Ok(()) => {
            let op = Op::Delete { key: record::disk_status_key(&path) };
            node.state.write(vec![op]).await.map_err(|error| chain(&error))
        }
        Err(error) => Err(chain(&error)),
    };
    node.set_problem(&format!("making disk {path}"), None);
    // After a failure the next tick tries again.
    let is_removed = removed.is_ok();
    node.set_problem(&what, removed.err());
    let made = node.state.now().desired.disks.get(&path).map(|it| it.created_unix_ms);
    if let Some(made) = made.filter(|_| is_removed) {
        node.note_gone(|gone| {
            gone.disks.insert(path, made);
        });
    }
}

/// An instance's data disks in the order in which they are attached and mounted: a disk whose path
/// lies in another's comes after it.
fn in_order(record: &InstanceRecord) -> Vec<&DiskMount> {
    let mut mounts: Vec<&DiskMount> = record.spec.disks.iter().collect();
    mounts.sort_by_key(|mount| &mount.path);
    mounts
}

/// What the VMM is to attach after the root's disks.
pub(crate) fn for_vmm(node: &Node, record: &InstanceRecord) -> Vec<Disk> {
    let disk = |mount: &DiskMount| Disk {
        path: node.host.disks.file(&mount.disk(&record.path.pool.tenant)),
        access: if mount.read_only { DiskAccess::ReadOnly } else { DiskAccess::ReadWrite },
    };
    in_order(record).into_iter().map(disk).collect()
}

/// What to type so that a journal is replayed which keeps an instance from reading its disks.
pub(crate) fn how_to_replay(desired: &Desired, reader: &InstanceRecord) -> String {
    let tenant = &reader.path.pool.tenant;
    let reads = |mount: &&DiskMount| mount.read_only;
    let disks: Vec<&DiskMount> = reader.spec.disks.iter().filter(reads).collect();
    let writes =
        |other: &&InstanceRecord| {
            let is_kept = other.desired != DesiredState::Destroyed;
            is_kept
                && other.spec.disks.iter().any(|mount| {
                    !mount.read_only && disks.iter().any(|disk| disk.name == mount.name)
                })
        };
    let replay = match (desired.instances_of(tenant).find(writes), disks.as_slice()) {
        (Some(writer), _) => format!("`mvm start {0}` and `mvm stop {0}`", writer.path),
        (None, [disk]) => {
            format!("`mvm run --rm --tenant {tenant} -v {}:/mnt builtin true`", disk.name)
        }
        (None, _) => "start and stop an instance that writes it".to_owned(),
    };
    format!("stop what reads it (`mvm stop {}`), then {replay}", reader.path)
}

/// The guest's name of the disk that comes after an instance's data disks.
pub(crate) fn device_behind(record: &InstanceRecord) -> String {
    // There are fewer data disks than letters.
    let count = u8::try_from(record.spec.disks.len()).unwrap_or(u8::MAX);
    format!("vd{}", char::from(FIRST_LETTER.saturating_add(count)))
}

/// What the guest is to mount.
pub(crate) fn for_guest(record: &InstanceRecord) -> Vec<DiskConfiguration> {
    let letters = (FIRST_LETTER..=b'z').map(char::from);
    in_order(record)
        .into_iter()
        .zip(letters)
        .map(|(mount, letter)| DiskConfiguration {
            name: mount.name.to_string(),
            device: format!("vd{letter}"),
            path: mount.path.to_string(),
            read_only: mount.read_only,
        })
        .collect()
}
