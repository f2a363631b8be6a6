//! End-to-end tests: the real binary, real microVMs, the real network of this machine.
//!
//! The harness that the files under `tests/` share. A test begins with
//! `let Some(node) = Node::new() else { return };`, which says why if it cannot run here, and gets
//! a state directory of its own in which nothing needs to be downloaded. What a test makes is
//! removed when its [`Node`] is dropped, also after a panic.

// It tells people why tests are skipped, and ends them at the first surprise.
#![allow(clippy::print_stdout, clippy::print_stderr)]

pub mod archive;
pub mod binary;
pub mod buildah;
pub mod cleanup;
pub mod host;
pub mod made_once;
pub mod netns;
pub mod node;
pub mod registry;
pub mod run;
pub mod seed;
pub mod slow_proxy;
pub mod terminal;
pub mod wait;

pub use node::Node;
pub use registry::Registry;
pub use run::{Output, Running};
pub use terminal::Terminal;
pub use wait::{LIMIT, until};
