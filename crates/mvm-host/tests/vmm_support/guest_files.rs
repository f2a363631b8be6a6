//! The files of the contract's guests: a distribution's kernel, and an archive to boot from.

use std::io::Write;
use std::path::{Path, PathBuf};

/// A kernel and its modules, in the order in which they can be loaded.
pub(crate) type KernelFiles = (PathBuf, Vec<(String, PathBuf)>);

/// Those of an unpacked kernel package.
pub(crate) fn unpacked(dir: &Path, modules: &[&str]) -> Result<KernelFiles, String> {
    let kernel = find(&dir.join("boot"), &|name| name.starts_with("vmlinuz-"))
        .ok_or_else(|| format!("there is no boot/vmlinuz-* in {}", dir.display()))?;
    let module = |name: &&str| {
        let file = format!("{name}.ko");
        let path = find(&dir.join("lib/modules"), &|name| name == file);
        let path = path.ok_or_else(|| format!("there is no {file} in {}", dir.display()))?;
        Ok(((*name).to_owned(), path))
    };
    Ok((kernel, modules.iter().map(module).collect::<Result<_, String>>()?))
}

/// The first file below a directory whose name fits.
fn find(dir: &Path, fits: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries: Vec<_> = std::fs::read_dir(dir).ok()?.filter_map(Result::ok).collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    entries.into_iter().find_map(|entry| {
        let kind = entry.file_type().ok()?;
        if kind.is_dir() {
            return find(&entry.path(), fits);
        }
        fits(entry.file_name().to_str()?).then(|| entry.path())
    })
}

/// An initial RAM filesystem in the `newc` format.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    pub(crate) fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.files += 1;
        let fields = [
            self.files, // inode
            mode,
            0, // user
            0, // group
            1, // links
            0, // time
            u32::try_from(content.len()).unwrap(),
            0, // device of the filesystem, and of a device file
            0,
            0,
            0,
            u32::try_from(name.len()).unwrap() + 1,
            0, // checksum
        ];
        self.bytes.write_all(b"070701").unwrap();
        for field in fields {
            write!(self.bytes, "{field:08x}").unwrap();
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, b"");
        self.bytes
    }
}
