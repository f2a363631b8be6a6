//! Starts a process that outlives the agent: own session, no privileges to gain, nothing inherited
//! but what is handed over.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::UnshareFlags;

use super::{Process, ProcessIdentity};

/// A process to start.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The program, by path or by a name to be found in `PATH`.
    pub program: &'a Path,
    /// Its arguments.
    pub args: &'a [OsString],
    /// The user and group that it runs as; the caller's own if absent.
    pub uid: Option<u32>,
    /// With a user: its only supplementary groups.
    pub groups: &'a [u32],
    /// Descriptors that it inherits under the numbers they have here.
    pub keep: &'a [BorrowedFd<'a>],
    /// Its standard input; nothing if absent.
    pub input: Option<BorrowedFd<'a>>,
    /// Where its standard output and error go; nowhere if absent.
    pub output: Option<BorrowedFd<'a>>,
    /// Where its standard error goes instead.
    pub errors: Option<BorrowedFd<'a>>,
    /// Whether it sees processes of the host.
    pub pids: Pids,
}

/// Which processes a process sees and can signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pids {
    /// Those that the caller sees.
    Host,
    /// Itself and its children alone, which end with it: it is the first of a PID namespace.
    Own,
}

impl<'a> Spawn<'a> {
    /// A process that inherits nothing and is silent.
    pub fn new(program: &'a Path, args: &'a [OsString]) -> Self {
        Self {
            program,
            args,
            uid: None,
            groups: &[],
            keep: &[],
            input: None,
            output: None,
            errors: None,
            pids: Pids::Host,
        }
    }
}

/// Starts the process. It has a session of its own, the standard search path as its only
/// environment, `/` as its directory, no core dumps and no way to gain privileges.
///
/// # Errors
/// The program cannot be run, or the caller may not become its user. Must be called on a tokio
/// runtime.
pub fn spawn(spawn: &Spawn<'_>) -> io::Result<Process> {
    let stdio = |fd: Option<BorrowedFd<'_>>| -> io::Result<Stdio> {
        Ok(fd.map(|fd| fd.try_clone_to_owned()).transpose()?.map_or_else(Stdio::null, Stdio::from))
    };
    let mut command = Command::new(spawn.program);
    command
        .args(spawn.args)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(stdio(spawn.input)?)
        .stdout(stdio(spawn.output)?)
        .stderr(stdio(spawn.errors.or(spawn.output))?);
    let child = Child {
        uid: spawn.uid,
        groups: spawn.groups.to_vec(),
        keep: spawn.keep.iter().map(AsRawFd::as_raw_fd).collect(),
    };
    before_exec(&mut command, child);
    // The child is not waited for through `std`: its pidfd reaps it.
    let child = match spawn.pids {
        Pids::Host => command.spawn()?,
        Pids::Own => spawn_first_of_namespace(command)?,
    };
    let opened = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?))
        .and_then(|pidfd: OwnedFd| Process::new(ProcessIdentity::of(child.id())?, pidfd));
    if opened.is_err() {
        let mut child = child;
        // Nobody else can reap it, so the pid is still this child's.
        child.kill()?;
        child.wait()?;
    }
    opened
}

/// Starts a command as the first process of a PID namespace. It stays this process's child: only
/// what the thread starts from then on is in the namespace, and the thread starts nothing else.
#[allow(unsafe_code)]
fn spawn_first_of_namespace(mut command: Command) -> io::Result<std::process::Child> {
    let start = move || {
        // SAFETY: the namespace is for children of this thread; no memory or file is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
        command.spawn()
    };
    let thread = std::thread::Builder::new().name("spawn".into()).spawn(start)?;
    thread.join().map_err(|_| io::Error::other("the thread that starts a process panicked"))?
}

/// What the child does to itself before it becomes the program.
struct Child {
    uid: Option<u32>,
    groups: Vec<u32>,
    keep: Vec<RawFd>,
}

#[allow(unsafe_code)]
fn before_exec(command: &mut Command, child: Child) {
    // SAFETY: the closure runs between fork and exec and only makes system calls; it allocates
    // nothing, takes no lock, and touches no descriptor but those that the caller keeps open.
    unsafe {
        command.pre_exec(move || prepare_child(&child));
    }
}

#[allow(unsafe_code)]
fn prepare_child(child: &Child) -> io::Result<()> {
    let check = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain system calls on this process; the one pointer is to a live structure.
    unsafe {
        check(libc::setsid())?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::setrlimit(libc::RLIMIT_CORE, &no_core))?;
        libc::umask(0o077);
        // Marked rather than closed: the standard library reports a failed exec through one.
        let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
        check(libc::close_range(3, libc::c_uint::MAX, flags))?;
        if let Some(uid) = child.uid {
            // Without the privilege to set groups there is none to lose, as long as the user stays.
            if libc::setgroups(child.groups.len(), child.groups.as_ptr()) == -1
                && (libc::geteuid() == 0 || !child.groups.is_empty())
            {
                return Err(io::Error::last_os_error());
            }
            check(libc::setresgid(uid, uid, uid))?;
            check(libc::setresuid(uid, uid, uid))?;
        }
        for &fd in &child.keep {
            check(libc::fcntl(fd, libc::F_SETFD, 0))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::os::fd::AsFd;

    async fn output_of(script: &str, uid: Option<u32>, keep: &[BorrowedFd<'_>]) -> String {
        let mut output = tempfile::tempfile().unwrap();
        let args = ["-c", script].map(OsString::from);
        let process = spawn(&Spawn {
            uid,
            keep,
            output: Some(output.as_fd()),
            ..Spawn::new(Path::new("/bin/sh"), &args)
        })
        .unwrap();
        process.wait().await;
        let mut text = String::new();
        output.rewind().unwrap();
        output.read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn only_the_descriptors_handed_over_reach_the_child() {
        let kept = File::open("/dev/null").unwrap();
        let other = File::open("/dev/null").unwrap();
        // Inheritable on purpose, as a careless library would leave it.
        rustix::io::fcntl_setfd(&other, rustix::io::FdFlags::empty()).unwrap();
        let text = output_of("exec ls /proc/self/fd", None, &[kept.as_fd()]).await;
        let mut numbers: Vec<i32> = text.lines().map(|line| line.parse().unwrap()).collect();
        // `ls` itself opens the directory, on the lowest free number.
        let own = (3..).find(|fd| *fd != kept.as_raw_fd()).unwrap();
        numbers.retain(|fd| *fd > 2 && *fd != own);
        assert_eq!(numbers, [kept.as_raw_fd()]);
        // Only the child's copy was changed.
        let flags = rustix::io::fcntl_getfd(&kept).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[tokio::test]
    #[allow(clippy::print_stderr)] // a skipped test says why
    async fn the_child_has_no_privileges_no_environment_and_its_own_session() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root may change the user");
            return;
        }
        let script = "exec cat /proc/self/status /proc/self/limits /proc/self/environ";
        let text = output_of(script, Some(65_123), &[]).await;
        for expected in [
            "Uid:\t65123\t65123\t65123\t65123",
            "Gid:\t65123\t65123\t65123\t65123",
            "Groups:\t \n",
            "NoNewPrivs:\t1",
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000000000",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in {text}");
        }
        let core = text.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        let limits: Vec<&str> = core.split_ascii_whitespace().skip(4).take(2).collect();
        assert_eq!(limits, ["0", "0"]);
        assert!(!text.contains("CARGO"), "{text}");
        let session = output_of("echo $$; cut -d' ' -f6 /proc/self/stat", None, &[]).await;
        let ids: Vec<&str> = session.lines().collect();
        assert_eq!(ids[0], ids[1]);
    }

    #[tokio::test]
    #[allow(clippy::print_stderr)] // a skipped test says why
    async fn a_process_with_pids_of_its_own_is_still_known_and_reaped_by_its_parent() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root may make a PID namespace");
            return;
        }
        let mut output = tempfile::tempfile().unwrap();
        let args = ["-c", "echo $$; echo told >&2; exit 7"].map(OsString::from);
        let program = Path::new("/bin/sh");
        let process = spawn(&Spawn {
            output: Some(output.as_fd()),
            pids: Pids::Own,
            ..Spawn::new(program, &args)
        })
        .unwrap();
        assert_ne!(process.identity().pid, 1);
        assert_eq!(process.wait().await, mvm_core::vmm::ProcessEnd::Exited { code: 7 });
        let mut text = String::new();
        output.rewind().unwrap();
        output.read_to_string(&mut text).unwrap();
        assert_eq!(text, "1\ntold\n");
    }

    #[tokio::test]
    async fn a_missing_program_is_an_error() {
        let error = spawn(&Spawn::new(Path::new("/no/such/program"), &[])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
