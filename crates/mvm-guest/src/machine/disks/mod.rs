//! Data disks: mounted where the host says before the guest is ready, unmounted before it stops.
//!
//! A file system that is smaller than its disk has been grown on the host and follows here, online.
//! A journal is replayed by the kernel as it mounts, except on a disk that may not be written.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use mvm_core::guest::{DiskConfiguration, GuestError};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::console::complain;
use crate::failure::{invalid, refused};

/// How long a disk may take to appear.
const DEADLINE: Duration = Duration::from_secs(10);
/// `_IOW('f', 16, __u64)` of `<linux/ext4.h>`: grow a mounted file system to so many blocks.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
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

/// Mounts each disk that is not mounted yet.
pub(super) fn ensure_mounted(disks: &[DiskConfiguration]) -> Result<(), GuestError> {
    for disk in disks {
        let failed = |error: String| {
            let DiskConfiguration { name, path, .. } = disk;
            refused(format!("disk {name} cannot be mounted on {path}"), error)
        };
        ensure_one(disk).map_err(failed)?;
    }
    Ok(())
}

fn ensure_one(disk: &DiskConfiguration) -> Result<(), String> {
    let device = format!("/dev/{}", disk.device);
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
    if mounted(&mounts).any(|(source, target)| source == device && target == disk.path) {
        return Ok(());
    }
    wait_for(&device).map_err(|error| format!("{device}: {error}"))?;
    fs::create_dir_all(&disk.path).map_err(|error| format!("cannot make it: {error}"))?;
    let (flags, options) = match disk.read_only {
        true => (MountFlags::RDONLY, None),
        // What a disk is grown by reads as zeroes, so its inode tables need no zeroing.
        false => (MountFlags::empty(), Some(c"noinit_itable")),
    };
    let flags = flags | MountFlags::NOATIME | MountFlags::NODEV;
    match mount(&*device, &*disk.path, "ext4", flags, options) {
        Ok(()) => {}
        Err(Errno::ROFS) if disk.read_only => {
            return Err("it was not unmounted in order and must be mounted for writing once, \
                        so that its journal is replayed"
                .to_owned());
        }
        Err(Errno::INVAL) => return Err("it has no ext4 file system, or a damaged one".to_owned()),
        Err(error) => return Err(error.to_string()),
    }
    if disk.read_only {
        return Ok(());
    }
    grow(&disk.device, Path::new(&disk.path)).map_err(|error| format!("cannot grow it: {error}"))
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
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let targets: Vec<&str> = mounted(&mounts).map(|(_, target)| target).collect();
    // The last one mounted may lie within an earlier one.
    for target in targets.into_iter().rev() {
        if let Err(error) = unmount(target, UnmountFlags::empty()) {
            complain(&format!("cannot unmount {target}: {error}"));
        }
    }
}

/// The devices of data disks with where they are mounted.
fn mounted(mounts: &str) -> impl Iterator<Item = (&str, &str)> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (source, target) = (fields.next()?, fields.next()?);
        let letter = *source.strip_prefix("/dev/vd")?.as_bytes().first()?;
        (letter >= FIRST_DEVICE).then_some((source, target))
    })
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
    fn data_disks_are_told_from_the_roots_own() {
        let table = "overlay / overlay rw 0 0\n/dev/vda /mnt/lower erofs ro 0 0\n\
                     /dev/vdc /data ext4 rw 0 0\n/dev/vdd /data/more ext4 ro 0 0\n";
        let found: Vec<_> = mounted(table).collect();
        assert_eq!(found, [("/dev/vdc", "/data"), ("/dev/vdd", "/data/more")]);
    }
}
