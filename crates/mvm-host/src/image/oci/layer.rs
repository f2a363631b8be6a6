//! Layers of images, each unpacked once: `layers/sha256-<diff id>/` of the state directory.
//!
//! ```text
//! index.json   the layer's entries in order, and when the layer was unpacked
//! data/<n>     the content of each file, with its owner, mode, times and attributes
//! durable      there once everything above is on the disk
//! ```
//!
//! A layer's name is the digest of its tar archive, which was verified while it was unpacked, so
//! pools, images and registries share it. A layer is a cache: it is not synced when it appears, and
//! one that was not synced before the machine went down is unpacked again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    CWD, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, fchmod, fchown, fsetxattr,
    futimens, openat,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::blob::{Blob, Bounded, Decompressed, Hashing, is_zero};
use super::entry::{Bytes, Content, Entry, Meta};
use super::error::{LayerProblem, OciError};
use super::limits::{MAX_ENTRIES, MAX_FILE_SIZE};
use super::registry::Downloads;
use super::tar::{Header, Kind, TarReader};
use crate::image::ImageError;
use crate::image::digest::{Digest, Hasher};
use crate::image::durable::{
    FileError, NameLock, Named, TempTree, abandoned, names, remove_dir, says_damage, write_new,
};
use crate::process::boot_id;
use crate::removal::detach_mounts_below;
use crate::state_dir::StateDir;

/// The version of the layout and of how entries are kept.
const SCHEMA: u32 = 1;
const INDEX: &str = "index.json";
const DATA: &str = "data";
const DURABLE: &str = "durable";
const PREFIX: &str = "sha256-";
const SCRATCH: &str = "scratch";
const COPY_BUFFER: usize = 128 * 1024;
/// The shortest run of zeroes that is worth a hole.
const HOLE: usize = 16 * 1024;

#[derive(Serialize, Deserialize)]
struct Index {
    schema: u32,
    /// The boot of the host during which the layer was unpacked.
    boot_id: String,
    entries: Vec<Entry>,
}

/// The unpacked layers of one state directory.
#[derive(Debug, Clone)]
pub struct LayerCache {
    dir: PathBuf,
}

/// An unpacked layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) entries: Vec<Entry>,
    /// The directory with the contents of files.
    pub(crate) data: PathBuf,
}

/// A layer as `image gc` sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredLayer {
    /// The digest of its tar archive.
    pub diff_id: Digest,
    /// Its directory.
    pub dir: PathBuf,
}

impl LayerCache {
    /// For this state directory; nothing is made yet.
    pub fn new(state: impl Into<StateDir>) -> Self {
        Self { dir: state.into().layers() }
    }

    /// Where layers are.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn layer_dir(&self, diff_id: &Digest) -> PathBuf {
        self.dir.join(format!("{PREFIX}{diff_id}"))
    }

    /// Whether a layer is unpacked.
    ///
    /// # Errors
    /// It cannot be told.
    pub(crate) fn has(&self, diff_id: &Digest) -> Result<bool, FileError> {
        Ok(self.open(diff_id)?.is_some())
    }

    /// An unpacked layer that can be relied on. One that is damaged is none: it is unpacked again.
    ///
    /// # Errors
    /// It cannot be read for a reason that says nothing about the layer.
    pub(crate) fn open(&self, diff_id: &Digest) -> Result<Option<Layer>, FileError> {
        let dir = self.layer_dir(diff_id);
        let (path, durable) = (dir.join(INDEX), dir.join(DURABLE));
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if says_damage(&error) => return Ok(None),
            Err(error) => return Err(FileError::new("read", &path, error)),
        };
        let Ok(index) = serde_json::from_slice::<Index>(&text) else { return Ok(None) };
        let is_sound = index.schema == SCHEMA
            && (durable.try_exists().named("look for", &durable)? || this_boot()? == index.boot_id);
        Ok(is_sound.then(|| Layer { entries: index.entries, data: dir.join(DATA) }))
    }

    /// The layers that are there, sound or not.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<StoredLayer>, ImageError> {
        let digest = |name: &String| name.strip_prefix(PREFIX)?.parse().ok();
        let mut layers: Vec<StoredLayer> = names(&self.dir)?
            .iter()
            .filter_map(digest)
            .map(|diff_id| StoredLayer { diff_id, dir: self.layer_dir(&diff_id) })
            .collect();
        layers.sort_by_key(|layer| layer.diff_id);
        Ok(layers)
    }

    /// Removes a layer; whoever needs it unpacks it again.
    ///
    /// # Errors
    /// It cannot be removed as a whole.
    pub fn remove(&self, diff_id: &Digest) -> Result<(), ImageError> {
        let _lock = NameLock::acquire(&self.dir, &format!("{PREFIX}{diff_id}"))?;
        Ok(remove_dir(&self.layer_dir(diff_id))?)
    }

    /// Detaches what tools of an earlier agent have mounted in the scratch directory: nobody else makes
    /// anything there. Returns the mount points. No build may run.
    pub(crate) fn detach_mounts(&self) -> Result<Vec<PathBuf>, ImageError> {
        let scratch = self.scratch();
        Ok(detach_mounts_below(&scratch).named("detach what is mounted below", &scratch)?)
    }

    /// What interrupted operations left behind. No build may run.
    pub(crate) fn leftovers(&self) -> Result<Vec<PathBuf>, ImageError> {
        let scratch = self.scratch();
        let mut found = abandoned(&self.dir)?;
        found.extend(names(&scratch)?.into_iter().map(|name| scratch.join(name)));
        Ok(found)
    }

    /// Downloads that are not unpacked, whole or not.
    pub(crate) fn downloads(&self) -> Result<Vec<PathBuf>, ImageError> {
        Downloads::new(&self.dir).list()
    }

    /// Unpacks a layer unless it is there, and checks its digests. Blocks its thread.
    ///
    /// # Errors
    /// The layer is not what its image promises, or is refused; nothing is left behind.
    pub(crate) fn unpack(
        &self,
        diff_id: &Digest,
        blob: &Blob,
        stop: &CancellationToken,
    ) -> Result<(), ImageError> {
        let name = format!("{PREFIX}{diff_id}");
        let lock = NameLock::acquire(&self.dir, &name)?;
        if self.has(diff_id)? {
            return Ok(());
        }
        let dest = self.layer_dir(diff_id);
        remove_dir(&dest)?;
        let temp = lock.temp_tree()?;
        let data = temp.path().join(DATA);
        fs::create_dir(&data).named("create directory", &data)?;
        write_index(&temp, unpack_blob(diff_id, blob, &data, stop)?)?;
        Ok(temp.rename(&dest)?)
    }

    /// Takes over what `fill` writes as a layer, under the name that it returns. Blocks its thread.
    ///
    /// # Errors
    /// Nothing is left behind.
    pub(crate) fn import(
        &self,
        fill: impl FnOnce(&mut LayerWriter<'_>) -> Result<Digest, ImageError>,
    ) -> Result<Digest, ImageError> {
        // The name is known at the end only, so the work goes on under one of its own.
        let own = format!("import-{}-{:?}", std::process::id(), std::thread::current().id());
        let temp = NameLock::acquire(&self.dir, &own)?.temp_tree()?;
        let data = temp.path().join(DATA);
        fs::create_dir(&data).named("create directory", &data)?;
        let mut writer = LayerWriter::new(&data)?;
        let diff_id = fill(&mut writer)?;
        let _lock = NameLock::acquire(&self.dir, &format!("{PREFIX}{diff_id}"))?;
        if !self.has(&diff_id)? {
            write_index(&temp, writer.entries)?;
            let dest = self.layer_dir(&diff_id);
            remove_dir(&dest)?;
            temp.rename(&dest)?;
        }
        Ok(diff_id)
    }

    /// A directory for files that are on their way into a layer.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.dir.join(SCRATCH)
    }

    /// Puts these layers on the disk, so that they are there after a loss of power. Blocks its
    /// thread; what fails only costs unpacking again.
    pub(crate) fn make_durable(&self, diff_ids: &[Digest]) {
        let dirs = diff_ids.iter().map(|diff_id| self.layer_dir(diff_id));
        let waiting: Vec<PathBuf> =
            dirs.filter(|dir| dir.exists() && !dir.join(DURABLE).exists()).collect();
        let synced = waiting.is_empty()
            || File::open(&self.dir).is_ok_and(|dir| rustix::fs::syncfs(&dir).is_ok());
        if synced {
            for dir in waiting {
                drop(File::create(dir.join(DURABLE)));
            }
        }
    }
}

fn this_boot() -> Result<String, FileError> {
    boot_id().named("read", Path::new("/proc/sys/kernel/random/boot_id"))
}

fn write_index(temp: &TempTree, entries: Vec<Entry>) -> Result<(), FileError> {
    let boot_id = this_boot()?;
    let path = temp.path().join(INDEX);
    let index = serde_json::to_vec(&Index { schema: SCHEMA, boot_id, entries });
    write_new(&path, &index.named("encode", &path)?, 0o600)
}

fn unpack_blob(
    diff_id: &Digest,
    blob: &Blob,
    data: &Path,
    stop: &CancellationToken,
) -> Result<Vec<Entry>, ImageError> {
    let bad = |problem: LayerProblem| {
        ImageError::from(OciError::Layer {
            layer: blob.digest.unwrap_or(*diff_id),
            path: blob.path.clone(),
            problem: Box::new(problem),
        })
    };
    let read = |error: io::Error| bad(LayerProblem::Tar(error.into()));
    let compressed = Hashing::new(Stoppable { inner: blob.reader(), stop });
    let plain = Decompressed::new(compressed).map_err(read)?;
    let mut tar = TarReader::new(Hashing::new(Bounded::new(plain, blob.length)));
    let unpacked = LayerWriter::new(data)?.run(&mut tar, &bad)?;
    let (found, plain) = tar.into_inner().finish().map_err(read)?;
    let compressed =
        plain.into_inner().into_inner().ok_or_else(|| read(io::ErrorKind::Other.into()))?;
    let (compressed_digest, _) = compressed.finish().map_err(read)?;
    if let Some(expected) = blob.digest.filter(|expected| *expected != compressed_digest) {
        return Err(bad(LayerProblem::WrongDigest { expected, found: compressed_digest }));
    }
    if found != *diff_id {
        return Err(bad(LayerProblem::WrongDiffId { expected: *diff_id, found }));
    }
    Ok(unpacked)
}

/// Ends a read when the build is given up: a thread cannot be ended from outside.
struct Stoppable<'a, R> {
    inner: R,
    stop: &'a CancellationToken,
}

impl<R: Read> Read for Stoppable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(io::Error::other("the build was given up"));
        }
        self.inner.read(buffer)
    }
}

/// Writes a layer's files and collects its entries.
pub(crate) struct LayerWriter<'a> {
    dir: OwnedFd,
    path: &'a Path,
    entries: Vec<Entry>,
    files: u32,
    buffer: Vec<u8>,
}

impl<'a> LayerWriter<'a> {
    fn new(path: &'a Path) -> Result<Self, FileError> {
        let dir = openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let dir = dir.named("open", path)?;
        let buffer = vec![0; COPY_BUFFER];
        Ok(Self { dir, path, entries: Vec::new(), files: 0, buffer })
    }

    fn run<R: Read>(
        mut self,
        tar: &mut TarReader<R>,
        bad: &dyn Fn(LayerProblem) -> ImageError,
    ) -> Result<Vec<Entry>, ImageError> {
        while let Some(header) = tar.next().map_err(|error| bad(error.into()))? {
            if self.entries.len() >= MAX_ENTRIES as usize {
                return Err(bad(LayerProblem::TooManyEntries { most: MAX_ENTRIES }));
            }
            if header.size > MAX_FILE_SIZE {
                return Err(bad(LayerProblem::FileTooLarge { entry: header.name() }));
            }
            let content = match header.kind {
                Kind::Directory => Content::Directory,
                Kind::Symlink => Content::Symlink(Bytes(header.link.clone())),
                Kind::HardLink => Content::HardLink(Bytes(header.link.clone())),
                Kind::CharDevice => Content::CharDevice(header.device.0, header.device.1),
                Kind::BlockDevice => Content::BlockDevice(header.device.0, header.device.1),
                Kind::Fifo => Content::Fifo,
                Kind::File => self.file(&header, tar, bad)?,
            };
            let meta = meta_of(&header);
            self.entries.push(Entry { path: Bytes(header.path), content, meta });
        }
        Ok(self.entries)
    }

    /// Adds an entry, and returns how many there are.
    pub(crate) fn push(&mut self, entry: Entry) -> usize {
        self.entries.push(entry);
        self.entries.len()
    }

    /// A new data file with its number.
    fn create(&mut self) -> Result<(u32, File, PathBuf), FileError> {
        let number = self.files;
        self.files += 1;
        let name = number.to_string();
        let path = self.path.join(&name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&self.dir, name.as_str(), flags, Mode::RUSR | Mode::WUSR);
        Ok((number, File::from(file.named("create", &path)?), path))
    }

    /// Copies a file of this machine, and returns its content's digest with it.
    pub(crate) fn copy(
        &mut self,
        source: &mut File,
        size: u64,
        meta: &Meta,
        source_path: &Path,
    ) -> Result<(Content, Digest), ImageError> {
        let (number, mut file, path) = self.create()?;
        let mut hasher = Hasher::default();
        let mut left = size;
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let read = source.read(&mut self.buffer[..wanted]).named("read", source_path)?;
            if read == 0 {
                let changed = io::Error::other("it became shorter during the build");
                return Err(FileError::new("read", source_path, changed).into());
            }
            left -= read as u64;
            hasher.update(&self.buffer[..read]);
            write_sparsely(&mut file, &self.buffer[..read]).named("write", &path)?;
        }
        file.set_len(size).named("write", &path)?;
        apply_meta(&file, meta).named("set the attributes of", &path)?;
        Ok((Content::File { data: number, size }, hasher.finish()))
    }

    fn file<R: Read>(
        &mut self,
        header: &Header,
        tar: &mut TarReader<R>,
        bad: &dyn Fn(LayerProblem) -> ImageError,
    ) -> Result<Content, ImageError> {
        let (number, mut file, path) = self.create()?;
        let whole = [(0, header.size)];
        let mut end = 0;
        for (offset, length) in header.parts.as_deref().unwrap_or(&whole) {
            if *offset != end {
                file.seek(SeekFrom::Start(*offset)).named("write", &path)?;
            }
            end = offset + length;
            let mut left = *length;
            while left > 0 {
                let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
                // To the brim: decoders give little at a time, in which no hole would be seen.
                let mut filled = 0;
                while filled < wanted {
                    let read = tar.read_content(&mut self.buffer[filled..wanted]);
                    let read = read.map_err(|e| bad(LayerProblem::Tar(e.into())))?;
                    if read == 0 {
                        let early = io::Error::from(io::ErrorKind::UnexpectedEof);
                        return Err(bad(LayerProblem::Tar(early.into())));
                    }
                    filled += read;
                }
                left -= wanted as u64;
                write_sparsely(&mut file, &self.buffer[..wanted]).named("write", &path)?;
            }
        }
        file.set_len(header.size).named("write", &path)?;
        apply_meta(&file, &meta_of(header)).named("set the attributes of", &path)?;
        Ok(Content::File { data: number, size: header.size })
    }
}

/// Long runs of zeroes become holes; who writes the last piece sets the length.
pub(crate) fn write_sparsely(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    // What is between two holes is written at once.
    let mut start = 0;
    let mut at = 0;
    for piece in bytes.chunks(HOLE) {
        if piece.len() == HOLE && is_zero(piece) {
            file.write_all(&bytes[start..at])?;
            file.seek(SeekFrom::Current(HOLE as i64))?;
            start = at + HOLE;
        }
        at += piece.len();
    }
    file.write_all(&bytes[start..])
}

fn meta_of(header: &Header) -> Meta {
    let bytes = |(name, value): (&Vec<u8>, &Vec<u8>)| (Bytes(name.clone()), Bytes(value.clone()));
    Meta {
        mode: header.mode,
        uid: header.uid,
        gid: header.gid,
        mtime_s: header.mtime_s,
        mtime_ns: header.mtime_ns,
        xattrs: header.xattrs.iter().map(bytes).collect::<BTreeMap<_, _>>(),
    }
}

/// Sets everything that an inode has beside its content. The owner comes first, as changing it
/// takes setuid bits and capabilities away.
pub(crate) fn apply_meta(file: &File, meta: &Meta) -> io::Result<()> {
    fchown(file, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))?;
    fchmod(file, Mode::from_raw_mode(meta.mode))?;
    for (name, value) in &meta.xattrs {
        fsetxattr(file, name.0.as_slice(), &value.0, XattrFlags::empty())?;
    }
    Ok(futimens(file, &times(meta))?)
}

/// The times of an inode, for the system call.
pub(crate) fn times(meta: &Meta) -> Timestamps {
    let time = Timespec { tv_sec: meta.mtime_s, tv_nsec: meta.mtime_ns.into() };
    Timestamps { last_access: time, last_modification: time }
}
