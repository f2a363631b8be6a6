//! The initial RAM filesystem of a microVM: the guest agent as `/init`, the kernel modules that it
//! loads, and the empty directories that it mounts on.
//!
//! It is not compressed: it is a few MiB, and unpacking would cost the guest more time than
//! reading costs the host. `/etc/mvm/modules` lists the modules' paths in load order, one per line.

use std::io::{self, Write};

use super::cpio::Archive;

/// The list of modules that the guest agent loads, one absolute path per line.
pub const MODULE_LIST: &str = "etc/mvm/modules";
/// Where the guest agent mounts filesystems, and moves into the root filesystem.
const MOUNT_POINTS: [&str; 6] = ["dev", "newroot", "proc", "run", "rw", "sys"];

/// Writes the archive; the same agent and modules give the same bytes.
///
/// `modules` are names and contents in load order.
///
/// # Errors
/// `out` cannot be written.
pub fn write_initrd(
    out: &mut impl Write,
    agent: &[u8],
    modules: &[(String, Vec<u8>)],
) -> io::Result<()> {
    let path = |name: &str| format!("lib/modules/{name}.ko");
    let list: String = modules.iter().map(|(name, _)| format!("/{}\n", path(name))).collect();
    let mut archive = Archive::default();
    for dir in MOUNT_POINTS {
        archive.dir(dir);
    }
    // The kernel opens the console for `/init` before anything is mounted.
    archive.char_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, agent).file(MODULE_LIST, 0o644, list.as_bytes());
    for (name, content) in modules {
        archive.file(&path(name), 0o644, content);
    }
    archive.write(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_listed_in_load_order() {
        let modules = [("zlib".to_owned(), b"Z".to_vec()), ("ext4".to_owned(), b"E".to_vec())];
        let mut initrd = Vec::new();
        write_initrd(&mut initrd, b"agent", &modules).unwrap();
        let text = String::from_utf8(initrd).unwrap();
        assert!(text.contains("/lib/modules/zlib.ko\n/lib/modules/ext4.ko\n"));
    }
}
