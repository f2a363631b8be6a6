//! From files to a stream.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, FileType, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use tar::{Builder, EntryType, Header, HeaderMode};

use crate::times::{MTIME, Time};
use crate::{FilesError, Summary};

/// Bytes in a block, of which a file's use of the disk is counted and an archive is made.
const BLOCK: u64 = 512;
/// Bytes of a file that are read at once: small reads are what costs in an emulated guest.
const BUFFER: usize = 64 * 1024;
/// Bytes that are read of a small file.
const PAGE: usize = 4096;
/// Bytes of a file that a pipe is offered at once: more than it holds.
const OFFER: u64 = 1024 * 1024;
/// The longest file, in bytes, that is copied although it says that it is shorter: it is kept in memory.
const LONGEST_UNTOLD: usize = 64 << 20;
/// What is wrong with a file of which less could be read than was announced.
const SHORTER: &str = "it became shorter while it was read";

/// The name under which a source is packed: its last part, or `.` if it has none or means what it
/// holds (`dir/.`).
pub fn source_name(path: &Path) -> OsString {
    use std::os::unix::ffi::OsStrExt as _;
    match path.file_name() {
        Some(name) if !path.as_os_str().as_bytes().ends_with(b"/.") => name.to_owned(),
        _ => ".".into(),
    }
}

/// Whether a file of this kind is not copied.
fn is_left_out(kind: FileType) -> bool {
    kind.is_fifo() || kind.is_socket() || kind.is_block_device() || kind.is_char_device()
}

/// Reads on until there are so many bytes, or the file ends; at first about as many as are expected.
fn read_on(file: &mut File, content: &mut Vec<u8>, expected: u64, limit: usize) -> io::Result<()> {
    let mut step = usize::try_from(expected.saturating_add(1)).unwrap_or(BUFFER);
    while content.len() < limit {
        let at = content.len();
        content.resize(limit.min(at + step.next_multiple_of(PAGE).min(BUFFER)), 0);
        step = BUFFER;
        let read = file.read(&mut content[at..]);
        content.truncate(at + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Whether a file is worth being sent as what it holds between holes. Its blocks alone do not say: the
/// kernel's own files have none, and hold something.
fn has_holes(file: &File, metadata: &Metadata) -> bool {
    if metadata.blocks() > 0 {
        return metadata.blocks() * BLOCK < metadata.len();
    }
    // Looking moves the file's position, and reading goes on where it was.
    let Ok(at) = rustix::fs::tell(file) else { return false };
    let data = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0));
    let is_back = rustix::fs::seek(file, rustix::fs::SeekFrom::Start(at)).is_ok();
    is_back && data == Err(Errno::NXIO)
}

fn unsteady(path: &Path, problem: &'static str) -> FilesError {
    FilesError::Unsteady { path: path.to_owned(), problem }
}

/// Writes what a path holds, under the name [`source_name`]: a file, a link, or a tree. A link is
/// followed only if the path ends with a slash. Devices, sockets and pipes are left out.
///
/// # Errors
/// Something cannot be read, or the stream not be written.
pub fn pack(path: &Path, out: impl Write) -> Result<Summary, FilesError> {
    pack_with(path, out, |_, _, _| Ok(0))
}

/// The same into a pipe, which takes the pages of a large file from the kernel without a copy.
///
/// # Errors
/// As of [`pack`].
pub fn pack_into_pipe(path: &Path, pipe: File) -> Result<Summary, FilesError> {
    let out = io::BufWriter::with_capacity(BUFFER, pipe);
    pack_with(path, out, |out: &mut io::BufWriter<File>, file, len| {
        out.flush()?;
        send(out.get_ref(), file, len)
    })
}

/// Passes on a file's next bytes; how many is told, which are fewer where the file ends or the
/// kernel knows no way from such a file to such a pipe.
fn send(pipe: &File, file: &File, len: u64) -> io::Result<u64> {
    let mut left = len;
    while left > 0 {
        let offer = usize::try_from(left.min(OFFER)).unwrap_or(BUFFER);
        match rustix::fs::sendfile(pipe.as_fd(), file.as_fd(), None, offer) {
            Ok(0) | Err(Errno::INVAL | Errno::NOSYS) => break,
            Ok(sent) => left -= sent as u64,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(len - left)
}

/// How a file's next bytes may come into the stream without this process's memory; those that did
/// are told.
type Shortcut<W> = fn(&mut W, &File, u64) -> io::Result<u64>;

fn pack_with<W: Write>(path: &Path, out: W, shortcut: Shortcut<W>) -> Result<Summary, FilesError> {
    use std::os::unix::ffi::OsStrExt as _;
    let bytes = path.as_os_str().as_bytes();
    let is_followed = bytes.ends_with(b"/") || bytes.ends_with(b"/.");
    let metadata = if is_followed { fs::metadata(path) } else { fs::symlink_metadata(path) };
    let metadata = metadata.map_err(FilesError::at("read", path))?;
    let mut builder = Builder::new(out);
    builder.mode(HeaderMode::Complete);
    let (linked, summary) = (BTreeMap::new(), Summary::default());
    let mut packer = Packer { builder, shortcut, linked, summary, buffer: Vec::new() };
    packer.add(path, &PathBuf::from(source_name(path)), &metadata)?;
    packer.builder.into_inner().and_then(|mut out| out.flush()).map_err(FilesError::Stream)?;
    Ok(packer.summary)
}

struct Packer<W: Write> {
    builder: Builder<W>,
    shortcut: Shortcut<W>,
    /// The first names of files that have several, by device and inode.
    linked: BTreeMap<(u64, u64), PathBuf>,
    summary: Summary,
    buffer: Vec<u8>,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> Result<(), FilesError> {
        let kind = metadata.file_type();
        let mut header = Header::new_gnu();
        header.set_metadata(metadata);
        header.set_mtime(Time::of(metadata).in_header());
        if let Some(time) = Time::of(metadata).extension().filter(|_| !is_left_out(kind)) {
            let extension = [(MTIME, time.as_bytes())];
            self.builder.append_pax_extensions(extension).map_err(FilesError::Stream)?;
        }
        if kind.is_dir() {
            header.set_size(0);
            self.append(&mut header, name, io::empty())?;
            return self.add_children(path, name);
        }
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(FilesError::at("read", path))?;
            return self.append_link(&mut header, name, &target);
        }
        if is_left_out(kind) {
            self.summary.skip(path.display().to_string());
            return Ok(());
        }
        if metadata.nlink() > 1 {
            let id = (metadata.dev(), metadata.ino());
            if let Some(first) = self.linked.get(&id).cloned() {
                header.set_entry_type(EntryType::Link);
                return self.append_link(&mut header, name, &first);
            }
            self.linked.insert(id, name.to_owned());
        }
        self.add_file(path, name, header, metadata)
    }

    /// Adds what reading a file gives: the length and the blocks that a file tells of are not
    /// believed where they can be looked at, as files of the kernel's tell what they like.
    fn add_file(
        &mut self,
        path: &Path,
        name: &Path,
        mut header: Header,
        metadata: &Metadata,
    ) -> Result<(), FilesError> {
        let mut file = File::open(path).map_err(FilesError::at("open", path))?;
        let told = metadata.len();
        let mut content = std::mem::take(&mut self.buffer);
        content.clear();
        let read = |file: &mut File, content: &mut Vec<u8>, limit| {
            read_on(file, content, told, limit).map_err(FilesError::at("read", path))
        };
        read(&mut file, &mut content, BUFFER)?;
        let added = if content.len() < BUFFER {
            self.add_whole(&content, name, &mut header)
        } else if told <= content.len() as u64 {
            read(&mut file, &mut content, LONGEST_UNTOLD)?;
            match content.len() < LONGEST_UNTOLD {
                true => self.add_whole(&content, name, &mut header),
                false => Err(unsteady(path, "it is much longer than it says")),
            }
        } else if has_holes(&file, metadata) {
            self.summary.entries += 1;
            self.summary.bytes += told;
            let added = self.builder.append_file(name, &mut file).map_err(FilesError::Stream);
            added.and_then(|()| match file.metadata() {
                Ok(now) if now.len() >= told => Ok(()),
                _ => Err(unsteady(path, SHORTER)),
            })
        } else {
            header.set_size(told);
            self.summary.bytes += told;
            // The header alone: what follows it goes past the archive's own buffer.
            let begun = self.append(&mut header, name, io::empty());
            begun.and_then(|()| self.add_content(&mut file, &mut content, path, told))
        };
        content.truncate(BUFFER);
        self.buffer = content;
        added
    }

    /// Adds a file of which all is in memory.
    fn add_whole(
        &mut self,
        content: &[u8],
        name: &Path,
        header: &mut Header,
    ) -> Result<(), FilesError> {
        header.set_size(content.len() as u64);
        self.summary.bytes += content.len() as u64;
        self.append(header, name, content)
    }

    /// Writes a file's first bytes, as many as were announced, up to the end of a block: what has
    /// been read of them, and then the rest. What comes on top of them came later.
    fn add_content(
        &mut self,
        file: &mut File,
        piece: &mut Vec<u8>,
        path: &Path,
        size: u64,
    ) -> Result<(), FilesError> {
        self.builder.get_mut().write_all(piece).map_err(FilesError::Stream)?;
        let mut left = size - piece.len() as u64;
        let sent = (self.shortcut)(self.builder.get_mut(), file, left);
        left -= sent.map_err(FilesError::Stream)?;
        while left > 0 {
            piece.clear();
            let wanted = BUFFER.min(usize::try_from(left).unwrap_or(BUFFER));
            read_on(file, piece, left, wanted).map_err(FilesError::at("read", path))?;
            if piece.is_empty() {
                return Err(unsteady(path, SHORTER));
            }
            self.builder.get_mut().write_all(piece).map_err(FilesError::Stream)?;
            left -= piece.len() as u64;
        }
        let blank = [0; BLOCK as usize];
        let padding = (size.next_multiple_of(BLOCK) - size) as usize;
        self.builder.get_mut().write_all(&blank[..padding]).map_err(FilesError::Stream)
    }

    fn add_children(&mut self, path: &Path, name: &Path) -> Result<(), FilesError> {
        let read = |error| FilesError::at("read", path)(error);
        let mut names = Vec::new();
        for entry in fs::read_dir(path).map_err(read)? {
            names.push(entry.map_err(read)?.file_name());
        }
        names.sort_unstable();
        for child in names {
            let path = path.join(&child);
            match fs::symlink_metadata(&path) {
                Ok(metadata) => self.add(&path, &name.join(&child), &metadata)?,
                // Removed since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(FilesError::at("read", &path)(error)),
            }
        }
        Ok(())
    }

    fn append(
        &mut self,
        header: &mut Header,
        name: &Path,
        data: impl Read,
    ) -> Result<(), FilesError> {
        self.summary.entries += 1;
        self.builder.append_data(header, name, data).map_err(FilesError::Stream)
    }

    fn append_link(
        &mut self,
        header: &mut Header,
        name: &Path,
        target: &Path,
    ) -> Result<(), FilesError> {
        header.set_size(0);
        self.summary.entries += 1;
        self.builder.append_link(header, name, target).map_err(FilesError::Stream)
    }
}
