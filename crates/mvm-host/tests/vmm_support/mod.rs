//! What the VMM contract runs on: a backend with guests that obey one-line commands.
#![allow(dead_code)] // each test binary uses its part

pub(crate) mod firecracker;
mod guest_files;
pub(crate) mod qemu;
pub(crate) mod sim;
pub(crate) mod stand_in;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mvm_core::name::InstanceId;
use mvm_core::rates::Rates;
use mvm_host::vmm::{Disk, DiskAccess, GuestStream, Vm, VmSpec, Vmm};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long anything may take: an emulated guest on a busy machine boots in seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// How often a predicate is looked at.
const INTERVAL: Duration = Duration::from_millis(20);

/// A VMM on which the contract runs. Its guests read lines from the agent's port and obey:
/// `echo WORDS` answers the words, `note WORDS` does too and keeps them in the guest's memory,
/// `notes` answers what was noted last, `disks` answers `NAME SECTORS READONLY` for each disk,
/// `rewrite` writes the first MiB of the second disk, durably, and answers `rewritten`, `off`, `reset` and `panic` end the guest.
pub(crate) trait Backend {
    /// A driver as a fresh agent would make it, over the same host.
    fn vmm(&self) -> Arc<dyn Vmm>;
    /// A driver whose program is not installed, where there is a program.
    fn vmm_without_program(&self) -> Option<Arc<dyn Vmm>>;
    /// The kernel and the initrd of its guests.
    fn boot_files(&self) -> (PathBuf, PathBuf);
}

/// A directory with instances.
pub(crate) struct Host<B> {
    pub(crate) backend: B,
    pub(crate) root: tempfile::TempDir,
    uids: [u32; 2],
}

impl<B: Backend> Host<B> {
    pub(crate) fn new(backend: B) -> Self {
        let root = tempfile::tempdir().unwrap();
        // As the agent's state directory: nobody but root may even pass through.
        let private = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(root.path(), private).unwrap();
        for (name, mib) in [("base", 3), ("layer-1", 5), ("layer-2", 5)] {
            let file = std::fs::File::create(root.path().join(name)).unwrap();
            file.set_len(mib << 20).unwrap();
            let private = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(root.path().join(name), private).unwrap();
        }
        Self { backend, root, uids: [fresh_uid(), fresh_uid()] }
    }

    /// Instance 1 or 2, with the shared base and a layer of its own.
    pub(crate) fn spec(&self, number: u32) -> VmSpec {
        let id = InstanceId::from_bits(number);
        // A path longer than a socket's address.
        let dir = self.root.path().join("d".repeat(120)).join(id.as_str());
        std::fs::create_dir_all(&dir).unwrap();
        let (kernel, initrd) = self.backend.boot_files();
        VmSpec {
            dir: dir.into(),
            vcpus: 1,
            mem_mib: 128,
            kernel,
            initrd,
            kernel_args: "quiet".into(),
            disks: vec![
                Disk { path: self.root.path().join("base"), access: DiskAccess::ReadOnly },
                Disk {
                    path: self.root.path().join(format!("layer-{number}")),
                    access: DiskAccess::ReadWrite,
                },
            ],
            nic: None,
            uid: self.uids[number as usize - 1],
            vmm: None,
            rates: Rates::default(),
            id,
        }
    }
}

/// A test that fails leaves no VMM behind either.
impl<B> Drop for Host<B> {
    fn drop(&mut self) {
        for pid in self.uids.iter().flat_map(|uid| processes_of(*uid)) {
            let killed = pidfd_open(pid, PidfdFlags::empty())
                .and_then(|pidfd| pidfd_send_signal(pidfd, Signal::KILL));
            assert!(matches!(killed, Ok(()) | Err(Errno::SRCH)), "{killed:?}");
        }
    }
}

/// The processes of a user.
pub(crate) fn processes_of(uid: u32) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    entries
        .filter(|entry| entry.metadata().is_ok_and(|metadata| metadata.uid() == uid))
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

/// A user id that no other test, in this process or another, uses at the same time.
fn fresh_uid() -> u32 {
    static USED: AtomicU32 = AtomicU32::new(0);
    0x4000_0000 + (std::process::id() % 0x0040_0000) * 0x80 + USED.fetch_add(1, Ordering::Relaxed)
}

/// The guest's lines.
pub(crate) struct Guest {
    stream: Box<dyn GuestStream>,
}

impl Guest {
    /// Connects, and waits until the guest has answered.
    pub(crate) async fn of(vm: &Arc<dyn Vm>) -> Self {
        let mut guest = Self { stream: vm.connect_guest().await.unwrap() };
        assert_eq!(guest.ask("echo ready").await, "ready");
        guest
    }

    pub(crate) fn stream(&mut self) -> &mut dyn GuestStream {
        &mut *self.stream
    }

    pub(crate) async fn tell(&mut self, line: &str) {
        self.stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub(crate) async fn ask(&mut self, line: &str) -> String {
        self.tell(line).await;
        let answer = async {
            let mut answer = Vec::new();
            loop {
                match self.stream.read_u8().await.unwrap() {
                    b'\n' => return String::from_utf8(answer).unwrap(),
                    byte => answer.push(byte),
                }
            }
        };
        tokio::time::timeout(PATIENCE, answer).await.expect("the guest answers")
    }
}

/// Waits until something holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(INTERVAL).await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, wait).await;
    assert!(in_time.is_ok(), "{what} does not become true");
}

/// A file's text, if there is one.
pub(crate) fn text_of(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
