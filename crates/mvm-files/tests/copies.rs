//! What is packed comes back as it was, and only where it belongs.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mvm_files::{
    FilesError, Links, Options, Owners, Summary, Target, pack, pack_into_pipe, source_name, unpack,
};
use rustix::fs::XattrFlags;
use tar::{Builder, EntryType, Header};

const HOSTILE: Options = Options { links: Links::Refuse, owners: Owners::Own };
const LONG: &str = "a-name-that-is-longer-than-the-hundred-bytes-of-a-plain-header-\
                    and-therefore-needs-an-extension-of-the-format-to-be-kept-whole";

fn packed(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack(path, &mut bytes).unwrap();
    bytes
}

/// What `cp -r SOURCE TARGET` does, through a stream.
fn copy(source: &str, target: &str) -> Result<Summary, FilesError> {
    let name = source_name(Path::new(source));
    let target = Target::As { path: PathBuf::from(target), name };
    unpack(&packed(Path::new(source))[..], &target, HOSTILE)
}

/// Everything below a directory that a copy keeps.
fn facts(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(dir).unwrap().display().to_string();
            let (mode, mtime) = (metadata.mode(), metadata.mtime());
            let what = if metadata.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if metadata.is_dir() {
                dirs.push(path);
                "dir".to_owned()
            } else {
                format!("{:?} x{}", fs::read(&path).unwrap().len(), metadata.nlink())
            };
            found.push(format!("{name} {mode:o} {mtime} {what}"));
        }
    }
    found.sort();
    found
}

/// A tree with one of everything.
fn tree(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    fs::write(tree.join(LONG), vec![7; 100_000]).unwrap();
    fs::write(tree.join("sub/tool"), "#!").unwrap();
    fs::set_permissions(tree.join("sub/tool"), Permissions::from_mode(0o751)).unwrap();
    fs::hard_link(tree.join("file"), tree.join("sub/second")).unwrap();
    symlink("../file", tree.join("sub/link")).unwrap();
    symlink("/nowhere", tree.join("dangling")).unwrap();
    fs::write(tree.join("blank"), "").unwrap();
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::open(tree.join("file")).unwrap().set_modified(old).unwrap();
    fs::File::open(tree.join("sub/empty")).unwrap().set_modified(old).unwrap();
    fs::set_permissions(tree.join("sub"), Permissions::from_mode(0o555)).unwrap();
    tree
}

#[test]
fn a_tree_comes_back_with_modes_times_and_links() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path());
    let summary = copy(tree.to_str().unwrap(), dir.path().join("copy").to_str().unwrap()).unwrap();
    assert_eq!(facts(&tree), facts(&dir.path().join("copy")));
    assert_eq!((summary.entries, summary.bytes), (10, 100_009));
    // Once more over itself: everything is replaced, nothing is in the way.
    copy(&format!("{}/.", tree.display()), dir.path().join("copy").to_str().unwrap()).unwrap();
    assert_eq!(facts(&tree), facts(&dir.path().join("copy")));
}

/// A stream that looks at a directory each time somebody reads.
struct Watched<'a> {
    stream: &'a [u8],
    dir: &'a Path,
    seen: Vec<Vec<OsString>>,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let names = fs::read_dir(self.dir)?.map(|entry| entry.map(|entry| entry.file_name()));
        self.seen.push(names.collect::<io::Result<_>>()?);
        let len = buffer.len().min(1000);
        self.stream.read(&mut buffer[..len])
    }
}

#[test]
fn a_file_has_no_name_until_it_is_whole_so_that_a_killed_copy_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    if tempfile_without_name(dir.path()).is_err() {
        return;
    }
    let (source, into) = (dir.path().join("source"), dir.path().join("into"));
    fs::create_dir(&into).unwrap();
    for content in [b"x", b"y"] {
        let content = content.repeat(100_000);
        fs::write(&source, &content).unwrap();
        let before: Vec<_> = fs::read_dir(&into).unwrap().map(|e| e.unwrap().file_name()).collect();
        let stream = packed(&source);
        let mut watched = Watched { stream: &stream, dir: &into, seen: Vec::new() };
        let target = Target::As { path: into.join("file"), name: "source".into() };
        unpack(&mut watched, &target, HOSTILE).unwrap();
        let is_done = |names: &Vec<OsString>| names == &["file"];
        let of_file = &watched.seen[..100];
        assert!(of_file.iter().all(|names| names == &before), "{of_file:?}");
        assert!(watched.seen.last().is_some_and(is_done));
        assert_eq!(fs::read(into.join("file")).unwrap(), content);
    }
}

fn tempfile_without_name(dir: &Path) -> io::Result<()> {
    /// `O_TMPFILE`, which contains `O_DIRECTORY`.
    const O_TMPFILE: i32 = 0o20_200_000;
    fs::File::options().write(true).custom_flags(O_TMPFILE).open(dir).map(drop)
}

#[test]
fn extended_attributes_are_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("file"), "content").unwrap();
    let name = "user.mvm";
    if rustix::fs::setxattr(path("file"), name, b"kept", XattrFlags::CREATE).is_err() {
        return; // This filesystem has none.
    }
    copy(path("file").to_str().unwrap(), path("copy").to_str().unwrap()).unwrap();
    assert_eq!(fs::read(path("copy")).unwrap(), b"content");
    let has = |file| rustix::fs::getxattr(path(file), name, &mut [0; 8]).is_ok();
    assert_eq!((has("file"), has("copy")), (true, false), "the guide and the help say so");
}

#[test]
fn the_target_means_what_it_means_to_cp() {
    let dir = tempfile::tempdir().unwrap();
    std::env::set_current_dir(dir.path()).unwrap();
    fs::write("file", "f").unwrap();
    fs::write("other", "o").unwrap();
    for path in ["d/x", "into"] {
        fs::create_dir_all(path).unwrap();
    }
    fs::write("d/x/leaf", "l").unwrap();
    let exists = |path: &str| fs::symlink_metadata(path).is_ok();
    copy("file", "into").unwrap();
    assert!(exists("into/file"));
    copy("file", "into/renamed").unwrap();
    assert!(exists("into/renamed"));
    copy("file", "other").unwrap();
    assert_eq!(fs::read_to_string("other").unwrap(), "f");
    copy("d", "into").unwrap();
    assert!(exists("into/d/x/leaf"));
    copy("d", "fresh").unwrap();
    assert!(exists("fresh/x/leaf"));
    copy("d/.", "into").unwrap();
    assert!(exists("into/x/leaf"));
    copy("d/.", "anew").unwrap();
    assert!(exists("anew/x/leaf") && !exists("anew/d"));
    copy("d", "slash/").unwrap();
    assert!(exists("slash/x/leaf"));
    let refused = |source: &str, target: &str| {
        let error = copy(source, target).unwrap_err();
        assert!(matches!(error, FilesError::Target { .. }), "{source} {target}: {error}");
    };
    refused("file", "missing/");
    refused("file", "no/such/place");
    refused("file", "other/");
    refused("d", "file");
    let error = copy("file", "into/x").and_then(|_| copy("d/x", "into/x/file")).unwrap_err();
    assert!(matches!(error, FilesError::Target { .. }), "{error}");
    let left: Vec<_> = fs::read_dir("into").unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_str().unwrap().starts_with(".mvm")), "{left:?}");
}

#[test]
fn a_sparse_file_stays_sparse_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = fs::File::create(dir.path().join("sparse")).unwrap();
    use std::os::unix::fs::FileExt as _;
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(b"middle", 8 << 20).unwrap();
    file.set_len(32 << 20).unwrap();
    let from = dir.path().join("sparse");
    let bytes = packed(&from);
    assert!(bytes.len() < 1 << 20, "{} bytes for a file of holes", bytes.len());
    copy(from.to_str().unwrap(), dir.path().join("copy").to_str().unwrap()).unwrap();
    assert!(fs::read(&from).unwrap() == fs::read(dir.path().join("copy")).unwrap());
    assert!(fs::metadata(dir.path().join("copy")).unwrap().blocks() * 512 < 2 << 20);
}

/// An archive of raw entries: type, name, link target, content.
fn archive(entries: &[(EntryType, &str, &str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, link, content) in entries {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o6755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn nothing_is_written_outside_whatever_an_archive_says() {
    use EntryType::{Directory, Link, Regular, Symlink};
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let out = outside.to_str().unwrap();
    let absolute = format!("{out}/absolute");
    let secret = format!("{out}/secret");
    let cases: [&[(EntryType, &str, &str, &str)]; 9] = [
        &[(Directory, "a/", "", ""), (Regular, "a/../../outside/x", "", "x")],
        &[(Regular, "../outside/x", "", "x")],
        &[(Regular, &absolute, "", "x")],
        // A link that the archive brings itself, and a way through it.
        &[(Directory, "a/", "", ""), (Symlink, "a/l", out, ""), (Regular, "a/l/x", "", "x")],
        &[(Directory, "a/", "", ""), (Symlink, "a/l", out, ""), (Directory, "a/l/x", "", "")],
        &[(Symlink, "a", out, ""), (Regular, "a/x", "", "x")],
        &[(Directory, "a/", "", ""), (Link, "a/hard", "../outside/secret", "")],
        &[(Directory, "a/", "", ""), (Link, "a/hard", &secret, "")],
        // A hard link through a link.
        &[(Directory, "a/", "", ""), (Symlink, "a/l", out, ""), (Link, "a/h", "a/l/secret", "")],
    ];
    for (number, entries) in cases.iter().enumerate() {
        for target in [
            Target::Into(dir.path().join(format!("into-{number}"))),
            Target::As { path: dir.path().join(format!("as-{number}")), name: "a".into() },
        ] {
            if let Target::Into(path) = &target {
                fs::create_dir(path).unwrap();
            }
            let result = unpack(&archive(entries)[..], &target, HOSTILE);
            assert!(result.is_err(), "{entries:?} into {target:?}: {result:?}");
            assert_eq!(facts(&outside).len(), 1, "{entries:?} into {target:?}");
            assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
        }
    }
}

#[test]
fn a_link_in_the_way_of_a_file_is_replaced_and_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (victim, target) = (dir.path().join("victim"), dir.path().join("target"));
    fs::write(&victim, "untouched").unwrap();
    fs::create_dir(&target).unwrap();
    symlink(&victim, target.join("f")).unwrap();
    let bytes = archive(&[(EntryType::Regular, "f", "", "new")]);
    unpack(&bytes[..], &Target::Into(target.clone()), HOSTILE).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "new");
    // What raises rights is not taken over from a stranger.
    assert_eq!(fs::metadata(target.join("f")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn what_is_cut_or_no_archive_is_an_error_and_leaves_no_half_file() {
    let dir = tempfile::tempdir().unwrap();
    let into = Target::Into(dir.path().to_owned());
    let whole = archive(&[(EntryType::Regular, "f", "", &"x".repeat(5000))]);
    assert!(unpack(&whole[..2000], &into, HOSTILE).is_err());
    assert!(unpack(&[7; 4096][..], &into, HOSTILE).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let one = Target::As { path: dir.path().join("x"), name: "x".into() };
    assert!(unpack(&[0; 1024][..], &one, HOSTILE).is_err());
    assert_eq!(unpack(&[0; 1024][..], &into, HOSTILE).unwrap(), Summary::default());
}

#[test]
fn a_pipe_gets_what_any_stream_gets() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir(&from).unwrap();
    for (name, len) in [("empty", 0), ("small", 700), ("block", 64 * 1024), ("large", 5_000_001)] {
        let bytes: Vec<u8> = (0..len).map(|number: u32| (number * 31 / 7) as u8).collect();
        fs::write(from.join(name), bytes).unwrap();
    }
    fs::File::create(from.join("sparse")).unwrap().set_len(1 << 20).unwrap();
    // The kernel knows no way from such a file to a pipe, or its length is not known before.
    symlink("large", from.join("link")).unwrap();
    for path in [from.as_path(), Path::new("/proc/version")] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let source = path.to_owned();
        let packer = std::thread::spawn(move || {
            let writer: std::os::fd::OwnedFd = writer.into();
            pack_into_pipe(&source, writer.into()).unwrap()
        });
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut bytes).unwrap();
        assert!(bytes == packed(path), "{} differs", path.display());
        assert_eq!(packer.join().unwrap().skipped, [""; 0]);
    }
}

#[test]
fn sockets_and_devices_are_left_out_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir(&from).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
    fs::write(from.join("file"), "").unwrap();
    let mut bytes = Vec::new();
    let summary = pack(&from, &mut bytes).unwrap();
    assert_eq!(summary.skipped, [from.join("socket").display().to_string()]);
    let bytes = archive(&[(EntryType::Char, "null", "", ""), (EntryType::Regular, "f", "", "")]);
    let summary = unpack(&bytes[..], &Target::Into(dir.path().to_owned()), HOSTILE).unwrap();
    assert_eq!((summary.skipped.as_slice(), summary.entries), (&["null".to_owned()][..], 1));
}
