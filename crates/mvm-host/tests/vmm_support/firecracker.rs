//! Real Firecracker, with a guest made of a distribution's kernel, busybox and socat.
//!
//! Needed: root, a KVM that works, `MVM_FIRECRACKER` or a `firecracker` in `PATH` with its jailer
//! beside it, `/bin/busybox`, `socat`, and `MVM_TEST_KERNEL_DIR` with an unpacked kernel package.
//! `cargo xtask lab` has all of it but Firecracker.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use mvm_core::guest::{POWER_OFF_WORDS, VSOCK_PORT};
use mvm_host::process::find_program;
use mvm_host::vmm::Vmm;
use mvm_host::vmm::firecracker::{FirecrackerConfig, FirecrackerVmm};

use super::Backend;
use super::guest_files::{Archive, unpacked};

/// Modules of an unpacked kernel package in the order in which they can be loaded.
const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];
/// Modules that others need and that come first.
const FIRST: &str = "vsock";

/// A machine without a power switch is reset, and its guest says that it meant to go off.
fn init() -> String {
    format!(
        r#"#!/bin/busybox sh
B=/bin/busybox
$B mkdir -p /dev /proc /sys /tmp
$B mount -t devtmpfs dev /dev; $B mount -t proc proc /proc; $B mount -t sysfs sys /sys
for m in $($B cat /modules.list); do $B insmod /modules/$m.ko; done
echo "guest is up"
while :; do /bin/socat VSOCK-LISTEN:{VSOCK_PORT},reuseaddr EXEC:/obey,nofork 2>/dev/null || $B usleep 20000; done
"#
    )
}

fn obey() -> String {
    format!(
        r#"#!/bin/busybox sh
B=/bin/busybox
while read -r verb rest; do
  case $verb in
    echo) echo "$rest" ;;
    disks) a=; for d in vda vdb; do
        a="$a$d $($B cat /sys/block/$d/size) $($B cat /sys/block/$d/ro) "; done; echo $a ;;
    note) echo "$rest" > /note; $B tail -n 1 /note ;;
    notes) $B cat /note ;;
    rewrite) $B dd if=/dev/zero of=/dev/vdb bs=1M count=1 conv=fsync 2>/dev/null; echo rewritten ;;
    mac) $B cat /sys/class/net/eth0/address ;;
    off) echo "<0>{POWER_OFF_WORDS}" > /dev/kmsg; $B reboot -f ;;
    reset) $B reboot -f ;;
    panic) echo c > /proc/sysrq-trigger ;;
  esac
done
"#
    )
}

pub(crate) struct Firecracker {
    files: tempfile::TempDir,
}

impl Firecracker {
    /// The backend, or why it cannot be used here.
    pub(crate) fn new() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root may start a jailer".into());
        }
        let program = FirecrackerConfig::from_environment().program;
        if find_program(&program).is_none() && !program.is_file() {
            return Err("there is no firecracker: MVM_FIRECRACKER names one".into());
        }
        if std::env::var("MVM_TEST_ACCEL").as_deref() != Ok("kvm") {
            return Err("MVM_TEST_ACCEL=kvm says that KVM works, which it does in the lab".into());
        }
        let dir = std::env::var_os("MVM_TEST_KERNEL_DIR");
        let dir = dir.ok_or("MVM_TEST_KERNEL_DIR names no unpacked kernel package")?;
        let names: Vec<&str> = [FIRST].into_iter().chain(MODULES).collect();
        let (kernel, modules) = unpacked(Path::new(&dir), &names)?;
        let busybox = read(Path::new("/bin/busybox"))?;
        let mut archive = Archive::default();
        for name in ["bin", "modules"] {
            archive.add(name, 0o040_755, b"");
        }
        archive.add("bin/busybox", 0o100_755, &busybox);
        add_with_libraries(&mut archive, "socat")?;
        archive.add("init", 0o100_755, init().as_bytes());
        archive.add("obey", 0o100_755, obey().as_bytes());
        archive.add("modules.list", 0o100_644, names.join(" ").as_bytes());
        for (name, path) in &modules {
            archive.add(&format!("modules/{name}.ko"), 0o100_644, &read(path)?);
        }
        let files = tempfile::tempdir().map_err(|error| error.to_string())?;
        let write = |name: &str, content: &[u8]| {
            std::fs::write(files.path().join(name), content).map_err(|error| error.to_string())
        };
        write("initrd", &archive.finish())?;
        // A copy: the kernel is unpacked beside it.
        write("vmlinuz", &read(&kernel)?)?;
        Ok(Self { files })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Adds a program of the host with the libraries that it is linked to, under their own paths.
fn add_with_libraries(archive: &mut Archive, program: &str) -> Result<(), String> {
    let path = find_program(Path::new(program)).ok_or(format!("`{program}` is not installed"))?;
    archive.add(&format!("bin/{program}"), 0o100_755, &read(&path)?);
    let listed = Command::new("ldd").arg(&path).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let libraries: BTreeSet<&str> =
        text.split_ascii_whitespace().filter(|word| word.starts_with('/')).collect();
    let mut dirs = BTreeSet::new();
    for library in libraries {
        let library = Path::new(library);
        let parents: Vec<&Path> = library.ancestors().skip(1).collect();
        for dir in parents.into_iter().rev() {
            let name = dir.to_str().unwrap_or_default().trim_start_matches('/');
            if !name.is_empty() && dirs.insert(name.to_owned()) {
                archive.add(name, 0o040_755, b"");
            }
        }
        let name = library.to_str().unwrap_or_default().trim_start_matches('/');
        archive.add(name, 0o100_755, &read(library)?);
    }
    Ok(())
}

impl Backend for Firecracker {
    fn vmm(&self) -> Arc<dyn Vmm> {
        Arc::new(FirecrackerVmm::new(FirecrackerConfig::from_environment()))
    }

    fn vmm_without_program(&self) -> Option<Arc<dyn Vmm>> {
        let config = FirecrackerConfig::new("firecracker-nowhere".into());
        Some(Arc::new(FirecrackerVmm::new(config)))
    }

    fn boot_files(&self) -> (PathBuf, PathBuf) {
        (self.files.path().join("vmlinuz"), self.files.path().join("initrd"))
    }
}
