//! Writes a merged tree as a directory, without copying a byte: files are hard links to the
//! contents in the layer cache.
//!
//! A file of the cache is never changed; everything that the tree has of its own (directories,
//! links, devices) is made anew. Two inodes of the image stay two, also if one cached file holds
//! the content of both: the second is a copy.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Uid, XattrFlags, chmodat, chownat, lsetxattr, makedev,
    mknodat, symlinkat, utimensat,
};
use tokio_util::sync::CancellationToken;

use super::entry::{Content, Meta};
use super::layer::{Layer, apply_meta, times};
use super::tree::{Dir, Item, Tree};
use crate::image::durable::{FileError, Named};

struct Writer<'a> {
    tree: &'a Tree,
    layers: &'a [Layer],
    /// Where each inode was written first.
    written: Vec<Option<PathBuf>>,
    /// Cached files that an inode of this tree is already linked to.
    linked: BTreeSet<PathBuf>,
    stop: &'a CancellationToken,
}

/// Writes the tree into an empty directory. Blocks its thread.
pub(crate) fn materialise(
    tree: &Tree,
    layers: &[Layer],
    dest: &Path,
    stop: &CancellationToken,
) -> Result<(), FileError> {
    let written = vec![None; tree.inodes.len()];
    let mut writer = Writer { tree, layers, written, linked: BTreeSet::new(), stop };
    writer.dir(&tree.root, dest)
}

impl Writer<'_> {
    fn dir(&mut self, dir: &Dir, path: &Path) -> Result<(), FileError> {
        if self.stop.is_cancelled() {
            return Err(FileError::new("write", path, io::Error::other("the build was given up")));
        }
        for (name, node) in &dir.children {
            let path = path.join(OsStr::from_bytes(name));
            match &node.item {
                Item::Dir(dir) => {
                    fs::create_dir(&path).named("create directory", &path)?;
                    self.dir(dir, &path)?;
                }
                Item::Inode(inode) => self.inode(*inode, path)?,
            }
        }
        // Last, as each child changes the time.
        set_meta(path, &dir.meta, AtFlags::empty()).named("set the attributes of", path)
    }

    fn inode(&mut self, number: usize, path: PathBuf) -> Result<(), FileError> {
        if let Some(first) = &self.written[number] {
            return fs::hard_link(first, &path).named("link", &path);
        }
        let inode = &self.tree.inodes[number];
        let special = |kind, device| {
            mknodat(CWD, &path, kind, Mode::RUSR | Mode::WUSR, device)?;
            set_meta(&path, &inode.meta, AtFlags::SYMLINK_NOFOLLOW)
        };
        match &inode.content {
            Content::File { data, .. } => {
                let source = self.layers[inode.layer].data.join(data.to_string());
                self.link_or_copy(source, &path, &inode.meta)
            }
            Content::Symlink(target) => symlinkat(target.0.as_slice(), CWD, &path)
                .map_err(io::Error::from)
                .and_then(|()| set_meta(&path, &inode.meta, AtFlags::SYMLINK_NOFOLLOW)),
            Content::CharDevice(major, minor) => {
                special(FileType::CharacterDevice, makedev(*major, *minor))
            }
            Content::BlockDevice(major, minor) => {
                special(FileType::BlockDevice, makedev(*major, *minor))
            }
            Content::Fifo => special(FileType::Fifo, 0),
            // Never an inode's content: the merge resolves them.
            Content::Directory | Content::HardLink(_) => Err(io::ErrorKind::InvalidData.into()),
        }
        .named("create", &path)?;
        self.written[number] = Some(path);
        Ok(())
    }

    fn link_or_copy(&mut self, source: PathBuf, path: &Path, meta: &Meta) -> io::Result<()> {
        if !self.linked.contains(&source) {
            match fs::hard_link(&source, path) {
                Ok(()) => {
                    self.linked.insert(source);
                    return Ok(());
                }
                // Another filesystem, or more images share the file than it can have links.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EXDEV | libc::EMLINK)) => {}
                Err(error) => return Err(error),
            }
        }
        fs::copy(&source, path)?;
        // Whoever owns it in the end, root may write it now.
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        apply_meta(&File::options().write(true).open(path)?, meta)
    }
}

/// Sets everything that a name's inode has, without opening it: devices and pipes are not opened.
fn set_meta(path: &Path, meta: &Meta, flags: AtFlags) -> io::Result<()> {
    let (owner, group) = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
    chownat(CWD, path, owner, group, AtFlags::SYMLINK_NOFOLLOW)?;
    let is_link = flags.contains(AtFlags::SYMLINK_NOFOLLOW)
        && path.symlink_metadata()?.file_type().is_symlink();
    if !is_link {
        chmodat(CWD, path, Mode::from_raw_mode(meta.mode), AtFlags::empty())?;
    }
    for (name, value) in &meta.xattrs {
        lsetxattr(path, name.0.as_slice(), &value.0, XattrFlags::empty())?;
    }
    Ok(utimensat(CWD, path, &times(meta), AtFlags::SYMLINK_NOFOLLOW)?)
}
