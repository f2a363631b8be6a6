//! Guests and a full filesystem of the host: who stands still for it, and when they go on.
//!
//! A VMM stops a guest whose write finds no space, and the write is tried again as the guest goes on. So
//! nothing is lost as long as there is space again one day. The worker of an instance's vCPUs looks
//! after its guest with a [`Space`]; everybody else asks the [`Node`].

use std::time::Duration;

use mvm_core::name::InstancePath;
use mvm_host::space::free_bytes;
use mvm_host::vmm::Vm;
use mvm_wire::{ApiError, ErrorCode};
use tokio::time::{Instant, sleep, sleep_until};

use crate::node::{Node, chain};

/// How often it is looked whether a guest stands still.
const LOOK: Duration = Duration::from_secs(3);
/// How often one that does is tried to go on.
const TRY: Duration = Duration::from_secs(1);
/// Free space below which none is tried to go on: it would stand still again at once.
const ENOUGH: u64 = 4 << 20;
/// Free space below which the node has a problem.
const LOW: u64 = 32 << 20;
/// What the problem is about.
const FREE: &str = "free space";

/// Looks after one guest.
pub(crate) struct Space<'a> {
    node: &'a Node,
    path: &'a InstancePath,
    next: Instant,
}

impl<'a> Space<'a> {
    /// Looks for the first time at once: an earlier agent may have left it standing still.
    pub(crate) fn of(node: &'a Node, path: &'a InstancePath) -> Self {
        Self { node, path, next: Instant::now() }
    }

    /// Waits until it is time to look.
    pub(crate) async fn due(&self) {
        sleep_until(self.next).await;
    }

    /// Looks whether the guest stands still, and has it go on if there is space.
    pub(crate) async fn look(&mut self, vm: &dyn Vm) {
        // Of one that does not answer nothing is known, and it is left alone.
        let lacks_space = vm.lacks_space().await.unwrap_or(false);
        self.next = Instant::now() + if lacks_space { TRY } else { LOOK };
        self.node.set_lacks_space(self.path, lacks_space);
        if !lacks_space || !has_enough(self.node) {
            return;
        }
        match vm.resume().await {
            Ok(()) => tracing::info!(instance = %self.path, "goes on, as there is space again"),
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(instance = %self.path, error, "cannot go on");
            }
        }
    }
}

impl Drop for Space<'_> {
    fn drop(&mut self) {
        self.node.set_lacks_space(self.path, false);
    }
}

fn has_enough(node: &Node) -> bool {
    free_bytes(&node.config.state_dir).is_ok_and(|free| free >= ENOUGH)
}

/// Waits while a guest stands still for lack of space.
pub(crate) async fn wait_while_lacking(path: &InstancePath, vm: &dyn Vm) {
    let mut is_said = false;
    while vm.lacks_space().await.unwrap_or(false) {
        if !is_said {
            tracing::warn!(instance = %path, "waits for space on the host's filesystem");
            is_said = true;
        }
        sleep(TRY).await;
    }
}

/// Notes whether there is enough space for what the node itself has to write.
pub(crate) fn note_free_space(node: &Node) {
    let dir = &node.config.state_dir;
    let problem = match free_bytes(dir) {
        Ok(free) if free < LOW => Some(format!(
            "{} MiB are left on the filesystem of {}; make room there, or stop or remove instances",
            free >> 20,
            dir.display()
        )),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    };
    node.set_problem(FREE, problem);
}

/// What standing still means, in words.
pub(crate) fn words(node: &Node) -> String {
    let dir = node.config.state_dir.display();
    format!(
        "it stands still: what it writes finds no space on the filesystem of {dir}; it goes on by \
         itself once there is some"
    )
}

/// Why nothing can be asked of a guest that stands still.
pub(crate) fn refusal(node: &Node, path: &InstancePath) -> ApiError {
    let id = &path.id;
    ApiError::new(ErrorCode::Conflict, format!("{path}: {}", words(node))).hint(format!(
        "make room there, remove what is not needed (`mvm image gc`), or end it with `mvm stop {id}`"
    ))
}
