//! Stands in for Firecracker and its jailer where there is none, so that the driver's ways through
//! every refusal, delay and sudden end are tested on any machine. A test program: no release has it.
//!
//! ```text
//!  DIR/firecracker  DIR/jailer     this program, which does what its name says
//!  DIR/behaviour.json              the version that it says it is, and faults to have
//!
//!  driver ── jailer ─> enters the jail, drops its rights, goes on as firecracker
//!                        api.rs      the state machine behind the API
//!                        request.rs  which requests there are, and their bodies
//!                        guest.rs    a guest that obeys the driver contract's commands
//!                        memory.rs   its memory, which is real, and is saved and mapped as such
//! ```
//!
//! What it answers was recorded from the real one, and the same conversations are held with both.
//! It has no vCPUs: what it calls a guest is a loop over a line protocol.

mod api;
mod arguments;
mod behaviour;
mod guest;
mod http;
mod jailer;
mod memory;
mod request;
mod seccomp;
mod server;

use std::path::Path;
use std::process::ExitCode;

use arguments::Arguments;
use behaviour::Behaviour;

/// The release that it stands in for unless its behaviour names another.
const VERSION: &str = "1.15.1";

/// Options of Firecracker that take a value.
const OPTIONS: [&str; 6] =
    ["--id", "--api-sock", "--log-path", "--level", "--metrics-path", "--seccomp-filter"];
/// What the jailer adds to Firecracker's arguments, with values.
const ADDED_BY_JAILER: [&str; 3] =
    ["--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"];

#[allow(clippy::print_stderr, reason = "what it says goes to the log of the VMM")]
fn main() -> ExitCode {
    let mut words = std::env::args();
    let name = words.next().unwrap_or_default();
    let words: Vec<String> = words.collect();
    let done = match Path::new(&name).file_name().is_some_and(|name| name == "jailer") {
        true => jailer::run(&words),
        false => Behaviour::beside_this_program().and_then(|is| firecracker(&words, is)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

/// Serves the API until the guest resets its machine.
#[allow(clippy::print_stdout, reason = "a version is printed")]
fn firecracker(words: &[String], behaviour: Behaviour) -> Result<(), String> {
    if words == ["--version"] {
        println!("Firecracker v{}\n", behaviour.version());
        return Ok(());
    }
    let known = [&OPTIONS[..], &ADDED_BY_JAILER[..]].concat();
    let arguments = Arguments::parse(words, &known)?;
    if let Some(path) = arguments.get("--seccomp-filter") {
        seccomp::install(path)?;
    }
    server::run(&arguments, behaviour)
}
