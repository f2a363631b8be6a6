//! The VMM seam: starting a microVM, knowing it again, and the byte stream to its guest agent.
//!
//! The agent's instance actors call it; it never decides whether a microVM should run.

pub mod console;
mod disk_lock;
pub mod firecracker;
pub(crate) mod memory;
mod node;
pub mod qemu;
pub mod qmp;
pub mod sim;
mod starting;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
pub use memory::MemoryImage;
use mvm_core::name::InstanceId;
use mvm_core::net::MacAddr;
use mvm_core::rates::Rates;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{Accel, DiskIo, VmExit, VmHandle, VmmKind};
pub use node::NodeVmm;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::image::digest::Digest;
use crate::process::ResourceUsage;
use crate::state_dir::{InstanceDir, SnapshotDir};

/// Whether a disk may be written. A disk that one microVM writes is refused to every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAccess {
    /// Shared by any number of microVMs that only read.
    ReadOnly,
    /// Private to one microVM.
    ReadWrite,
}

/// A raw disk image; the guest sees disks in order as `/dev/vda`, `/dev/vdb`, …
#[derive(Debug, Clone)]
pub struct Disk {
    /// The image file.
    pub path: PathBuf,
    /// Whether it may be written.
    pub access: DiskAccess,
}

/// A network interface on a persistent tap, which is there already or made by the driver ([`TapPlace`]).
#[derive(Debug, Clone)]
pub struct Nic {
    /// The tap's interface name.
    pub tap: String,
    /// The interface's address in the guest.
    pub mac: MacAddr,
}

/// Everything that a VMM needs to start one microVM.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// The instance.
    pub id: InstanceId,
    /// The instance's own directory, which exists: sockets and logs are made in it.
    pub dir: InstanceDir,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub mem_mib: u32,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initial RAM filesystem with the guest agent.
    pub initrd: PathBuf,
    /// Added to the kernel arguments that the VMM needs.
    pub kernel_args: String,
    /// Disks, in the guest's order.
    pub disks: Vec<Disk>,
    /// The network interface, if any.
    pub nic: Option<Nic>,
    /// The unprivileged user and group id that the VMM process runs as.
    pub uid: u32,
    /// The VMM that it has to run on; whichever starts microVMs here if absent.
    pub vmm: Option<VmmKind>,
    /// How fast it may use its disks. The network's rate is no VMM's business: the firewall holds
    /// the guest to it.
    pub rates: Rates,
}

impl VmSpec {
    /// Refuses what no VMM should start.
    ///
    /// # Errors
    /// The specification is not usable.
    pub fn check(&self) -> Result<(), VmmError> {
        let refuse = |message: &str| {
            Err(VmmError::Spec { id: self.id.clone(), message: message.to_owned() })
        };
        if self.uid == 0 {
            return refuse("a VMM never runs as root: it needs a user id of its own");
        }
        if self.vcpus == 0 || self.mem_mib == 0 {
            return refuse("it needs at least one vCPU and some memory");
        }
        if self.kernel_args.contains(['\n', '\0']) {
            return refuse("its kernel arguments are not one line");
        }
        Ok(())
    }
}

#[cfg(test)]
impl VmSpec {
    /// One with two disks and a network, of which no file exists.
    fn example() -> Self {
        Self {
            id: "i-0000002a".parse().unwrap(),
            dir: "/state/i-0000002a".into(),
            vcpus: 2,
            mem_mib: 256,
            kernel: "/state/kernel".into(),
            initrd: "/state/initrd".into(),
            kernel_args: "quiet mvm.x=1".into(),
            disks: [DiskAccess::ReadOnly, DiskAccess::ReadWrite]
                .map(|access| Disk { path: "/state/disk".into(), access })
                .into(),
            nic: Some(Nic { tap: "tn1i3".into(), mac: MacAddr([2, 0, 0, 0, 0, 7]) }),
            uid: 70_000,
            vmm: None,
            rates: Rates::default(),
        }
    }
}

/// What was saved of a microVM's memory, besides the state of its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Which part of it.
    pub part: MemoryPart,
    /// Bytes of memory that were saved.
    pub bytes: u64,
    /// Where they are in an image that there was before, if they were written into one: parts of it
    /// in ascending order, in bytes.
    pub written: Vec<Range<u64>>,
}

/// Where a microVM that was restored saves what it changed of its image. One that was booted has no
/// image, and saves all of its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SaveChanges {
    /// Apart from the image, which stays as it is, as [`SnapshotDir::memory_changes`].
    Apart(Packing),
    /// Into this image, the one that it was restored from, which becomes the snapshot's
    /// [`SnapshotDir::memory_image`]. Nobody else may need what was in it. If saving fails, the microVM can go on
    /// and be saved again as if it had not been tried.
    IntoImage(PathBuf),
}

/// How the changed memory of a snapshot is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Packing {
    /// As it is: fastest.
    #[default]
    Plain,
    /// Compressed with zstd: smallest. A whole memory, which is mapped, stays as it is.
    Zstd,
}

/// A part of a microVM's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryPart {
    /// All of it, as [`SnapshotDir::memory_image`].
    Whole,
    /// What it changed of its image, as [`SnapshotDir::memory_changes`].
    Changes,
}

/// A saved microVM that is to go on.
#[derive(Debug, Clone)]
pub struct Restore {
    /// The directory that it was saved into, or one with copies of its files.
    pub dir: SnapshotDir,
    /// The memory that it begins with: its own image, or the one that its changes are about.
    pub memory: Arc<MemoryImage>,
    /// What it was saved on, which is to restore it.
    pub build: VmmBuild,
}

/// Why a VMM operation failed.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A program that the VMM needs is not installed.
    #[error("`{program}` is not installed: `mvm bootstrap` installs what is missing")]
    MissingProgram {
        /// The program's name.
        program: String,
    },
    /// A file that the microVM needs cannot be used.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another microVM has the disk: two may share one that both only read.
    #[error(
        "{path} is in use by another microVM, and a disk has either one writer or only readers"
    )]
    DiskInUse {
        /// The disk's image file.
        path: PathBuf,
    },
    /// The VMM's process could not be started.
    #[error("cannot start `{program}`")]
    Spawn {
        /// The program's name.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The installed VMM has a fault that mvm cannot live with.
    #[error("`{program}` is version {found}: {problem}")]
    Unfit {
        /// The program's name.
        program: String,
        /// The installed version.
        found: String,
        /// What is wrong with it, and what to use instead.
        problem: String,
    },
    /// The installed VMM lacks what mvm needs.
    #[error("`{program}` is version {found}: at least {required} is needed")]
    TooOld {
        /// The program's name.
        program: String,
        /// The installed version.
        found: String,
        /// The oldest version that works.
        required: String,
    },
    /// The microVM was specified in a way that no VMM can start.
    #[error("cannot start {id}: {message}")]
    Spec {
        /// The instance.
        id: InstanceId,
        /// What is wrong.
        message: String,
    },
    /// A microVM runs that is less walled off than it has to be; it is ended.
    #[error("{id} is not walled off as production has to be: its VMM lacks {lacks}")]
    NotIsolated {
        /// The instance.
        id: InstanceId,
        /// What it lacks.
        lacks: String,
    },
    /// The VMM ended before it answered; its own last words are in `log`.
    #[error("the VMM ended during start: {log}")]
    DiedAtStart {
        /// The last lines of the VMM's own output.
        log: String,
    },
    /// The VMM's control interface gave an unexpected or no answer.
    #[error("{operation}: {message}")]
    Control {
        /// What was asked of the VMM.
        operation: String,
        /// What it answered.
        message: String,
    },
    /// The operating system refused.
    #[error("{operation}")]
    System {
        /// What was being done.
        operation: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

fn file_error(path: &Path) -> impl FnOnce(std::io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::File { path, source }
}

/// A byte stream to a guest agent.
pub trait GuestStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> GuestStream for T {}

/// What a guest sees of this machine's processor, on hardware virtualization.
fn this_processor() -> Result<String, VmmError> {
    let path = PathBuf::from("/proc/cpuinfo");
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(processor(&text)),
        Err(source) => Err(VmmError::File { path, source }),
    }
}

/// The processor that a description is of: two machines of which this is the same can exchange
/// saved microVMs.
fn processor(cpuinfo: &str) -> String {
    const FIELDS: [&str; 5] = ["vendor_id", "cpu family", "model", "stepping", "flags"];
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let values = first.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        FIELDS.contains(&name.trim()).then(|| value.trim())
    });
    let text = values.collect::<Vec<_>>().join("/");
    Digest::of(text.as_bytes()).to_string()
}

/// What a VMM process uses on the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VmUsage {
    /// CPU time since the process started, user and system, in milliseconds.
    pub cpu_ms: u64,
    /// Resident memory in KiB, guest memory included.
    pub rss_kib: u64,
    /// What was read from storage for its disks since the process started, in KiB: what the page
    /// cache had is not in it.
    pub disk_read_kib: u64,
    /// What was written to its disks since the process started, in KiB.
    pub disk_written_kib: u64,
}

impl From<ResourceUsage> for VmUsage {
    fn from(process: ResourceUsage) -> Self {
        let ResourceUsage { cpu_ms, rss_kib, disk_read_kib, disk_written_kib } = process;
        Self { cpu_ms, rss_kib, disk_read_kib, disk_written_kib }
    }
}

/// What a VMM has counted since its process started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmCounters {
    /// What the guest has asked of its disks.
    pub disk_io: DiskIo,
    /// What the VMM counts or was told besides, by its own names: those that are not zero.
    pub own: BTreeMap<String, u64>,
}

/// Where a VMM opens a microVM's tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapPlace {
    /// In the network namespace of the machine: it has to be there.
    Host,
    /// In a network namespace of the VMM's own, where its driver makes it. Without its being
    /// [taken](crate::net::Network::take_tap) from there it leads nowhere.
    Own,
}

/// A virtual machine monitor.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Which VMM this is.
    fn kind(&self) -> VmmKind;

    /// What microVMs are launched on, as far as their saved state depends on it.
    ///
    /// # Errors
    /// The VMM is not installed, or does not say.
    async fn build(&self) -> Result<VmmBuild, VmmError>;

    /// What would restore a microVM that was saved on this build: the same one where it is still
    /// there, else what microVMs are launched on.
    ///
    /// # Errors
    /// The VMM is not installed, or does not say.
    async fn build_for(&self, saved_on: &VmmBuild) -> Result<VmmBuild, VmmError>;

    /// Where the taps of microVMs are opened that this kind of VMM runs; the one that microVMs are launched
    /// on, if none is named.
    fn tap_place(&self, _vmm: Option<VmmKind>) -> TapPlace {
        TapPlace::Host
    }

    /// The boot id of the machine that microVMs run on: changes with each of its boots.
    fn host_boot_id(&self) -> String;

    /// Starts a microVM: on return its process runs and its vCPUs execute.
    ///
    /// # Errors
    /// Nothing is left behind: no process, no socket.
    async fn launch(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, VmmError>;

    /// Starts a saved microVM: on return its process runs, and its vCPUs are where they were when
    /// it was saved, paused. The specification is the one that it was launched with, except for
    /// the instance's own paths, tap and user; its disks have the content that they had then.
    ///
    /// # Errors
    /// The files are damaged or of another microVM. Nothing is left behind: no process, no socket.
    async fn restore(&self, spec: &VmSpec, from: &Restore) -> Result<Arc<dyn Vm>, VmmError>;

    /// Removes what the VMM of a microVM that has ended left in the instance's directory, other than its
    /// logs. A process of this VMM that still serves it is ended first.
    ///
    /// # Errors
    /// A process could not be ended, or a file not be removed.
    async fn clear(&self, _spec: &VmSpec) -> Result<(), VmmError> {
        Ok(())
    }

    /// Ends every microVM of this instance that its agent does not know of: one that was launched
    /// by an agent that died before it could say so. On return none of its processes runs.
    ///
    /// # Errors
    /// A process could not be ended.
    async fn end_strays(&self, spec: &VmSpec) -> Result<(), VmmError>;

    /// Finds a microVM that an earlier agent started, or `None` if it is gone.
    ///
    /// # Errors
    /// It cannot be told whether the microVM still runs.
    async fn adopt(
        &self,
        handle: &VmHandle,
        spec: &VmSpec,
    ) -> Result<Option<Arc<dyn Vm>>, VmmError>;

    /// How a microVM ended that [`Vmm::adopt`] did not find, as far as it left word of it.
    async fn exit_of(&self, handle: &VmHandle, spec: &VmSpec) -> VmExit;
}

/// One running microVM. Dropping it leaves the microVM running.
#[async_trait]
pub trait Vm: Send + Sync {
    /// What to remember to find it again.
    fn handle(&self) -> &VmHandle;

    /// What executes the guest's instructions.
    fn accel(&self) -> Accel {
        self.handle().accel
    }

    /// What it runs on. Its process is asked: another VMM may have been installed since it started.
    ///
    /// # Errors
    /// The microVM is gone or does not answer.
    async fn build(&self) -> Result<VmmBuild, VmmError>;

    /// Waits for the VMM's process to end. May be called by many, also after the end.
    async fn wait(&self) -> VmExit;

    /// Ends the process at once; it is not an error if it has ended.
    ///
    /// # Errors
    /// The operating system refused.
    async fn kill(&self) -> Result<(), VmmError>;

    /// Stops the vCPUs. On return the guest does nothing, and its writes are in its disks' files.
    ///
    /// # Errors
    /// The microVM is gone or does not answer.
    async fn pause(&self) -> Result<(), VmmError>;

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// The microVM is gone or does not answer.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Whether it stands still because the host had no space for what its guest wrote to a disk.
    /// [`Vm::resume`] has the write tried again. A VMM that cannot stand still for that, and tells
    /// its guest of an error instead, never says so.
    ///
    /// # Errors
    /// The microVM is gone or does not answer.
    async fn lacks_space(&self) -> Result<bool, VmmError> {
        Ok(false)
    }

    /// Writes a paused microVM's devices and memory into an empty directory, durably. It stays
    /// paused, and can be resumed or ended. Its disks are for the caller to keep.
    ///
    /// # Errors
    /// The microVM runs, or its files cannot be written: the directory is then of no use.
    async fn save(&self, dest: &SnapshotDir, changes: SaveChanges) -> Result<Saved, VmmError>;

    /// Opens the byte stream to the guest agent. A microVM has one: a second caller waits or fails
    /// until the first has dropped its stream.
    ///
    /// # Errors
    /// The microVM is gone, or its socket cannot be reached.
    async fn connect_guest(&self) -> Result<Box<dyn GuestStream>, VmmError>;

    /// Whether each such stream is a connection of its own, in which nothing of an earlier one can
    /// be left.
    fn has_connections(&self) -> bool {
        false
    }

    /// What the process uses on the host.
    ///
    /// # Errors
    /// The microVM is gone.
    async fn usage(&self) -> Result<VmUsage, VmmError>;

    /// What the VMM has counted.
    ///
    /// # Errors
    /// The microVM is gone, or does not tell.
    async fn counters(&self) -> Result<VmCounters, VmmError>;

    /// Keeps small what the VMM goes on writing, other than its console and its log. To be called now
    /// and then as long as it runs.
    ///
    /// # Errors
    /// A file cannot be read or changed.
    async fn tidy(&self) -> Result<(), VmmError>;
}
