//! The Firecrackers of a state directory: one pair of programs for each version that ever started a
//! microVM here.
//!
//! ```text
//!  STATE/firecracker/1.15.1/firecracker   jailer
//!                    1.16.2/firecracker   jailer
//! ```
//!
//! What a Firecracker has saved, only the same version restores for certain. So whatever replaces
//! the installed one, the one that something sleeps on stays, and microVMs are started with the copy,
//! which nobody replaces in between. The driver and `mvm bootstrap` put them here.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{FirecrackerVersion, JAILER, PROGRAM, Programs};
use crate::image::durable::{FileError, NameLock, Named};

/// What came of keeping a pair of programs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It is kept now.
    Made,
    /// It was already.
    AlreadyThere,
    /// Other programs are kept that call themselves the same version.
    Others,
}

/// The program of a version that is kept, which has its jailer beside it.
pub(super) fn program(dir: &Path, version: FirecrackerVersion) -> Option<PathBuf> {
    let program = dir.join(version.to_string()).join(PROGRAM);
    program.is_file().then_some(program)
}

/// The program of the newest version that is kept and fit to start microVMs.
pub(super) fn newest(dir: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(dir).ok()?.flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let versions = names.filter_map(|name| FirecrackerVersion::parse(&name));
    let newest = versions.filter(|version| version.problem().is_none()).max()?;
    program(dir, newest)
}

/// Keeps a pair of programs under its version.
///
/// # Errors
/// They cannot be read, or the directory cannot be written.
pub(crate) fn keep(dir: &Path, programs: &Programs) -> Result<Kept, FileError> {
    let version = programs.version.to_string();
    let lock = NameLock::acquire(dir, &version)?;
    let home = dir.join(&version);
    let pairs = [(&programs.firecracker, PROGRAM), (&programs.jailer, JAILER)];
    if home.exists() {
        for (from, name) in pairs {
            if !is_same(from, &home.join(name))? {
                return Ok(Kept::Others);
            }
        }
        return Ok(Kept::AlreadyThere);
    }
    let tree = lock.temp_tree()?;
    for (from, name) in pairs {
        let to = tree.path().join(name);
        fs::copy(from, &to).named("copy", from)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))
            .named("set the mode of", &to)?;
    }
    tree.publish(&home)?;
    Ok(Kept::Made)
}

fn is_same(one: &Path, other: &Path) -> Result<bool, FileError> {
    let len = |path: &Path| Ok(fs::metadata(path).named("read", path)?.len());
    if len(one)? != len(other)? {
        return Ok(false);
    }
    Ok(fs::read(one).named("read", one)? == fs::read(other).named("read", other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs(dir: &Path, content: &str, version: FirecrackerVersion) -> Programs {
        let [firecracker, jailer] = [PROGRAM, JAILER].map(|name| {
            fs::write(dir.join(name), format!("{content} {name}")).unwrap();
            dir.join(name)
        });
        Programs { firecracker, jailer, version }
    }

    #[test]
    fn each_version_is_kept_once_and_the_newest_fit_one_is_used() {
        let (state, installed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dir = state.path().join("kept");
        assert_eq!(newest(&dir), None);
        let [old, new, unfit] = [(1, 15, 1), (1, 15, 12), (1, 16, 0)]
            .map(|(major, minor, patch)| FirecrackerVersion(major, minor, patch));
        for version in [old, new, unfit] {
            let programs = programs(installed.path(), &version.to_string(), version);
            assert_eq!(keep(&dir, &programs).unwrap(), Kept::Made);
            assert_eq!(keep(&dir, &programs).unwrap(), Kept::AlreadyThere);
        }
        let kept = newest(&dir).unwrap();
        assert_eq!(kept, dir.join("1.15.12/firecracker"));
        assert_eq!(fs::read_to_string(kept).unwrap(), "1.15.12 firecracker");
        // The old one is as it was, whatever calls itself the same.
        let others = programs(installed.path(), "rebuilt", old);
        assert_eq!(keep(&dir, &others).unwrap(), Kept::Others);
        let kept = program(&dir, old).unwrap();
        assert_eq!(fs::read_to_string(kept).unwrap(), "1.15.1 firecracker");
        assert_eq!(program(&dir, FirecrackerVersion(1, 14, 0)), None);
    }
}
