//! Starts a process in namespaces and a cgroup of its own: it is never anywhere else, not for one
//! instruction.
//!
//! Done by hand, because the standard library knows no other way than to fork first and to move then.
//! To move a process into a cgroup takes the kernel many milliseconds; to make it there takes none.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::spawn::{Child, ENVIRONMENT, Spawn, check, prepare_child};

/// `CLONE_CLEAR_SIGHAND` of `linux/sched.h`: no handler of the caller's runs in the child.
const CLEAR_SIGHAND: u64 = 0x1_0000_0000;
/// `CLONE_INTO_CGROUP` of the same.
const INTO_CGROUP: u64 = 0x2_0000_0000;
/// The first descriptor that is not standard input, output or error.
const FIRST: RawFd = 3;

/// What a process has of its own besides its session. It is the first of its PID namespace, whose processes
/// end with it, and its network namespace has nothing but a loopback link that is down.
#[derive(Debug, Clone, Copy)]
pub struct Apart<'a> {
    /// The directory of the cgroup (version 2) that it is made in; the caller's if absent.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// Starts it, and returns its pid and its pidfd.
///
/// The network namespace is made before the process, by a thread that ends with this: it takes a while, for
/// which the process would hold copies of all that the caller has open, locks of files among it.
pub(super) fn start(
    spawn: &Spawn<'_>,
    apart: Apart<'_>,
    child: &Child,
) -> io::Result<(u32, OwnedFd)> {
    let enter_and_start = || {
        // SAFETY: the network namespace is this thread's alone; no memory or file is unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        start_here(spawn, apart, child)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("spawn".into());
        let started = thread.spawn_scoped(scope, enter_and_start)?.join();
        started.map_err(|_| io::Error::other("the thread that starts a process panicked"))?
    })
}

/// Starts it in the network namespace of this thread.
fn start_here(spawn: &Spawn<'_>, apart: Apart<'_>, child: &Child) -> io::Result<(u32, OwnedFd)> {
    let words = std::iter::once(spawn.program.as_os_str());
    let words: Vec<CString> =
        words.chain(spawn.args.iter().map(|word| &**word)).map(text).collect::<io::Result<_>>()?;
    let variables = ENVIRONMENT.map(|(name, value)| text(format!("{name}={value}").as_ref()));
    let variables: Vec<CString> = variables.into_iter().collect::<io::Result<_>>()?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    // Above those that they become, so that none is overwritten before it is used.
    let above = |fd: Option<BorrowedFd<'_>>| {
        rustix::io::fcntl_dupfd_cloexec(fd.unwrap_or(null.as_fd()), FIRST)
    };
    let streams =
        [above(spawn.input)?, above(spawn.output)?, above(spawn.errors.or(spawn.output))?];
    let (failure, report) = pipe_with(PipeFlags::CLOEXEC)?;
    let exec = Exec {
        words: pointers(&words),
        variables: pointers(&variables),
        streams: streams.each_ref().map(AsRawFd::as_raw_fd),
        report: report.as_raw_fd(),
    };

    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero arguments are valid: they are integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    let flags = libc::CLONE_PIDFD | libc::CLONE_NEWPID;
    arguments.flags = u64::from(flags.cast_unsigned()) | CLEAR_SIGHAND;
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = apart.cgroup {
        arguments.flags |= INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: without a stack and without shared memory it is a fork: the child has a copy of
    // everything. It only makes system calls until it is the program, or has ended.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>())
    };
    match pid {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: this is the child.
        0 => unsafe { become_program(child, &exec) },
        _ => {}
    }
    // SAFETY: the kernel has made this descriptor for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    drop(report);
    let mut errno = [0; size_of::<i32>()];
    match File::from(failure).read_exact(&mut errno) {
        // It is the program: that has closed the pipe.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        told => {
            waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
            told?;
            return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)));
        }
    }
    let pid = u32::try_from(pid).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((pid, pidfd))
}

/// What the child needs, made before there is one: it must not allocate.
struct Exec {
    words: Vec<*const libc::c_char>,
    variables: Vec<*const libc::c_char>,
    streams: [RawFd; 3],
    report: RawFd,
}

/// Goes on as the program, or says why not and ends.
///
/// # Safety
/// For a process that was just forked, and has no other thread.
unsafe fn become_program(child: &Child, exec: &Exec) -> ! {
    let prepare = || {
        // SAFETY: system calls on numbers, and on structures and texts that live on.
        unsafe {
            // The standard library ignores it, for itself.
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()))?;
            for (to, from) in (0..).zip(exec.streams) {
                check(libc::dup2(from, to))?;
            }
            check(libc::chdir(c"/".as_ptr()))?;
            prepare_child(child)?;
            check(libc::execve(exec.words[0], exec.words.as_ptr(), exec.variables.as_ptr()))
        }
    };
    let failed = prepare().err().and_then(|error| error.raw_os_error()).unwrap_or(libc::EIO);
    let errno = failed.to_ne_bytes();
    // SAFETY: the bytes live as long as the call; if nobody reads them, nobody waits for them.
    unsafe {
        libc::write(exec.report, errno.as_ptr().cast(), errno.len());
        libc::_exit(127)
    }
}

fn text(word: &OsStr) -> io::Result<CString> {
    Ok(CString::new(word.as_bytes())?)
}

/// The pointers to these, with the null that ends them.
fn pointers(words: &[CString]) -> Vec<*const libc::c_char> {
    words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect()
}
