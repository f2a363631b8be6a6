//! The host's side of the guest channel: a session with the guest agent of one microVM.
//!
//! The instance actors open a session on the byte stream that a VMM gives them, and the image
//! builder puts [`AGENT_BINARY`] into the initial RAM filesystem. It never decides what a guest
//! should do, and trusts nothing that a guest says: a hung or hostile guest cannot block, crash or
//! bloat the host.

mod clock;
mod error;
mod exec;
mod forward;
mod main_process;
mod outgoing;
mod session;
pub mod sim;
mod sleep;
mod streams;

pub use error::SessionError;
pub use exec::{Exec, ExecEvent, ExecEvents, ExecInput, ExecOutput, KernelLog};
pub use forward::{Forward, ForwardEvent, ForwardEvents};
pub use main_process::{MainEvent, MainEvents, MainInput};
pub use session::{Session, SessionMode};

/// The guest agent: a static program for this machine's architecture. Empty on hosts other than
/// Linux.
pub const AGENT_BINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mvm-guest"));
