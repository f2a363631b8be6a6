//! Processes found by their user: what a crash may have left behind without a record, and whose they are.
//!
//! A user id and a process id are numbers, which a copy of a state directory has in its records as well.
//! What tells a microVM's process is what it holds: files of its instance's own directory, by device
//! and inode.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Process, ProcessIdentity};

/// The files of a directory, whatever they are called by now.
#[derive(Debug)]
pub(crate) struct Belongings(BTreeSet<(u64, u64)>);

impl Belongings {
    /// Those below `dir`; none if it does not exist.
    pub(crate) fn of(dir: &Path) -> io::Result<Self> {
        let mut found = BTreeSet::new();
        let mut left = vec![dir.to_owned()];
        while let Some(dir) = left.pop() {
            let entries = match fs::read_dir(&dir) {
                // Removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                // A link is not followed: what it leads to may be anybody's.
                let Ok(metadata) = entry.metadata() else { continue };
                found.insert(file_id(&metadata));
                if metadata.is_dir() {
                    left.push(entry.path());
                }
            }
        }
        Ok(Self(found))
    }

    /// Whether a process has one of them open, or for its root.
    pub(crate) fn are_held_by(&self, pid: u32) -> bool {
        let is_ours = |path: &Path| {
            path.metadata().is_ok_and(|metadata| self.0.contains(&file_id(&metadata)))
        };
        let of_process = Path::new("/proc").join(pid.to_string());
        let open = fs::read_dir(of_process.join("fd")).into_iter().flatten().flatten();
        is_ours(&of_process.join("root")) || open.map(|fd| fd.path()).any(|fd| is_ours(&fd))
    }
}

fn file_id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Opens the process that has this identity, if it runs and holds a file of the instance directory `dir`.
///
/// # Errors
/// It cannot be told.
pub(crate) fn adopt_holder(identity: ProcessIdentity, dir: &Path) -> io::Result<Option<Process>> {
    let pid = identity.pid;
    let Some(process) = Process::adopt(identity)? else { return Ok(None) };
    let is_ours = Belongings::of(dir)?.are_held_by(pid);
    // While it runs, the pid is its own.
    if !process.is_running()? {
        return Ok(None);
    }
    if !is_ours {
        tracing::warn!(
            pid,
            dir = %dir.display(),
            "left alone: a record names this process, which holds none of the instance's files; \
             it may be of a state directory that this one is a copy of"
        );
    }
    Ok(is_ours.then_some(process))
}

/// Ends every process of a user that holds a file of the instance directory `dir`, and waits for their
/// ends. Returns how many there were.
///
/// # Errors
/// `/proc` cannot be read, a process cannot be ended, the user is root or the caller's own, or it also
/// runs a process that is not of this directory: that one is left alone.
pub async fn end_all_of(uid: u32, dir: &Path) -> io::Result<usize> {
    if uid == 0 || uid == rustix::process::geteuid().as_raw() {
        let message = format!("user {uid} also runs what is not a microVM");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let (mut ended, mut foreign) = (0, Vec::new());
    let mut belongings = None;
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
        let Some(process) = Process::adopt(identity)? else { continue };
        let belongings = match &belongings {
            Some(known) => known,
            None => belongings.insert(Belongings::of(dir)?),
        };
        if belongings.are_held_by(pid) {
            process.kill().await?;
            process.wait().await;
            ended += 1;
        } else if process.is_running()? {
            foreign.push(pid.to_string());
        }
    }
    if !foreign.is_empty() {
        return Err(io::Error::other(format!(
            "it runs process {}, which has no file of {} open: it may be of a state directory that \
             this one is a copy of, or whose copy it is, and is left alone",
            foreign.join(", "),
            dir.display()
        )));
    }
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    #[tokio::test]
    async fn root_s_processes_and_one_s_own_are_never_ended() {
        for uid in [0, rustix::process::geteuid().as_raw()] {
            let error = end_all_of(uid, Path::new("/")).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    /// A process of `uid` that has the log of an instance directory open.
    fn holder(uid: u32, dir: &Path) -> std::process::Child {
        let log = File::options().create(true).append(true).open(dir.join("vmm.log")).unwrap();
        Command::new("sleep").arg("60").uid(uid).stdout(log).spawn().unwrap()
    }

    #[tokio::test]
    #[allow(clippy::print_stderr)] // a skipped test says why
    async fn processes_of_a_user_are_ended_and_no_others() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can start processes as other users");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let uid = 0x7100_0000 + std::process::id();
        let (one, two) = (holder(uid, dir.path()), holder(uid, dir.path()));
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(end_all_of(uid, dir.path()).await.unwrap(), 2);
        for child in [one, two] {
            assert!(ProcessIdentity::of(child.id()).is_err(), "it was ended and reaped");
        }
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[tokio::test]
    #[allow(clippy::print_stderr)] // a skipped test says why
    async fn what_a_copied_record_names_is_neither_adopted_nor_ended() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can start processes as other users");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let (original, copy) = (root.path().join("original"), root.path().join("copy"));
        fs::create_dir(&original).unwrap();
        let uid = 0x7200_0000 + std::process::id();
        let mut running = holder(uid, &original);
        fs::create_dir(&copy).unwrap();
        fs::copy(original.join("vmm.log"), copy.join("vmm.log")).unwrap();

        let identity = ProcessIdentity::of(running.id()).unwrap();
        assert!(adopt_holder(identity.clone(), &copy).unwrap().is_none());
        let refused = end_all_of(uid, &copy).await.unwrap_err().to_string();
        assert!(refused.contains(&running.id().to_string()), "{refused}");
        assert!(running.try_wait().unwrap().is_none(), "it was ended from the copy");

        // A directory that was only renamed has the same files.
        let renamed = root.path().join("renamed");
        fs::rename(&original, &renamed).unwrap();
        assert!(adopt_holder(identity, &renamed).unwrap().is_some());
        assert_eq!(end_all_of(uid, &renamed).await.unwrap(), 1);
        let _ = running.wait();
    }
}
