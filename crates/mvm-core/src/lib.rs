//! The functional core of mvm: what things are called, what was asked for, what should happen next.
//!
//! Every decision lives here as a pure function: admission ([`admit`]), planning ([`plan`]), one
//! instance's life ([`lifecycle`]), addresses ([`net`]), firewall text ([`nft`]) and the protocol
//! spoken with the guest ([`guest`], [`frame`], [`accept`], [`credit`]) and with [`firecracker`].
//!
//! It performs no I/O, reads no clock, draws no randomness and knows no async runtime: time,
//! entropy and observations are arguments. The same inputs give the same outputs.

pub mod accept;
pub mod admit;
mod authored;
pub mod credit;
pub mod death;
pub mod disk;
pub mod document;
pub mod firecracker;
pub mod frame;
pub mod guest;
pub mod image;
pub mod init;
pub mod lifecycle;
pub mod local;
pub mod main_process;
pub mod mirror;
pub mod name;
pub mod net;
pub mod nft;
pub mod outdated;
pub mod plan;
#[cfg(test)]
mod property;
pub mod publish;
pub mod rates;
pub mod record;
pub mod settings;
pub mod shown;
pub mod sleep_policy;
pub mod snapshot;
pub mod spec;
pub mod stored;
mod text;
pub mod vmm;
