//! What takes time, and so is not done by the loop: one worker for each object, never two at once.

use std::collections::BTreeMap;

use mvm_core::name::{DiskPath, InstancePath, PoolPath, RequestId, TenantName};
use tokio::task::{AbortHandle, JoinSet};

/// What a worker works on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Work {
    /// The whole network of the machine.
    Network,
    /// A tenant's bridge and key.
    Tenant(TenantName),
    /// Name servers of tenants.
    Names,
    /// Published ports.
    Ports,
    /// The look-out for neighbours of what rests.
    Neighbours,
    /// The firewall's rules and the links.
    Mending,
    /// Logs of instances and VMMs.
    Logs,
    /// Snapshots that nobody needs.
    Snapshots,
    /// What the node decided and control has taken over.
    Settled,
    /// The sleep policies of pools.
    Policy,
    /// A pool's image.
    Build(PoolPath),
    /// A pool that goes.
    Pool(PoolPath),
    /// A pool's base.
    Base(PoolPath),
    /// An instance that is saved for forks.
    Capture(RequestId),
    /// What was saved for forks that are there, or were given up.
    Captures,
    /// A data disk.
    Disk(DiskPath),
    /// A guest's clock.
    Clock(InstancePath),
    /// A wake that a neighbour needs.
    Wake(InstancePath),
}

/// The workers of a node; they end with it.
#[derive(Default)]
pub(crate) struct Workers {
    tasks: JoinSet<()>,
    working: BTreeMap<Work, AbortHandle>,
}

impl Workers {
    /// Begins, unless somebody works on that.
    pub(crate) fn begin<F>(&mut self, work: Work, task: impl FnOnce() -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if !self.is_busy(&work) {
            let handle = self.tasks.spawn(task());
            self.working.insert(work, handle);
        }
    }

    /// Whether somebody works on that.
    pub(crate) fn is_busy(&self, work: &Work) -> bool {
        self.working.get(work).is_some_and(|handle| !handle.is_finished())
    }

    /// Whether somebody works on any tenant's network.
    pub(crate) fn is_busy_with_tenants(&self) -> bool {
        let is_tenant = |work: &&Work| matches!(work, Work::Tenant(_));
        self.working.keys().filter(is_tenant).any(|work| self.is_busy(work))
    }

    /// Ends a worker in the middle.
    pub(crate) fn abort(&mut self, work: &Work) {
        if let Some(handle) = self.working.remove(work) {
            handle.abort();
        }
    }

    /// Waits until one has ended, and forgets those that have.
    pub(crate) async fn ended(&mut self) {
        match self.tasks.join_next().await {
            Some(_) => self.working.retain(|_, handle| !handle.is_finished()),
            None => std::future::pending().await,
        }
    }
}
