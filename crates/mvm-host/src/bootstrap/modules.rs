//! Chooses the kernel modules that a microVM needs to reach its root filesystem and its host, with
//! everything they depend on, in an order that loads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::BootstrapError;
use super::deb::decompress;
use super::modinfo::{ModInfo, module_name};
use crate::image::durable::Named;

/// Whether a microVM can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Required,
    Optional,
}

/// What the guest loads, in this order: its devices' transports, its devices, its filesystems.
/// Of alternatives the ones that exist are taken, and one is enough.
const ROOTS: &[(&[&str], Need)] = &[
    (&["virtio_mmio", "virtio_pci"], Need::Required),
    (&["virtio_console"], Need::Required),
    (&["virtio_blk"], Need::Required),
    (&["virtio_net"], Need::Required),
    (&["virtio_rng"], Need::Optional),
    // Hands memory that is free in the guest back to the host.
    (&["virtio_balloon"], Need::Optional),
    (&["erofs"], Need::Required),
    (&["ext4"], Need::Required),
    (&["overlay"], Need::Required),
    // The guest channel of VMMs that offer vsock instead of a virtio-serial port.
    (&["vmw_vsock_virtio_transport"], Need::Optional),
    // Tells the VMM of a kernel panic, which would look like a reset otherwise.
    (&["pvpanic_mmio"], Need::Optional),
];

/// What a kernel has under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Lookup {
    Builtin,
    Module(ModInfo),
    Nothing,
}

/// Where module names are looked up.
trait Catalogue {
    fn look_up(&self, name: &str) -> Result<Lookup, BootstrapError>;
    /// The module to load for an alias; `None` if there is none or if it is built in.
    fn provider(&self, alias: &str) -> Result<Option<String>, BootstrapError>;
    /// For error messages.
    fn place(&self) -> String;
}

/// The modules of one kernel, as files below a directory.
pub(super) struct ModuleTree {
    root: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    builtin_aliases: BTreeSet<String>,
}

impl ModuleTree {
    /// Lists a directory such as `/lib/modules/RELEASE`, with `modules.builtin` and
    /// `modules.builtin.modinfo` if they are there.
    pub(super) fn scan(root: &Path) -> Result<Self, BootstrapError> {
        let mut tree = Self {
            root: root.to_owned(),
            files: BTreeMap::new(),
            builtin: BTreeSet::new(),
            builtin_aliases: BTreeSet::new(),
        };
        tree.scan_dir(root)?;
        Ok(tree)
    }

    fn scan_dir(&mut self, dir: &Path) -> Result<(), BootstrapError> {
        for entry in fs::read_dir(dir).named("read directory", dir)? {
            let entry = entry.named("read directory", dir)?;
            let path = entry.path();
            let kind = entry.file_type().named("read", &path)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if kind.is_dir() {
                self.scan_dir(&path)?;
            } else if name == "modules.builtin" {
                let list = fs::read_to_string(&path).named("read", &path)?;
                self.builtin.extend(list.lines().filter_map(name_of_file));
            } else if name == "modules.builtin.modinfo" {
                let list = fs::read(&path).named("read", &path)?;
                let list = String::from_utf8_lossy(&list);
                // MODULE.alias=NAME, each ended by a NUL
                let aliases = list.split('\0').filter_map(|field| field.split_once(".alias="));
                self.builtin_aliases.extend(aliases.map(|(_, alias)| module_name(alias)));
            } else if kind.is_file()
                && let Some(module) = name_of_file(&name)
            {
                self.files.insert(module, path);
            }
        }
        Ok(())
    }

    /// The names of the modules to load, dependencies first.
    pub(super) fn load_order(&self) -> Result<Vec<String>, BootstrapError> {
        load_order(self)
    }

    /// Every module with its path below the directory, without a compression's ending, in the order
    /// of their names.
    pub(super) fn all(&self) -> impl Iterator<Item = (&str, PathBuf)> {
        self.files.iter().map(|(name, path)| {
            let inside = path.strip_prefix(&self.root).unwrap_or(path);
            let text = inside.to_string_lossy();
            let end = text.rfind(".ko").map_or(text.len(), |at| at + ".ko".len());
            (name.as_str(), PathBuf::from(&text[..end]))
        })
    }

    /// The directory.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The content of a module, uncompressed.
    pub(super) fn read(&self, name: &str) -> Result<Vec<u8>, BootstrapError> {
        let Some(path) = self.files.get(name) else {
            let place = self.place();
            return Err(BootstrapError::MissingModule { module: name.to_owned(), place });
        };
        read_module(path)
    }
}

fn read_module(path: &Path) -> Result<Vec<u8>, BootstrapError> {
    let packed = fs::read(path).named("read", path)?;
    let mut content = Vec::new();
    let name = path.to_string_lossy();
    let read = decompress(&name, packed.as_slice()).and_then(|mut r| r.read_to_end(&mut content));
    read.map_err(|error| bad_module(path, error.to_string()))?;
    Ok(content)
}

fn bad_module(path: &Path, problem: String) -> BootstrapError {
    BootstrapError::BadModule { path: path.to_owned(), problem }
}

/// `kernel/fs/ext4/ext4.ko.zst` is `ext4`.
fn name_of_file(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (name, ending) = file.split_once(".ko")?;
    matches!(ending, "" | ".xz" | ".zst" | ".gz").then(|| module_name(name))
}

impl Catalogue for ModuleTree {
    fn look_up(&self, name: &str) -> Result<Lookup, BootstrapError> {
        if self.builtin.contains(name) {
            return Ok(Lookup::Builtin);
        }
        let Some(path) = self.files.get(name) else { return Ok(Lookup::Nothing) };
        let info = ModInfo::parse(&read_module(path)?).map_err(|e| bad_module(path, e))?;
        Ok(Lookup::Module(info))
    }

    /// Soft dependencies name algorithms such as `crc32c`, so only the software implementations
    /// below a `crypto` directory are asked; a driver of some device would not load in a microVM.
    fn provider(&self, alias: &str) -> Result<Option<String>, BootstrapError> {
        let mut providers = Vec::new();
        if self.builtin_aliases.contains(alias) {
            return Ok(None);
        }
        for (name, path) in &self.files {
            let inside = path.strip_prefix(&self.root).unwrap_or(path);
            let mut parts = inside.iter();
            if !parts.clone().any(|part| part == "crypto") || parts.any(|part| part == "drivers") {
                continue;
            }
            let info = ModInfo::parse(&read_module(path)?).map_err(|e| bad_module(path, e))?;
            if info.aliases.iter().any(|known| known == alias) {
                providers.push(name.clone());
            }
        }
        // The portable one loads on every processor.
        providers.sort_by_key(|name| !name.ends_with("_generic"));
        Ok(providers.into_iter().next())
    }

    fn place(&self) -> String {
        self.root.display().to_string()
    }
}

fn load_order(catalogue: &dyn Catalogue) -> Result<Vec<String>, BootstrapError> {
    let mut order = Order { catalogue, loaded: Vec::new(), seen: BTreeSet::new() };
    for (names, need) in ROOTS {
        let mut found = false;
        for name in *names {
            found |= order.add(name)?;
        }
        if !found && *need == Need::Required {
            let (module, place) = (names.join("` or `"), catalogue.place());
            return Err(BootstrapError::MissingModule { module, place });
        }
    }
    Ok(order.loaded)
}

struct Order<'a> {
    catalogue: &'a dyn Catalogue,
    loaded: Vec<String>,
    /// Also those whose dependencies are being added: a cycle of soft dependencies ends here.
    seen: BTreeSet<String>,
}

impl Order<'_> {
    /// Adds a module behind everything that it needs; whether the kernel has it.
    fn add(&mut self, name: &str) -> Result<bool, BootstrapError> {
        if self.seen.contains(name) {
            return Ok(true);
        }
        let info = match self.catalogue.look_up(name)? {
            Lookup::Builtin => return Ok(true),
            Lookup::Nothing => return Ok(false),
            Lookup::Module(info) => info,
        };
        self.seen.insert(name.to_owned());
        for soft in &info.pre {
            self.add_soft(soft)?;
        }
        for needed in &info.depends {
            if !self.add(needed)? {
                let module = format!("{needed}` for `{name}");
                let place = self.catalogue.place();
                return Err(BootstrapError::MissingModule { module, place });
            }
        }
        self.loaded.push(name.to_owned());
        for soft in &info.post {
            self.add_soft(soft)?;
        }
        Ok(true)
    }

    /// A soft dependency is a module or an alias, and it may be missing.
    fn add_soft(&mut self, name: &str) -> Result<(), BootstrapError> {
        if !self.add(name)?
            && let Some(provider) = self.catalogue.provider(name)?
        {
            self.add(&provider)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::modinfo::fake_module;
    use super::*;

    struct Table(BTreeMap<&'static str, &'static str>);

    /// Every root is there without dependencies, except for what `changes` says: an empty text
    /// removes a module, `builtin` makes it so, anything else is its `.modinfo`.
    fn table(changes: &[(&'static str, &'static str)]) -> Table {
        let roots = ROOTS.iter().flat_map(|(names, _)| *names).map(|name| (*name, "name=x"));
        Table(roots.chain(changes.iter().copied()).collect())
    }

    impl Catalogue for Table {
        fn look_up(&self, name: &str) -> Result<Lookup, BootstrapError> {
            Ok(match self.0.get(name).copied() {
                None | Some("") => Lookup::Nothing,
                Some("builtin") => Lookup::Builtin,
                Some(text) => Lookup::Module(ModInfo::parse(&fake_module(text)).unwrap()),
            })
        }
        fn provider(&self, alias: &str) -> Result<Option<String>, BootstrapError> {
            Ok((alias == "crc32c").then(|| "crc32c_generic".to_owned()))
        }
        fn place(&self) -> String {
            "a table".to_owned()
        }
    }

    fn position(order: &[String], name: &str) -> usize {
        order.iter().position(|n| n == name).unwrap_or_else(|| panic!("{name} in {order:?}"))
    }

    #[test]
    fn dependencies_precede_their_users_and_come_once() {
        let order = load_order(&table(&[
            ("ext4", "depends=mbcache,jbd2\0softdep=pre: crc32c"),
            ("erofs", "depends=libcrc32c"),
            ("jbd2", "depends=libcrc32c"),
            ("mbcache", "name=mbcache"),
            ("libcrc32c", "softdep=pre: crc32c"),
            ("crc32c_generic", "name=crc32c_generic"),
        ]))
        .unwrap();
        for (first, second) in [
            ("crc32c_generic", "libcrc32c"),
            ("libcrc32c", "jbd2"),
            ("libcrc32c", "erofs"),
            ("jbd2", "ext4"),
            ("mbcache", "ext4"),
        ] {
            assert!(position(&order, first) < position(&order, second), "{order:?}");
        }
        let unique: BTreeSet<_> = order.iter().collect();
        assert_eq!(unique.len(), order.len());
    }

    #[test]
    fn builtin_modules_are_not_loaded() {
        let order = load_order(&table(&[("ext4", "builtin"), ("virtio_blk", "builtin")])).unwrap();
        assert!(!order.iter().any(|name| name == "ext4" || name == "virtio_blk"));
    }

    #[test]
    fn one_transport_is_enough_and_none_is_an_error() {
        assert!(load_order(&table(&[("virtio_mmio", "")])).is_ok());
        assert!(load_order(&table(&[("virtio_pci", "")])).is_ok());
        let none = load_order(&table(&[("virtio_mmio", ""), ("virtio_pci", "")])).unwrap_err();
        assert!(none.to_string().contains("`virtio_mmio` or `virtio_pci`"), "{none}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = load_order(&table(&[("erofs", "")])).unwrap_err().to_string();
        assert!(error.contains("`erofs`") && error.contains("a table"), "{error}");
        let error = load_order(&table(&[("ext4", "depends=gone")])).unwrap_err().to_string();
        assert!(error.contains("`gone` for `ext4`"), "{error}");
        assert!(load_order(&table(&[("virtio_rng", "")])).is_ok());
    }

    #[test]
    fn a_cycle_of_soft_dependencies_ends() {
        let order = load_order(&table(&[
            ("ext4", "softdep=pre: overlay"),
            ("overlay", "softdep=post: ext4"),
        ]))
        .unwrap();
        assert!(position(&order, "overlay") < position(&order, "ext4"));
    }

    #[test]
    fn a_directory_of_modules_is_read_whatever_their_compression() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        for sub in ["fs", "crypto", "drivers/crypto"] {
            fs::create_dir_all(kernel.join(sub)).unwrap();
        }
        for (names, _) in ROOTS {
            for name in names.iter().filter(|name| **name != "virtio_blk") {
                let file = format!("fs/{}.ko", name.replace('_', "-"));
                fs::write(kernel.join(file), fake_module("softdep=pre: crc32c")).unwrap();
            }
        }
        let packed = ruzstd::encoding::compress_to_vec(
            fake_module("alias=crc32c").as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        fs::write(kernel.join("crypto/crc32c_generic.ko.zst"), packed).unwrap();
        fs::write(kernel.join("crypto/crc32c-intel.ko"), fake_module("alias=crc32c")).unwrap();
        fs::write(kernel.join("drivers/crypto/card.ko"), fake_module("alias=crc32c")).unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/drivers/block/virtio_blk.ko\n")
            .unwrap();

        let builtin = "lz4.alias=lz4\0sha256_generic.alias=sha256\0";
        fs::write(dir.path().join("modules.builtin.modinfo"), builtin).unwrap();
        fs::write(kernel.join("crypto/sha256-intel.ko"), fake_module("alias=sha256")).unwrap();

        let tree = ModuleTree::scan(dir.path()).unwrap();
        assert_eq!(tree.provider("sha256").unwrap(), None, "the kernel has it built in");
        let order = tree.load_order().unwrap();
        assert_eq!(order[..2], ["crc32c_generic", "virtio_mmio"]);
        assert!(
            !order.iter().any(|n| ["crc32c_intel", "card", "virtio_blk"].contains(&n.as_str()))
        );
        assert_eq!(tree.read("crc32c_generic").unwrap(), fake_module("alias=crc32c"));
    }
}
