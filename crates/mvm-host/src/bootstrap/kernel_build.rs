//! Collects the parts of a stored kernel, from packages or from the user's files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::BootstrapError;
use super::deb;
use super::kernel::{KernelId, KernelManifest, KernelOrigin, SCHEMA, StoredFile, module_file};
use super::kernel_file::check_kernel;
use super::module_image::ModuleImage;
use super::modules::ModuleTree;
use crate::image::digest::{Digest, InputDigest};
use crate::image::durable::{Named, ensure_dir, write_new};
use crate::state_dir::{KernelDir, MODULES, VMLINUZ};

/// A kernel in memory, a few MiB; all of its modules are a file.
pub(super) struct Parts {
    release: String,
    origin: KernelOrigin,
    load: Vec<String>,
    /// By relative path; the manifest is made of these.
    files: BTreeMap<String, Vec<u8>>,
    all_modules: Option<ModuleImage>,
}

impl Parts {
    /// The id of this content; where it came from does not matter.
    pub(super) fn id(&self) -> KernelId {
        let mut digest = InputDigest::new("guest kernel");
        digest.add("schema", &SCHEMA.to_be_bytes());
        digest.add("load", self.load.join(",").as_bytes());
        for (name, content) in &self.files {
            digest.add(name, content);
        }
        if let Some(image) = &self.all_modules {
            digest.add("all modules", image.tree().to_string().as_bytes());
        }
        KernelId::from_digest(digest.finish())
    }

    /// Writes the files and the manifest into an empty directory.
    pub(super) fn write(&self, id: &KernelId, dir: &KernelDir) -> Result<(), BootstrapError> {
        ensure_dir(&dir.boot_modules())?;
        let mut files = BTreeMap::new();
        for (name, content) in &self.files {
            write_new(&dir.join(name), content, 0o444)?;
            let (size, sha256) = (content.len() as u64, Digest::of(content));
            files.insert(name.clone(), StoredFile { size, sha256 });
        }
        if let Some(image) = &self.all_modules {
            files.insert(MODULES.to_owned(), image.place(&dir.modules())?);
        }
        let manifest = KernelManifest {
            schema: SCHEMA,
            id: id.clone(),
            release: self.release.clone(),
            origin: self.origin.clone(),
            load: self.load.clone(),
            files,
        };
        let path = dir.manifest();
        let text = serde_json::to_vec_pretty(&manifest).named("encode", &path)?;
        Ok(write_new(&path, &text, 0o444)?)
    }

    /// Takes the modules that a boot needs, and makes a filesystem of all of them in `temp`, where
    /// there is room.
    fn add_modules(&mut self, tree: &ModuleTree, temp: &Path) -> Result<(), BootstrapError> {
        self.load = tree.load_order()?;
        for name in &self.load {
            self.files.insert(module_file(name), tree.read(name)?);
        }
        self.all_modules = Some(ModuleImage::make(tree, &temp.join("image"))?);
        Ok(())
    }
}

/// Takes a kernel out of the distribution's packages; `temp` is an empty directory.
pub(super) fn from_packages(
    packages: &[PathBuf],
    origin: KernelOrigin,
    temp: &Path,
) -> Result<Parts, BootstrapError> {
    let mut parts = Parts {
        release: String::new(),
        origin,
        load: Vec::new(),
        files: BTreeMap::new(),
        all_modules: None,
    };
    let modules = temp.join("modules");
    ensure_dir(&modules)?;
    for package in packages {
        deb::for_each_file(package, |path, content| unpack(&mut parts, &modules, path, content))?;
    }
    let first = packages.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
    match parts.files.get(VMLINUZ) {
        Some(kernel) => check_kernel(first, kernel)?,
        None => {
            return Err(BootstrapError::BadPackage {
                path: first.to_owned(),
                problem: "it has no boot/vmlinuz-*".to_owned(),
            });
        }
    };
    parts.add_modules(&ModuleTree::scan(&modules)?, temp)?;
    Ok(parts)
}

/// Keeps the kernel and its configuration, and puts the modules where they can be searched.
fn unpack(
    parts: &mut Parts,
    modules: &Path,
    path: &Path,
    content: &[u8],
) -> Result<(), BootstrapError> {
    let name = path.to_string_lossy();
    if let Some(release) = name.strip_prefix("boot/vmlinuz-") {
        parts.release = release.to_owned();
        parts.files.insert(VMLINUZ.to_owned(), content.to_vec());
    } else if name.starts_with("boot/config-") {
        parts.files.insert("config".to_owned(), content.to_vec());
    } else if let Some(inside) =
        name.strip_prefix("lib/modules/").or_else(|| name.strip_prefix("usr/lib/modules/"))
        && let Some((_release, inside)) = inside.split_once('/')
    {
        let dest = modules.join(inside);
        ensure_dir(dest.parent().unwrap_or(modules))?;
        fs::write(&dest, content).named("write", &dest)?;
    }
    Ok(())
}

/// Takes a kernel of the user's own; `temp` is an empty directory.
pub(super) fn from_files(
    vmlinuz: &Path,
    modules: Option<&Path>,
    temp: &Path,
) -> Result<Parts, BootstrapError> {
    let content = fs::read(vmlinuz).named("read", vmlinuz)?;
    check_kernel(vmlinuz, &content)?;
    let name = vmlinuz.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut parts = Parts {
        release: release_of(&content).unwrap_or(name),
        origin: KernelOrigin::File { path: vmlinuz.to_owned() },
        load: Vec::new(),
        files: BTreeMap::from([(VMLINUZ.to_owned(), content)]),
        all_modules: None,
    };
    if let Some(modules) = modules {
        parts.add_modules(&ModuleTree::scan(modules)?, temp)?;
    }
    Ok(parts)
}

/// The release that a bzImage's header points to.
fn release_of(content: &[u8]) -> Option<String> {
    if content.get(0x202..0x206) != Some(b"HdrS") {
        return None;
    }
    let at = usize::from(u16::from_le_bytes(*content.get(0x20e..)?.first_chunk()?)) + 0x200;
    let text = content.get(at..)?.split(|byte| *byte == 0).next()?;
    Some(std::str::from_utf8(text).ok()?.split_whitespace().next()?.to_owned())
}
