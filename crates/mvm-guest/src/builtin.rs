//! The guest agent's own programs, which are there in every image: `mvm-guest --builtin NAME …`.
//!
//! An exec that asks for one gets this very file, run as a process of its own, with everything that
//! an exec has: pipes with credit, an exit code, and an end with whoever asked. What fails is said
//! on standard error, for a person.

pub(crate) mod sshd;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::machine;
use mvm_core::guest::ExecRequest;
use mvm_files::{FilesError, Links, Options, Owners, Summary, Target};

/// Runs the program that these arguments name.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["pack", path] => pack(Path::new(path)),
        ["unpack", "into", path, owners] => unpack(&Target::Into(path.into()), owners),
        ["unpack", "as", path, name, owners] => {
            unpack(&Target::As { path: PathBuf::from(path), name: OsString::from(name) }, owners)
        }
        ["ssh-prepare", key] => sshd::prepare(key),
        ["prepare-sleep"] => {
            rustix::fs::sync();
            machine::freeze_disks();
            Ok(())
        }
        ["sshd"] => Err(sshd::serve()),
        _ => Err("this guest agent does not have that program".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            say(&message);
            ExitCode::FAILURE
        }
    }
}

/// Whether an exec is of a program that removes what it has not finished when its input ends early.
pub(crate) fn clears_up(request: &ExecRequest) -> bool {
    request.builtin && request.argv.first().is_some_and(|name| name == "unpack")
}

fn pack(path: &Path) -> Result<(), String> {
    // Without the line buffering of the standard library's own.
    let out = std::fs::File::from(stdout()?);
    mvm_files::pack_into_pipe(path, out)
        .map(|summary| report(&summary))
        .map_err(|error| chain(&error))
}

fn unpack(target: &Target, owners: &str) -> Result<(), String> {
    let owners = if owners == "keep" { Owners::Kept } else { Owners::Own };
    // What the host sends is trusted by its guest.
    let options = Options { links: Links::Follow, owners };
    let stream = io::BufReader::with_capacity(PIECE, io::stdin().lock());
    mvm_files::unpack(stream, target, options)
        .map(|summary| report(&summary))
        .map_err(|error| chain(&error))
}

/// Bytes that are read or written at once: what a pipe holds.
const PIECE: usize = 64 * 1024;

fn stdout() -> Result<std::os::fd::OwnedFd, String> {
    rustix::io::dup(rustix::stdio::stdout()).map_err(|error| format!("standard output: {error}"))
}

fn report(summary: &Summary) {
    for path in &summary.skipped {
        say(&format!("left out {path}: neither a file nor a directory nor a link"));
    }
}

fn chain(error: &FilesError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

fn say(line: &str) {
    // Nobody may listen.
    let _ = writeln!(io::stderr(), "{line}");
}
