//! Data disks: mounted where the host says before the guest is ready, unmounted before it stops.
//!
//! A file system that is smaller than its disk has been grown on the host and follows here, online.
//! A journal is replayed by the kernel as it mounts, except on a disk that may not be written.
#![allow(unsafe_code)]

mod freeze;
mod fresh;
mod mounts;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use mvm_core::guest::{DiskConfiguration, ErrorKind, GuestError};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::console::complain;
use crate::failure::{failure, invalid};
use mounts::MountInfo;

pub(crate) use freeze::{freeze_all, thaw_all};

/// How long a disk may take to appear.
const DEADLINE: Duration = Duration::from_secs(10);
/// `_IOW('f', 16, __u64)` of `<linux/ext4.h>`: grow a mounted file system to so many blocks.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
/// Why a journal keeps a disk from being read.
const UNCLEAN: &str = "it was not unmounted in order and must be mounted for writing once, \
                       so that its journal is replayed";
/// The root's own disks come first, data disks after them.
const FIRST_DEVICE: u8 = b'c';

/// Refuses what cannot be meant.
pub(super) fn check(disks: &[DiskConfiguration]) -> Result<(), GuestError> {
    for DiskConfiguration { name, device, path, .. } in disks {
        let letter = match device.as_bytes() {
            [b'v', b'd', letter] => *letter,
            _ => 0,
        };
        if !(FIRST_DEVICE..=b'z').contains(&letter) {
            return Err(invalid(format!("disk {name}: `{device}` is not a data disk's device")));
        }
        let is_plain = |rest: &str| rest.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !path.strip_prefix('/').is_some_and(is_plain) {
            return Err(invalid(format!("disk {name}: `{path}` is not a directory to mount on")));
        }
    }
    Ok(())
}

/// Mounts each disk that is not mounted yet, wherever that was done.
pub(super) fn ensure_mounted(disks: &[DiskConfiguration]) -> Result<(), GuestError> {
    let failed = |disk: &DiskConfiguration, error: String| {
        let DiskConfiguration { name, path, .. } = disk;
        let kind = if error == UNCLEAN { ErrorKind::Unclean } else { ErrorKind::System };
        failure(kind, format!("disk {name} cannot be mounted on {path}: {error}"))
    };
    let mut missing: Vec<(PathBuf, &DiskConfiguration)> = Vec::new();
    for disk in disks {
        let place = is_mounted(disk).and_then(|is_mounted| match is_mounted {
            true => Ok(None),
            false => place_of(Path::new(&disk.path)).map(Some),
        });
        let Some(place) = place.map_err(|error| failed(disk, error))? else { continue };
        if let Some((_, other)) = missing.iter().find(|(there, _)| *there == place) {
            let error = format!("disk {} is mounted on {} too", other.name, place.display());
            return Err(failed(disk, error));
        }
        missing.push((place, disk));
    }
    // Whatever links lead there, a disk whose directory lies in another's comes after it.
    missing.sort_by(|(one, _), (other, _)| one.cmp(other));
    for (_, disk) in missing {
        // What is on the others may lead elsewhere.
        let mounted = place_of(Path::new(&disk.path)).and_then(|place| mount_on(disk, &place));
        mounted.map_err(|error| failed(disk, error))?;
    }
    Ok(())
}

/// Whether a disk is mounted: a path may lead elsewhere than it did, and a device does not.
fn is_mounted(disk: &DiskConfiguration) -> Result<bool, String> {
    let device = format!("/dev/{}", disk.device);
    wait_for(&device).map_err(|error| format!("{device}: {error}"))?;
    let number = fs::metadata(&device).map_err(|error| format!("{device}: {error}"))?.rdev();
    let number = (rustix::fs::major(number), rustix::fs::minor(number));
    let mounts = MountInfo::read().map_err(|error| error.to_string())?;
    Ok(mounts.iter().any(|mount| mount.device == number && mount.is_whole))
}

/// Where a path leads from the root: links are followed, and what is missing is added.
fn place_of(path: &Path) -> Result<PathBuf, String> {
    let mut place = PathBuf::from("/");
    for part in path.components().skip(1) {
        let next = place.join(part);
        place = match fs::canonicalize(&next) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(&next) {
                Ok(target) => {
                    let (link, target) = (next.display(), target.display());
                    return Err(format!("{link} is a link to {target}, which leads nowhere"));
                }
                Err(_) => next,
            },
            Err(error) => return Err(format!("{}: {error}", next.display())),
        };
    }
    match place == Path::new("/") {
        true => Err("it leads to the root".to_owned()),
        false => Ok(place),
    }
}

fn mount_on(disk: &DiskConfiguration, place: &Path) -> Result<(), String> {
    let device = format!("/dev/{}", disk.device);
    fs::create_dir_all(place).map_err(|error| format!("cannot make it: {error}"))?;
    let covered = File::open(place).map_err(|error| format!("cannot open it: {error}"))?;
    let (flags, options) = match (disk.read_only, takes_discards(&disk.device)) {
        (true, _) => (MountFlags::RDONLY, None),
        // What a disk is grown by reads as zeroes, so its inode tables need no zeroing. What is
        // deleted is given back to the host.
        (false, true) => (MountFlags::empty(), Some(c"noinit_itable,discard")),
        (false, false) => (MountFlags::empty(), Some(c"noinit_itable")),
    };
    let flags = flags | MountFlags::NOATIME | MountFlags::NODEV;
    match mount(&*device, place, "ext4", flags, options) {
        Ok(()) => {}
        Err(Errno::ROFS) if disk.read_only => return Err(UNCLEAN.to_owned()),
        Err(Errno::INVAL) => return Err("it has no ext4 file system, or a damaged one".to_owned()),
        Err(error) => return Err(error.to_string()),
    }
    if disk.read_only {
        return Ok(());
    }
    grow(&disk.device, place).map_err(|error| format!("cannot grow it: {error}"))?;
    fresh::fill(&covered, place).map_err(|error| format!("cannot fill it: {error}"))
}

/// Whether a block device has what is deleted on it given back to the host.
pub(crate) fn takes_discards(device: &str) -> bool {
    let limit = fs::read_to_string(format!("/sys/class/block/{device}/queue/discard_max_bytes"));
    limit.is_ok_and(|limit| limit.trim() != "0")
}

/// Grows the mounted file system to its device's size, if it is smaller.
fn grow(device: &str, path: &Path) -> io::Result<()> {
    const SECTOR: u64 = 512;
    let sectors = fs::read_to_string(format!("/sys/class/block/{device}/size"))?;
    let sectors: u64 = sectors.trim().parse().map_err(io::Error::other)?;
    let dir = File::open(path)?;
    let block = rustix::fs::statvfs(path)?.f_frsize.max(1);
    let blocks: u64 = sectors * SECTOR / block;
    // The kernel does nothing if the file system has the size already.
    // SAFETY: the operation reads a number of 64 bits that lives as long as the call.
    match unsafe { libc::ioctl(dir.as_raw_fd(), EXT4_IOC_RESIZE_FS as _, &blocks) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Unmounts every data disk, as nothing runs any more, so that each is found in order.
pub(crate) fn unmount_all() {
    freeze::thaw_all();
    // The last one mounted may lie within an earlier one.
    for mount in data_disks().iter().rev() {
        if let Err(error) = unmount(&*mount.place, UnmountFlags::empty()) {
            complain(&format!("cannot unmount {}: {error}", mount.place.display()));
        }
    }
}

/// Every mount of a data disk.
fn data_disks() -> Vec<MountInfo> {
    let mut mounts = MountInfo::read().unwrap_or_default();
    mounts.retain(MountInfo::is_data_disk);
    mounts
}

fn wait_for(device: &str) -> io::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match File::open(device) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn disk(device: &str, path: &str) -> DiskConfiguration {
        let (name, device, path) = ("data".into(), device.into(), path.into());
        DiskConfiguration { name, device, path, read_only: false }
    }

    #[test]
    fn only_a_data_disk_is_mounted_and_only_on_a_plain_path() {
        assert!(check(&[disk("vdc", "/data"), disk("vdz", "/srv/a")]).is_ok());
        for (device, path) in [
            ("vda", "/data"),
            ("vdb", "/data"),
            ("sda", "/data"),
            ("vdc1", "/data"),
            ("../vdc", "/data"),
            ("vdc", "data"),
            ("vdc", "/"),
            ("vdc", "/a/../etc"),
            ("vdc", ""),
        ] {
            assert!(check(&[disk(device, path)]).is_err(), "{device} {path}");
        }
    }

    #[test]
    fn a_place_is_where_links_lead_and_one_that_dangles_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("run/lock")).unwrap();
        fs::create_dir(root.join("var")).unwrap();
        let link = |target: &str, name: &str| symlink(target, root.join(name)).unwrap();
        link("../run", "var/run");
        link("nowhere", "var/lost");
        link("/", "var/top");
        let place = |path: &str| place_of(&root.join(path));
        assert_eq!(place("var/run/db"), Ok(root.join("run/db")));
        assert_eq!(place("var/run/lock"), Ok(root.join("run/lock")));
        assert_eq!(place("var/new/deep"), Ok(root.join("var/new/deep")));
        let lost = place("var/lost/db").unwrap_err();
        assert!(lost.contains("var/lost is a link to nowhere, which leads nowhere"), "{lost}");
        assert_eq!(place("var/top"), Err("it leads to the root".to_owned()));
    }
}
