//! Real QEMU, in software or with what `MVM_TEST_ACCEL` names, with a guest made of a distribution's
//! kernel and busybox.
//!
//! The kernel is the one that mvm itself fetches; `MVM_TEST_KERNEL_DIR` names a directory with an
//! unpacked kernel package (`boot/vmlinuz-*` and `lib/modules/*`) to be used instead. Also needed:
//! root, `qemu-system-x86_64` (or another one that `MVM_TEST_QEMU` names), and a static
//! `/bin/busybox`.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mvm_core::vmm::Accel;
use mvm_host::guest::AGENT_BINARY;
use mvm_host::image::initrd::write_initrd;
use mvm_host::process::find_program;
use mvm_host::vmm::Vmm;
use mvm_host::vmm::qemu::{QemuConfig, QemuVmm};

use super::Backend;
use super::guest_files::{Archive, KernelFiles, unpacked};

/// Modules of an unpacked kernel package in the order in which they can be loaded.
const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "failover",
    "net_failover",
    "virtio_net",
    "pvpanic",
    "pvpanic-mmio",
];

const INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
$B mkdir -p /dev /proc /sys
$B mount -t devtmpfs dev /dev; $B mount -t proc proc /proc; $B mount -t sysfs sys /sys
for m in $($B cat /modules.list); do $B insmod /modules/$m.ko; done
echo "guest is up"
port() { for p in /sys/class/virtio-ports/*; do
  [ "$($B cat $p/name 2>/dev/null)" = mvm.agent.0 ] && echo /dev/${p##*/}; done; }
until p=$(port) && [ -n "$p" ] && exec 3<>$p; do $B usleep 20000; done 2>/dev/null
while :; do
  if ! read -r verb rest <&3; then $B usleep 20000; continue; fi
  case $verb in
    echo) echo "$rest" >&3 ;;
    disks) a=; for d in vda vdb; do
        a="$a$d $($B cat /sys/block/$d/size) $($B cat /sys/block/$d/ro) "; done; echo $a >&3 ;;
    note) echo "$rest" > /note; $B tail -n 1 /note >&3 ;;
    notes) $B cat /note >&3 ;;
    rewrite) $B dd if=/dev/zero of=/dev/vdb bs=1M count=1 conv=fsync 2>/dev/null
        echo rewritten >&3 ;;
    mac) $B cat /sys/class/net/eth0/address >&3 ;;
    off) $B poweroff -f ;;
    reset) $B reboot -f ;;
    panic) echo c > /proc/sysrq-trigger ;;
  esac
done
"#;

pub(crate) struct Qemu {
    kernel: PathBuf,
    files: tempfile::TempDir,
}

impl Qemu {
    /// The backend, or why it cannot be used here.
    pub(crate) async fn new() -> Result<Self, String> {
        let (busybox, (kernel, modules)) = needed().await?;
        let mut archive = Archive::default();
        for name in ["bin", "modules"] {
            archive.add(name, 0o040_755, b"");
        }
        archive.add("bin/busybox", 0o100_755, &busybox);
        archive.add("init", 0o100_755, INIT.as_bytes());
        let names: Vec<&str> = modules.iter().map(|(name, _)| name.as_str()).collect();
        archive.add("modules.list", 0o100_644, names.join(" ").as_bytes());
        for (name, path) in &modules {
            let content = std::fs::read(path).map_err(|error| error.to_string())?;
            archive.add(&format!("modules/{name}.ko"), 0o100_644, &content);
        }
        Self::with_initrd(kernel, &archive.finish())
    }

    /// The backend with guests that mvm's own agent boots, or why it cannot be used here. They have
    /// busybox and these scripts (path, text) besides, and no disks of their own.
    pub(crate) async fn with_agent(scripts: &[(&str, &str)]) -> Result<Self, String> {
        let (busybox, (kernel, modules)) = needed().await?;
        let read = |(name, path): &(String, PathBuf)| Ok((name.clone(), std::fs::read(path)?));
        let modules: std::io::Result<Vec<_>> = modules.iter().map(read).collect();
        let modules = modules.map_err(|error| error.to_string())?;
        let mut initrd = Vec::new();
        write_initrd(&mut initrd, AGENT_BINARY, &modules).map_err(|error| error.to_string())?;
        // The kernel unpacks one archive after the other.
        let mut archive = Archive::default();
        archive.add("bin", 0o040_755, b"");
        archive.add("bin/busybox", 0o100_755, &busybox);
        for (path, text) in scripts {
            for (at, _) in path.match_indices('/') {
                archive.add(&path[..at], 0o040_755, b"");
            }
            archive.add(path, 0o100_755, text.as_bytes());
        }
        initrd.extend(archive.finish());
        Self::with_initrd(kernel, &initrd)
    }

    fn with_initrd(kernel: PathBuf, content: &[u8]) -> Result<Self, String> {
        let files = tempfile::tempdir().map_err(|error| error.to_string())?;
        let initrd = files.path().join("initrd");
        std::fs::write(&initrd, content).map_err(|error| error.to_string())?;
        std::fs::set_permissions(&initrd, std::fs::Permissions::from_mode(0o644))
            .map_err(|error| error.to_string())?;
        Ok(Self { kernel, files })
    }
}

/// What there must be: root, QEMU, busybox's content, a kernel and its modules.
async fn needed() -> Result<(Vec<u8>, KernelFiles), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("only root may start QEMU as another user".into());
    }
    let program = config().program;
    if find_program(&program).is_none() && !program.exists() {
        return Err(format!("`{}` is not installed", program.display()));
    }
    let busybox = std::fs::read("/bin/busybox").map_err(|_| "there is no /bin/busybox")?;
    let kernel = match std::env::var_os("MVM_TEST_KERNEL_DIR") {
        Some(dir) => unpacked(Path::new(&dir), &MODULES)?,
        None => fetched().await,
    };
    Ok((busybox, kernel))
}

fn config() -> QemuConfig {
    let accel = std::env::var("MVM_TEST_ACCEL");
    let accel = accel.map_or(Accel::Tcg, |word| word.parse().expect("MVM_TEST_ACCEL"));
    let config = QemuConfig::new(accel);
    match std::env::var_os("MVM_TEST_QEMU") {
        Some(program) => QemuConfig { program: program.into(), ..config },
        None => config,
    }
}

async fn fetched() -> KernelFiles {
    let kernel = crate::image_support::kernel().await;
    let mut modules: BTreeMap<String, PathBuf> = kernel.modules().into_iter().collect();
    let load = kernel.manifest().load.iter();
    let load = load.filter_map(|name| modules.remove_entry(name)).collect();
    (kernel.vmlinuz(), load)
}

impl Backend for Qemu {
    fn vmm(&self) -> Arc<dyn Vmm> {
        Arc::new(QemuVmm::new(config()))
    }

    fn vmm_without_program(&self) -> Option<Arc<dyn Vmm>> {
        let program = "qemu-system-nowhere".into();
        Some(Arc::new(QemuVmm::new(QemuConfig { program, ..config() })))
    }

    fn boot_files(&self) -> (PathBuf, PathBuf) {
        (self.kernel.clone(), self.files.path().join("initrd"))
    }
}
