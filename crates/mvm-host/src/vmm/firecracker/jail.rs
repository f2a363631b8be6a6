//! The directory that is all a Firecracker sees, and what is put into it.
//!
//! ```text
//!  INSTANCE/jail/firecracker/ID/root/   becomes / (the layout is the jailer's)
//!    kernel initrd disk0 disk1 …        hard links: no copy, and the disk's own permissions
//!    device.state memory.image          of a restored microVM; the memory only until it is mapped
//!    save/                              where Firecracker writes what is saved
//!    log                                what Firecracker says, linked to the instance's vmm.log
//!    metrics                            what it counts, linked to the file beside root/
//!    api.sock v.sock                    made by Firecracker
//!  INSTANCE/jail/firecracker/ID/        is root's: what Firecracker cannot put in another file's place
//!    metrics metrics.sums               see metrics.rs
//! ```
//!
//! A jail is made afresh for each start, and removed once its microVM has ended.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::super::{Disk, DiskAccess, VmSpec, VmmError, file_error};
use crate::removal::remove_tree;
use crate::unix_socket;

pub(super) const API_SOCKET: &str = "api.sock";
pub(super) const VSOCK: &str = "v.sock";
pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRD: &str = "initrd";
pub(super) const LOG: &str = "log";
pub(super) const METRICS: &str = "metrics";
/// A seccomp filter of the operator's.
pub(super) const SECCOMP_FILTER: &str = "seccomp.bpf";
/// Directory that Firecracker may write into.
pub(super) const SAVE_DIR: &str = "save";

/// The root of the jail that was made last, as far as there is one.
pub(super) fn root_of(spec: &VmSpec) -> PathBuf {
    let base = spec.dir.jail();
    let program = fs::read_dir(&base).ok().and_then(|mut entries| entries.next()?.ok());
    let program = program.map_or_else(|| base.join("none"), |entry| entry.path());
    program.join(spec.id.as_str()).join("root")
}

/// The directory of the jail that has this root.
pub(super) fn dir_of(root: &Path) -> &Path {
    root.parent().unwrap_or(root)
}

/// Whether a Firecracker serves its API in the jail that was made last.
pub(super) async fn is_served(spec: &VmSpec) -> bool {
    unix_socket::connect(&root_of(spec).join(API_SOCKET)).await.is_ok()
}

/// A jail in the making; removed again unless it is completed.
#[derive(Debug)]
pub(super) struct Jail {
    base: PathBuf,
    root: PathBuf,
    uid: u32,
    is_complete: bool,
}

impl Jail {
    /// Replaces the jail of an earlier run, whose microVM has ended.
    pub(super) fn create(spec: &VmSpec, program: &Path) -> Result<Self, VmmError> {
        remove(spec)?;
        let base = spec.dir.jail();
        let name = program.file_name().unwrap_or_default();
        let root = base.join(name).join(spec.id.as_str()).join("root");
        // Made before the first file is: from here on, dropping it cleans up.
        let jail = Self { base, root, uid: spec.uid, is_complete: false };
        let make = || {
            DirBuilder::new().mode(0o700).recursive(true).create(&jail.root)?;
            // Whatever the umask was, Firecracker's user may pass through what it sees.
            jail.give(&jail.root, 0o700)?;
            let save = jail.root.join(SAVE_DIR);
            fs::create_dir(&save)?;
            jail.give(&save, 0o700)
        };
        make().map_err(file_error(&jail.root))?;
        Ok(jail)
    }

    /// The directory that becomes Firecracker's root.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The directory that its root is in.
    pub(super) fn dir(&self) -> &Path {
        dir_of(&self.root)
    }

    /// Puts a file into the jail that Firecracker only reads.
    pub(super) fn place_to_read(&self, path: &Path, name: &str) -> Result<(), VmmError> {
        let place = || {
            let to = self.root.join(name);
            match fs::hard_link(path, &to) {
                Ok(()) => let_others_read(&to),
                // On another filesystem.
                Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                    fs::copy(path, &to)?;
                    self.give(&to, 0o400)
                }
                Err(error) => Err(error),
            }
        };
        place().map_err(file_error(path))
    }

    /// Puts a copy of a small file into the jail.
    pub(super) fn place_copy(&self, path: &Path, name: &str) -> Result<(), VmmError> {
        let to = self.root.join(name);
        fs::copy(path, &to).and_then(|_| self.give(&to, 0o400)).map_err(file_error(path))
    }

    /// Puts a disk into the jail: the file itself, because it is shared, or must keep what the
    /// guest writes.
    pub(super) fn place_disk(&self, disk: &Disk, name: &str) -> Result<(), VmmError> {
        match disk.access {
            DiskAccess::ReadWrite => self.place_to_write(&disk.path, name),
            DiskAccess::ReadOnly => {
                let to = self.root.join(name);
                let place = fs::hard_link(&disk.path, &to).and_then(|()| let_others_read(&to));
                place.map_err(file_error(&disk.path))
            }
        }
    }

    /// Puts a file into the jail that Firecracker writes and that outlives it.
    pub(super) fn place_to_write(&self, path: &Path, name: &str) -> Result<(), VmmError> {
        let to = self.root.join(name);
        let place = fs::hard_link(path, &to).and_then(|()| self.give(&to, 0o600));
        place.map_err(file_error(path))
    }

    /// Takes a file out of the jail that Firecracker has opened and needs no name of any more.
    pub(super) fn take_out(&self, name: &str) -> Result<(), VmmError> {
        let path = self.root.join(name);
        fs::remove_file(&path).map_err(file_error(&path))
    }

    /// Firecracker has taken it over: it stays.
    pub(super) fn complete(mut self) {
        self.is_complete = true;
    }

    fn give(&self, path: &Path, mode: u32) -> io::Result<()> {
        chown(path, Some(self.uid), Some(self.uid))?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        if !self.is_complete
            && let Err(error) = remove_tree(&self.base)
        {
            tracing::warn!(%error, "cannot remove the jail of a failed launch");
        }
    }
}

/// Lets every user read a file, if they find a way to it: the directory that it is kept in is
/// root's alone, and the jail that it is linked into belongs to one microVM.
fn let_others_read(path: &Path) -> io::Result<()> {
    let mode = fs::metadata(path)?.mode();
    if mode & 0o004 == 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(mode | 0o004))?;
    }
    Ok(())
}

/// Removes the jail of an earlier run, if there is one. Its files that are kept have other names, too.
pub(super) fn remove(spec: &VmSpec) -> Result<(), VmmError> {
    let base = spec.dir.jail();
    remove_tree(&base).map_err(file_error(&base))
}
