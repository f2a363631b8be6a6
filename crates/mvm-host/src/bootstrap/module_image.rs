//! All modules of a kernel as a filesystem: made once per kernel, shared by all of its guests, and
//! mounted in each on `/lib/modules/RELEASE`.
//!
//! The modules are not compressed, as what loads them in a guest may not know how to unpack them,
//! and `depmod` lists what they need and offer, so that `modprobe` finds them.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use super::BootstrapError;
use super::kernel::StoredFile;
use super::modules::ModuleTree;
use crate::image::digest::{Digest, InputDigest};
use crate::image::durable::{FileError, Named, ensure_dir};
use crate::process::Tool;

/// The filesystem's UUID; a random one would make each build differ.
const UUID: &str = "6d766d00-0000-4000-8000-6d6f64730001";
/// What `depmod` is told that the kernel's release is. What it writes does not depend on it.
const RELEASE: &str = "0.0.0";
/// What a kernel's directory holds besides the modules, as far as `depmod` or programs read it.
const LISTS: [&str; 3] = ["modules.order", "modules.builtin", "modules.builtin.modinfo"];

/// Where `depmod` lists the device nodes whose opening loads a module. systemd's kmod-static-nodes runs
/// `kmod` wherever there is such a file, also in images without that program.
const DEVNAMES: &str = "modules.devname";
/// The same list under the name by which the guest agent, which makes the nodes, finds it.
const NODES: &str = "modules.nodes";

/// A filesystem with all modules, where it was made.
pub(super) struct ModuleImage {
    path: PathBuf,
    tree: Digest,
}

impl ModuleImage {
    /// Makes it in a directory of its own, which has room for all modules twice. Blocks its thread,
    /// which is one of a runtime's.
    pub(super) fn make(modules: &ModuleTree, dir: &Path) -> Result<Self, BootstrapError> {
        let root = dir.join("lib/modules").join(RELEASE);
        ensure_dir(&root)?;
        // Some builds of depmod look there.
        let merged = dir.join("usr");
        ensure_dir(&merged)?;
        symlink("../lib", merged.join("lib")).named("link", &merged)?;
        let mut digest = InputDigest::new("kernel modules");
        for (name, inside) in modules.all() {
            let content = modules.read(name)?;
            digest.add(&inside.to_string_lossy(), &content);
            write(&root.join(inside), &content)?;
        }
        for name in LISTS {
            let path = modules.root().join(name);
            match fs::read(&path) {
                Ok(content) => {
                    digest.add(name, &content);
                    write(&root.join(name), &content)?;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(FileError::new("read", &path, error).into()),
            }
        }
        let path = dir.join("image.erofs");
        let runtime = tokio::runtime::Handle::current();
        runtime.block_on(Tool::new("depmod").arg("-b").arg(dir).arg(RELEASE).run())?;
        let (listed, nodes) = (root.join(DEVNAMES), root.join(NODES));
        fs::rename(&listed, &nodes).named("rename", &listed)?;
        let image = Tool::new("mkfs.erofs").args(["--quiet", "-U", UUID, "-T0", "--all-root"]);
        runtime.block_on(image.arg(&path).arg(&root).run())?;
        Ok(Self { path, tree: digest.finish() })
    }

    /// A digest of the modules, whatever program made the filesystem.
    pub(super) fn tree(&self) -> Digest {
        self.tree
    }

    /// Moves it to its place, and tells what it is.
    pub(super) fn place(&self, to: &Path) -> Result<StoredFile, BootstrapError> {
        fs::set_permissions(&self.path, Permissions::from_mode(0o444))
            .named("set the mode of", &self.path)?;
        let file = fs::File::open(&self.path).named("open", &self.path)?;
        file.sync_all().named("write", &self.path)?;
        fs::rename(&self.path, to).named("create", to)?;
        let (sha256, size) = Digest::of_file(to).named("read", to)?;
        Ok(StoredFile { size, sha256 })
    }
}

fn write(path: &Path, content: &[u8]) -> Result<(), BootstrapError> {
    ensure_dir(path.parent().unwrap_or(path))?;
    Ok(fs::write(path, content).named("write", path)?)
}
