//! Snapshots: what a sleeping instance is made of, and whether it can go on here.
//!
//! A snapshot is the state of the devices, the memory, and the disks of one moment. Its memory is
//! an image, or what differs from an image: a fork, and an instance that sleeps once more, keep
//! only the pages that they wrote. The manifest names every part with its digest and says what the
//! microVM was running on; [`verdict`] compares that with what is here.
//!
//! A sleeping instance's snapshot is of one use: its disks go on from it. One that is shared (a
//! fork's source, a pool's base) has copies of the disks, and is begun from any number of times.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::name::{InstancePath, RevisionId, SnapshotId};
use crate::vmm::{Accel, VmmKind};

/// The format of manifests that this build writes.
pub const FORMAT: u32 = 2;

/// A memory image that is mapped by microVMs, and that later snapshots of them are relative to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "image", rename_all = "snake_case")]
pub enum ImageRef {
    /// The instance's own, in its snapshot of this number.
    Own {
        /// The snapshot's number.
        number: u64,
    },
    /// One that instances share.
    Shared {
        /// The snapshot that it belongs to.
        id: SnapshotId,
    },
}

/// The snapshot that a sleeping instance goes on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnSnapshot {
    /// Its number: an instance's snapshots are counted from 1.
    pub number: u64,
    /// The image that its memory is, or is relative to.
    pub memory: ImageRef,
}

/// What restored a microVM, as far as its saved state depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmBuild {
    /// The VMM.
    pub vmm: VmmKind,
    /// Its version.
    pub version: String,
    /// What executes the guest's instructions.
    pub accel: Accel,
    /// What the guest sees of the host's processor, or the emulated one that it sees.
    pub cpu: String,
}

/// The microVM's shape: what the saved devices expect to find.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub mem_mib: u32,
    /// Whether it has a network interface.
    pub has_nic: bool,
    /// The arguments of its kernel.
    pub kernel_args: String,
}

/// A file of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the snapshot's directory.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// The digest of its content, in hexadecimal digits.
    pub digest: String,
    /// Whether that is the digest of its blocks' digests, so that a part of it can change without
    /// all of it being read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_blocks: bool,
}

/// What a disk's file looked like when the microVM stopped: it has to be the same file still, and
/// nobody may have written to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStamp {
    /// The disk, in words.
    pub name: String,
    /// The file's length in bytes.
    pub bytes: u64,
    /// The file's number in its filesystem; 0 if the snapshot has a copy.
    pub inode: u64,
    /// When it was written last, in nanoseconds since the Unix epoch; 0 if the snapshot has a copy.
    pub modified_unix_ns: u64,
}

impl DiskStamp {
    /// The stamp of a copy of the disk, which any file may be.
    #[must_use]
    pub fn of_copy(self) -> Self {
        Self { inode: 0, modified_unix_ns: 0, ..self }
    }
}

/// Everything that there is to know of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The manifest's own format.
    pub format: u32,
    /// The instance that was saved.
    pub instance: InstancePath,
    /// When, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// What it ran on.
    pub build: VmmBuild,
    /// The image that its root comes from.
    pub revision: RevisionId,
    /// What it was like.
    pub shape: Shape,
    /// The image that its memory is relative to; absent if the snapshot has all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<ImageRef>,
    /// The snapshot's files.
    pub files: Vec<FileEntry>,
    /// The disks that it may write.
    pub disks: Vec<DiskStamp>,
    /// The data disks that it may only read, whose content its memory knows; absent in a manifest of
    /// an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_disks: Option<Vec<DiskStamp>>,
}

/// What is here, to be compared with a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Here {
    /// What would run it.
    pub build: VmmBuild,
    /// The image that the instance's root comes from.
    pub revision: RevisionId,
    /// What the instance is like.
    pub shape: Shape,
    /// The disks that it may write, as they are now.
    pub disks: Vec<DiskStamp>,
    /// The data disks that it may only read, as they are now.
    pub read_disks: Vec<DiskStamp>,
}

/// Why a snapshot cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is of a newer mvm.
    #[error("its format is {0}, and this mvm knows formats up to {FORMAT}")]
    Format(u32),
    /// It is of another tenant.
    #[error("it belongs to {0}, which is another tenant's")]
    Tenant(InstancePath),
    /// Somebody has written to a data disk that it only reads: what it remembers of the disk is not so
    /// any more.
    #[error("{name}, which it only reads, was written to or grown since")]
    DiskWritten {
        /// The disk, in words.
        name: String,
    },
    /// Something is not as it was.
    #[error("its {what} was {was}, and is {is} now")]
    Changed {
        /// What.
        what: String,
        /// As the manifest says.
        was: String,
        /// As it is here.
        is: String,
    },
}

/// Whether an instance can go on from a snapshot: everything that the saved state depends on has to
/// be as it was. The content of files is not looked at here.
///
/// # Errors
/// The first thing that is in the way.
pub fn verdict(manifest: &Manifest, instance: &InstancePath, here: &Here) -> Result<(), Refusal> {
    if manifest.format > FORMAT {
        return Err(Refusal::Format(manifest.format));
    }
    if manifest.instance.pool.tenant != instance.pool.tenant {
        return Err(Refusal::Tenant(manifest.instance.clone()));
    }
    let (was, is) = (&manifest.build, &here.build);
    same("VMM", was.vmm, is.vmm)?;
    same("accelerator", was.accel, is.accel)?;
    same(&format!("{} version", was.vmm), &was.version, &is.version)?;
    same("processor", &was.cpu, &is.cpu)?;
    same("image", &manifest.revision, &here.revision)?;
    let (was, is) = (&manifest.shape, &here.shape);
    same("number of vCPUs", was.vcpus, is.vcpus)?;
    same("memory in MiB", was.mem_mib, is.mem_mib)?;
    same("network interface", yes_no(was.has_nic), yes_no(is.has_nic))?;
    same("kernel arguments", &was.kernel_args, &is.kernel_args)?;
    same("number of disks", manifest.disks.len(), here.disks.len())?;
    for (was, is) in manifest.disks.iter().zip(&here.disks) {
        same("disk", &was.name, &is.name)?;
        same(&format!("size of {}", was.name), was.bytes, is.bytes)?;
        if was.modified_unix_ns != 0 {
            same(&format!("file of {}", was.name), was.inode, is.inode)?;
            let time = |stamp: &DiskStamp| format!("written at {} ns", stamp.modified_unix_ns);
            same(&was.name, time(was), time(is))?;
        }
    }
    // An earlier version did not look.
    let Some(read_disks) = &manifest.read_disks else { return Ok(()) };
    same("number of disks that are read", read_disks.len(), here.read_disks.len())?;
    for (was, is) in read_disks.iter().zip(&here.read_disks) {
        if was != is {
            return Err(Refusal::DiskWritten { name: was.name.clone() });
        }
    }
    Ok(())
}

fn yes_no(there: bool) -> &'static str {
    if there { "there" } else { "not there" }
}

fn same<T: PartialEq + fmt::Display>(what: &str, was: T, is: T) -> Result<(), Refusal> {
    if was == is {
        return Ok(());
    }
    Err(Refusal::Changed { what: what.to_owned(), was: was.to_string(), is: is.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Here {
        Here {
            build: VmmBuild {
                vmm: VmmKind::Qemu,
                version: "7.2.0".into(),
                accel: Accel::Tcg,
                cpu: String::new(),
            },
            revision: RevisionId::from_digest([1; 8]),
            shape: Shape { vcpus: 1, mem_mib: 256, has_nic: true, kernel_args: String::new() },
            disks: vec![DiskStamp {
                name: "the writable layer".into(),
                bytes: 1 << 30,
                inode: 7,
                modified_unix_ns: 9,
            }],
            read_disks: vec![DiskStamp {
                name: "disk data".into(),
                bytes: 1 << 20,
                inode: 8,
                modified_unix_ns: 10,
            }],
        }
    }

    fn path(text: &str) -> InstancePath {
        text.parse().unwrap()
    }

    fn manifest() -> Manifest {
        let Here { build, revision, shape, disks, read_disks } = here();
        Manifest {
            format: FORMAT,
            instance: path("acme/web/i-00000001"),
            created_unix_ms: 1,
            build,
            revision,
            shape,
            base: Some(ImageRef::Own { number: 1 }),
            files: vec![],
            disks,
            read_disks: Some(read_disks),
        }
    }

    #[test]
    fn a_snapshot_goes_on_where_nothing_has_changed() {
        let sibling = path("acme/api/i-00000002");
        assert_eq!(verdict(&manifest(), &path("acme/web/i-00000001"), &here()), Ok(()));
        assert_eq!(verdict(&manifest(), &sibling, &here()), Ok(()));
    }

    /// What is said of a change, and what makes it.
    type Change = (&'static str, fn(&mut Here));

    #[test]
    fn each_thing_that_the_state_depends_on_is_compared() {
        let changes: [Change; 11] = [
            ("VMM", |here| here.build.vmm = VmmKind::Firecracker),
            ("accelerator", |here| here.build.accel = Accel::Kvm),
            ("qemu version", |here| here.build.version = "10.0.0".into()),
            ("processor", |here| here.build.cpu = "other".into()),
            ("image", |here| here.revision = RevisionId::from_digest([2; 8])),
            ("number of vCPUs", |here| here.shape.vcpus = 2),
            ("memory in MiB", |here| here.shape.mem_mib = 512),
            ("network interface", |here| here.shape.has_nic = false),
            ("number of disks", |here| here.disks.clear()),
            ("size of the writable layer", |here| here.disks[0].bytes = 1),
            ("the writable layer", |here| here.disks[0].modified_unix_ns = 10),
        ];
        for (expected, change) in changes {
            let mut here = here();
            change(&mut here);
            match verdict(&manifest(), &path("acme/web/i-00000001"), &here) {
                Err(Refusal::Changed { what, .. }) => assert_eq!(what, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_disk_that_was_only_read_must_not_have_been_written_since() {
        let changes: [fn(&mut DiskStamp); 3] =
            [|disk| disk.modified_unix_ns += 1, |disk| disk.bytes += 1, |disk| disk.inode += 1];
        for change in changes {
            let mut here = here();
            change(&mut here.read_disks[0]);
            let refused = verdict(&manifest(), &manifest().instance, &here).unwrap_err();
            assert_eq!(refused, Refusal::DiskWritten { name: "disk data".into() });
            // Of a manifest of before nothing is known.
            let earlier = Manifest { read_disks: None, ..manifest() };
            assert_eq!(verdict(&earlier, &earlier.instance, &here), Ok(()));
        }
    }

    #[test]
    fn another_tenants_and_a_newer_snapshot_are_refused() {
        let stranger = path("evil/web/i-00000001");
        let refused = verdict(&manifest(), &stranger, &here()).unwrap_err();
        assert!(refused.to_string().contains("another tenant"), "{refused}");
        let newer = Manifest { format: FORMAT + 1, ..manifest() };
        let refused = verdict(&newer, &newer.instance, &here()).unwrap_err();
        assert_eq!(refused, Refusal::Format(FORMAT + 1));
    }

    #[test]
    fn a_copied_disk_may_be_any_file_of_its_size() {
        let mut shared = manifest();
        shared.disks[0].modified_unix_ns = 0;
        let mut here = here();
        here.disks[0].inode = 99;
        here.disks[0].modified_unix_ns = 99;
        assert_eq!(verdict(&shared, &shared.instance, &here), Ok(()));
    }
}
