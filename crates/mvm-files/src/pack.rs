//! From files to a stream.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use tar::{Builder, EntryType, Header, HeaderMode};

use crate::{FilesError, Summary};

/// Bytes in a block, of which a file's use of the disk is counted and an archive is made.
const BLOCK: u64 = 512;
/// Bytes of a file that are read at once: small reads are what costs in an emulated guest.
const BUFFER: usize = 64 * 1024;
/// Bytes of a file that a pipe is offered at once: more than it holds.
const OFFER: u64 = 1024 * 1024;

/// The name under which a source is packed: its last part, or `.` if it has none or means what it
/// holds (`dir/.`).
pub fn source_name(path: &Path) -> OsString {
    use std::os::unix::ffi::OsStrExt as _;
    match path.file_name() {
        Some(name) if !path.as_os_str().as_bytes().ends_with(b"/.") => name.to_owned(),
        _ => ".".into(),
    }
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
        if kind.is_dir() {
            header.set_size(0);
            self.append(&mut header, name, io::empty())?;
            return self.add_children(path, name);
        }
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(FilesError::at("read", path))?;
            return self.append_link(&mut header, name, &target);
        }
        if kind.is_fifo() || kind.is_socket() || kind.is_block_device() || kind.is_char_device() {
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

    fn add_file(
        &mut self,
        path: &Path,
        name: &Path,
        mut header: Header,
        metadata: &Metadata,
    ) -> Result<(), FilesError> {
        let mut file = File::open(path).map_err(FilesError::at("open", path))?;
        self.summary.bytes += metadata.len();
        if metadata.blocks() * BLOCK < metadata.len() {
            // Only what the file holds is sent.
            self.summary.entries += 1;
            return self.builder.append_file(name, &mut file).map_err(FilesError::Stream);
        }
        let size = metadata.len();
        header.set_size(size);
        // The header alone: what follows it goes through a buffer of our own, which is larger than
        // the archive's.
        self.append(&mut header, name, io::empty())?;
        self.add_content(&mut file, path, size)
    }

    /// Writes a file's first bytes, as many as were announced, up to the end of a block. One that
    /// grows or shrinks meanwhile must not shift what follows it: zeros stand for what is not there
    /// any more.
    fn add_content(&mut self, file: &mut File, path: &Path, size: u64) -> Result<(), FilesError> {
        let mut left = size;
        // What is small goes with its header.
        if size >= BUFFER as u64 {
            let sent = (self.shortcut)(self.builder.get_mut(), file, size);
            left -= sent.map_err(FilesError::Stream)?;
        }
        self.buffer.resize(BUFFER, 0);
        while left > 0 {
            let wanted = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let piece = &mut self.buffer[..wanted];
            let len = match file.read(piece) {
                Ok(0) => {
                    piece.fill(0);
                    wanted
                }
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(FilesError::at("read", path)(error)),
            };
            self.builder.get_mut().write_all(&piece[..len]).map_err(FilesError::Stream)?;
            left -= len as u64;
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
