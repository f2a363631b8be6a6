//! What changes without anybody saying so: logs that grow, rules and links that somebody else touches, space that
//! runs out, snapshots that nobody needs.

use std::sync::Arc;

use mvm_host::console;

use crate::node::{Node, chain};
use crate::workers::{Work, Workers};
use crate::{cut_off, space};

/// Begins all of it.
pub(crate) fn begin(node: &Arc<Node>, workers: &mut Workers) {
    look_after_space(node);
    let logs = node.clone();
    workers.begin(Work::Logs, || async move {
        bound_own_log(&logs);
        bound_logs(&logs).await;
    });
    let snapshots = node.clone();
    workers.begin(Work::Snapshots, || async move {
        let tidied = snapshots.shared.tidy(&snapshots.state.now());
        snapshots.set_problem("removing snapshots", tidied.err().map(|error| chain(&error)));
    });
    let mending = node.clone();
    workers.begin(Work::Mending, || async move {
        mend_firewall(&mending).await;
        mend_links(&mending).await;
    });
}

/// Sets space aside, and notes whether there is enough.
pub(crate) fn look_after_space(node: &Node) {
    let reserved = node.state.ensure_reserve();
    node.set_problem("setting space aside", reserved.err().map(|error| error.to_string()));
    space::note_free_space(node);
}

async fn mend_firewall(node: &Node) {
    let mended = node.host.network.mend_firewall().await;
    if let Ok(true) = mended {
        tracing::warn!(
            "somebody else changed the firewall's rules of this agent: they are put back"
        );
    }
    node.set_problem("mending the firewall", mended.err().map(|error| chain(&error)));
}

async fn mend_links(node: &Node) {
    let mended = node.host.network.mend_links().await;
    if let Ok(true) = mended {
        tracing::warn!("somebody else changed this agent's network links: they are put back");
    }
    node.set_problem("mending links", mended.err().map(|error| chain(&error)));
    let looked = cut_off::look(node).await;
    node.set_problem("looking at links", looked.err().map(|error| chain(&error)));
}

/// Keeps small what this agent writes, whatever makes it do so.
fn bound_own_log(node: &Node) {
    let bound = mvm_host::process::bound_own_log(&node.config.state_dir.log());
    node.set_problem("bounding the log", bound.err().map(|error| error.to_string()));
}

/// Keeps small what guests and VMMs go on writing.
async fn bound_logs(node: &Node) {
    for (path, status) in &node.state.now().observed.instances {
        if status.vm.is_none() {
            continue;
        }
        let dir = node.instance_dir(&path.id);
        for file in [dir.console_log(), dir.vmm_log()] {
            let problem = console::bound(&file).err().map(|error| error.to_string());
            node.set_problem(&format!("bounding {}", file.display()), problem);
        }
        let vm = node.instance(path).and_then(|handle| handle.vm.borrow().clone());
        if let Some(vm) = vm
            && let Err(error) = vm.tidy().await
        {
            // It may have ended just now.
            tracing::debug!(instance = %path, error = chain(&error), "cannot tidy up");
        }
    }
}
