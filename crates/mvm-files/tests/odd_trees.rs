//! A corpus of odd files and trees, each with what a copy makes of it: in both directions, as a guest is
//! copied to (links of the target are followed) and as it is copied from (it may be hostile), with and
//! without the owners.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use mvm_files::{FilesError, Links, Options, Owners, Summary, Target, pack, source_name, unpack};
use rustix::fs::{CWD, FileType, Mode, Timespec, Timestamps, UTIME_OMIT, mknodat, utimensat};

/// Both directions, each with and without owners.
const WAYS: [Options; 4] = [
    Options { links: Links::Follow, owners: Owners::Own },
    Options { links: Links::Follow, owners: Owners::Kept },
    Options { links: Links::Refuse, owners: Owners::Own },
    Options { links: Links::Refuse, owners: Owners::Kept },
];

fn copy(from: &Path, to: &Path, options: Options) -> Result<Summary, FilesError> {
    let mut stream = Vec::new();
    let packed = pack(from, &mut stream)?;
    let target = Target::As { path: to.to_owned(), name: source_name(from) };
    unpack(&stream[..], &target, options)?;
    Ok(packed)
}

/// What is below a directory, one line each: name, mode, time, owner if that is not who tests, what.
fn facts(dir: &Path) -> String {
    let own = rustix::process::getuid().as_raw();
    let mut lines = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let found = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(dir).unwrap().as_os_str().as_bytes().escape_ascii();
            let mut line = format!("{name} {:o}", found.mode() & 0o7777);
            if found.mtime_nsec() != 0 || found.mtime() < 1_000_000_000 {
                write!(line, " {}+{}ns", found.mtime(), found.mtime_nsec()).unwrap();
            }
            if found.uid() != own {
                write!(line, " {}:{}", found.uid(), found.gid()).unwrap();
            }
            let what = if found.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if found.is_dir() {
                dirs.push(path);
                "dir".to_owned()
            } else {
                let sparse =
                    if found.blocks() * 512 + 65_536 < found.len() { " sparse" } else { "" };
                format!("{} bytes x{}{sparse}", found.len(), found.nlink())
            };
            lines.push(format!("{line} {what}"));
        }
    }
    lines.sort();
    lines.join("\n")
}

/// Sets a file's time to the nanosecond, and not through a link.
fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
    };
    utimensat(CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_all_times(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            set_all_times(&path);
        }
        set_time(&path, 1_500_000_000, 0);
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A tree, and what a copy of it is, of which only the owners' part depends on the way.
struct Odd {
    name: &'static str,
    make: fn(&Path),
    copied: &'static str,
    /// If that is something else with the owners kept.
    with_owners: Option<&'static str>,
}

const CORPUS: [Odd; 9] = [
    Odd {
        name: "times before 1970 and to the nanosecond",
        make: |dir| {
            for (name, seconds, nanoseconds) in
                [("old", -2, 750_000_000), ("older", -86_400, 0), ("fine", 1_700_000_000, 1)]
            {
                fs::write(dir.join(name), "x").unwrap();
                set_time(&dir.join(name), seconds, nanoseconds);
            }
            fs::create_dir(dir.join("sub")).unwrap();
            symlink("nowhere", dir.join("link")).unwrap();
            set_time(&dir.join("link"), -1, 999_999_999);
            set_time(&dir.join("sub"), 1_600_000_000, 123_456_789);
        },
        copied: "fine 644 1700000000+1ns 1 bytes x1\n\
                 link 777 -1+999999999ns -> nowhere\n\
                 old 644 -2+750000000ns 1 bytes x1\n\
                 older 644 -86400+0ns 1 bytes x1\n\
                 sub 755 1600000000+123456789ns dir",
        with_owners: None,
    },
    Odd {
        name: "rights that raise rights",
        make: |dir| {
            for (name, rights) in [("setuid", 0o4755), ("setgid", 0o2711), ("locked", 0o400)] {
                fs::write(dir.join(name), "").unwrap();
                mode(&dir.join(name), rights);
            }
            fs::create_dir(dir.join("sticky")).unwrap();
            mode(&dir.join("sticky"), 0o1777);
            set_all_times(dir);
        },
        copied: "locked 400 0 bytes x1\n\
                 setgid 711 0 bytes x1\n\
                 setuid 755 0 bytes x1\n\
                 sticky 1777 dir",
        with_owners: Some(
            "locked 400 0 bytes x1\n\
             setgid 2711 0 bytes x1\n\
             setuid 4755 0 bytes x1\n\
             sticky 1777 dir",
        ),
    },
    Odd {
        name: "several names of one file",
        make: |dir| {
            fs::create_dir(dir.join("a")).unwrap();
            fs::write(dir.join("a/first"), "content").unwrap();
            fs::hard_link(dir.join("a/first"), dir.join("second")).unwrap();
            set_all_times(dir);
        },
        copied: "a 755 dir\n\
                 a/first 644 7 bytes x2\n\
                 second 644 7 bytes x2",
        with_owners: None,
    },
    Odd {
        name: "links of all kinds",
        make: |dir| {
            fs::create_dir(dir.join("dir")).unwrap();
            symlink("dir", dir.join("to-dir")).unwrap();
            symlink("/etc", dir.join("out")).unwrap();
            symlink("../../..", dir.join("up")).unwrap();
            symlink("loop", dir.join("loop")).unwrap();
            symlink("no such", dir.join("dangling")).unwrap();
            set_all_times(dir);
        },
        copied: "dangling 777 -> no such\n\
                 dir 755 dir\n\
                 loop 777 -> loop\n\
                 out 777 -> /etc\n\
                 to-dir 777 -> dir\n\
                 up 777 -> ../../..",
        with_owners: None,
    },
    Odd {
        name: "names that are no text",
        make: |dir| {
            for name in [&b"\xff\xfe"[..], b"new\nline", b" ", b"-rf", b"esc\x1b[2J"] {
                fs::write(dir.join(OsStr::from_bytes(name)), "x").unwrap();
            }
            set_all_times(dir);
        },
        copied: "  644 1 bytes x1\n\
                 -rf 644 1 bytes x1\n\
                 \\xff\\xfe 644 1 bytes x1\n\
                 esc\\x1b[2J 644 1 bytes x1\n\
                 new\\nline 644 1 bytes x1",
        with_owners: None,
    },
    Odd {
        name: "files of holes",
        make: |dir| {
            File::create(dir.join("all")).unwrap().set_len(64 << 20).unwrap();
            let file = File::create(dir.join("end")).unwrap();
            file.write_all_at(b"end", 20 << 20).unwrap();
            set_all_times(dir);
        },
        copied: "all 644 67108864 bytes x1 sparse\n\
                 end 644 20971523 bytes x1 sparse",
        with_owners: None,
    },
    Odd {
        name: "what is neither a file nor a directory nor a link",
        make: |dir| {
            mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
            drop(std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap());
            fs::write(dir.join("file"), "x").unwrap();
            set_all_times(dir);
        },
        copied: "file 644 1 bytes x1",
        with_owners: None,
    },
    Odd {
        name: "empty things",
        make: |dir| {
            fs::write(dir.join("file"), "").unwrap();
            fs::create_dir(dir.join("dir")).unwrap();
            mode(&dir.join("dir"), 0o500);
            set_all_times(dir);
        },
        copied: "dir 500 dir\n\
                 file 644 0 bytes x1",
        with_owners: None,
    },
    Odd {
        name: "sizes around those that are read at once",
        make: |dir| {
            for size in [4095, 4096, 65_535, 65_536, 65_537, 200_000] {
                fs::write(dir.join(size.to_string()), vec![7; size]).unwrap();
            }
            set_all_times(dir);
        },
        copied: "200000 644 200000 bytes x1\n\
                 4095 644 4095 bytes x1\n\
                 4096 644 4096 bytes x1\n\
                 65535 644 65535 bytes x1\n\
                 65536 644 65536 bytes x1\n\
                 65537 644 65537 bytes x1",
        with_owners: None,
    },
];

#[test]
fn odd_trees_come_back_as_is_said_of_each() {
    for Odd { name, make, copied, with_owners } in CORPUS {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir(&from).unwrap();
        make(&from);
        for (number, options) in WAYS.into_iter().enumerate() {
            let to = dir.path().join(format!("to-{number}"));
            copy(&from, &to, options).unwrap_or_else(|error| panic!("{name}: {error}"));
            let expected = match options.owners {
                Owners::Kept => with_owners.unwrap_or(copied),
                Owners::Own => copied,
            };
            assert_eq!(facts(&to), expected, "{name}, {options:?}");
        }
    }
}

#[test]
fn owners_are_kept_where_that_is_asked_for() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir(&from).unwrap();
    fs::write(from.join("file"), "x").unwrap();
    chown(from.join("file"), Some(1000), Some(1001)).unwrap();
    set_all_times(&from);
    for (number, options) in WAYS.into_iter().enumerate() {
        let to = dir.path().join(format!("to-{number}"));
        copy(&from, &to, options).unwrap();
        let owner = if options.owners == Owners::Kept { " 1000:1001" } else { "" };
        assert_eq!(facts(&to), format!("file 644{owner} 1 bytes x1"));
    }
}

#[test]
fn what_is_left_out_is_named() {
    let dir = tempfile::tempdir().unwrap();
    mknodat(CWD, dir.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    let summary = pack(dir.path(), Vec::new()).unwrap();
    assert_eq!(summary.skipped, [dir.path().join("fifo").display().to_string()]);
}

#[test]
fn files_of_the_kernel_are_what_reading_them_gives() {
    let dir = tempfile::tempdir().unwrap();
    let candidates = [
        // No length, no blocks.
        "/proc/version",
        "/proc/cpuinfo",
        "/proc/kallsyms",
        // A length of a page, no blocks, and a line.
        "/sys/class/net/lo/mtu",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        // A true length that is long, and no blocks.
        "/sys/kernel/btf/vmlinux",
    ];
    let is_there = |path: &&str| fs::read(path).is_ok_and(|content| !content.is_empty());
    let files: Vec<&str> = candidates.into_iter().filter(is_there).collect();
    assert!(files.len() >= 3, "{files:?}");
    for (number, file) in files.iter().enumerate() {
        let to = dir.path().join(number.to_string());
        copy(Path::new(file), &to, WAYS[2]).unwrap();
        let (is, copied) = (fs::read(file).unwrap(), fs::read(&to).unwrap());
        // A processor's clock is not the same twice.
        let is_same =
            is == copied || (*file == "/proc/cpuinfo" && is.len().abs_diff(copied.len()) < 64);
        assert!(is_same, "{file}: {} bytes instead of {}", copied.len(), is.len());
    }
    // One that cannot be read is an error, whatever it says of itself.
    let error = copy(Path::new("/proc/self/mem"), &dir.path().join("mem"), WAYS[2]).unwrap_err();
    assert!(error.to_string().contains("cannot read /proc/self/mem"), "{error}");
    assert!(!dir.path().join("mem").exists());
}

/// A stream that does something to a file as soon as its content is on the way.
struct Meanwhile<'a> {
    stream: Vec<u8>,
    then: Option<&'a dyn Fn()>,
}

impl Write for Meanwhile<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.stream.len() >= 1024
            && let Some(then) = self.then.take()
        {
            then();
        }
        self.stream.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_what_was_read_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    let is = vec![7; 1 << 20];
    let pack_while = |then: &dyn Fn()| {
        fs::write(&from, &is).unwrap();
        let mut out = Meanwhile { stream: Vec::new(), then: Some(then) };
        let packed = pack(&from, &mut out);
        assert!(out.then.is_none(), "nothing happened meanwhile");
        (packed, out.stream)
    };
    let (packed, stream) = pack_while(&|| {
        let mut file = File::options().append(true).open(&from).unwrap();
        file.write_all(&[8; 1000]).unwrap();
    });
    packed.unwrap();
    let to = dir.path().join("grown");
    unpack(&stream[..], &Target::As { path: to.clone(), name: "from".into() }, WAYS[2]).unwrap();
    assert!(fs::read(&to).unwrap() == is);

    let shrink = || File::options().write(true).open(&from).unwrap().set_len(100_000).unwrap();
    let (packed, stream) = pack_while(&shrink);
    let error = packed.unwrap_err().to_string();
    assert!(error.contains("it became shorter while it was read"), "{error}");
    let to = dir.path().join("shrunk");
    let target = Target::As { path: to.clone(), name: "from".into() };
    assert!(unpack(&stream[..], &target, WAYS[2]).is_err());
    assert!(!to.exists());
}

#[test]
fn what_is_deeper_than_is_made_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let nested = |depth: usize| (0..depth).fold(PathBuf::from("from"), |path, _| path.join("d"));
    fs::create_dir_all(dir.path().join(nested(150))).unwrap();
    copy(&dir.path().join("from"), &dir.path().join("to"), WAYS[2]).unwrap();
    fs::create_dir_all(dir.path().join(nested(250))).unwrap();
    let error = copy(&dir.path().join("from"), &dir.path().join("deep"), WAYS[2]).unwrap_err();
    assert!(error.to_string().contains("is deeper than"), "{error}");
}

#[test]
fn a_link_that_is_copied_to_is_written_through_and_one_that_dangles_is_refused() {
    for (number, options) in WAYS.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("elsewhere")).unwrap();
        fs::write(at("elsewhere/real"), "old").unwrap();
        symlink("elsewhere/real", at("link")).unwrap();
        symlink("elsewhere", at("link-to-dir")).unwrap();
        symlink("no-such", at("dangling")).unwrap();
        fs::write(at("source"), "new").unwrap();
        copy(&at("source"), &at("link"), options).unwrap();
        assert_eq!(fs::read_to_string(at("elsewhere/real")).unwrap(), "new", "{options:?}");
        assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("elsewhere/real"), "{number}");
        copy(&at("source"), &at("link-to-dir"), options).unwrap();
        assert_eq!(fs::read_to_string(at("elsewhere/source")).unwrap(), "new");
        let error = copy(&at("source"), &at("dangling"), options).unwrap_err().to_string();
        assert!(error.contains("dangling"), "{error}");
        assert!(!at("no-such").exists());

        // Within a tree, only where the target is trusted.
        fs::create_dir_all(at("tree")).unwrap();
        fs::write(at("tree/file"), "newer").unwrap();
        fs::create_dir_all(at("target/tree")).unwrap();
        symlink(at("elsewhere/real"), at("target/tree/file")).unwrap();
        copy(&at("tree"), &at("target"), options).unwrap();
        let is_followed = options.links == Links::Follow;
        let real = fs::read_to_string(at("elsewhere/real")).unwrap();
        assert_eq!(real == "newer", is_followed, "{options:?}");
        assert_eq!(fs::read_link(at("target/tree/file")).is_ok(), is_followed);
        assert_eq!(fs::read_to_string(at("target/tree/file")).unwrap(), "newer");
        let left = fs::read_dir(at("elsewhere")).unwrap().count();
        assert_eq!(left, 2, "a temporary file stays");
    }
}
