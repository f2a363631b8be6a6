//! One agent per state directory: a lock that the kernel gives back when its holder dies.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mvm_host::state_dir::StateDir;

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent holds it.
    #[error("another agent (pid {pid}) serves {dir}")]
    Held {
        /// The state directory.
        dir: PathBuf,
        /// The holder, as it wrote.
        pid: String,
    },
    /// The lock file cannot be used.
    #[error("cannot lock {path}")]
    File {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The held lock; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "held for its lock, closed on drop")] File);

/// Makes the state directory, open to root alone.
pub(crate) fn private_dir(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
}

/// Locks a state directory for this process.
pub(crate) fn acquire(dir: &Path) -> Result<Lock, LockError> {
    let path = StateDir::from(dir).lock();
    let failed = |source| LockError::File { path: path.clone(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            file.read_to_string(&mut pid).map_err(failed)?;
            return Err(LockError::Held { dir: dir.to_owned(), pid: pid.trim().to_owned() });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    let write = |file: &mut File| {
        // Over what was there, which finds room on a full filesystem too.
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        let length = file.stream_position()?;
        file.set_len(length)
    };
    write(&mut file).map_err(failed)?;
    Ok(Lock(file))
}

/// Whether an agent has the state directory, also one that does not answer (any more).
///
/// # Errors
/// The lock file cannot be read.
pub fn is_held(dir: &Path) -> Result<bool, LockError> {
    let path = StateDir::from(dir).lock();
    let failed = |source| LockError::File { path: path.clone(), source };
    match File::open(&path) {
        Ok(file) => match file.try_lock() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_with_the_first_ones_pid() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_held(dir.path()).unwrap());
        let lock = acquire(dir.path()).unwrap();
        assert!(is_held(dir.path()).unwrap());
        let error = acquire(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        assert!(!is_held(dir.path()).unwrap());
        acquire(dir.path()).unwrap();
    }
}
