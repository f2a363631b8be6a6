//! The log that a background agent writes: what its standard error was opened on.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::fstat;
use rustix::stdio;

/// Bytes of a log at which another one is begun.
const LONGEST: u64 = 8 * 1024 * 1024;

/// Where the earlier log is kept: the last one only, so that both take a bounded space.
fn earlier(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Begins another log if this process writes to this one and it has grown too long. Whatever writes to
/// standard error goes on in the new one. A log that is somebody else's is left alone.
///
/// # Errors
/// The log cannot be renamed, or another one not be made.
pub fn bound_own_log(log: &Path) -> io::Result<()> {
    bound(log, LONGEST)
}

fn bound(log: &Path, longest: u64) -> io::Result<()> {
    let file = match fs::metadata(log) {
        Ok(file) if file.len() > longest => file,
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let is_it = |stream| {
        fstat(stream).is_ok_and(|stream| (stream.st_dev, stream.st_ino) == (file.dev(), file.ino()))
    };
    let (output, errors) = (is_it(stdio::stdout()), is_it(stdio::stderr()));
    if !errors {
        return Ok(());
    }
    fs::rename(log, earlier(log))?;
    let fresh = OpenOptions::new().create(true).append(true).mode(0o600).open(log)?;
    stdio::dup2_stderr(&fresh)?;
    if output {
        stdio::dup2_stdout(&fresh)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_of_somebody_else_and_one_that_is_short_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("agent.log");
        bound(&log, 3).unwrap();
        fs::write(&log, "long enough").unwrap();
        bound(&log, 3).unwrap();
        bound(&log, 100).unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "long enough");
        assert!(!earlier(&log).exists());
    }
}
