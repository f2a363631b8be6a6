//! A writer of `newc` cpio archives, the format of the kernel's initial RAM filesystem.
//!
//! The same entries give the same bytes: sorted by name, times zero, owner root, inode numbers
//! counted up from one.

use std::collections::BTreeMap;
use std::io::{self, Write};

const TRAILER: &str = "TRAILER!!!";
const DIR: u32 = 0o040000;
const FILE: u32 = 0o100000;
const CHAR: u32 = 0o020000;

enum Node<'a> {
    Dir,
    File(&'a [u8]),
    CharDevice { major: u32, minor: u32 },
}

struct Entry<'a> {
    mode: u32,
    node: Node<'a>,
}

/// An archive in the making; names are relative, such as `etc/mvm/modules`.
#[derive(Default)]
pub(crate) struct Archive<'a> {
    entries: BTreeMap<String, Entry<'a>>,
}

impl<'a> Archive<'a> {
    /// Adds a directory and its parents.
    pub(crate) fn dir(&mut self, name: &str) -> &mut Self {
        self.parents(name);
        self.entries.insert(name.to_owned(), Entry { mode: DIR | 0o755, node: Node::Dir });
        self
    }

    /// Adds a regular file and its parent directories.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, content: &'a [u8]) -> &mut Self {
        self.parents(name);
        let entry = Entry { mode: FILE | permissions, node: Node::File(content) };
        self.entries.insert(name.to_owned(), entry);
        self
    }

    /// Adds a character device node and its parent directories.
    pub(crate) fn char_device(
        &mut self,
        name: &str,
        permissions: u32,
        major: u32,
        minor: u32,
    ) -> &mut Self {
        self.parents(name);
        let node = Node::CharDevice { major, minor };
        self.entries.insert(name.to_owned(), Entry { mode: CHAR | permissions, node });
        self
    }

    fn parents(&mut self, name: &str) {
        for (at, _) in name.match_indices('/') {
            let parent = Entry { mode: DIR | 0o755, node: Node::Dir };
            self.entries.entry(name[..at].to_owned()).or_insert(parent);
        }
    }

    /// Writes the archive; a parent precedes what is in it.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (index, (name, entry)) in self.entries.iter().enumerate() {
            let (links, content, device) = match entry.node {
                Node::Dir => (2, [].as_slice(), (0, 0)),
                Node::File(content) => (1, content, (0, 0)),
                Node::CharDevice { major, minor } => (1, [].as_slice(), (major, minor)),
            };
            header(out, index + 1, entry.mode, links, content.len(), device, name)?;
            out.write_all(content)?;
            pad(out, content.len())?;
        }
        header(out, 0, 0, 1, 0, (0, 0), TRAILER)
    }
}

fn header(
    out: &mut impl Write,
    inode: usize,
    mode: u32,
    links: u32,
    size: usize,
    (major, minor): (u32, u32),
    name: &str,
) -> io::Result<()> {
    let size = u32::try_from(size).map_err(|_| {
        io::Error::new(io::ErrorKind::FileTooLarge, format!("{name} is larger than 4 GiB"))
    })?;
    let name_size = name.len() + 1;
    // magic, inode, mode, uid, gid, links, mtime, size, dev major and minor, rdev major and minor,
    // name size with its NUL, checksum (unused)
    write!(out, "070701{inode:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}", 0, 0, 0)?;
    write!(out, "{:08x}{:08x}{major:08x}{minor:08x}{name_size:08x}{:08x}", 0, 0, 0)?;
    out.write_all(name.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, 110 + name_size)
}

fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..written.next_multiple_of(4) - written])
}

#[cfg(test)]
// The tests check the archive with the system's own cpio, and say so if there is none.
#[allow(clippy::disallowed_methods, clippy::print_stdout)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::default();
        archive
            .file("init", 0o755, b"#!agent")
            .file("lib/modules/a.ko", 0o644, b"12345")
            .dir("proc")
            .char_device("dev/console", 0o600, 5, 1);
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();
        bytes
    }

    fn cpio(args: &[&str], dir: &std::path::Path, archive: &[u8]) -> Option<String> {
        let mut command = Command::new("cpio");
        command.args(args).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        let Ok(mut child) = command.stderr(Stdio::null()).spawn() else {
            println!("skipped: `cpio` is not installed");
            return None;
        };
        child.stdin.take().unwrap().write_all(archive).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn cpio_lists_and_unpacks_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let Some(list) = cpio(&["-it"], dir.path(), &sample()) else { return };
        let names: Vec<&str> = list.lines().collect();
        assert_eq!(
            names,
            ["dev", "dev/console", "init", "lib", "lib/modules", "lib/modules/a.ko", "proc"]
        );
        let files = ["-id", "--no-preserve-owner", "init", "lib/modules/a.ko", "proc"];
        cpio(&files, dir.path(), &sample());
        assert_eq!(std::fs::read(dir.path().join("init")).unwrap(), b"#!agent");
        assert_eq!(std::fs::read(dir.path().join("lib/modules/a.ko")).unwrap(), b"12345");
        assert!(dir.path().join("proc").is_dir());
        let detail = cpio(&["-itv"], dir.path(), &sample()).unwrap();
        assert!(detail.lines().any(|l| l.starts_with("-rwxr-xr-x") && l.ends_with("init")));
        assert!(detail.lines().any(|l| l.starts_with("crw-------") && l.contains("5,   1")));
    }

    #[test]
    fn the_order_of_adding_does_not_matter() {
        let mut other = Archive::default();
        other
            .char_device("dev/console", 0o600, 5, 1)
            .dir("proc")
            .file("lib/modules/a.ko", 0o644, b"12345")
            .file("init", 0o755, b"#!agent");
        let mut bytes = Vec::new();
        other.write(&mut bytes).unwrap();
        assert_eq!(bytes, sample());
    }
}
