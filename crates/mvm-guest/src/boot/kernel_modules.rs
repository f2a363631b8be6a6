//! The modules of the guest's kernel, where programs look for them: a read-only disk that all guests
//! of the kernel share, mounted on `/lib/modules/RELEASE` unless the image brings that itself.
//!
//! Those that the boot needs come with the initial RAM filesystem and are loaded by then. These are
//! for programs: `modprobe`, and the kernel itself, which calls it for what is used first.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, chmodat, makedev, mknodat};
use rustix::mount::{MountFlags, mount};

use super::root;
use crate::console::{complain, note};

/// What the kernel runs to load a module, by this path.
const HELPER: &str = "/proc/sys/kernel/modprobe";
/// Where images have it.
const HELPERS: [&str; 5] = [
    "/sbin/modprobe",
    "/usr/sbin/modprobe",
    "/bin/modprobe",
    "/usr/bin/modprobe",
    "/usr/local/sbin/modprobe",
];
/// Device nodes that everybody may open, as udev would have it.
const FOR_EVERYBODY: [&str; 2] = ["fuse", "net/tun"];

/// Brings in the modules on this disk, if that can be done; a guest runs without them, too.
pub(super) fn bring_in(device: &str) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let target = format!("/lib/modules/{release}");
    match mount_on(device, Path::new(&target)) {
        Ok(true) => note(&format!("modules are mounted on {target}")),
        Ok(false) => note(&format!("the image has {target} itself")),
        Err(error) => return complain(&format!("no modules on {target}: {error}")),
    }
    let Some(helper) = HELPERS.into_iter().find(|path| Path::new(path).exists()) else { return };
    if helper != HELPERS[0]
        && let Err(error) = fs::write(HELPER, helper)
    {
        complain(&format!("the kernel is not told of {helper}: {error}"));
    }
    // An image's own modules have the list where `depmod` writes it.
    let listed = fs::read_to_string(format!("{target}/modules.nodes"))
        .or_else(|_| fs::read_to_string(format!("{target}/modules.devname")))
        .unwrap_or_default();
    for node in nodes(&listed) {
        if let Err(error) = node.ensure() {
            complain(&format!("cannot make /dev/{}: {error}", node.name));
        }
    }
}

/// Whether it was necessary.
fn mount_on(device: &str, target: &Path) -> Result<bool, String> {
    let is_there = fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some());
    if is_there {
        return Ok(false);
    }
    let device = format!("/dev/{device}");
    root::wait_for(&device)?;
    fs::create_dir_all(target).map_err(|error| error.to_string())?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    mount(&*device, target, "erofs", flags, None).map_err(|error| format!("{device}: {error}"))?;
    Ok(true)
}

/// A device node that has the kernel load a module when it is opened.
#[derive(Debug, PartialEq, Eq)]
struct Node<'a> {
    name: &'a str,
    kind: FileType,
    major: u32,
    minor: u32,
}

impl Node<'_> {
    fn ensure(&self) -> io::Result<()> {
        let path = Path::new("/dev").join(self.name);
        if fs::symlink_metadata(&path).is_ok() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mode = if FOR_EVERYBODY.contains(&self.name) { 0o666 } else { 0o600 };
        let mode = Mode::from_raw_mode(mode);
        mknodat(CWD, &path, self.kind, mode, makedev(self.major, self.minor))?;
        // The mode that it was made with is subject to the umask.
        Ok(chmodat(CWD, &path, mode, rustix::fs::AtFlags::empty())?)
    }
}

/// The lines `MODULE NAME TYPEMAJOR:MINOR` of `modules.nodes`, which is `depmod`'s `modules.devname`.
fn nodes(listed: &str) -> impl Iterator<Item = Node<'_>> {
    listed.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (name, device) = (words.next()?, words.next()?);
        let kind = match device.as_bytes().first()? {
            b'c' => FileType::CharacterDevice,
            b'b' => FileType::BlockDevice,
            _ => return None,
        };
        let (major, minor) = device.get(1..)?.split_once(':')?;
        let is_inside = !name.starts_with('/') && !name.split('/').any(|part| part == "..");
        let node = Node { name, kind, major: major.parse().ok()?, minor: minor.parse().ok()? };
        is_inside.then_some(node)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_nodes_are_read_from_the_modules_list() {
        let listed = "# Device nodes to trigger on-demand module loading.\n\
                      tun net/tun c10:200\nfuse fuse c10:229\nodd ../../etc c1:1\nbad x\n\
                      other y z10:1\nfloppy fd0 b2:0\n";
        let found: Vec<_> = nodes(listed).collect();
        let node = |name, kind, major, minor| Node { name, kind, major, minor };
        let (c, b) = (FileType::CharacterDevice, FileType::BlockDevice);
        assert_eq!(
            found,
            [node("net/tun", c, 10, 200), node("fuse", c, 10, 229), node("fd0", b, 2, 0),]
        );
    }

    #[test]
    fn modules_that_an_image_brings_are_left_to_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.dep"), "").unwrap();
        assert_eq!(mount_on("vdz", dir.path()), Ok(false));
    }
}
