//! What is mounted where, as the kernel tells: by device, whatever paths led there.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use super::FIRST_DEVICE;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountInfo {
    /// The major and minor number of its filesystem's device.
    pub(super) device: (u32, u32),
    /// Whether it shows all of its filesystem, as opposed to a directory of it that was bound.
    pub(super) is_whole: bool,
    /// Where it is.
    pub(super) place: PathBuf,
    /// Whether it may be written.
    pub(super) is_writable: bool,
    source: String,
}

impl MountInfo {
    /// All mounts, in the order in which they were made.
    pub(super) fn read() -> io::Result<Vec<Self>> {
        Ok(parse(&fs::read("/proc/self/mountinfo")?))
    }

    /// Whether it is a data disk's: the root's own disks come before those.
    pub(super) fn is_data_disk(&self) -> bool {
        let letter = self.source.strip_prefix("/dev/vd").and_then(|rest| rest.bytes().next());
        letter.is_some_and(|letter| letter >= FIRST_DEVICE)
    }
}

fn parse(table: &[u8]) -> Vec<MountInfo> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `ID PARENT MAJOR:MINOR ROOT PLACE OPTIONS [FIELD…] - TYPE SOURCE OPTIONS`
fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|byte| *byte == b' ').skip(2);
    let device = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let (root, place, options) = (fields.next()?, fields.next()?, fields.next()?);
    let source = fields.skip_while(|field| *field != b"-").nth(2)?;
    Some(MountInfo {
        device: (device.0.parse().ok()?, device.1.parse().ok()?),
        is_whole: root == b"/",
        place: PathBuf::from(OsString::from_vec(unescaped(place))),
        is_writable: options.split(|byte| *byte == b',').any(|option| option == b"rw"),
        source: String::from_utf8_lossy(&unescaped(source)).into_owned(),
    })
}

/// The kernel writes spaces and the like as a backslash and three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        let digits = text.get(at + 1..at + 4).filter(|_| byte == b'\\');
        let value = digits.and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        plain.push(value.unwrap_or(byte));
        at += if value.is_some() { 4 } else { 1 };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 0:20 / / rw,noatime - overlay overlay rw,lowerdir=/mnt/lower\n\
        24 1 254:16 / /mnt/rw rw,noatime - ext4 /dev/vdb rw\n\
        31 22 254:32 / /run/my\\040db rw,nodev,noatime shared:3 master:1 - ext4 /dev/vdc rw\n\
        32 22 254:48 / /srv/ro ro,nodev - ext4 /dev/vdd ro\n\
        33 22 254:32 /sub /bound rw - ext4 /dev/vdc rw\n";

    #[test]
    fn mounts_are_told_by_their_devices() {
        let mounts = parse(TABLE);
        assert_eq!(mounts.len(), 5);
        let disks: Vec<&MountInfo> = mounts.iter().filter(|mount| mount.is_data_disk()).collect();
        let facts: Vec<_> = disks
            .iter()
            .map(|it| (it.device, it.place.to_str().unwrap(), it.is_whole, it.is_writable))
            .collect();
        assert_eq!(
            facts,
            [
                ((254, 32), "/run/my db", true, true),
                ((254, 48), "/srv/ro", true, false),
                ((254, 32), "/bound", false, true),
            ]
        );
    }

    #[test]
    fn this_process_has_mounts_and_what_is_no_escape_stays() {
        let mounts = MountInfo::read().unwrap();
        assert!(mounts.iter().any(|mount| mount.place.as_os_str() == "/"));
        assert_eq!(unescaped(b"a\\134b\\9\\"), b"a\\b\\9\\");
    }
}
