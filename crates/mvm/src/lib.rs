//! `mvm`: runs fleets of microVMs for many tenants on machines you own.
//!
//! The command line: it parses into typed values, calls the agent and shows what it answers.
//! It never touches a microVM, a network or the store itself; `mvm agent serve` is the agent.
//! The program in `main.rs` is this, or on a computer without Linux the way into a Lima machine.
#![cfg(target_os = "linux")]

mod agent;
mod cli;
mod client;
mod cmd;
mod complete;
mod copy;
mod detach_keys;
mod document;
mod error;
mod exec;
mod forward;
mod image_source;
mod log;
mod output;
mod request;
#[cfg(test)]
mod samples;
mod terminal;
#[cfg(test)]
mod tests;
mod units;
mod wait;

/// Runs the program and returns its exit code.
pub fn run() -> i32 {
    cli::main()
}
