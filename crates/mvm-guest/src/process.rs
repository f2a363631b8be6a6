//! The system calls on child processes: signals, reaping, and being told of a child's end.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;

use mvm_core::guest::ExitStatus;

/// A descriptor that is readable while a child's end has not been looked at.
#[derive(Debug)]
pub(crate) struct ChildEnds(OwnedFd);

impl ChildEnds {
    /// Blocks `SIGCHLD` for this thread and all that it starts from now on.
    pub(crate) fn watch() -> io::Result<Self> {
        // SAFETY: plain system calls on a local signal set; a new descriptor has no other owner.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGCHLD);
            if libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Self(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// Makes the descriptor unreadable; then [`reap`] all there is.
    pub(crate) fn clear(&self) {
        // Ends of children that come together are one signal.
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        while matches!(rustix::io::read(&self.0, &mut info), Ok(len) if len > 0) {}
    }
}

impl AsFd for ChildEnds {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The next child that has ended, own or inherited, with how it ended.
pub(crate) fn reap() -> Option<(i32, ExitStatus)> {
    loop {
        let mut status = 0;
        // SAFETY: a plain system call that writes to a live integer.
        match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 | 0 => return None,
            pid if libc::WIFSIGNALED(status) => {
                return Some((
                    pid,
                    ExitStatus::Signaled { signal: libc::WTERMSIG(status), out_of_memory: false },
                ));
            }
            pid => return Some((pid, ExitStatus::Exited { code: libc::WEXITSTATUS(status) })),
        }
    }
}

/// Whether any child is left, ended or not.
pub(crate) fn has_children() -> bool {
    // SAFETY: a plain system call on a zeroed structure that it may fill.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        libc::waitid(libc::P_ALL, 0, &mut info, flags) == 0
    }
}

/// Sends a signal to one process; the caller has not reaped it yet.
pub(crate) fn signal(pid: i32, signal: i32) {
    if pid > 1 {
        // SAFETY: a plain system call.
        unsafe { libc::kill(pid, signal) };
    }
}

/// Sends a signal to a process group.
pub(crate) fn signal_group(group: i32, signal: i32) {
    if group > 1 {
        // SAFETY: a plain system call.
        unsafe { libc::kill(-group, signal) };
    }
}

/// Sends a signal to every process but this one; only for PID 1.
pub(crate) fn signal_all(signal: i32) {
    // SAFETY: a plain system call.
    unsafe { libc::kill(-1, signal) };
}

/// Takes over an inherited descriptor. Its number is left to the null device, so that standard
/// input, output and error stay taken.
pub(crate) fn take_inherited(number: i32) -> io::Result<OwnedFd> {
    let null = File::open("/dev/null")?;
    let flags = if number > 2 { libc::O_CLOEXEC } else { 0 };
    // SAFETY: plain system calls; a new descriptor has no other owner.
    unsafe {
        let own = libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3);
        if own < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::dup3(null.as_raw_fd(), number, flags);
        Ok(OwnedFd::from_raw_fd(own))
    }
}

/// Raises the limit of open files: a thousand execs have four thousand pipes.
pub(crate) fn raise_open_files(wanted: u64) {
    // SAFETY: plain system calls on a live structure.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 || limit.rlim_cur >= wanted {
            return;
        }
        let raised = libc::rlimit { rlim_cur: wanted, rlim_max: limit.rlim_max.max(wanted) };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raised) != 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
