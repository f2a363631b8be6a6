//! What is done to the vCPUs of one VM, in the order in which it was asked for: a resume that came
//! late would let a guest go on after it was saved.
//!
//! In between it is looked whether they stand still because the host's filesystem is full: then they
//! go on once there is space.

use std::sync::Arc;

use mvm_core::lifecycle::{Event, InstanceStatus};
use mvm_core::name::InstancePath;
use mvm_host::guest::Session;
use mvm_host::state_dir::SnapshotDir;
use mvm_host::vmm::Vm;
use tokio::sync::{mpsc, oneshot, watch};

use crate::actor::Message;
use crate::effects::Given;
use crate::node::{Node, chain};
use crate::sleep;
use crate::space::Space;

/// One thing to do.
pub(crate) enum VcpuOrder {
    /// Stop them.
    Pause,
    /// Let them run.
    Resume,
    /// Stop them and save the VM.
    Suspend {
        /// Which request it is.
        request: u64,
        /// How long the guest has to prepare, in milliseconds; 0 does without.
        hooks_ms: u64,
        /// The instance as it is.
        status: Box<InstanceStatus>,
        /// What it is to be.
        given: Arc<Given>,
    },
    /// Save the VM for others to begin from; it goes on afterwards if it did before.
    Capture {
        /// The snapshot's directory.
        dest: SnapshotDir,
        /// The instance as it is.
        status: Box<InstanceStatus>,
        /// What it is to be.
        given: Arc<Given>,
        /// Told the result.
        done: oneshot::Sender<Result<(), String>>,
    },
}

/// Carries out the orders for a VM, until it has ended. Once it is to end, its guest is no longer
/// prepared for a sleep.
pub(crate) async fn work(
    node: Arc<Node>,
    path: InstancePath,
    vm: Arc<dyn Vm>,
    (session, is_ending): (watch::Receiver<Option<Session>>, watch::Receiver<bool>),
    mut orders: mpsc::UnboundedReceiver<VcpuOrder>,
    mailbox: mpsc::Sender<Box<Message>>,
) {
    let mut is_paused = false;
    let mut space = Space::of(&node, &path);
    loop {
        let order = tokio::select! {
            order = orders.recv() => match order {
                Some(order) => order,
                None => return,
            },
            // A guest that was stopped goes on when that is asked for.
            () = space.due(), if !is_paused => {
                space.look(&*vm).await;
                continue;
            }
        };
        let event = match order {
            VcpuOrder::Pause => {
                let paused = vm.pause().await;
                is_paused = paused.is_ok();
                paused.err().map(|error| Event::PauseFailed { error: chain(&error) })
            }
            VcpuOrder::Resume => {
                let resumed = vm.resume().await;
                is_paused &= resumed.is_err();
                resumed.err().map(|error| Event::ResumeFailed { error: chain(&error) })
            }
            VcpuOrder::Capture { dest, status, given, done } => {
                let captured = sleep::capture(&node, &given, &*vm, &status, &dest).await;
                let resumed = if is_paused { Ok(()) } else { vm.resume().await };
                let _ = done.send(captured.map_err(|error| chain(&error)));
                resumed.err().map(|error| Event::ResumeFailed { error: chain(&error) })
            }
            VcpuOrder::Suspend { request, hooks_ms, status, given } => {
                let guest = (session.clone(), is_ending.clone());
                let suspend = async {
                    if is_paused && hooks_ms > 0 {
                        // A guest that stands still cannot prepare.
                        vm.resume().await?;
                    }
                    sleep::suspend(&node, &given, &*vm, guest, &status, hooks_ms).await
                };
                let suspended = suspend.await;
                is_paused = true;
                Some(match suspended {
                    Ok(snapshot) => Event::Saved(snapshot),
                    Err(error) => {
                        let error = chain(&error);
                        tracing::warn!(instance = %path, error, "cannot be put to sleep");
                        Event::SleepFailed { error, request }
                    }
                })
            }
        };
        if let Some(event) = event {
            // The mailbox is closed only when the actor has ended.
            let _ = mailbox.send(Box::new(Message::Event(event))).await;
        }
    }
}
