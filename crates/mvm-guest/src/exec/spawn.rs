//! Starting a process: pipes, fork, and the child's way to `execve`.
//!
//! It is done by hand because the server must not wait for the child: `execve` may take as long as
//! the guest's disk does. The child reports a failure over a pipe that a success closes.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::ptr;

use mvm_core::guest::{ExecRequest, TerminalSize};
use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::OpenptFlags;

use super::program::{ChildStep, Program};
use super::surroundings::Entry;

/// Bytes that a pipe to or from a program holds: four times what the kernel gives, because each time
/// that one is full or empty costs a change of processes.
pub(super) const PIPE_LEN: usize = 256 * 1024;

/// A process that may not have reached its program yet.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: i32,
    /// Ends when the program runs; carries a [`ChildStep`] and an error number if it never will.
    pub(super) report: OwnedFd,
    /// The agent's ends of the program's standard streams.
    pub(super) ends: Ends,
}

/// The agent's ends of a program's standard streams, which do not block.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    /// The program's terminal itself. A terminal that nobody has open for a moment, as when a
    /// program closes its outputs before it exits, is at its end for who reads it.
    pub(super) terminal: Option<OwnedFd>,
}

/// The program's ends of its standard streams.
struct Stdio {
    streams: [OwnedFd; 3],
    is_terminal: bool,
}

impl Stdio {
    fn open(request: &ExecRequest, uid: u32) -> io::Result<(Self, Ends)> {
        match request.terminal {
            _ if request.detach => Ok((Self::null()?, Ends::default())),
            Some(size) => Self::terminal(size, request.stdin, uid),
            None => Self::pipes(request.stdin),
        }
    }

    fn null() -> io::Result<Self> {
        let null: OwnedFd = File::options().read(true).write(true).open("/dev/null")?.into();
        let streams = [null.try_clone()?, null.try_clone()?, null];
        Ok(Self { streams, is_terminal: false })
    }

    fn pipes(has_stdin: bool) -> io::Result<(Self, Ends)> {
        let (stdin_read, stdin) = match has_stdin {
            true => {
                let (read, write) = wide_pipe()?;
                (read, Some(unblocked(write)?))
            }
            false => (File::open("/dev/null")?.into(), None),
        };
        let (stdout, stdout_write) = wide_pipe()?;
        let (stderr, stderr_write) = wide_pipe()?;
        let (stdout, stderr) = (Some(unblocked(stdout)?), Some(unblocked(stderr)?));
        let ends = Ends { stdin, stdout, stderr, terminal: None };
        let streams = [stdin_read, stdout_write, stderr_write];
        Ok((Self { streams, is_terminal: false }, ends))
    }

    /// A pseudo-terminal that belongs to the program's user, as one that logs in has it.
    fn terminal(size: TerminalSize, has_stdin: bool, uid: u32) -> io::Result<(Self, Ends)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&controller)?;
        let terminal = rustix::pty::ioctl_tiocgptpeer(&controller, flags)?;
        set_size(&controller, size)?;
        // Only root may, and only root has a user to change to.
        let _ = rustix::fs::fchown(&terminal, Some(rustix::fs::Uid::from_raw(uid)), None);
        let controller = unblocked(controller)?;
        let stdin = has_stdin.then(|| controller.try_clone()).transpose()?;
        let streams = [terminal.try_clone()?, terminal.try_clone()?, terminal.try_clone()?];
        let terminal = Some(terminal);
        let ends = Ends { stdin, stdout: Some(controller), stderr: None, terminal };
        Ok((Self { streams, is_terminal: true }, ends))
    }
}

/// Gives a terminal a size; the kernel tells the programs in its foreground.
pub(super) fn set_size(terminal: &OwnedFd, size: TerminalSize) -> io::Result<()> {
    let TerminalSize { rows, columns } = size;
    let size =
        rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// Starts a process in a session and process group of its own, with its id.
pub(super) fn spawn(
    program: &Program,
    request: &ExecRequest,
    entry: &Entry<'_>,
) -> io::Result<Child> {
    let (stdio, ends) = Stdio::open(request, program.identity.uid)?;
    let (report, report_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let report = unblocked(report)?;

    let euid = rustix::process::geteuid().as_raw();
    let argv = pointers(&program.argv);
    let env = pointers(&program.env);
    let start = Start {
        program,
        argv: &argv,
        env: &env,
        stdio: stdio.streams.each_ref().map(|stream| stream.as_raw_fd()),
        is_terminal: stdio.is_terminal,
        report: report_write.as_raw_fd(),
        must_change_user: euid == 0 || euid != program.identity.uid,
        entry,
    };
    // SAFETY: the child only makes system calls on memory prepared above, and never returns.
    match unsafe { entry.fork() }? {
        0 => start.run(),
        pid => Ok(Child { pid, report, ends }),
    }
}

fn wide_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let pipe = pipe_with(PipeFlags::CLOEXEC)?;
    // One that the kernel leaves as it was is slower, and as good.
    let _ = rustix::pipe::fcntl_setpipe_size(&pipe.0, PIPE_LEN);
    Ok(pipe)
}

fn unblocked(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK)?;
    Ok(fd)
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// What the child works with.
struct Start<'a> {
    program: &'a Program,
    argv: &'a [*const libc::c_char],
    env: &'a [*const libc::c_char],
    stdio: [RawFd; 3],
    /// Whether they are a terminal, which controls the program's session.
    is_terminal: bool,
    report: RawFd,
    must_change_user: bool,
    entry: &'a Entry<'a>,
}

impl Start<'_> {
    /// The child's whole life before its program: no allocation, no lock, no return.
    fn run(&self) -> ! {
        let (step, errno) = self.reach_program();
        let errno = errno.to_ne_bytes();
        let report = [step as u8, errno[0], errno[1], errno[2], errno[3]];
        // SAFETY: plain system calls on a live buffer; `_exit` runs no handlers of the parent.
        unsafe {
            libc::write(self.report, report.as_ptr().cast(), report.len());
            libc::_exit(127)
        }
    }

    fn reach_program(&self) -> (ChildStep, i32) {
        // SAFETY: plain system calls; the descriptors are open and above 2, because the process
        // starts with 0 to 2 open; all pointers are to prepared, terminated memory.
        unsafe {
            libc::setsid();
            // A refusal leaves the program without job control, which it tells itself.
            if self.is_terminal {
                libc::ioctl(self.stdio[0], libc::TIOCSCTTY, 0);
            }
            for (to, from) in self.stdio.iter().enumerate() {
                if libc::dup2(*from, to as RawFd) < 0 {
                    return (ChildStep::Execute, errno());
                }
            }
            // What Rust's runtime ignores, and the agent beside an init; handlers end with `execve`.
            for signal in [libc::SIGPIPE, libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
            if let Err(errno) = self.entry.enter() {
                return (ChildStep::EnterNamespace, errno);
            }
            if self.entry.set_limits().is_err() {
                return (ChildStep::SetLimits, errno());
            }
            if self.must_change_user {
                let identity = &self.program.identity;
                // The raw calls: the C library's would look for other threads to change.
                let failed = libc::syscall(
                    libc::SYS_setgroups,
                    identity.groups.len(),
                    identity.groups.as_ptr(),
                ) != 0
                    || libc::syscall(libc::SYS_setgid, identity.gid) != 0
                    || libc::syscall(libc::SYS_setuid, identity.uid) != 0;
                if failed {
                    return (ChildStep::BecomeUser, errno());
                }
            }
            if libc::chdir(self.program.cwd.as_ptr()) != 0 {
                let errno = errno();
                if self.program.is_cwd_required || libc::chdir(c"/".as_ptr()) != 0 {
                    return (ChildStep::EnterDirectory, errno);
                }
            }
        }
        (ChildStep::Execute, self.execute())
    }

    /// Tries the candidates; returns the most telling error number.
    fn execute(&self) -> i32 {
        let mut result = libc::ENOENT;
        for candidate in &self.program.candidates {
            let candidate: &CStr = candidate;
            // Looking costs far less than trying: `execve` makes an address space before it looks.
            // SAFETY: the string ends with a zero.
            if unsafe { libc::access(candidate.as_ptr(), libc::F_OK) } != 0
                && matches!(errno(), libc::ENOENT | libc::ENOTDIR)
            {
                continue;
            }
            // SAFETY: the arrays end with a null pointer, the strings with a zero.
            unsafe { libc::execve(candidate.as_ptr(), self.argv.as_ptr(), self.env.as_ptr()) };
            match errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => result = libc::EACCES,
                other => return other,
            }
        }
        result
    }
}

fn errno() -> i32 {
    // SAFETY: the C library's own per-thread number.
    unsafe { *libc::__errno_location() }
}
