//! The node's report: what it has, made anew whenever something of that changes.

use std::sync::Arc;

use mvm_core::document::{NodeNotes, NodeReport};
use mvm_core::record;
use tokio::sync::watch;

use crate::node::Node;

/// Keeps the latest report, until the node ends.
pub(crate) async fn run(node: Arc<Node>, reports: watch::Sender<Arc<NodeReport>>) {
    let mut state = node.state.follow();
    let mut waiting = node.waiting();
    let mut news = node.news();
    loop {
        state.borrow_and_update();
        waiting.borrow_and_update();
        news.borrow_and_update();
        let report = make(&node);
        reports.send_if_modified(|before| {
            let is_new = **before != report;
            if is_new {
                *before = Arc::new(report);
            }
            is_new
        });
        let changed = tokio::select! {
            changed = state.changed() => changed,
            changed = waiting.changed() => changed,
            changed = news.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// What the node has.
pub(crate) fn make(node: &Node) -> NodeReport {
    // Before the state: a report never says that it knows a document whose objects it has not seen.
    let document = node.document();
    let mirror = node.state.now();
    let own = mirror.bad.iter().filter(|(key, _)| !key.starts_with(record::DESIRED));
    NodeReport {
        document,
        observed: mirror.observed.clone(),
        bad: own.map(|(key, reason)| (key.clone(), reason.clone())).collect(),
        local: mirror.local.clone(),
        notes: NodeNotes {
            waiting: node.waiting().borrow().clone(),
            lacking_space: node.lacking_space(),
            cut_off: node.cut_off.problems(&mirror),
        },
        gone: node.gone(),
        needs: node.needs(),
    }
}
