//! Control's way to a node in the same process.

use std::sync::Arc;

use async_trait::async_trait;
use mvm_control::{Link, Prepared};
use mvm_core::document::{NodeDocument, NodeReport};
use mvm_core::name::Selector;
use mvm_core::record::Desired;
use mvm_node::RunningNode;
use mvm_wire::door::{Answer, Channel, Question, Veto};
use mvm_wire::{ApiError, Connection, ConnectionError, HangUp};
use tokio::sync::watch;

/// A node in this process.
pub(crate) struct Local(pub(crate) Arc<RunningNode>);

#[async_trait]
impl Link for Local {
    fn set_document(&self, document: &NodeDocument) {
        self.0.set_document(document);
    }

    fn reports(&self) -> watch::Receiver<Arc<NodeReport>> {
        self.0.reports()
    }

    async fn prepare(&self, before: &Desired, after: &Desired) -> Result<Box<dyn Prepared>, Veto> {
        Ok(Box::new(Taken(self.0.prepare(before, after).await?)))
    }

    async fn ask(&self, question: Question) -> Result<Answer, ApiError> {
        self.0.ask(question).await
    }

    async fn open(
        &self,
        selector: &Selector,
        channel: Channel,
        connection: Connection,
        hang_up: &dyn HangUp,
    ) -> Result<(), ConnectionError> {
        self.0.open(selector, channel, connection, hang_up).await
    }
}

struct Taken(mvm_node::Prepared);

impl Prepared for Taken {
    fn keep(self: Box<Self>) {
        self.0.keep();
    }
}
