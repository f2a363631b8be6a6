//! The serial console that each boot of a microVM leaves in its directory.
//!
//! The VMM drivers open it; [`crate::console`] reads it and keeps it bounded.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use crate::state_dir::InstanceDir;

/// Puts the previous boot's console aside and opens a new one for appending.
///
/// # Errors
/// The directory does not exist, or the disk is full.
pub fn rotate(dir: &InstanceDir) -> io::Result<File> {
    match std::fs::rename(dir.console_log(), dir.previous_console_log()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(dir.console_log())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::tail;
    use std::io::Write;

    #[test]
    fn each_boot_has_its_own_console_and_the_one_before_is_kept() {
        let temp = tempfile::tempdir().unwrap();
        let dir = InstanceDir::from(temp.path());
        for boot in ["first\n", "second\n", "third\n"] {
            rotate(&dir).unwrap().write_all(boot.as_bytes()).unwrap();
        }
        assert_eq!(tail(&dir.console_log(), 9).unwrap(), ["third"]);
        assert_eq!(tail(&dir.previous_console_log(), 9).unwrap(), ["second"]);
    }
}
