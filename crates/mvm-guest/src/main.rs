//! The guest agent: PID 1 of a microVM, which boots it and carries out what the host asks for.
//!
//! With `--serve-fd N` it serves the same protocol on an inherited stream socket as an ordinary
//! process, which changes nothing about the machine that it runs on. A directory behind that is
//! where it finds hooks, and shows what programs are to see of a wake.
//!
//! It never opens a network connection, and does nothing that the host has not asked for.

mod boot;
mod builtin;
mod console;
mod exec;
mod failure;
mod forward;
mod health;
mod init;
mod kernel_log;
mod machine;
mod process;
mod server;
mod session;

use std::path::PathBuf;
use std::process::ExitCode;

use console::complain;
use machine::Machine;
use server::Server;
use session::{Port, PortKind};

/// The argument before the name of one of the agent's own programs.
const BUILTIN: &str = "--builtin";
/// Open files that a thousand execs need, with room.
const OPEN_FILES: u64 = 8192;

fn main() -> ExitCode {
    process::raise_open_files(OPEN_FILES);
    if std::process::id() == 1 {
        boot::run();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, rest @ ..] = &arguments[..]
        && flag == BUILTIN
    {
        return builtin::run(rest);
    }
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--serve-fd", number] => serve_fd(number, None),
        ["--serve-fd", number, root] => serve_fd(number, Some(root)),
        _ => Err("usage: mvm-guest --serve-fd N [DIR] (or as PID 1 of a microVM)".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            complain(&reason);
            ExitCode::FAILURE
        }
    }
}

/// Serves an inherited stream socket until its other end is closed, or asks for a shutdown.
fn serve_fd(number: &str, root: Option<&str>) -> Result<(), String> {
    let number = number.parse().map_err(|_| format!("`{number}` is not a file descriptor"))?;
    let describe =
        |error: std::io::Error| format!("cannot serve file descriptor {number}: {error}");
    let socket = process::take_inherited(number).map_err(describe)?;
    let port = Port::new(socket, PortKind::Socket);
    let mut machine = Machine::Borrowed { root: root.map(PathBuf::from) };
    let mut server = Server::new(&mut machine).map_err(describe)?;
    server.serve(port).map_err(describe)?;
    Ok(())
}
