//! The image's own init as process 1, with the agent beside it.
//!
//! ```text
//!  process 1 ── fork ──┬─> waits for the word ── execve ──> the image's init
//!                      └─> the agent: serves, configures the guest, then gives the word:
//!                          the init's arguments, variables and limits
//! ```
//!
//! So the init finds a guest that has its name, its network and its data disks. The agent stays a
//! child that no init has started: its name begins with `@`, which systemd spares when it kills
//! what is left, and it does not mind the signals by which others do that.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::thread;
use std::time::Duration;

use mvm_core::guest::{ErrorKind, ExecRequest, GuestError, MainProgram};
use mvm_core::settings::Ulimit;
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};

use crate::console::{complain, note};
use crate::exec::{Identity, Program, Surroundings};
use crate::failure::{failure, refused};
use crate::process;

/// systemd's word for an orderly power-off: `SIGRTMIN+4` as systemd counts, from 34.
const SYSTEMD_POWEROFF: i32 = 38;
/// Where a `poweroff` is that knows its init.
const POWEROFF: [&str; 3] = ["/sbin/poweroff", "/usr/sbin/poweroff", "/bin/poweroff"];
/// Where SysV's scripts look for processes that they are to leave alone, in a file each.
const OMITTED: &str = "/run/sendsigs.omit.d";

unsafe extern "C" {
    /// The C library's pointer to the process's own first argument.
    static program_invocation_name: *mut c_char;
}

/// What the agent tells the process that becomes the init.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Word {
    program: MainProgram,
    ulimit: BTreeMap<String, Ulimit>,
}

/// The init that waits for the agent's word, or runs.
#[derive(Debug)]
pub(crate) struct Init {
    path: String,
    go: Option<File>,
    report: File,
    failure: Option<GuestError>,
}

impl Init {
    /// Leaves process 1 to the init: returns in a child, which is the agent from now on. Nothing
    /// may run in other threads yet.
    pub(crate) fn make_room(path: &str) -> io::Result<Self> {
        let (wait, go) = pipe_with(PipeFlags::CLOEXEC)?;
        let (report, tell) = pipe_with(PipeFlags::CLOEXEC)?;
        // SAFETY: the process has one thread, so that the child may go on with all of it.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop((wait, tell));
                step_aside();
                let go = Some(go.into());
                Ok(Self { path: path.to_owned(), go, report: report.into(), failure: None })
            }
            _ => {
                drop((go, report));
                become_init(path, wait.into(), tell.into())
            }
        }
    }

    /// Gives the word, once, and tells whether the init runs. A host that is older than arguments of
    /// an init names no program.
    pub(crate) fn start(
        &mut self,
        program: Option<&MainProgram>,
        ulimit: &BTreeMap<String, Ulimit>,
    ) -> Result<(), GuestError> {
        if let Some(go) = self.go.take() {
            let named = || MainProgram { argv: vec![self.path.clone()], ..MainProgram::default() };
            let program = program.cloned().unwrap_or_else(named);
            let word = Word { program, ulimit: ulimit.clone() };
            match self.give(&word, go) {
                Ok(()) => {
                    note(&format!("{} is process 1", self.path));
                    spare_the_agent();
                }
                Err(error) => self.failure = Some(error),
            }
        }
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn give(&mut self, word: &Word, mut go: File) -> Result<(), GuestError> {
        // What cannot be said to a kernel is told in the words of any other program's.
        prepared(&word.program)?;
        Surroundings::of_init(&word.ulimit)?;
        // One that cannot be made is left out, as one that is missing.
        let _ = fs::create_dir_all(&word.program.cwd);
        let text = serde_json::to_vec(word)
            .map_err(|error| refused("cannot tell the init its arguments", error))?;
        let told = go.write_all(&text);
        drop(go);
        let mut errno = [0; 4];
        // The report ends without a word when the program runs.
        if told.and_then(|()| self.report.read_exact(&mut errno)).is_err() {
            return Ok(());
        }
        let error = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            _ => ErrorKind::System,
        };
        Err(failure(kind, format!("init `{}`: {error}", self.path)))
    }

    /// Asks the init to power the machine off, in the way that it understands. It takes the agent
    /// along; this returns when it has not done so in time.
    pub(crate) fn power_off(&self, grace: Duration) {
        let program = fs::read_link("/proc/1/exe").unwrap_or_default();
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        if self.go.is_some() || self.failure.is_some() {
            return;
        }
        match &*name {
            "systemd" => signal_init(SYSTEMD_POWEROFF),
            "busybox" => signal_init(libc::SIGUSR2),
            // SysV, runit, OpenRC and s6 bring a program that knows how to ask.
            _ => {
                spare_the_agent();
                let found = POWEROFF.iter().find(|path| Path::new(path).exists());
                match found.map(|path| Command::new(path).spawn()) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => complain(&format!("cannot run poweroff: {error}")),
                    None => return complain(&format!("{name} cannot be asked to power off")),
                }
            }
        }
        thread::sleep(grace);
        complain("the init has not powered off in time");
    }
}

/// Tells SysV's scripts not to wait ten seconds for a process that does not mind their signals. Done
/// again when it matters: they may have mounted a `/run` of their own.
fn spare_the_agent() {
    let file = Path::new(OMITTED).join("mvm-guest");
    // What keeps it from being written costs those seconds.
    let _ = fs::create_dir_all(OMITTED)
        .and_then(|()| fs::write(file, format!("{}\n", std::process::id())));
}

fn signal_init(signal: i32) {
    // SAFETY: a plain system call.
    unsafe { libc::kill(1, signal) };
}

/// The agent's way out of the init's sight.
fn step_aside() {
    // SAFETY: plain system calls; the first argument is memory of this process, at least one byte
    // long, that nothing else looks at.
    unsafe {
        libc::setsid();
        for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
            libc::signal(signal, libc::SIG_IGN);
        }
        let name = program_invocation_name;
        if !name.is_null() && *name != 0 {
            *name = b'@' as c_char;
        }
    }
}

/// The init as the kernel takes it: root's, whatever else the request says.
fn prepared(program: &MainProgram) -> Result<Program, GuestError> {
    let MainProgram { argv, env, cwd, .. } = program.clone();
    let cwd = Some(cwd).filter(|cwd| !cwd.is_empty()).or_else(|| Some("/".to_owned()));
    let request = ExecRequest { argv, env, cwd, is_cwd_default: true, ..ExecRequest::default() };
    Program::new(&request, Identity::resolve(None, 0)?)
}

/// What is left of the first process: waits for the word, and becomes the init. It has one thread,
/// so that it may allocate.
fn become_init(path: &str, mut wait: File, mut tell: File) -> ! {
    let mut text = Vec::new();
    // Without an agent there is nobody to give the word: better an init than nothing.
    let _ = wait.read_to_end(&mut text);
    let word = serde_json::from_slice(&text).unwrap_or_else(|_| {
        let argv = vec![path.to_owned()];
        Word { program: MainProgram { argv, ..MainProgram::default() }, ..Word::default() }
    });
    let errno = execute(&word);
    // The agent tells it to the host, which ends the machine.
    let _ = tell.write_all(&errno.to_ne_bytes());
    drop(tell);
    loop {
        while process::reap().is_some() {}
        thread::sleep(Duration::from_secs(1));
    }
}

/// Becomes the init; returns why it cannot.
fn execute(word: &Word) -> i32 {
    let (Ok(program), Ok(surroundings)) =
        (prepared(&word.program), Surroundings::of_init(&word.ulimit))
    else {
        return libc::EINVAL;
    };
    if let Err(error) = surroundings.set_limits() {
        return error.raw_os_error().unwrap_or(libc::EPERM);
    }
    let pointers = |words: &[std::ffi::CString]| -> Vec<*const c_char> {
        words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect()
    };
    let (argv, env) = (pointers(&program.argv), pointers(&program.env));
    let execve = |file: &CStr| {
        // SAFETY: the arrays end with a null pointer, the strings with a zero, and all live on.
        unsafe { libc::execve(file.as_ptr(), argv.as_ptr(), env.as_ptr()) };
        io::Error::last_os_error().raw_os_error().unwrap_or_default()
    };
    // SAFETY: plain system calls on a string that ends with a zero.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        // A directory that is not there is no reason to have no init.
        libc::chdir(program.cwd.as_ptr());
    }
    let mut result = libc::ENOENT;
    for candidate in &program.candidates {
        match execve(candidate) {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => result = libc::EACCES,
            other => return other,
        }
    }
    result
}
