//! `mvm`: runs fleets of microVMs for many tenants on machines you own.
//!
//! The command line: it parses into typed values, calls the agent and shows what it answers.
//! It never touches a microVM, a network or the store itself; `mvm agent serve` is the agent.

mod agent;
mod cli;
mod client;
mod cmd;
mod copy;

mod complete;
mod detach_keys;
mod document;
mod error;
mod exec;
mod forward;
mod image_source;
mod output;
mod request;
#[cfg(test)]
mod samples;
mod terminal;
#[cfg(test)]
mod tests;
mod units;
mod wait;

fn main() {
    // Not a return: a thread may still be blocked in a read of standard input.
    std::process::exit(cli::main())
}
