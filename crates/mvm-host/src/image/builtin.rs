//! The built-in image: a small system of busybox, ready at once and without a registry.
//!
//! busybox comes from the distribution's package, so that the image is the same on each machine
//! with the same package; on machines without `apt` a static busybox of the host is taken.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::ImageError;
use super::digest::{Digest, InputDigest};
use super::durable::{FileError, Named, ensure_dir, write_new};
use super::progress::{OnProgress, step};
use super::source::{ImageSource, Ownership};
use crate::bootstrap::apt::{self, Candidate};
use crate::bootstrap::packages::find_program;
use crate::bootstrap::{BootstrapError, deb};
use crate::process::Tool;

/// The package with a statically linked busybox.
const PACKAGE: &str = "busybox-static";
/// The ordinary user's id and group id.
const USER_ID: u32 = 1000;
/// Directories with their modes, parents first.
const DIRS: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("etc/mvm", 0o755),
    ("home", 0o755),
    ("home/mvm", 0o755),
    ("mnt", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var", 0o755),
    ("var/lib", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];
/// Files with their modes and contents. The guest agent writes the instance's own `hostname`,
/// `hosts` and `resolv.conf` over these.
const FILES: &[(&str, u32, &str)] = &[
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\n\
         mvm:x:1000:1000:mvm:/home/mvm:/bin/sh\n\
         nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    ),
    ("etc/shadow", 0o600, "root:*:::::::\nmvm:*:::::::\nnobody:*:::::::\n"),
    ("etc/group", 0o644, "root:x:0:\ntty:x:5:\nmvm:x:1000:\nnogroup:x:65534:\n"),
    ("etc/shells", 0o644, "/bin/sh\n"),
    ("etc/hostname", 0o644, "mvm\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/resolv.conf", 0o644, ""),
    ("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n"),
    (
        "etc/profile",
        0o644,
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
         export PS1='\\u@\\h:\\w\\$ '\n",
    ),
    ("etc/os-release", 0o644, "ID=mvm\nNAME=mvm\nPRETTY_NAME=\"mvm built-in image\"\n"),
];

/// Where busybox comes from.
#[derive(Debug, Clone)]
enum Busybox {
    Package { candidate: Candidate, cache: PathBuf },
    File { path: PathBuf, digest: Digest },
}

/// The source of the built-in image, with the version of busybox settled.
#[derive(Debug, Clone)]
pub struct BuiltinSource {
    busybox: Busybox,
}

impl BuiltinSource {
    /// Settles which busybox this machine gives; `cache` keeps downloaded packages. Nothing is
    /// downloaded before the image is built.
    ///
    /// # Errors
    /// There is neither the package nor a static busybox on this machine.
    pub async fn resolve(cache: &Path, progress: OnProgress<'_>) -> Result<Self, ImageError> {
        let busybox = if apt::is_available() {
            let candidate = apt::first_candidate(&[PACKAGE], progress).await?;
            Busybox::Package { candidate, cache: cache.to_owned() }
        } else {
            let path = find_program("busybox").ok_or(BootstrapError::NoApt {
                needed: "busybox, which the built-in image is made of,",
                instead: "install a statically linked `busybox`",
            })?;
            let content = fs::read(&path).named("read", &path)?;
            Busybox::File { digest: Digest::of(&content), path }
        };
        Ok(Self { busybox })
    }

    async fn busybox(&self, progress: OnProgress<'_>) -> Result<Vec<u8>, ImageError> {
        let (content, path) = match &self.busybox {
            Busybox::Package { candidate, cache } => {
                let package = apt::download(candidate, cache, progress).await?;
                let owned = package.clone();
                let content = tokio::task::spawn_blocking(move || from_package(&owned)).await;
                (content.map_err(std::io::Error::other).named("read", &package)??, package)
            }
            Busybox::File { path, digest } => {
                let content = fs::read(path).named("read", path)?;
                if Digest::of(&content) != *digest {
                    let changed = std::io::Error::other("it changed during the build");
                    return Err(FileError::new("read", path, changed).into());
                }
                (content, path.clone())
            }
        };
        if is_static_elf(&content) { Ok(content) } else { Err(ImageError::NotStatic { path }) }
    }
}

fn from_package(package: &Path) -> Result<Vec<u8>, BootstrapError> {
    let mut found = None;
    deb::for_each_file(package, |path, content| {
        if path.ends_with("bin/busybox") {
            found = Some(content.to_vec());
        }
        Ok::<_, BootstrapError>(())
    })?;
    found.ok_or_else(|| BootstrapError::BadPackage {
        path: package.to_owned(),
        problem: "it has no bin/busybox".to_owned(),
    })
}

/// Whether a 64-bit ELF file asks for no dynamic loader.
fn is_static_elf(elf: &[u8]) -> bool {
    const PT_INTERP: &[u8] = &[3, 0, 0, 0];
    let headers = || {
        let table = usize::try_from(u64::from_le_bytes(*elf.get(0x20..)?.first_chunk()?)).ok()?;
        let size = usize::from(u16::from_le_bytes(*elf.get(0x36..)?.first_chunk()?));
        let count = usize::from(u16::from_le_bytes(*elf.get(0x38..)?.first_chunk()?));
        elf.get(table..table.checked_add(size * count)?).map(|table| (table, size))
    };
    match headers() {
        Some((table, size)) if elf.starts_with(b"\x7fELF\x02\x01") && size >= 4 => {
            !table.chunks(size).any(|header| header.starts_with(PT_INTERP))
        }
        _ => false,
    }
}

#[async_trait]
impl ImageSource for BuiltinSource {
    fn describe(&self) -> String {
        match &self.busybox {
            Busybox::Package { candidate, .. } => {
                format!("built-in ({} {})", candidate.package, candidate.version)
            }
            Busybox::File { path, .. } => format!("built-in ({})", path.display()),
        }
    }

    fn ownership(&self) -> Ownership {
        Ownership::AsWritten
    }

    async fn fingerprint(&self) -> Result<Digest, ImageError> {
        let mut digest = InputDigest::new("built-in image");
        match &self.busybox {
            Busybox::Package { candidate, .. } => {
                digest.add("package", candidate.sha256.to_string().as_bytes());
            }
            Busybox::File { digest: content, .. } => {
                digest.add("file", content.to_string().as_bytes());
            }
        }
        for (name, mode) in DIRS {
            digest.add("dir", name.as_bytes()).add("mode", &mode.to_be_bytes());
        }
        for (name, mode, content) in FILES {
            digest.add("file", name.as_bytes()).add("mode", &mode.to_be_bytes());
            digest.add("content", content.as_bytes());
        }
        Ok(digest.finish())
    }

    async fn write_root(&self, dest: &Path, progress: OnProgress<'_>) -> Result<(), ImageError> {
        let busybox = self.busybox(progress).await?;
        step(progress, "writing the root filesystem".to_owned(), async {
            write_base(dest)?;
            let program = dest.join("bin/busybox");
            write_new(&program, &busybox, 0o755)?;
            let applets = Tool::new(&program).arg("--list-full").run().await?;
            for applet in applets.lines() {
                link_applet(dest, applet)?;
            }
            Ok(())
        })
        .await
    }
}

/// Everything except busybox.
fn write_base(dest: &Path) -> Result<(), FileError> {
    for (name, mode) in DIRS {
        let path = dest.join(name);
        ensure_dir(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(*mode))
            .named("set the mode of", &path)?;
    }
    for (name, mode, content) in FILES {
        write_new(&dest.join(name), content.as_bytes(), *mode)?;
    }
    let home = dest.join("home/mvm");
    chown(&home, Some(USER_ID), Some(USER_ID)).named("change the owner of", &home)
}

/// Links a relative path such as `usr/bin/awk` to busybox.
fn link_applet(dest: &Path, applet: &str) -> Result<(), FileError> {
    let path = dest.join(applet.trim_start_matches('/'));
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        ensure_dir(parent)?;
    }
    symlink("/bin/busybox", &path).named("link", &path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_a_dynamic_loader_is_not_static() {
        assert!(!is_static_elf(&fs::read("/bin/sh").unwrap()), "the host's shell is dynamic");
        assert!(!is_static_elf(b"#!/bin/sh\n"));
        assert!(!is_static_elf(b"\x7fELF\x02\x01"));
    }

    #[test]
    fn every_user_has_a_line_in_each_file() {
        let content = |name: &str| FILES.iter().find(|(n, _, _)| *n == name).unwrap().2;
        for user in ["root", "mvm", "nobody"] {
            for file in ["etc/passwd", "etc/shadow"] {
                let start = format!("{user}:");
                assert!(
                    content(file).lines().any(|line| line.starts_with(&start)),
                    "{user} {file}"
                );
            }
        }
        assert!(content("etc/passwd").contains(&format!("mvm:x:{USER_ID}:{USER_ID}:")));
    }
}
