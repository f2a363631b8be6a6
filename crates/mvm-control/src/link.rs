//! The way to a node: a document down, reports up, questions, and byte streams to instances.

use std::sync::Arc;

use async_trait::async_trait;
use mvm_core::document::{NodeDocument, NodeReport};
use mvm_core::name::Selector;
use mvm_core::record::Desired;
use mvm_wire::door::{Answer, Channel, Question, Veto};
use mvm_wire::{ApiError, Connection, ConnectionError, HangUp};
use tokio::sync::watch;

/// A node, as control sees it: in the same process, or at the other end of a session.
#[async_trait]
pub trait Link: Send + Sync {
    /// From now on this is what the node is to have. An earlier document than the present one is ignored.
    fn set_document(&self, document: &NodeDocument);

    /// What the node has, now and after each change.
    fn reports(&self) -> watch::Receiver<Arc<NodeReport>>;

    /// Takes what a document that is about to be written needs of the machine.
    ///
    /// # Errors
    /// The node cannot have it.
    async fn prepare(&self, before: &Desired, after: &Desired) -> Result<Box<dyn Prepared>, Veto>;

    /// Asks something.
    ///
    /// # Errors
    /// The node cannot be reached or asked that, or what it is about failed.
    async fn ask(&self, question: Question) -> Result<Answer, ApiError>;

    /// Carries bytes between a connection and an instance, until either ends.
    ///
    /// # Errors
    /// The other end of the connection hung up.
    async fn open(
        &self,
        selector: &Selector,
        channel: Channel,
        connection: Connection,
        hang_up: &dyn HangUp,
    ) -> Result<(), ConnectionError>;
}

/// What a node took for a document that is being written; given back when it is dropped, unless it is kept.
pub trait Prepared: Send {
    /// The document is written.
    fn keep(self: Box<Self>);
}
