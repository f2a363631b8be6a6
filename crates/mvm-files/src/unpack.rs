//! From a stream to files.
//!
//! The directories from the target to the entry at hand are held open, each opened by its own name
//! in its parent: nothing in the stream is ever resolved as a path. What is there is always the old
//! or the new file, whole: a file gets its name once it is complete, and one that is to be replaced
//! is replaced by a rename. Until then it has no name at all where the filesystem can do that, so
//! that nothing is left of a copy that is killed.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT, Uid,
    openat,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use crate::place::{Place, Root};
use crate::times::{MTIME, Time};
use crate::writer::{Broken, fill};
use crate::{FilesError, Summary, Target};

/// Directories within each other: each is an open descriptor.
const MAX_DEPTH: usize = 200;

/// Whether symbolic links that lie in the way are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// They are: what comes is trusted, as by a guest that its host copies to.
    Follow,
    /// They are not: what comes may be hostile.
    Refuse,
}

/// Whose the files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// Of whoever unpacks; rights that belong to an owner (set-user-id) are left out.
    Own,
    /// Of the user and group ids in the stream.
    Kept,
}

/// How to unpack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Symbolic links in the way.
    pub links: Links,
    /// Owners.
    pub owners: Owners,
}

/// Makes what a stream holds at a target, and reads the stream to its end.
///
/// # Errors
/// The target is not fit, the stream is broken or leads out of the target, or a file cannot be
/// made. What was made before stays.
pub fn unpack(stream: impl Read, target: &Target, options: Options) -> Result<Summary, FilesError> {
    let mut archive = Archive::new(stream);
    let mut unpacker: Option<Unpacker> = None;
    for entry in archive.entries().map_err(FilesError::Stream)? {
        let mut entry = entry.map_err(broken)?;
        if matches!(entry.header().entry_type(), EntryType::XGlobalHeader) {
            continue;
        }
        let unpacker = match &mut unpacker {
            Some(unpacker) => unpacker,
            None => {
                let place = target.place(entry.header().entry_type().is_dir())?;
                unpacker.insert(Unpacker::new(place, options)?)
            }
        };
        unpacker.add(&mut entry)?;
    }
    // Whoever writes wants to write its end, too.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(FilesError::Stream)?;
    match unpacker {
        Some(unpacker) => unpacker.finish(),
        None if matches!(target, Target::Into(_)) => target.place(true).map(|_| Summary::default()),
        None => Err(FilesError::Archive { problem: "it is empty".to_owned() }),
    }
}

/// A failure of reading the next header: the stream ended within, or is none.
fn broken(error: io::Error) -> FilesError {
    match error.kind() {
        io::ErrorKind::Other | io::ErrorKind::InvalidData => {
            FilesError::Archive { problem: error.to_string() }
        }
        _ => FilesError::Stream(error),
    }
}

/// What is said of an entry besides its content.
#[derive(Debug, Clone, Copy)]
struct Meta {
    mode: Mode,
    mtime: Time,
    owner: Option<(Uid, Gid)>,
}

/// An open directory.
struct Level {
    name: CString,
    dir: OwnedFd,
    /// Set when everything in it is made, which would change it.
    meta: Option<Meta>,
}

struct Unpacker {
    options: Options,
    root_path: PathBuf,
    root: OwnedFd,
    root_meta: Option<Meta>,
    names: Root,
    levels: Vec<Level>,
    summary: Summary,
    buffer: Vec<u8>,
    made: u64,
}

impl Unpacker {
    fn new(place: Place, options: Options) -> Result<Self, FilesError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, &place.dir, flags, Mode::empty())
            .map_err(FilesError::at("open", &place.dir))?;
        Ok(Self {
            options,
            root_path: place.dir,
            root,
            root_meta: None,
            names: place.root,
            levels: Vec::new(),
            summary: Summary::default(),
            buffer: Vec::new(),
            made: 0,
        })
    }

    fn add(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<(), FilesError> {
        let name = entry.path_bytes().into_owned();
        let mut parts = self.parts(&name)?;
        let meta = self.meta(entry)?;
        let kind = entry.header().entry_type();
        let Some(last) = parts.pop() else {
            // The target itself.
            return match kind.is_dir() {
                true => {
                    self.summary.entries += 1;
                    self.root_meta = matches!(self.names, Root::Dropped).then_some(meta);
                    Ok(())
                }
                false => Err(FilesError::Escape { name: lossy(&name) }),
            };
        };
        self.enter(&parts)?;
        match kind {
            EntryType::Directory => {
                self.descend(last)?;
                if let Some(level) = self.levels.last_mut() {
                    level.meta = Some(meta);
                }
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.add_file(entry, &last, meta)?;
            }
            EntryType::Symlink => self.add_symlink(entry, &last, meta)?,
            EntryType::Link => self.add_link(entry, &last, &parts)?,
            _ => {
                self.summary.skip(lossy(&name));
                return Ok(());
            }
        }
        self.summary.entries += 1;
        Ok(())
    }

    /// The parts of a name below the target.
    fn parts(&self, name: &[u8]) -> Result<Vec<CString>, FilesError> {
        let escape = || FilesError::Escape { name: lossy(name) };
        let mut parts = Vec::new();
        for part in Path::new(OsStr::from_bytes(name)).components() {
            match part {
                Component::Normal(part) => {
                    parts.push(CString::new(part.as_bytes()).map_err(|_| escape())?);
                }
                Component::CurDir => {}
                Component::RootDir | Component::ParentDir | Component::Prefix(_) => {
                    return Err(escape());
                }
            }
        }
        let own = |root: &OsStr| CString::new(root.as_bytes()).map_err(|_| escape());
        match &self.names {
            Root::Kept | Root::Dropped => {}
            Root::Under(root) => parts.insert(0, own(root)?),
            Root::Named(root) => match parts.first_mut() {
                Some(first) => *first = own(root)?,
                None => return Err(escape()),
            },
        }
        if parts.len() > MAX_DEPTH {
            let problem = format!("`{}` is deeper than {MAX_DEPTH} directories", lossy(name));
            return Err(FilesError::Archive { problem });
        }
        Ok(parts)
    }

    fn meta(&self, entry: &mut Entry<'_, impl Read>) -> Result<Meta, FilesError> {
        let mtime = mtime(entry)?;
        let header = entry.header();
        let bad = |error: io::Error| FilesError::Archive { problem: error.to_string() };
        let is_kept = self.options.owners == Owners::Kept;
        let rights = header.mode().map_err(bad)? & if is_kept { 0o7777 } else { 0o1777 };
        let id = |id: io::Result<u64>| -> Result<u32, FilesError> {
            u32::try_from(id.map_err(bad)?)
                .map_err(|_| FilesError::Archive { problem: "an owner's id is no id".to_owned() })
        };
        let owner = match is_kept {
            true => Some((Uid::from_raw(id(header.uid())?), Gid::from_raw(id(header.gid())?))),
            false => None,
        };
        Ok(Meta { mode: Mode::from_raw_mode(rights), mtime, owner })
    }

    /// Goes to a directory below the target, leaving others and making what is missing.
    fn enter(&mut self, parts: &[CString]) -> Result<(), FilesError> {
        let common = self.levels.iter().zip(parts).take_while(|(l, part)| l.name == **part).count();
        while self.levels.len() > common {
            self.leave()?;
        }
        for part in &parts[common..] {
            self.descend(part.clone())?;
        }
        Ok(())
    }

    /// Opens, and if need be makes, a directory in the one at hand.
    fn descend(&mut self, name: CString) -> Result<(), FilesError> {
        // The directory may be the one at hand's child that was made last.
        let here = self.here();
        let mut flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if self.options.links == Links::Refuse {
            flags |= OFlags::NOFOLLOW;
        }
        let dir = match openat(here, &name, flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                let failed = self.failed("make directory", &name);
                match rustix::fs::mkdirat(here, &name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(failed(error)),
                }
                openat(here, &name, flags, Mode::empty())
            }
            opened => opened,
        };
        let dir = dir.map_err(self.failed("enter directory", &name))?;
        self.levels.push(Level { name, dir, meta: None });
        Ok(())
    }

    /// Leaves the directory at hand.
    fn leave(&mut self) -> Result<(), FilesError> {
        let Some(level) = self.levels.pop() else { return Ok(()) };
        if let Some(meta) = level.meta {
            let failed = self.failed("set the rights of", &level.name);
            meta.apply(level.dir.as_fd()).map_err(failed)?;
        }
        Ok(())
    }

    fn add_file(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        name: &CString,
        meta: Meta,
    ) -> Result<(), FilesError> {
        let temporary = self.temporary();
        let through = self.through_link(name)?;
        let (here, own) = match &through {
            Some((dir, own)) => (dir.as_fd(), own),
            None => (self.here(), name),
        };
        let made = Unfinished::make(here, &temporary).map_err(self.failed("make", name))?;
        let Unfinished { mut file, is_named } = made;
        let mut buffer = std::mem::take(&mut self.buffer);
        let filled = fill(&mut file, entry, &mut buffer);
        self.buffer = buffer;
        let made = match filled {
            Ok(len) if len != entry.size() => {
                Err(FilesError::Stream(io::ErrorKind::UnexpectedEof.into()))
            }
            Ok(len) => {
                self.summary.bytes += len;
                meta.apply(file.as_fd()).map_err(self.failed("set the rights of", name))
            }
            Err(Broken::Source(error)) => Err(FilesError::Stream(error)),
            Err(Broken::File(error)) => Err(self.failed::<io::Error>("write", name)(error)),
        };
        let here = through.as_ref().map_or(self.here(), |(dir, _)| dir.as_fd());
        if is_named {
            return self.settle(here, &temporary, own, made);
        }
        made?;
        match link_open_file(&file, here, own) {
            Err(Errno::EXIST) => {
                let made = link_open_file(&file, here, &temporary);
                self.settle(here, &temporary, own, made.map_err(self.failed("replace", name)))
            }
            linked => linked.map_err(self.failed("make", name)),
        }
    }

    /// Where a file goes whose name is a link's: what the link leads to is written, as `cp` does.
    /// Only a link is followed that whoever copies has named, or in a target that is trusted.
    fn through_link(&self, name: &CString) -> Result<Option<(OwnedFd, CString)>, FilesError> {
        let is_named = self.levels.is_empty() && matches!(self.names, Root::Named(_));
        let here = self.here();
        let found = rustix::fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW);
        let is_link = found.is_ok_and(|found| FileType::from_raw_mode(found.st_mode).is_symlink());
        if !is_link || (self.options.links == Links::Refuse && !is_named) {
            return Ok(None);
        }
        let action = "write through the link";
        // The kernel follows it, by its own rules, and says where to.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let file = openat(here, name, flags, Mode::empty()).map_err(self.failed(action, name))?;
        let shown = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = std::fs::read_link(shown).map_err(self.failed(action, name))?;
        let (Some(dir), Some(own)) = (path.parent(), path.file_name()) else {
            return Err(self.failed(action, name)(Errno::ISDIR));
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(CWD, dir, flags, Mode::empty()).map_err(self.failed(action, name))?;
        let own = CString::new(own.as_bytes());
        let own = own.map_err(|_| self.failed(action, name)(Errno::INVAL))?;
        Ok(Some((dir, own)))
    }

    fn add_symlink(
        &mut self,
        entry: &Entry<'_, impl Read>,
        name: &CString,
        meta: Meta,
    ) -> Result<(), FilesError> {
        let target = link_target(entry)?;
        let temporary = self.temporary();
        let here = self.here();
        let made = rustix::fs::symlinkat(&target, here, &temporary)
            .and_then(|()| match meta.owner {
                Some((uid, gid)) => rustix::fs::chownat(
                    here,
                    &temporary,
                    Some(uid),
                    Some(gid),
                    AtFlags::SYMLINK_NOFOLLOW,
                ),
                None => Ok(()),
            })
            .and_then(|()| {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(here, &temporary, &times(meta.mtime), flags)
            })
            .map_err(self.failed("make the link", name));
        self.settle(self.here(), &temporary, name, made)
    }

    /// A second name of a file that came before.
    fn add_link(
        &mut self,
        entry: &Entry<'_, impl Read>,
        name: &CString,
        parents: &[CString],
    ) -> Result<(), FilesError> {
        let target = link_target(entry)?;
        let mut parts = self.parts(target.to_bytes())?;
        let escape = || FilesError::Escape { name: lossy(target.to_bytes()) };
        let first = parts.pop().ok_or_else(escape)?;
        // By way of the target's directory, which is held while the entry's is entered again.
        self.enter(&parts)?;
        let from = self.here().try_clone_to_owned().map_err(self.failed("open", &first))?;
        self.enter(parents)?;
        let temporary = self.temporary();
        let made = rustix::fs::linkat(&from, &first, self.here(), &temporary, AtFlags::empty())
            .map_err(self.failed("make the link", name));
        self.settle(self.here(), &temporary, name, made)
    }

    /// Gives what was made its name, or removes it.
    fn settle(
        &self,
        here: BorrowedFd<'_>,
        temporary: &CString,
        name: &CString,
        made: Result<(), FilesError>,
    ) -> Result<(), FilesError> {
        let settled = made.and_then(|()| {
            rustix::fs::renameat_with(here, temporary, here, name, RenameFlags::empty())
                .map_err(self.failed("replace", name))
        });
        // A rename between two names of one file leaves both; after any other there is none.
        let _ = rustix::fs::unlinkat(here, temporary, AtFlags::empty());
        settled
    }

    fn finish(mut self) -> Result<Summary, FilesError> {
        while !self.levels.is_empty() {
            self.leave()?;
        }
        if let Some(meta) = self.root_meta {
            let failed = FilesError::at("set the rights of", &self.root_path);
            meta.apply(self.root.as_fd()).map_err(failed)?;
        }
        Ok(self.summary)
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.levels.last().map_or(self.root.as_fd(), |level| level.dir.as_fd())
    }

    /// A name that nobody else uses.
    fn temporary(&mut self) -> CString {
        self.made += 1;
        let name = format!(".mvm-cp-{}-{}", std::process::id(), self.made);
        CString::new(name).unwrap_or_default()
    }

    fn failed<E: Into<io::Error>>(
        &self,
        action: &'static str,
        name: &CString,
    ) -> impl FnOnce(E) -> FilesError + use<E> {
        let mut path = self.root_path.clone();
        path.extend(self.levels.iter().map(|level| OsStr::from_bytes(level.name.to_bytes())));
        path.push(OsStr::from_bytes(name.to_bytes()));
        FilesError::at(action, &path)
    }
}

/// A file that is being written.
struct Unfinished {
    file: File,
    /// Whether it can be found, under its temporary name.
    is_named: bool,
}

impl Unfinished {
    fn make(here: BorrowedFd<'_>, temporary: &CString) -> rustix::io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let private = Mode::from_raw_mode(0o600);
        // Not every filesystem has files without a name.
        if let Ok(file) = openat(here, c".", flags | OFlags::TMPFILE, private) {
            return Ok(Self { file: File::from(file), is_named: false });
        }
        let file = openat(here, temporary, flags | OFlags::CREATE | OFlags::EXCL, private)?;
        Ok(Self { file: File::from(file), is_named: true })
    }
}

/// Gives a file without a name one, unless something has that name.
fn link_open_file(file: &File, here: BorrowedFd<'_>, name: &CString) -> rustix::io::Result<()> {
    let shown = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, shown, here, name, AtFlags::SYMLINK_FOLLOW)
}

impl Meta {
    fn apply(&self, file: BorrowedFd<'_>) -> rustix::io::Result<()> {
        if let Some((uid, gid)) = self.owner {
            rustix::fs::fchown(file, Some(uid), Some(gid))?;
        }
        // After the owner, whose change takes rights away.
        rustix::fs::fchmod(file, self.mode)?;
        rustix::fs::futimens(file, &times(self.mtime))
    }
}

/// When what an entry is of was changed.
fn mtime(entry: &mut Entry<'_, impl Read>) -> Result<Time, FilesError> {
    let bad = |error: io::Error| FilesError::Archive { problem: error.to_string() };
    let mut told = Time::from_header(entry.header().mtime().map_err(bad)?);
    for extension in entry.pax_extensions().map_err(bad)?.into_iter().flatten().flatten() {
        if extension.key() == Ok(MTIME)
            && let Some(time) = extension.value().ok().and_then(Time::from_extension)
        {
            told = time;
        }
    }
    Ok(told)
}

fn times(mtime: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds },
    }
}

fn link_target(entry: &Entry<'_, impl Read>) -> Result<CString, FilesError> {
    let target = entry.link_name_bytes().map(|name| CString::new(name.into_owned()));
    match target {
        Some(Ok(target)) if !target.is_empty() => Ok(target),
        _ => Err(FilesError::Archive { problem: "a link leads nowhere".to_owned() }),
    }
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
