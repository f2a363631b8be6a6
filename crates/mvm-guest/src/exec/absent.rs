//! Why there was nothing to execute: the program is not there, or what is to run it is not.
//!
//! The kernel says `ENOENT` for both, and only the files can tell. They belong to the guest's users:
//! reads are bounded, only ordinary files are read, and what they name is only a word to show.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{File, OpenOptions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// What the kernel reads of a script's first line.
const SCRIPT_MAX: usize = 256;
/// Longest path, in bytes (`PATH_MAX`).
const PATH_MAX: u64 = 4096;
/// Program headers that are looked at; real programs have about ten.
const HEADERS_MAX: u16 = 64;
/// An interpreter may itself need one; the kernel goes on as often as this.
const DEPTH_MAX: usize = 5;
/// `PT_INTERP`: the program header that names the loader.
const INTERPRETER: u32 = 3;
/// Shells by their names, the usual first.
const SHELLS: [&str; 6] = ["sh", "bash", "ash", "dash", "busybox", "zsh"];
/// Where shells are.
const SHELL_DIRS: [&str; 2] = ["/bin", "/usr/bin"];

/// A file that is there, and the interpreter of it that is not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Uninterpreted {
    /// The file.
    pub(super) file: String,
    /// What the file says is to run it.
    pub(super) interpreter: String,
}

/// The first of the files, seen from a directory, that lacks its interpreter.
pub(super) fn uninterpreted(candidates: &[CString], cwd: &CStr) -> Option<Uninterpreted> {
    let cwd = Path::new(OsStr::from_bytes(cwd.to_bytes()));
    let files = candidates.iter().map(|file| cwd.join(OsStr::from_bytes(file.to_bytes())));
    files.into_iter().find_map(|file| lacks(cwd, file))
}

fn lacks(cwd: &Path, mut file: PathBuf) -> Option<Uninterpreted> {
    for _ in 0..DEPTH_MAX {
        let interpreter = interpreter(&open(&file)?)?;
        let next = cwd.join(OsStr::from_bytes(&interpreter));
        if std::fs::metadata(&next).is_err() {
            let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).escape_debug().to_string();
            let file = shown(file.as_os_str().as_bytes());
            return Some(Uninterpreted { file, interpreter: shown(&interpreter) });
        }
        file = next;
    }
    None
}

/// Opens an ordinary file, and waits for nothing.
fn open(path: &Path) -> Option<File> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    file.metadata().ok()?.is_file().then_some(file)
}

/// What a script's first line, or a program's header, says is to run it.
fn interpreter(file: &File) -> Option<Vec<u8>> {
    let mut head = [0; SCRIPT_MAX];
    let len = file.read_at(&mut head, 0).ok()?;
    let head = &head[..len];
    match head.strip_prefix(b"#!") {
        Some(line) => {
            let line = line.trim_ascii_start();
            let end = line.iter().position(|byte| matches!(byte, b' ' | b'\t' | b'\n'));
            Some(line[..end.unwrap_or(line.len())].to_vec())
        }
        None => loader(file, head),
    }
    .filter(|path| !path.is_empty())
}

/// The loader that an ELF file of 64 bits names; a static program has none.
fn loader(file: &File, head: &[u8]) -> Option<Vec<u8>> {
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let start = u64::from_le_bytes(field(head, 32)?);
    let size = u16::from_le_bytes(field(head, 54)?);
    let count = u16::from_le_bytes(field(head, 56)?).min(HEADERS_MAX);
    for index in 0..count {
        let mut header = [0; 56];
        let at = start.checked_add(u64::from(index) * u64::from(size))?;
        file.read_exact_at(&mut header, at).ok()?;
        if u32::from_le_bytes(field(&header, 0)?) == INTERPRETER {
            let at = u64::from_le_bytes(field(&header, 8)?);
            let len = u64::from_le_bytes(field(&header, 32)?).min(PATH_MAX);
            let mut path = vec![0; usize::try_from(len).ok()?];
            file.read_exact_at(&mut path, at).ok()?;
            let end = path.iter().position(|byte| *byte == 0).unwrap_or(path.len());
            path.truncate(end);
            return Some(path);
        }
    }
    None
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// What there is instead of a shell that is not: other shells, or none. `None` for a program that
/// is no shell.
pub(super) fn instead_of_shell(name: &str) -> Option<String> {
    name.rsplit('/').next().filter(|name| SHELLS.contains(name))?;
    let paths = SHELL_DIRS.iter().flat_map(|dir| SHELLS.map(|shell| format!("{dir}/{shell}")));
    let found = paths.into_iter().find(|path| std::fs::metadata(path).is_ok());
    Some(match found {
        Some(path) => format!("the image has {path}"),
        None => "the image has no shell".to_owned(),
    })
}
