//! Trees that are no container image: a directory or a tar archive, taken over as one layer.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{lgetxattr, llistxattr};
use tokio_util::sync::CancellationToken;

use super::document::unusable;
use super::entry::{Bytes, Content, Entry, Meta};
use super::layer::LayerWriter;
use super::limits::MAX_ENTRIES;
use crate::image::ImageError;
use crate::image::digest::{Digest, InputDigest};
use crate::image::durable::{FileError, Named};

/// Most bytes of one extended attribute, and of the names of all of an inode's.
const MAX_XATTR: usize = 64 * 1024;
/// Attributes that describe this machine, not the tree.
const FOREIGN_XATTRS: [&str; 3] = ["security.selinux", "system.nfs4_acl", "trusted.overlay."];

/// Copies a directory as a layer, in the order of names, so that the same tree gives the same
/// layer. Returns the layer's name. Blocks its thread.
pub(super) fn import_dir(
    root: &Path,
    writer: &mut LayerWriter<'_>,
    stop: &CancellationToken,
) -> Result<Digest, ImageError> {
    let device = root.metadata().named("read", root)?.dev();
    let mut import = Import {
        root,
        device,
        first: BTreeMap::new(),
        digest: InputDigest::new("directory as a layer"),
        writer,
        stop,
    };
    import.dir(Path::new(""))?;
    Ok(import.digest.finish())
}

struct Import<'a, 'w> {
    root: &'a Path,
    /// What is mounted below the root is not part of it.
    device: u64,
    /// The first name of each file with several.
    first: BTreeMap<u64, Bytes>,
    digest: InputDigest,
    writer: &'a mut LayerWriter<'w>,
    stop: &'a CancellationToken,
}

impl Import<'_, '_> {
    fn dir(&mut self, name: &Path) -> Result<(), ImageError> {
        let path = self.path(name);
        let meta = path.symlink_metadata().named("read", &path)?;
        self.add(name, Content::Directory, &meta, None)?;
        if meta.dev() != self.device {
            return Ok(());
        }
        let entries = fs::read_dir(&path).named("read directory", &path)?;
        let names: io::Result<Vec<OsString>> =
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect();
        let mut names = names.named("read directory", &path)?;
        names.sort();
        for child in names {
            self.child(&name.join(child))?;
        }
        Ok(())
    }

    fn child(&mut self, name: &Path) -> Result<(), ImageError> {
        if self.stop.is_cancelled() {
            let given_up = io::Error::other("the build was given up");
            return Err(FileError::new("read", self.root, given_up).into());
        }
        let path = self.path(name);
        let meta = path.symlink_metadata().named("read", &path)?;
        let kind = meta.file_type();
        if kind.is_dir() {
            return self.dir(name);
        }
        // A socket is nothing without the process behind it.
        if kind.is_socket() {
            return Ok(());
        }
        if meta.nlink() > 1 {
            if let Some(first) = self.first.get(&meta.ino()) {
                let content = Content::HardLink(first.clone());
                return self.add(name, content, &meta, None);
            }
            self.first.insert(meta.ino(), bytes(name));
        }
        let device = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let content = if kind.is_symlink() {
            let target = fs::read_link(&path).named("read", &path)?;
            Content::Symlink(Bytes(target.into_os_string().into_vec()))
        } else if kind.is_char_device() {
            Content::CharDevice(device.0, device.1)
        } else if kind.is_block_device() {
            Content::BlockDevice(device.0, device.1)
        } else if kind.is_fifo() {
            Content::Fifo
        } else {
            let described = describe(&path, &meta)?;
            let mut file = File::open(&path).named("open", &path)?;
            let (content, digest) = self.writer.copy(&mut file, meta.len(), &described, &path)?;
            return self.add(name, content, &meta, Some(digest));
        };
        self.add(name, content, &meta, None)
    }

    fn add(
        &mut self,
        name: &Path,
        content: Content,
        meta: &Metadata,
        digest: Option<Digest>,
    ) -> Result<(), ImageError> {
        let path = self.path(name);
        let entry = Entry { path: bytes(name), content, meta: describe(&path, meta)? };
        let text = serde_json::to_vec(&entry).named("encode", &path)?;
        self.digest.add("entry", &text);
        if let Some(digest) = digest {
            self.digest.add("content", digest.to_string().as_bytes());
        }
        if self.writer.push(entry) > MAX_ENTRIES as usize {
            let problem = format!("it has more than {MAX_ENTRIES} files");
            return Err(unusable(&self.root.display().to_string(), problem).into());
        }
        Ok(())
    }

    fn path(&self, name: &Path) -> PathBuf {
        if name == Path::new("") { self.root.to_owned() } else { self.root.join(name) }
    }
}

fn bytes(name: &Path) -> Bytes {
    Bytes(name.as_os_str().as_bytes().to_vec())
}

fn describe(path: &Path, meta: &Metadata) -> Result<Meta, FileError> {
    Ok(Meta {
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime_s: meta.mtime(),
        mtime_ns: u32::try_from(meta.mtime_nsec()).unwrap_or(0),
        xattrs: xattrs(path).named("read the attributes of", path)?,
    })
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Bytes, Bytes>> {
    let mut buffer = vec![0; MAX_XATTR];
    let length = match llistxattr(path, buffer.as_mut_slice()) {
        Err(rustix::io::Errno::NOTSUP) => return Ok(BTreeMap::new()),
        length => length?,
    };
    let names: Vec<Vec<u8>> = buffer[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .filter(|name| !FOREIGN_XATTRS.iter().any(|foreign| name.starts_with(foreign.as_bytes())))
        .map(<[u8]>::to_vec)
        .collect();
    let mut found = BTreeMap::new();
    for name in names {
        let length = lgetxattr(path, name.as_slice(), buffer.as_mut_slice())?;
        found.insert(Bytes(name), Bytes(buffer[..length].to_vec()));
    }
    Ok(found)
}

/// The digest of a tar archive as it is without compression: its name as a layer.
pub(super) fn archive_digest(mut plain: impl Read, stop: &CancellationToken) -> io::Result<Digest> {
    let mut hasher = crate::image::digest::Hasher::default();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        if stop.is_cancelled() {
            return Err(io::Error::other("the build was given up"));
        }
        match plain.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&buffer[..read]),
        }
    }
}
