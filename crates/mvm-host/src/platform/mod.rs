//! What this machine is and what it can do.
//!
//! The agent asks it for its node's name, capacity and name servers.

mod node;

pub use node::{capacity, hostname, nameservers};
