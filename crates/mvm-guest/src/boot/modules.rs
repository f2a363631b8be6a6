//! Loads the kernel modules that the initial RAM filesystem lists.

use std::fs::{self, File};
use std::io;
use std::time::Instant;

use rustix::io::Errno;
use rustix::system::finit_module;

use crate::console::{complain, note};

/// Paths of modules, one per line, each after what it depends on.
const LIST: &str = "/etc/mvm/modules";

/// Loads every listed module. One that fails is reported and skipped: the kernel may do without.
pub(super) fn load() {
    let list = match fs::read_to_string(LIST) {
        Ok(list) => list,
        // A kernel with everything built in needs no list.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return complain(&format!("cannot read {LIST}: {error}")),
    };
    let start = Instant::now();
    let mut count = 0;
    for path in entries(&list) {
        match load_one(path) {
            Ok(()) => count += 1,
            Err(error) => complain(&format!("cannot load {path}: {error}")),
        }
        // The file is memory that nobody reads again.
        let _ = fs::remove_file(path);
    }
    note(&format!("{count} modules loaded in {} ms", start.elapsed().as_millis()));
}

fn load_one(path: &str) -> io::Result<()> {
    match finit_module(File::open(path)?, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_may_hold_blank_lines_and_remarks() {
        let list = "# order matters\n/lib/a.ko\n\n  /lib/b.ko \n";
        assert_eq!(entries(list).collect::<Vec<_>>(), ["/lib/a.ko", "/lib/b.ko"]);
    }

    #[test]
    fn a_missing_module_is_an_error_that_can_be_told() {
        assert_eq!(load_one("/nowhere/x.ko").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
