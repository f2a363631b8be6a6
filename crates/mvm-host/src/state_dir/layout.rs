//! The layout of a state directory: a type for each kind of directory in it, and a method for each
//! file. Nothing here touches the disk, and no other module joins these names to a path.
//!
//! State directories of earlier releases have the same names: a name never changes.

use std::ffi::OsStr;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use mvm_core::name::{DiskPath, InstanceId, InstancePath, RevisionId, SnapshotId, TenantName};

/// The name of [`InstanceDir::layer`], which a snapshot's manifest has, too.
pub const LAYER: &str = "layer.ext4";
/// The name of [`SnapshotDir::device_state`], in manifests, too.
pub const DEVICE_STATE: &str = "device.state";
/// The name of [`SnapshotDir::memory_image`], in manifests, too.
pub const MEMORY_IMAGE: &str = "memory.image";
/// The name of [`RevisionDir::vmlinuz`], in manifests, too.
pub const VMLINUZ: &str = "vmlinuz";
/// The name of [`RevisionDir::initrd`], in manifests, too.
pub const INITRD: &str = "initrd";
/// The name of [`RevisionDir::root`], in manifests, too.
pub const ROOT: &str = "root.erofs";
/// The name of [`RevisionDir::modules`], in manifests, too.
pub const MODULES: &str = "modules.erofs";
/// What the name of each of an instance's own snapshots begins with.
const SLEEP: &str = "sleep-";

/// Declares a directory; it is used as a path wherever one is wanted.
macro_rules! directory {
    ($(#[$docs:meta])* $name:ident { $($(#[$file_docs:meta])* $file:ident = $path:expr;)* }) => {
        $(#[$docs])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(PathBuf);

        impl $name {
            $($(#[$file_docs])*
            pub fn $file(&self) -> PathBuf {
                self.0.join($path)
            })*
        }

        impl Deref for $name {
            type Target = Path;

            fn deref(&self) -> &Path {
                &self.0
            }
        }

        impl AsRef<Path> for $name {
            fn as_ref(&self) -> &Path {
                &self.0
            }
        }

        impl AsRef<OsStr> for $name {
            fn as_ref(&self) -> &OsStr {
                self.0.as_ref()
            }
        }

        impl<P: AsRef<Path> + ?Sized> From<&P> for $name {
            fn from(path: &P) -> Self {
                Self(path.as_ref().to_owned())
            }
        }

        impl From<PathBuf> for $name {
            fn from(path: PathBuf) -> Self {
                Self(path)
            }
        }
    };
}

directory! {
    /// A state directory.
    StateDir {
        /// The socket that the agent serves its API on.
        socket = "agent.sock";
        /// The lock of the agent that serves the directory.
        lock = "agent.lock";
        /// What the background agent says.
        log = "agent.log";
        /// The desired and observed records.
        database = "mvm.db";
        /// Which state directory it is.
        identity = "identity.json";
        /// The space that is set aside.
        reserve = "reserve";
        /// What KVM was found to be capable of.
        kvm_probe = "kvm-probe.json";
        /// Mirrors, and registries without TLS; written by people.
        registries = "registries.toml";
        /// The kernels.
        kernels = "kernels";
        /// The revisions.
        images = "images";
        /// The unpacked layers of images.
        layers = "layers";
        /// The empty writable layers, one per size.
        templates = "templates";
        /// The Firecrackers that ever started a microVM here, by their versions.
        firecrackers = "firecracker";
        /// Downloaded packages.
        package_cache = "cache/packages";
        /// Archives that came over a command's standard input.
        uploads = "cache/uploads";
        /// The data disks, by tenants.
        disks = "disks";
        /// The snapshots that several instances begin with.
        snapshots = "snapshots";
        /// The instances.
        instances = "instances";
    }
}

impl StateDir {
    /// A revision.
    pub fn revision(&self, id: &RevisionId) -> RevisionDir {
        RevisionDir(self.images().join(id.as_str()))
    }

    /// The directory of a tenant's data disks.
    pub fn disks_of(&self, tenant: &TenantName) -> PathBuf {
        self.disks().join(tenant.as_str())
    }

    /// A data disk.
    pub fn disk(&self, disk: &DiskPath) -> PathBuf {
        self.disks_of(&disk.tenant).join(format!("{}.ext4", disk.disk))
    }

    /// A data disk that is being made. The name is no disk's.
    pub fn unfinished_disk(&self, disk: &DiskPath) -> PathBuf {
        self.disks_of(&disk.tenant).join(format!(".{}.new", disk.disk))
    }

    /// A tenant's private key for SSH.
    pub fn ssh_key(&self, tenant: &TenantName) -> PathBuf {
        self.join("ssh").join(tenant.as_str()).join("id_ed25519")
    }

    /// A snapshot that several instances begin with.
    pub fn snapshot(&self, id: &SnapshotId) -> SnapshotDir {
        SnapshotDir(self.snapshots().join(id.as_str()))
    }

    /// An instance.
    pub fn instance(&self, id: &InstanceId) -> InstanceDir {
        InstanceDir(self.instances().join(id.as_str()))
    }

    /// The host keys of an instance's guest.
    pub fn known_hosts(&self, instance: &InstancePath) -> PathBuf {
        self.instance(&instance.id).join("known_hosts")
    }
}

directory! {
    /// An instance's directory.
    InstanceDir {
        /// The writable layer.
        layer = LAYER;
        /// What the main process wrote.
        main_log = "main.log";
        /// What the main process wrote before.
        older_main_log = "main.log.1";
        /// The guest's serial console.
        console_log = "console.log";
        /// The console of the boot before.
        previous_console_log = "console.log.1";
        /// What the VMM itself printed.
        vmm_log = "vmm.log";
        /// All that a Firecracker sees, as long as it runs.
        jail = "jail";
        /// The socket that holds the locks of a Firecracker's disks.
        locks_socket = "locks.sock";
        /// The directory that QEMU writes its events into.
        events = "events";
        /// QEMU's control socket.
        qmp_socket = "qmp.sock";
        /// The socket of the guest agent's port in QEMU.
        agent_socket = "agent.sock";
    }
}

impl InstanceDir {
    /// The snapshot of a sleep.
    pub fn sleep(&self, number: u64) -> SnapshotDir {
        SnapshotDir(self.join(format!("{SLEEP}{number}")))
    }

    /// What follows `sleep-` in the name of a sleep's snapshot; a number, if it is complete.
    pub fn sleep_of_name(name: &str) -> Option<&str> {
        name.strip_prefix(SLEEP)
    }
}

directory! {
    /// A snapshot.
    SnapshotDir {
        /// What describes it.
        manifest = "manifest.json";
        /// The state of the devices.
        device_state = DEVICE_STATE;
        /// The whole memory.
        memory_image = MEMORY_IMAGE;
        /// What was changed of the image that it was restored from.
        memory_changes = "memory.changes";
        /// The digests of the image's blocks. It only saves time, so that no manifest names it.
        memory_blocks = "memory.blocks";
        /// The copy of the writable layer, in one that several instances begin with.
        layer = LAYER;
    }
}

impl SnapshotDir {
    /// Where it is while it is being made.
    pub fn unfinished(&self) -> Self {
        Self(self.with_extension("new"))
    }

    /// The name of what `name` is, without what tells that it is unfinished.
    pub fn finished_name(name: &str) -> &str {
        name.strip_suffix(".new").unwrap_or(name)
    }
}

directory! {
    /// A revision: an immutable image.
    RevisionDir {
        /// What describes it.
        manifest = "manifest.json";
        /// The kernel.
        vmlinuz = VMLINUZ;
        /// The initial RAM filesystem.
        initrd = INITRD;
        /// The root filesystem.
        root = ROOT;
        /// All modules of the kernel.
        modules = MODULES;
    }
}

directory! {
    /// A kernel with its modules.
    KernelDir {
        /// What describes it.
        manifest = "kernel.json";
        /// The kernel.
        vmlinuz = VMLINUZ;
        /// The modules that guests need to boot.
        boot_modules = "modules";
        /// All modules.
        modules = MODULES;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names_of(paths: &[(PathBuf, &str)]) {
        for (path, name) in paths {
            assert_eq!(path, &Path::new("/s").join(name));
        }
    }

    #[test]
    fn the_names_on_disk_are_those_of_all_releases() {
        let (state, tenant) = (StateDir::from("/s"), "acme".parse().unwrap());
        let (disk, path) = ("acme/data".parse().unwrap(), "acme/web/i-0000002a".parse().unwrap());
        names_of(&[
            (state.socket(), "agent.sock"),
            (state.lock(), "agent.lock"),
            (state.log(), "agent.log"),
            (state.database(), "mvm.db"),
            (state.identity(), "identity.json"),
            (state.reserve(), "reserve"),
            (state.kvm_probe(), "kvm-probe.json"),
            (state.registries(), "registries.toml"),
            (state.kernels(), "kernels"),
            (state.layers(), "layers"),
            (state.templates(), "templates"),
            (state.firecrackers(), "firecracker"),
            (state.package_cache(), "cache/packages"),
            (state.uploads(), "cache/uploads"),
            (state.disk(&disk), "disks/acme/data.ext4"),
            (state.unfinished_disk(&disk), "disks/acme/.data.new"),
            (state.ssh_key(&tenant), "ssh/acme/id_ed25519"),
            (state.known_hosts(&path), "instances/i-0000002a/known_hosts"),
        ]);
        let instance = state.instance(&path.id);
        let in_instance = |path: PathBuf| path.strip_prefix(&instance).unwrap().to_owned();
        let files = [
            instance.layer(),
            instance.main_log(),
            instance.older_main_log(),
            instance.console_log(),
            instance.previous_console_log(),
            instance.vmm_log(),
            instance.jail(),
            instance.locks_socket(),
            instance.events(),
            instance.qmp_socket(),
            instance.agent_socket(),
            instance.sleep(3).to_path_buf(),
            instance.sleep(3).unfinished().to_path_buf(),
        ];
        let names = files.map(in_instance);
        let expected = "layer.ext4 main.log main.log.1 console.log console.log.1 vmm.log jail \
                        locks.sock events qmp.sock agent.sock sleep-3 sleep-3.new";
        assert!(names.iter().eq(expected.split_whitespace().map(Path::new)), "{names:?}");
        let snapshot = state.snapshot(&"s-0000002a".parse().unwrap());
        names_of(&[
            (snapshot.unfinished().to_path_buf(), "snapshots/s-0000002a.new"),
            (snapshot.manifest(), "snapshots/s-0000002a/manifest.json"),
            (snapshot.device_state(), "snapshots/s-0000002a/device.state"),
            (snapshot.memory_image(), "snapshots/s-0000002a/memory.image"),
            (snapshot.memory_changes(), "snapshots/s-0000002a/memory.changes"),
            (snapshot.memory_blocks(), "snapshots/s-0000002a/memory.blocks"),
            (snapshot.layer(), "snapshots/s-0000002a/layer.ext4"),
        ]);
        let revision = state.revision(&"r-000000000000002a".parse().unwrap());
        names_of(&[
            (revision.manifest(), "images/r-000000000000002a/manifest.json"),
            (revision.vmlinuz(), "images/r-000000000000002a/vmlinuz"),
            (revision.initrd(), "images/r-000000000000002a/initrd"),
            (revision.root(), "images/r-000000000000002a/root.erofs"),
            (revision.modules(), "images/r-000000000000002a/modules.erofs"),
        ]);
        let kernel = KernelDir::from("/s");
        names_of(&[
            (kernel.manifest(), "kernel.json"),
            (kernel.vmlinuz(), "vmlinuz"),
            (kernel.boot_modules(), "modules"),
            (kernel.modules(), "modules.erofs"),
        ]);
    }

    /// Names that only a state directory has: the first part of what is joined, in its own quotes or
    /// as a constant of this module.
    const OWN: &str = "agent.sock agent.lock agent.log mvm.db identity.json reserve kvm-probe.json \
         registries.toml kernels images layers templates cache disks ssh snapshots instances \
         layer.ext4 main.log main.log.1 console.log console.log.1 vmm.log jail locks.sock events \
         qmp.sock device.state memory.image memory.changes memory.blocks root.erofs modules.erofs";

    /// Where a line of a program joins one of these names to a path.
    fn joins_own_name(line: &str) -> bool {
        let joined = line.split(".join(").skip(1);
        joined.into_iter().any(|rest| match rest.strip_prefix('"') {
            Some(text) => {
                let name = text.split(['"', '/']).next().unwrap_or_default();
                OWN.split_whitespace().any(|own| own == name)
            }
            None => {
                let name = rest.split(')').next().unwrap_or_default();
                let name = name.rsplit("::").next().unwrap_or_default();
                ["LAYER", "DEVICE_STATE", "MEMORY_IMAGE", "VMLINUZ", "INITRD", "ROOT", "MODULES"]
                    .contains(&name)
                    || rest.starts_with("format!(\"sleep-")
            }
        })
    }

    #[test]
    fn no_other_module_joins_a_name_of_the_layout() {
        assert!(joins_own_name("let path = dir.join(\"layer.ext4\");"));
        assert!(joins_own_name("dir.join(\"disks/demo\").join(name)"));
        assert!(joins_own_name("self.dir.join(state_dir::MEMORY_IMAGE)"));
        assert!(!joins_own_name("names.join(\", \"); dir.join(\"bin\")"));
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let programs = fs::read_dir(crates).unwrap().map(|entry| entry.unwrap().path().join("src"));
        let mut left: Vec<PathBuf> = programs.collect();
        let (mut files, mut found) = (0, Vec::new());
        while let Some(path) = left.pop() {
            if path.is_dir() {
                left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !path.ends_with("state_dir/layout.rs")
                && !path.components().any(|part| part.as_os_str() == "tests")
                && !path.ends_with("tests.rs")
            {
                files += 1;
                let text = fs::read_to_string(&path).unwrap();
                // Tests know names on their own account.
                let program = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
                let lines = program.lines().enumerate().filter(|(_, line)| joins_own_name(line));
                found.extend(
                    lines.map(|(at, line)| format!("{}:{}: {line}", path.display(), at + 1)),
                );
            }
        }
        assert!(files > 100, "only {files} files were looked at");
        assert!(found.is_empty(), "add a method in layout.rs:\n{}", found.join("\n"));
    }
}
