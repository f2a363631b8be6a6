//! What this machine is and what it can do.
//!
//! The agent asks it for its node's name, capacity and name servers, and for the VMM that suits the
//! machine; the CLI's `doctor` asks for everything that is in the way. Facts are gathered by a thin
//! shell ([`facts::gather`]), all verdicts are pure functions of them. It changes nothing on the
//! machine: installing is [`crate::bootstrap`]'s part.

mod choose;
mod doctor;
pub mod facts;
pub mod firewall;
pub mod kvm;
mod kvm_probe;
mod memory;
mod node;
mod probe_cache;
pub mod system;

pub use choose::{Choice, PlatformError, choose, for_production, obstacle_to};
pub use doctor::{Check, Verdict, doctor};
pub use facts::Facts;
pub use memory::MemoryGauge;
pub use node::{capacity, hostname};
