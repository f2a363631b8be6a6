//! What machine this is.

mod node;

pub use node::{capacity, hostname, nameservers};
