//! A command on a pseudo-terminal of its own: what a person at a terminal types and sees.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::until;

/// How long what happens at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// A command on a pseudo-terminal of its own. It is killed when dropped.
pub struct Terminal {
    controller: File,
    terminal: OwnedFd,
    child: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts a command on a VT220 with 33 lines of 101 characters.
    ///
    /// # Panics
    /// It does not start.
    #[track_caller]
    pub fn start(mut command: Command) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = rustix::pty::openpt(flags).expect("a terminal can be made");
        rustix::pty::unlockpt(&controller).expect("a terminal can be made");
        let terminal = rustix::pty::ioctl_tiocgptpeer(&controller, flags);
        let terminal = terminal.expect("a terminal has two ends");
        let stdio = || Stdio::from(terminal.try_clone().expect("there are descriptors left"));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio()).env("TERM", "vt220");
        let controller = File::from(controller);
        set_size(&controller, 33, 101);
        let child = command.process_group(0).spawn().expect("the command starts");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let reader = controller.try_clone().expect("there are descriptors left");
        let (mut reader, ours) = (reader, Arc::clone(&seen));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut buffer) {
                if let Ok(mut seen) = ours.lock() {
                    seen.extend_from_slice(&buffer[..len]);
                }
            }
        });
        Self { controller, terminal, child, seen }
    }

    /// Types these keys.
    ///
    /// # Panics
    /// The terminal is gone.
    #[track_caller]
    pub fn key(&mut self, keys: &str) {
        self.controller.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Gives the terminal another size, and tells the command.
    ///
    /// # Panics
    /// The terminal is gone.
    #[track_caller]
    pub fn resize(&self, rows: u16, columns: u16) {
        set_size(&self.controller, rows, columns);
        // The kernel tells the foreground of a session, and the command is in none.
        self.signal(Signal::WINCH);
    }

    /// Sends the command a signal.
    ///
    /// # Panics
    /// It is gone.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let sent = rustix::process::kill_process(Pid::from_child(&self.child), signal);
        sent.expect("the command is there");
    }

    /// All that the terminal has shown.
    pub fn seen(&self) -> String {
        let seen = self.seen.lock().map(|seen| seen.clone()).unwrap_or_default();
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Waits until the terminal shows this.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn until_seen(&self, text: &str) {
        let what = format!("{text:?} is on the terminal");
        until(&what, SOON, || self.seen().contains(text).then_some(()));
    }

    /// Whether keys are lines here, as they are for a shell.
    fn is_cooked(&self) -> bool {
        let mode = tcgetattr(&self.terminal).expect("a terminal has modes");
        mode.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// Waits until every key goes to the program in the guest.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn until_raw(&self) {
        until("the terminal is raw", SOON, || (!self.is_cooked()).then_some(()));
    }

    /// Waits until the command ends, and returns its exit code.
    ///
    /// # Panics
    /// It does not end, or leaves the terminal as it must not.
    #[track_caller]
    pub fn wait(mut self) -> Option<i32> {
        let status = until("the command ends", SOON, || {
            self.child.try_wait().expect("a child can be waited for")
        });
        assert!(self.is_cooked(), "the terminal was not given back");
        status.code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("── the terminal\n{}", self.seen());
        }
    }
}

fn set_size(terminal: &File, ws_row: u16, ws_col: u16) {
    let size = Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).expect("the terminal takes a size");
}
