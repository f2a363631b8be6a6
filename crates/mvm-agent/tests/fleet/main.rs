//! The agent as a whole on the simulated host: the loop, the actors and the API, in virtual time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]

mod alone;
mod attach;
mod base;
mod clocks;
mod disks;
mod faults;
mod fixtures;
mod fork;
mod habits;
mod held;
mod hello;
mod life;
mod lists;
mod main_process;
mod network;
mod node;
mod publish;
mod sleep;
mod sleep_policy;
mod space;
mod spares;
mod stop;
mod together;
