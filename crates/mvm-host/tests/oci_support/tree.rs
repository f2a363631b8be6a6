//! Trees compared file by file: types, modes, owners, times, attributes, contents, and which names
//! are one file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Everything that an image decides about one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: String,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    pub(crate) xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The content's digest, a link's target, or a device's number.
    pub(crate) content: String,
    /// The first name of the same file.
    pub(crate) same_as: PathBuf,
}

/// A tree by the names below its root; the root itself is the empty name.
pub(crate) type Snapshot = BTreeMap<PathBuf, Node>;

/// Reads a whole tree.
pub(crate) fn snapshot(root: &Path) -> Snapshot {
    let mut tree = Snapshot::new();
    let mut first = BTreeMap::new();
    add(root, Path::new(""), &mut tree, &mut first);
    tree
}

fn add(root: &Path, name: &Path, tree: &mut Snapshot, first: &mut BTreeMap<u64, PathBuf>) {
    let path = if name == Path::new("") { root.to_owned() } else { root.join(name) };
    let meta = path.symlink_metadata().unwrap();
    let kind = meta.file_type();
    let (kind, content) = if kind.is_dir() {
        ("directory", String::new())
    } else if kind.is_symlink() {
        ("symlink", fs::read_link(&path).unwrap().to_string_lossy().into_owned())
    } else if kind.is_file() {
        ("file", digest(&fs::read(&path).unwrap()))
    } else if kind.is_fifo() {
        ("fifo", String::new())
    } else if kind.is_char_device() {
        ("char device", meta.rdev().to_string())
    } else {
        ("block device", meta.rdev().to_string())
    };
    let same_as = match meta.is_dir() {
        true => name.to_owned(),
        false => first.entry(meta.ino()).or_insert_with(|| name.to_owned()).clone(),
    };
    let node = Node {
        kind: kind.to_owned(),
        mode: meta.mode() & 0o7777,
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        xattrs: xattrs(&path),
        content,
        same_as,
    };
    tree.insert(name.to_owned(), node);
    if meta.is_dir() {
        let mut names: Vec<_> =
            fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        for child in names {
            add(root, &name.join(child), tree, first);
        }
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut list = vec![0; 64 * 1024];
    let length = rustix::fs::llistxattr(path, list.as_mut_slice()).unwrap();
    list.truncate(length);
    let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 64 * 1024];
            let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
            value.truncate(length);
            (OsString::from_vec(name.to_vec()), value)
        })
        .collect()
}

/// Fails with every name that differs. The time of a directory that no layer describes, and of the
/// root, is left to whoever unpacks: ours is the first second of 1970, theirs the time of day.
pub(crate) fn assert_same(ours: &Snapshot, theirs: &Snapshot) {
    let names: std::collections::BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let mut differences = Vec::new();
    for name in names {
        let (ours, mut theirs) = (ours.get(name), theirs.get(name).cloned());
        if let (Some(ours), Some(theirs)) = (ours, &mut theirs)
            && ours.kind == "directory"
            && (ours.mtime == (0, 0) || name == Path::new(""))
        {
            theirs.mtime = ours.mtime;
        }
        let theirs = theirs.as_ref();
        if ours != theirs {
            differences.push(format!("{}:\n  {ours:?}\n  {theirs:?}", name.display()));
        }
    }
    assert!(differences.is_empty(), "{} differ\n{}", differences.len(), differences.join("\n"));
}
