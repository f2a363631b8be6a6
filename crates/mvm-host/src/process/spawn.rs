//! Starts a process that outlives the agent: own session, no privileges to gain, nothing inherited
//! but what is handed over.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

use super::apart::{self, Apart};
use super::starting::starting;
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
    /// Namespaces and a cgroup of its own; the caller's if absent.
    pub apart: Option<Apart<'a>>,
}

/// The variables that it has.
pub(super) const ENVIRONMENT: [(&str, &str); 2] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("LC_ALL", "C")];

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
            apart: None,
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
    let child = Child {
        uid: spawn.uid,
        groups: spawn.groups.to_vec(),
        keep: spawn.keep.iter().map(AsRawFd::as_raw_fd).collect(),
    };
    let (pid, pidfd) = starting(|| match spawn.apart {
        Some(apart) => apart::start(spawn, apart, &child),
        None => start(spawn, child),
    })?;
    // Until it is reaped, which nobody else does, the pid is this child's.
    let process = ProcessIdentity::of(pid).and_then(|identity| {
        let pidfd = pidfd.try_clone()?;
        Process::new(identity, pidfd)
    });
    if process.is_err() {
        pidfd_send_signal(&pidfd, Signal::KILL)?;
        waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
    }
    process
}

/// Starts it where the caller is, and returns its pid and its pidfd.
fn start(spawn: &Spawn<'_>, child: Child) -> io::Result<(u32, OwnedFd)> {
    let stdio = |fd: Option<BorrowedFd<'_>>| -> io::Result<Stdio> {
        Ok(fd.map(|fd| fd.try_clone_to_owned()).transpose()?.map_or_else(Stdio::null, Stdio::from))
    };
    let mut command = Command::new(spawn.program);
    command
        .args(spawn.args)
        .env_clear()
        .envs(ENVIRONMENT)
        .current_dir("/")
        .stdin(stdio(spawn.input)?)
        .stdout(stdio(spawn.output)?)
        .stderr(stdio(spawn.errors.or(spawn.output))?);
    before_exec(&mut command, child);
    // The child is not waited for through `std`: its pidfd reaps it.
    let mut child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => Ok((child.id(), pidfd)),
        Err(error) => {
            child.kill()?;
            child.wait()?;
            Err(error.into())
        }
    }
}

/// What the child does to itself before it becomes the program.
pub(super) struct Child {
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

/// The error of a system call that failed.
pub(super) fn check(result: impl Into<libc::c_long>) -> io::Result<()> {
    match result.into() {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Makes only system calls.
#[allow(unsafe_code)]
pub(super) fn prepare_child(child: &Child) -> io::Result<()> {
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
            let (count, groups) = (child.groups.len(), child.groups.as_ptr());
            // The library's own functions would do it for threads that this process does not have.
            let set = check(libc::syscall(libc::SYS_setgroups, count, groups));
            if libc::geteuid() == 0 || !child.groups.is_empty() {
                set?;
            }
            check(libc::syscall(libc::SYS_setresgid, uid, uid, uid))?;
            check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
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

    /// What a shell says that is apart, to its standard output and its standard error.
    #[allow(clippy::print_stderr)] // a skipped test says why
    async fn apart(script: &str) -> Option<(Process, String)> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root may make namespaces");
            return None;
        }
        let mut output = tempfile::tempfile().unwrap();
        let args = ["-c", script].map(OsString::from);
        let program = Path::new("/bin/sh");
        let process = spawn(&Spawn {
            output: Some(output.as_fd()),
            apart: Some(Apart { cgroup: None }),
            ..Spawn::new(program, &args)
        })
        .unwrap();
        process.wait().await;
        let mut text = String::new();
        output.rewind().unwrap();
        output.read_to_string(&mut text).unwrap();
        Some((process, text))
    }

    #[tokio::test]
    async fn a_process_that_is_apart_is_still_known_and_reaped_by_its_parent() {
        let Some((process, text)) = apart("echo $$; echo told >&2; exit 7").await else { return };
        assert_ne!(process.identity().pid, 1);
        assert_eq!(process.wait().await, mvm_core::vmm::ProcessEnd::Exited { code: 7 });
        assert_eq!(text, "1\ntold\n");
    }

    #[tokio::test]
    async fn a_process_that_is_apart_has_no_links_and_inherits_nothing() {
        let script = "tail -n +3 /proc/net/dev | cut -d: -f1; grep Sig /proc/self/status; \
                      tr '\\0' '\\n' </proc/self/environ; ls /proc/self/fd | wc -l; pwd";
        let Some((_, text)) = apart(script).await else { return };
        assert_eq!(text.lines().next().map(str::trim), Some("lo"), "{text}");
        assert!(text.lines().nth(1).is_some_and(|line| line.starts_with("Sig")), "{text}");
        assert!(text.contains("SigBlk:\t0000000000000000"), "{text}");
        let ignored = text.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert_eq!(ignored & (1 << (libc::SIGPIPE - 1)), 0, "it ignores broken pipes");
        assert!(text.contains("LC_ALL=C\n") && !text.contains("CARGO"), "{text}");
        // Its three, and the directory that is listed.
        assert!(text.ends_with("\n4\n/\n"), "{text}");
    }

    #[tokio::test]
    async fn a_missing_program_is_an_error() {
        let missing = Spawn::new(Path::new("/no/such/program"), &[]);
        assert_eq!(spawn(&missing).unwrap_err().kind(), io::ErrorKind::NotFound);
        if rustix::process::geteuid().is_root() {
            let apart = Some(Apart { cgroup: None });
            let error = spawn(&Spawn { apart, ..missing }).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
    }
}
