//! The contract between the command line (or a coordinator) and a node's agent.
//!
//! One connection carries one call: the caller sends a [`Call`], the agent answers with one or more
//! [`Reply`]s and, for exec and logs, with data frames. The framing is [`mvm_core::frame`]'s, the
//! bodies are JSON, unknown fields are ignored and an unknown call is answered with
//! [`ErrorCode::Unsupported`]. The transport is any byte stream: a Unix socket on one machine,
//! a duplex pipe in tests.

pub mod api;
pub mod connection;
pub mod door;
mod hang_up;
mod hello;
mod pieces;
mod shown_spec;
pub mod view;

pub use api::{
    Accepted, ApiError, Call, DiskTarget, ErrorCode, InstanceTarget, LogKind, LogQuery, PoolTarget,
    Reply, chain,
};
pub use connection::{Connection, ConnectionError, Item, ReadHalf, WriteHalf};
pub use hang_up::{HangUp, NeverHangsUp};
pub use hello::{Hello, NEWEST_PROTOCOL, OLDEST_PROTOCOL, Welcome};
pub use pieces::INSTANCES_AT_ONCE;
pub use shown_spec::ShownSpec;
