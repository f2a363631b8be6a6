//! Opens, with the agent's rights, everything that the unprivileged QEMU will use, so that it needs
//! no access to any path.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;

use super::super::disk_lock::LockedDisk;
use super::super::{DiskAccess, Restore, VmSpec, VmmError, console, disk_lock, file_error};
use super::args::{Descriptors, DiskDescriptor};
use super::journal::{self, Journal};
use super::{tap, with_source};
use crate::state_dir::InstanceDir;
use crate::unix_socket;

/// Open descriptors of one launch, and the files that were made for it.
#[derive(Debug)]
pub(super) struct Handover {
    memory: OwnedFd,
    device_state: Option<File>,
    kernel: File,
    initrd: File,
    disks: Vec<(LockedDisk, DiskAccess)>,
    tap: Option<OwnedFd>,
    qmp: OwnedFd,
    agent: OwnedFd,
    console: File,
    log: File,
    journal: Journal,
    made: Made,
}

/// Files that a launch has made, removed again unless it succeeds.
#[derive(Debug, Default)]
struct Made {
    sockets: Vec<PathBuf>,
    journal_of: Option<InstanceDir>,
}

impl Drop for Made {
    fn drop(&mut self) {
        let sockets = self.sockets.drain(..).map(std::fs::remove_file);
        let journal = self.journal_of.take().map(|dir| journal::remove(&dir));
        for error in sockets.chain(journal).filter_map(Result::err) {
            tracing::warn!(%error, "cannot remove a file of a failed launch");
        }
    }
}

impl Handover {
    /// Opens everything, or leaves nothing. A microVM that is not restored begins with fresh
    /// memory.
    pub(super) async fn open(spec: &VmSpec, restore: Option<&Restore>) -> Result<Self, VmmError> {
        let kernel = open_for_user(&spec.kernel, spec.uid)?;
        let initrd = open_for_user(&spec.initrd, spec.uid)?;
        let disks = spec
            .disks
            .iter()
            .map(|disk| Ok((disk_lock::open(disk)?, disk.access)))
            .collect::<Result<Vec<_>, VmmError>>()?;
        let (memory, device_state) = match restore {
            None => (guest_memory(spec.mem_mib)?, None),
            Some(restore) => {
                let path = restore.dir.device_state();
                let device_state = File::open(&path).map_err(file_error(&path))?;
                (image_of(restore, spec.mem_mib)?, Some(device_state))
            }
        };
        let tap = match &spec.nic {
            None => None,
            Some(nic) => {
                let attached = tap::attach(&nic.tap).await;
                Some(attached.map_err(|source| VmmError::System {
                    operation: format!("attach to tap {}", nic.tap),
                    source,
                })?)
            }
        };

        let mut made = Made::default();
        // First, because it fails if a VMM still runs in this directory, whose files are in use.
        let mut listen = |path: PathBuf| {
            let fd = unix_socket::bind_fd(&path).map_err(|error| VmmError::Control {
                operation: "prepare QEMU's sockets".into(),
                message: with_source(&error),
            })?;
            made.sockets.push(path);
            Ok::<_, VmmError>(fd)
        };
        let (qmp, agent) = (listen(spec.dir.qmp_socket())?, listen(spec.dir.agent_socket())?);
        let journal = journal::create(&spec.dir, spec.uid).map_err(file_error(&spec.dir))?;
        made.journal_of = Some(spec.dir.clone());
        let console = console::rotate(&spec.dir).map_err(file_error(&spec.dir))?;
        let log_path = spec.dir.vmm_log();
        let log = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&log_path)
            .map_err(file_error(&log_path))?;
        Ok(Self {
            memory,
            device_state,
            kernel,
            initrd,
            disks,
            tap,
            qmp,
            agent,
            console,
            log,
            journal,
            made,
        })
    }

    /// The numbers for QEMU's arguments, the same here and there.
    pub(super) fn descriptors(&self) -> Descriptors {
        Descriptors {
            memory: self.memory.as_raw_fd(),
            device_state: self.device_state.as_ref().map(AsRawFd::as_raw_fd),
            kernel: self.kernel.as_raw_fd(),
            initrd: self.initrd.as_raw_fd(),
            console: self.console.as_raw_fd(),
            qmp: self.qmp.as_raw_fd(),
            agent: self.agent.as_raw_fd(),
            journal_dir: self.journal.dir.as_raw_fd(),
            tap: self.tap.as_ref().map(AsRawFd::as_raw_fd),
            disks: self
                .disks
                .iter()
                .map(|(disk, access)| DiskDescriptor { fd: disk.as_raw_fd(), access: *access })
                .collect(),
        }
    }

    /// What QEMU is to inherit.
    pub(super) fn to_keep(&self) -> Vec<BorrowedFd<'_>> {
        let files = [&self.kernel, &self.initrd, &self.console].into_iter();
        let files = files.chain(&self.device_state).map(AsFd::as_fd);
        let owned = [&self.memory, &self.qmp, &self.agent, &self.journal.dir].into_iter();
        let disks = self.disks.iter().map(|(disk, _)| disk.as_fd());
        files
            .chain(owned.map(AsFd::as_fd))
            .chain(disks)
            .chain(self.tap.as_ref().map(AsFd::as_fd))
            .collect()
    }

    /// Where QEMU's own messages go.
    pub(super) fn log(&self) -> BorrowedFd<'_> {
        self.log.as_fd()
    }

    /// QEMU has taken everything over: its files stay.
    pub(super) fn complete(mut self) {
        self.disks.into_iter().for_each(|(disk, _)| disk.leave_to_vmm());
        self.made.sockets.clear();
        self.made.journal_of = None;
    }
}

/// Opens a file that QEMU will open again through its descriptor, which checks the file's own mode
/// (though not the directories on the way).
fn open_for_user(path: &Path, uid: u32) -> Result<File, VmmError> {
    let open = || {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let readable = match metadata.mode() {
            _ if !metadata.is_file() => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
            }
            mode if metadata.uid() == uid => mode & 0o400 != 0,
            mode if metadata.gid() == uid => mode & 0o040 != 0,
            mode => mode & 0o004 != 0,
        };
        if !readable {
            let message = format!("user {uid} may not read it: its mode should be 0644");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        Ok(file)
    };
    open().map_err(file_error(path))
}

/// The image that a restored microVM maps.
fn image_of(restore: &Restore, mem_mib: u32) -> Result<OwnedFd, VmmError> {
    let image = &restore.memory;
    if image.bytes() != u64::from(mem_mib) << 20 {
        return Err(VmmError::Control {
            operation: "restore the microVM".into(),
            message: format!("its memory has {} bytes, not {mem_mib} MiB", image.bytes()),
        });
    }
    image
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| VmmError::System { operation: "open a memory image".into(), source })
}

/// Memory that belongs to no filesystem and is freed with the last process that has it mapped.
fn guest_memory(mem_mib: u32) -> Result<OwnedFd, VmmError> {
    let make = || {
        let memory = rustix::fs::memfd_create("mvm-guest-memory", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory, u64::from(mem_mib) << 20)?;
        Ok::<_, rustix::io::Errno>(memory)
    };
    make().map_err(|error| VmmError::System {
        operation: format!("make {mem_mib} MiB of guest memory"),
        source: error.into(),
    })
}
