//! Starts mvm's own agent in the background, detached from the terminal of whoever started it.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Starts a daemon and returns its process id: own session, `/` as its directory, no standard
/// input, output and errors appended to `log`, no other descriptor. It keeps the caller's
/// environment, which holds the proxies and the search path that the administrator chose.
///
/// # Errors
/// The log cannot be opened or the program cannot be run.
pub fn spawn_daemon(program: &Path, args: &[OsString], log: &Path) -> io::Result<u32> {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(log)?;
    let mut command = Command::new(program);
    command.args(args).current_dir("/").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    detach_before_exec(&mut command);
    // It outlives this process, so nobody here waits for it.
    Ok(command.spawn()?.id())
}

#[allow(unsafe_code)]
fn detach_before_exec(command: &mut Command) {
    let detach = || {
        // SAFETY: plain system calls on this process, without pointers.
        let failed = unsafe {
            let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
            // Marked rather than closed: the standard library reports a failed exec through one.
            libc::setsid() == -1 || libc::close_range(3, libc::c_uint::MAX, flags) == -1
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure runs between fork and exec and only makes system calls; it allocates
    // nothing and takes no lock.
    unsafe {
        command.pre_exec(detach);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, WaitOptions, waitpid};

    fn output_of(script: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("daemon.log");
        let args = ["-c", script].map(OsString::from);
        let pid = spawn_daemon(Path::new("/bin/sh"), &args, &log).unwrap();
        waitpid(Pid::from_raw(i32::try_from(pid).unwrap()), WaitOptions::empty()).unwrap();
        std::fs::read_to_string(&log).unwrap()
    }

    #[test]
    fn a_daemon_leads_its_own_session_and_holds_no_directory_or_input() {
        let text = output_of("echo $$; cut -d' ' -f6 /proc/self/stat; pwd; cat; echo end >&2");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], lines[1]);
        assert_eq!(&lines[2..], ["/", "end"]);
    }

    #[test]
    fn a_daemon_inherits_no_descriptors() {
        let other = std::fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&other, rustix::io::FdFlags::empty()).unwrap();
        // 3 is the listing itself.
        assert_eq!(output_of("exec ls /proc/self/fd"), "0\n1\n2\n3\n");
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let error = spawn_daemon(Path::new("/no/such/program"), &[], &log).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
