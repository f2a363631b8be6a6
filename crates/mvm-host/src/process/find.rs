//! Where the host's programs are.
//!
//! Everything that starts a program looks here first, so that a program that the doctor finds is
//! also the one that runs: who became root with `su` has none of the administrators' directories
//! in `PATH`.

use std::env;
use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Directories for administrators.
const ADMIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Finds an executable in `PATH` or in the directories for administrators.
pub fn find_program(name: impl AsRef<Path>) -> Option<PathBuf> {
    find_in(&env::var_os("PATH").unwrap_or_default(), name.as_ref())
}

/// The program to start for this name; the name itself if it is a path, or nothing is found.
pub(crate) fn program(name: &OsStr) -> PathBuf {
    let name = Path::new(name);
    let is_path = name.components().count() > 1;
    let found = if is_path { None } else { find_program(name) };
    found.unwrap_or_else(|| name.to_owned())
}

fn find_in(path: &OsStr, name: &Path) -> Option<PathBuf> {
    let dirs = env::split_paths(path).chain(ADMIN.map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|file| {
        file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_name() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-at-all").is_none());
    }

    #[test]
    fn administrators_programs_need_no_path() {
        // Part of the package manager on Debian, of the system's base elsewhere.
        let found = find_in(OsStr::new("/nowhere"), Path::new("ldconfig"));
        assert!(found.is_some_and(|file| file.ends_with("sbin/ldconfig")));
        assert_eq!(find_in(OsStr::new("/nowhere"), Path::new("sh")), None);
    }

    #[test]
    fn a_path_and_what_is_not_found_stay_as_they_are() {
        for name in ["/bin/sh", "./sh", "no-such-program-at-all"] {
            assert_eq!(program(OsStr::new(name)), Path::new(name));
        }
    }
}
