//! Processes of the host, held by pidfd and known by pid, start time and boot id.
//!
//! The VMM drivers start and adopt their VMMs with it, and every other module runs tools through
//! [`ToolError`]. It never signals a bare pid: a number that the kernel has given to somebody else is
//! recognised and left alone.

mod apart;
mod become_program;
mod contained;
mod daemon;
mod exit_info;
pub(crate) mod find;
mod identity;
mod open_files;
mod own_log;
mod spawn;
mod starting;
mod strays;
mod tool;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use mvm_core::vmm::ProcessEnd;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;

pub use apart::Apart;
pub use become_program::become_program;
pub use daemon::spawn_daemon;
pub use find::find_program;
pub use identity::{ProcessIdentity, ResourceUsage, boot_id};
pub use open_files::raise_open_files;
pub use own_log::bound_own_log;
pub use spawn::{Spawn, spawn};
pub(crate) use starting::between_starts;
#[cfg(test)]
pub(crate) use starting::starting;
pub(crate) use strays::adopt_holder;
pub use strays::end_all_of;
pub(crate) use tool::Tool;
pub use tool::ToolError;

/// How often, and how many times, an exit status that the process's parent has yet to collect is
/// asked for again.
const EXIT_INFO_INTERVAL: Duration = Duration::from_millis(10);
const EXIT_INFO_ATTEMPTS: u32 = 20;

/// One process, held by pidfd. Dropping it leaves the process alone.
#[derive(Debug)]
pub struct Process {
    identity: ProcessIdentity,
    pidfd: AsyncFd<OwnedFd>,
    end: OnceCell<ProcessEnd>,
}

impl Process {
    /// Opens the process that has this identity, or `None` if it has ended.
    ///
    /// # Errors
    /// It cannot be told whether the process runs. Must be called on a tokio runtime.
    pub fn adopt(identity: ProcessIdentity) -> io::Result<Option<Self>> {
        if identity.host_boot_id != boot_id()? {
            return Ok(None);
        }
        let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // Nobody has the pid, or a thread that leads no process has it.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The pidfd pins one process; only now does its start time say whether it is the right one.
        match identity::start_ticks(identity.pid) {
            Ok(start_ticks) if start_ticks == identity.start_ticks => {}
            Ok(_) => return Ok(None),
            Err(error) if identity::is_gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        let process = Self::new(identity, pidfd)?;
        Ok(process.is_running()?.then_some(process))
    }

    #[allow(unsafe_code)]
    fn new(identity: ProcessIdentity, pidfd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
        Ok(Self { identity, pidfd, end: OnceCell::new() })
    }

    /// What to remember to find the process again.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Whether the process has not ended yet. One that only waits to be reaped has ended.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn is_running(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(rustix::event::poll(&mut fds, Some(&now))? == 0)
    }

    /// Waits for the process to end, and reaps it if it is a child. May be called by many, also
    /// after the end.
    pub async fn wait(&self) -> ProcessEnd {
        *self.end.get_or_init(|| self.observe_end()).await
    }

    async fn observe_end(&self) -> ProcessEnd {
        if self.pidfd.readable().await.is_err() {
            return ProcessEnd::Unobserved; // the runtime is shutting down
        }
        let pidfd = self.pidfd.get_ref().as_fd();
        match waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED) {
            Ok(Some(status)) => {
                let code = status.exit_status().map(|code| ProcessEnd::Exited { code });
                let signal = status.terminating_signal();
                return code
                    .or(signal.map(|signal| ProcessEnd::Signaled { signal }))
                    .unwrap_or(ProcessEnd::Unobserved);
            }
            Ok(None) => return ProcessEnd::Unobserved,
            // Not our child: the kernel tells its status once its parent has reaped it.
            Err(_) => {}
        }
        for _ in 0..EXIT_INFO_ATTEMPTS {
            match exit_info::of(pidfd) {
                exit_info::ExitInfo::Known(end) => return end,
                exit_info::ExitInfo::NotYet => tokio::time::sleep(EXIT_INFO_INTERVAL).await,
                exit_info::ExitInfo::Unsupported => break,
            }
        }
        ProcessEnd::Unobserved
    }

    /// Ends the process at once and waits until it is gone; it is not an error if it has ended.
    ///
    /// # Errors
    /// The operating system refused.
    pub async fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        self.wait().await;
        Ok(())
    }

    /// Like [`Self::kill`] where nothing can be awaited: the few milliseconds that the kernel needs
    /// are spent waiting.
    pub(crate) fn kill_now(&self) {
        let ended = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL).and_then(|()| {
            waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), WaitIdOptions::EXITED)
        });
        if let Err(error) = ended
            && !matches!(error, Errno::SRCH | Errno::CHILD)
        {
            tracing::warn!(pid = self.identity.pid, %error, "cannot kill a process");
        }
    }

    /// What the process uses.
    ///
    /// # Errors
    /// The process has ended.
    pub fn usage(&self) -> io::Result<ResourceUsage> {
        identity::usage(&self.identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::path::Path;

    fn sleeper() -> Process {
        let args = [OsString::from("600")];
        spawn(&Spawn::new(Path::new("/bin/sleep"), &args)).unwrap()
    }

    #[tokio::test]
    async fn a_child_is_killed_reaped_and_its_end_told_to_everyone() {
        let process = sleeper();
        assert!(process.is_running().unwrap());
        process.kill().await.unwrap();
        process.kill().await.unwrap();
        let (one, two) = tokio::join!(process.wait(), process.wait());
        assert_eq!(one, ProcessEnd::Signaled { signal: 9 });
        assert_eq!(one, two);
        assert!(!Path::new(&format!("/proc/{}", process.identity().pid)).exists(), "a zombie");
    }

    #[tokio::test]
    async fn an_exit_code_is_seen() {
        let args = ["-c", "exit 7"].map(OsString::from);
        let process = spawn(&Spawn::new(Path::new("/bin/sh"), &args)).unwrap();
        assert_eq!(process.wait().await, ProcessEnd::Exited { code: 7 });
    }

    #[tokio::test]
    async fn a_live_process_is_adopted_and_a_recycled_pid_is_not() {
        let process = sleeper();
        let identity = process.identity().clone();
        assert!(Process::adopt(identity.clone()).unwrap().is_some());
        let earlier = ProcessIdentity { start_ticks: identity.start_ticks - 1, ..identity.clone() };
        assert!(Process::adopt(earlier).unwrap().is_none());
        let other_boot = ProcessIdentity { host_boot_id: "earlier".into(), ..identity.clone() };
        assert!(Process::adopt(other_boot).unwrap().is_none());
        process.kill().await.unwrap();
        assert!(Process::adopt(identity).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_process_that_waits_to_be_reaped_is_gone() {
        let args = [OsString::from("0")];
        let process = spawn(&Spawn::new(Path::new("/bin/sleep"), &args)).unwrap();
        process.pidfd.readable().await.unwrap().retain_ready();
        assert!(Path::new(&format!("/proc/{}", process.identity().pid)).exists());
        assert!(Process::adopt(process.identity().clone()).unwrap().is_none());
        assert_eq!(process.wait().await, ProcessEnd::Exited { code: 0 });
    }

    /// The middle process dies, its child is left to somebody else to reap.
    #[tokio::test]
    async fn a_process_of_another_parent_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let script = format!("sleep 600 >/dev/null 2>&1 & echo $! > {}", pid_file.display());
        Tool::new("sh").args(["-c", &script]).run().await.unwrap();
        let pid: u32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
        let process = Process::adopt(ProcessIdentity::of(pid).unwrap()).unwrap().unwrap();
        process.kill().await.unwrap();
        assert!(matches!(
            process.wait().await,
            ProcessEnd::Signaled { signal: 9 } | ProcessEnd::Unobserved
        ));
    }

    #[tokio::test]
    async fn usage_is_told_while_the_process_lives() {
        let process = sleeper();
        assert!(process.usage().unwrap().rss_kib > 0);
        process.kill().await.unwrap();
        assert!(process.usage().is_err());
    }
}
