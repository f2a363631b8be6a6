//! Everything that touches Linux, each seam as a trait with a real and a simulated backend.
//!
//! This is the only host crate that starts processes, mounts filesystems or contains `unsafe`.

pub mod bootstrap;
pub mod console;
pub mod disks;
pub mod guest;
mod held;
mod hole;
pub mod image;
pub mod images;
pub mod listen;
pub mod main_log;
pub mod net;
pub mod platform;
pub mod process;
pub mod removal;
pub mod snapshots;
pub mod space;
pub mod state_dir;
mod tls;
pub mod unix_socket;
pub mod vmm;
