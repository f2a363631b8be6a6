//! Runs a tool that mounts filesystems or leaves processes behind, so that nothing of it outlives it.
//!
//! ```text
//!  agent ── fork ──> keeper ── fork ──> tool ──> its children, in whatever session
//!    └── lifeline ────┘ PID 1 of a PID namespace, in a mount namespace of their own
//! ```
//!
//! The keeper ends when the tool ends, when the agent gives the tool up, and when the agent itself is
//! gone, which closes the lifeline. With PID 1 the kernel ends every process of the namespace, and the
//! mounts go with the last of them; the host never sees one.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::ExitStatus;
use std::ptr;

use rustix::event::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::process::{Child, Command};

use super::spawn::check;
use super::starting::starting;

/// What a shell adds to the number of the signal that ended a program.
const SIGNALED: i32 = 128;

/// Ends the tool and everything that it started when this is dropped, and waits for that.
pub(super) struct Keeper {
    pidfd: OwnedFd,
    _lifeline: OwnedFd,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It is reaped by its `Child`, so until then the descriptor is its own.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        // The kernel has ended and reaped the whole namespace by the time that its first process ends.
        while let Err(rustix::io::Errno::INTR) =
            rustix::event::poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], None)
        {}
    }
}

/// Starts it; for root, on a tokio runtime. The child is the keeper, which ends with the tool's code.
pub(super) fn spawn(mut command: Command) -> io::Result<(Child, Keeper)> {
    let (watched, lifeline) = pipe_with(PipeFlags::CLOEXEC)?;
    let fd = watched.as_raw_fd();
    // SAFETY: it runs between fork and exec, makes system calls on numbers only, and allocates nothing.
    unsafe { command.pre_exec(move || become_keeper(fd)) };
    let runtime = tokio::runtime::Handle::current();
    let start = || {
        let _runtime = runtime.enter();
        // SAFETY: what is unshared is where this thread's children go; it ends with its only child's start.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
        starting(|| command.spawn())
    };
    let child = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("spawn".into());
        let started = thread.spawn_scoped(scope, start)?.join();
        started.map_err(|_| io::Error::other("the thread that starts a process panicked"))?
    })?;
    let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    Ok((child, Keeper { pidfd, _lifeline: lifeline }))
}

/// How the tool ended, out of how its keeper did.
pub(super) fn tools_status(keeper: ExitStatus) -> ExitStatus {
    use std::os::unix::process::ExitStatusExt;
    match keeper.code() {
        Some(code) if (SIGNALED + 1..SIGNALED + 65).contains(&code) => {
            ExitStatus::from_raw(code - SIGNALED)
        }
        _ => keeper,
    }
}

/// Returns in the process that becomes the tool. This one, the first of its PID namespace, stays and
/// keeps it. Makes only system calls.
fn become_keeper(lifeline: RawFd) -> io::Result<()> {
    // SAFETY: system calls on numbers, on static texts and on structures that live on.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        // What the host mounts and unmounts is seen here, nothing of here there.
        let flags = libc::MS_REC | libc::MS_SLAVE;
        check(libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), flags, ptr::null()))?;
        // Where a container forbids it, the old one shows the tool under another number.
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let proc = c"proc".as_ptr();
        libc::mount(proc, c"/proc".as_ptr(), proc, flags, ptr::null());
        check(libc::setsid())?;
        let mut children: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut children);
        libc::sigaddset(&raw mut children, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const children, &raw mut before))?;
        let ends = libc::signalfd(-1, &raw const children, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        check(ends)?;
        // Handlers of the agent write to descriptors that this process shares with it.
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut gate = [-1; 2];
        check(libc::pipe2(gate.as_mut_ptr(), libc::O_CLOEXEC))?;
        let [closed, open] = gate;
        match libc::fork() {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                check(libc::sigprocmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()))?;
                // Who starts a process counts on it that nothing else has copies of its files afterwards.
                check(libc::close(open))?;
                let mut nothing = 0_u8;
                libc::read(closed, (&raw mut nothing).cast(), 1);
                Ok(())
            }
            tool => keep(tool, lifeline, ends, open),
        }
    }
}

/// Closes everything of the agent's, and `gate` at last, which lets the tool begin. Waits for the tool's
/// end or the agent's, and ends: with it all that is left.
///
/// # Safety
/// For a process that was just forked, and has no other thread.
unsafe fn keep(tool: libc::pid_t, lifeline: RawFd, ends: RawFd, gate: RawFd) -> ! {
    // SAFETY: system calls on numbers and on structures that live on; no descriptor is used by others.
    unsafe {
        // The standard streams are there, so these are all above them.
        for (fd, to) in [(lifeline, 0), (ends, 1), (gate, 2)] {
            libc::dup2(fd, to);
        }
        // Above all the pipe that tells that the tool runs, and the agent's locks.
        libc::close_range(3, libc::c_uint::MAX, 0);
        libc::close(2);
        libc::prctl(libc::PR_SET_NAME, c"mvm-keeper".as_ptr());
        let watch = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        loop {
            let mut fds = [watch(0), watch(1)];
            libc::poll(fds.as_mut_ptr(), 2, -1);
            if fds[0].revents != 0 {
                libc::_exit(1);
            }
            let mut told: libc::signalfd_siginfo = std::mem::zeroed();
            libc::read(1, (&raw mut told).cast(), size_of::<libc::signalfd_siginfo>());
            loop {
                let mut status = 0;
                match libc::waitpid(-1, &raw mut status, libc::WNOHANG) {
                    ended if ended <= 0 => break,
                    ended if ended != tool => {}
                    _ if libc::WIFSIGNALED(status) => {
                        libc::_exit(SIGNALED + libc::WTERMSIG(status))
                    }
                    _ => libc::_exit(libc::WEXITSTATUS(status)),
                }
            }
        }
    }
}
