//! The private writable layer of each instance: a sparse ext4 image that the guest mounts as the
//! upper side of its overlay root.
//!
//! A template per size is made once with `mke2fs`; a layer is a copy of the template's few
//! non-zero blocks, or a reflink where the filesystem can. That is about 150 KiB and a few
//! milliseconds whatever the layer's size.
//!
//! Choices that the numbers rest on:
//!
//! * There is a journal, of the smallest size that ext4 has (1,024 blocks, 4 MiB): a microVM that
//!   is killed must find its files on the next start, and nobody runs `fsck` in it. Its blocks are
//!   holes until the guest writes to them; in a new layer the journal costs one block.
//! * The inode tables count as zeroed, so that the guest's kernel does not write zeroes over all of
//!   them in the background, which would fill the holes.
//! * The features are listed one by one, so that any kernel since 4.5 mounts it, whatever this
//!   host's `mke2fs.conf` says.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags, SeekFrom, linkat};

use super::ImageError;
use super::durable::{FileError, NameLock, Named, TempTree, remove_abandoned};
use crate::process::Tool;
use crate::state_dir::StateDir;

/// The smallest layer in MiB: a journal and some room.
pub const MIN_MIB: u64 = 16;
/// The largest layer in MiB, 16 TiB: the largest file of an ext4 host.
pub const MAX_MIB: u64 = 16 * 1024 * 1024 - 1;
/// Part of the template's name: raised when the way it is made changes.
const TEMPLATE_VERSION: u32 = 1;
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,\
                        sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
const BLOCK: usize = 4096;
const MIB: u64 = 1024 * 1024;

/// The templates of one state directory.
#[derive(Debug, Clone)]
pub struct LayerTemplates {
    dir: PathBuf,
}

impl LayerTemplates {
    /// For this state directory; nothing is made yet.
    pub fn new(state: impl Into<StateDir>) -> Self {
        Self { dir: state.into().templates() }
    }

    /// The template for layers of this size, made if it is not there.
    ///
    /// # Errors
    /// The size is not possible, `mke2fs` is missing or fails, or there is no space.
    pub async fn ensure(&self, size_mib: u64) -> Result<PathBuf, ImageError> {
        if !(MIN_MIB..=MAX_MIB).contains(&size_mib) {
            return Err(ImageError::LayerSize { size_mib, min: MIN_MIB, max: MAX_MIB });
        }
        let name = format!("layer-v{TEMPLATE_VERSION}-{size_mib}MiB.ext4");
        let path = self.dir.join(&name);
        if path.exists() {
            return Ok(path);
        }
        let lock = NameLock::wait(&self.dir, &name).await?;
        if !path.exists() {
            let temp = lock.temp_tree()?;
            self.make(size_mib, &path, temp).await.map_err(|error| error.at(&self.dir))?;
        }
        Ok(path)
    }

    /// Removes what interrupted operations left behind; running ones are left alone. Returns how
    /// many directories were removed.
    ///
    /// # Errors
    /// A directory cannot be read or removed.
    pub fn gc_temp(&self) -> Result<usize, ImageError> {
        Ok(remove_abandoned(&self.dir)?)
    }

    async fn make(&self, size_mib: u64, path: &Path, temp: TempTree) -> Result<(), ImageError> {
        let raw = temp.path().join("raw");
        let inodes = inode_count(size_mib).to_string();
        Tool::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-J", "size=4"])
            .args(["-O", FEATURES, "-N", &inodes, "-E"])
            // Not lazy: on a file, zeroed inode tables are holes or unwritten extents.
            .arg("lazy_itable_init=0,lazy_journal_init=1,nodiscard,packed_meta_blocks=1")
            .arg(&raw)
            .arg(format!("{size_mib}M"))
            .run()
            .await?;
        let path = path.to_owned();
        let copied = tokio::task::spawn_blocking(move || {
            let source = File::open(&raw).named("open", &raw)?;
            let result = copy_into_place(&source, &path, 0o644, None, Copy::Blocks);
            drop(temp);
            result
        });
        copied.await.map_err(io::Error::other).named("write", &self.dir)?
    }
}

/// One inode per 64 KiB, but at least the 65,536 that a tree of small files needs, if they take at
/// most an eighth of the space.
fn inode_count(size_mib: u64) -> u64 {
    let bytes = size_mib * MIB;
    (bytes / (64 * 1024)).max((bytes / (16 * 1024)).min(65_536))
}

/// How a layer is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copy {
    /// Shares the blocks where the filesystem can.
    ReflinkOrBlocks,
    /// Copies the blocks that are not zero.
    Blocks,
}

/// Makes an instance's layer from a template: mode 0600, owned by the VMM's user. It is durable
/// and complete when it appears at `dest`. Blocks its thread for some milliseconds.
///
/// # Errors
/// [`ImageError::LayerExists`] if `dest` is there, which then is untouched; otherwise nothing is
/// left behind.
pub fn create_layer(template: &Path, dest: &Path, uid: u32) -> Result<(), ImageError> {
    let source = File::open(template).named("open", template)?;
    copy_into_place(&source, dest, 0o600, Some(uid), Copy::ReflinkOrBlocks)
}

fn copy_into_place(
    source: &File,
    dest: &Path,
    mode: u32,
    uid: Option<u32>,
    how: Copy,
) -> Result<(), ImageError> {
    let dir = dest.parent().unwrap_or(Path::new("."));
    let write = |file: &File| fill(source, file, mode, uid, how).named("write", dest);
    let mut options = OpenOptions::new();
    options.write(true).mode(mode).custom_flags(OFlags::TMPFILE.bits() as i32);
    let placed = match options.open(dir) {
        // A file without a name leaves nothing behind, however this process ends.
        Ok(file) => {
            write(&file)?;
            let by_fd = format!("/proc/self/fd/{}", file.as_raw_fd());
            linkat(CWD, by_fd, CWD, dest, AtFlags::SYMLINK_FOLLOW).map_err(io::Error::from)
        }
        // Not every filesystem has them.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
            let file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(dir);
            let file = file.named("create a file in", dir)?;
            write(file.as_file())?;
            file.persist_noclobber(dest).map(drop).map_err(|error| error.error)
        }
        Err(error) => return Err(FileError::new("create a file in", dir, error).into()),
    };
    match placed {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(ImageError::LayerExists { path: dest.to_owned() });
        }
        placed => placed.named("create", dest)?,
    }
    Ok(File::open(dir).and_then(|dir| dir.sync_all()).named("sync", dir)?)
}

fn fill(source: &File, dest: &File, mode: u32, uid: Option<u32>, how: Copy) -> io::Result<()> {
    if how == Copy::Blocks || rustix::fs::ioctl_ficlone(dest, source).is_err() {
        dest.set_len(source.metadata()?.len())?;
        copy_data(source, dest)?;
    }
    // The mode that the file was created with is subject to the umask.
    dest.set_permissions(Permissions::from_mode(mode))?;
    if let Some(uid) = uid {
        fchown(dest, Some(uid), Some(uid))?;
    }
    dest.sync_all()
}

/// Copies the blocks that are not zero.
fn copy_data(source: &File, dest: &File) -> io::Result<()> {
    let mut buffer = vec![0; 64 * BLOCK];
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // There is no data behind this offset.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let wanted = (end - at).min(buffer.len() as u64) as usize;
            let chunk = &mut buffer[..wanted];
            source.read_exact_at(chunk, at)?;
            for (index, block) in chunk.chunks(BLOCK).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    dest.write_all_at(block, at + (index * BLOCK) as u64)?;
                }
            }
            at += wanted as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn sparse(dir: &Path, size: u64, data: &[(u64, &[u8])]) -> PathBuf {
        let path = dir.join("template");
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        for (at, bytes) in data {
            file.write_all_at(bytes, *at).unwrap();
        }
        path
    }

    #[test]
    fn a_copy_has_the_content_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let data: [(u64, &[u8]); 3] =
            [(0, b"start"), (3 * MIB, &[0; 100_000]), (9 * MIB - 3, b"end")];
        let template = sparse(dir.path(), 9 * MIB, &data);
        let dest = dir.path().join("layer");
        copy_into_place(&File::open(&template).unwrap(), &dest, 0o600, None, Copy::Blocks).unwrap();
        assert_eq!(fs::read(&dest).unwrap(), fs::read(&template).unwrap());
        let meta = dest.metadata().unwrap();
        assert!(meta.blocks() * 512 <= 4 * BLOCK as u64, "{} bytes allocated", meta.blocks() * 512);
        assert_eq!(meta.mode() & 0o7777, 0o600);
    }

    #[test]
    fn an_existing_layer_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let template = sparse(dir.path(), MIB, &[(0, b"new")]);
        let dest = dir.path().join("layer");
        fs::write(&dest, "precious").unwrap();
        let uid = rustix::process::geteuid().as_raw();
        let error = create_layer(&template, &dest, uid).unwrap_err();
        assert!(matches!(error, ImageError::LayerExists { .. }), "{error}");
        assert_eq!(fs::read(&dest).unwrap(), b"precious");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file stays");
    }

    #[test]
    fn small_layers_do_not_drown_in_inodes() {
        assert_eq!(inode_count(64), 4096);
        assert_eq!(inode_count(1024), 65_536);
        assert_eq!(inode_count(10 * 1024), 163_840);
    }
}
