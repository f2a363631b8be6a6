//! Processes found by their user: what a crash may have left behind without a record.

use std::io;
use std::os::unix::fs::MetadataExt;

use super::{Process, ProcessIdentity};

/// Ends every process of a user and waits for their ends. Returns how many there were.
///
/// The user must be one that mvm alone gives to processes: each instance has its own.
///
/// # Errors
/// `/proc` cannot be read, a process cannot be ended, or the user is root or the caller's own.
pub async fn end_all_of(uid: u32) -> io::Result<usize> {
    if uid == 0 || uid == rustix::process::geteuid().as_raw() {
        let message = format!("user {uid} also runs what is not a microVM");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let mut ended = 0;
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process that ends meanwhile is what is wanted.
        if !entry.metadata().is_ok_and(|metadata| metadata.uid() == uid) {
            continue;
        }
        let Ok(identity) = ProcessIdentity::of(pid) else { continue };
        if let Some(process) = Process::adopt(identity)? {
            process.kill().await?;
            process.wait().await;
            ended += 1;
        }
    }
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    #[tokio::test]
    async fn root_s_processes_and_one_s_own_are_never_ended() {
        for uid in [0, rustix::process::geteuid().as_raw()] {
            assert_eq!(end_all_of(uid).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[tokio::test]
    #[allow(clippy::print_stderr)] // a skipped test says why
    async fn processes_of_a_user_are_ended_and_no_others() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can start processes as other users");
            return;
        }
        let uid = 0x7100_0000 + std::process::id();
        let sleep = || Command::new("sleep").arg("60").uid(uid).spawn().unwrap();
        let (one, two) = (sleep(), sleep());
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(end_all_of(uid).await.unwrap(), 2);
        for child in [one, two] {
            assert!(ProcessIdentity::of(child.id()).is_err(), "it was ended and reaped");
        }
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
