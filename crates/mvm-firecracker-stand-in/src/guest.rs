//! A guest that obeys the commands of the driver contract's guests, over the vsock protocol.
//!
//! Like a real one it stands still while it is paused, and drops its connections after it was saved
//! or restored: once it has refused two requests for one, or before it answers on any.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use mvm_core::guest::{POWER_OFF_WORDS, VSOCK_PORT};

use crate::memory::Memory;

/// How many requests for a connection are refused before it has read that connections are gone.
const REFUSALS: u32 = 2;
const MIB: u64 = 1 << 20;

/// What it sees of its devices.
pub(crate) struct GuestParts {
    /// Name, sectors and whether it is read-only, of each.
    pub(crate) disks: String,
    /// The address of its interface, or nothing.
    pub(crate) mac: String,
}

/// What it has written to its disks.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Writes {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
    pub(crate) flushes: u64,
}

/// A handle to the guest.
#[derive(Clone)]
pub(crate) struct Guest(Arc<Shared>);

struct Shared {
    parts: GuestParts,
    state: Mutex<State>,
    goes_on: Condvar,
}

struct State {
    runs: bool,
    memory: Memory,
    connections: Vec<UnixStream>,
    writes: Writes,
    /// Refusals until it drops its connections, if it is to drop them.
    until_reset: Option<u32>,
}

impl State {
    fn reset(&mut self) {
        self.until_reset = None;
        for connection in self.connections.drain(..) {
            // It may have ended by itself.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Guest {
    /// A guest that stands still.
    pub(crate) fn new(memory: Memory, parts: GuestParts) -> Self {
        let state = State {
            runs: false,
            memory,
            connections: Vec::new(),
            writes: Writes::default(),
            until_reset: None,
        };
        Self(Arc::new(Shared { parts, state: Mutex::new(state), goes_on: Condvar::new() }))
    }

    /// Lets it begin.
    pub(crate) fn boot(&self) {
        print("guest is up");
        self.resume();
    }

    /// What it has written since this was asked last.
    pub(crate) fn take_writes(&self) -> Writes {
        std::mem::take(&mut self.state().writes)
    }

    pub(crate) fn pause(&self) {
        self.state().runs = false;
    }

    pub(crate) fn resume(&self) {
        self.state().runs = true;
        self.0.goes_on.notify_all();
    }

    /// Its connections are gone, which it learns when it goes on.
    pub(crate) fn leave_word_of_a_reset(&self) {
        self.state().until_reset = Some(REFUSALS);
    }

    pub(crate) fn save(&self, file: &mut File) -> io::Result<()> {
        self.state().memory.save(file)
    }

    /// Serves connections for as long as the process lives.
    pub(crate) fn listen(&self, listener: UnixListener) {
        let guest = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let guest = guest.clone();
                // Its end is the client's affair.
                std::thread::spawn(move || guest.serve(stream));
            }
        });
    }

    fn serve(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let mut state = self.running();
        if line.trim_end() != format!("CONNECT {VSOCK_PORT}") {
            state.until_reset = state.until_reset.map(|left| left - 1);
            if state.until_reset == Some(0) {
                state.reset();
            }
            return Ok(());
        }
        state.connections.push(stream.try_clone()?);
        drop(state);
        stream.write_all(b"OK 1073741824\n")?;
        loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let mut state = self.running();
            if state.until_reset.is_some() {
                state.reset();
                return Ok(());
            }
            drop(state);
            let answer = self.obey(line.trim_end());
            stream.write_all(answer.as_bytes())?;
        }
    }

    fn obey(&self, line: &str) -> String {
        let mut state = self.running();
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        match verb {
            "echo" => format!("{rest}\n"),
            "note" => {
                state.memory.keep(rest);
                format!("{rest}\n")
            }
            "notes" => format!("{}\n", state.memory.line()),
            "disks" => format!("{}\n", self.0.parts.disks),
            "rewrite" => {
                let Writes { count, bytes, flushes } = &mut state.writes;
                (*count, *bytes, *flushes) = (*count + 1, *bytes + MIB, *flushes + 1);
                "rewritten\n".to_owned()
            }
            "mac" => format!("{}\n", self.0.parts.mac),
            "off" => end(&[POWER_OFF_WORDS, "reboot: Restarting system"]),
            "reset" => end(&["reboot: Restarting system"]),
            "panic" => end(&["Kernel panic - not syncing: sysrq triggered crash"]),
            _ => String::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no thread panics with it")
    }

    /// The state, once the guest runs.
    fn running(&self) -> MutexGuard<'_, State> {
        let state = self.state();
        self.0.goes_on.wait_while(state, |state| !state.runs).expect("no thread panics with it")
    }
}

/// Every end of a guest is a reset of its machine, which ends Firecracker well.
fn end(words: &[&str]) -> ! {
    words.iter().for_each(|words| print(words));
    std::process::exit(0)
}

#[allow(clippy::print_stdout, reason = "standard output is the guest's console")]
fn print(line: &str) {
    println!("{line}");
}
