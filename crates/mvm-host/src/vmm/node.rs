//! The VMMs of one node: the one that starts microVMs, and those that started some earlier.
//!
//! An operator may install a VMM or choose another one while microVMs run. Those go on under the
//! VMM that they were started with, which their handle names, and a saved one is restored by the one
//! that saved it. The agent's set-up makes it.

use std::sync::Arc;

use async_trait::async_trait;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{VmExit, VmHandle, VmmKind};

use super::{Restore, Vm, VmSpec, Vmm, VmmError};

/// A VMM that starts microVMs, and others that are only looked after.
pub struct NodeVmm {
    chosen: Arc<dyn Vmm>,
    others: Vec<Arc<dyn Vmm>>,
    restores: RestoredBy,
}

/// Which VMM restores what another one than the chosen has saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RestoredBy {
    /// The one that saved it.
    WhoSavedIt,
    /// None but the chosen one, which boots it instead.
    TheChosen,
}

impl NodeVmm {
    /// Starts microVMs with the first, and adopts those of any.
    pub fn new(chosen: Arc<dyn Vmm>, others: Vec<Arc<dyn Vmm>>) -> Self {
        Self { chosen, others, restores: RestoredBy::WhoSavedIt }
    }

    /// Has microVMs started by the first alone: others are looked after until they end.
    #[must_use]
    pub fn with_none_but_the_chosen(self) -> Self {
        Self { restores: RestoredBy::TheChosen, ..self }
    }

    fn restorer(&self, kind: VmmKind) -> &dyn Vmm {
        match self.restores {
            RestoredBy::WhoSavedIt => self.of(kind),
            RestoredBy::TheChosen => &*self.chosen,
        }
    }

    fn of(&self, kind: VmmKind) -> &dyn Vmm {
        let other = self.others.iter().find(|vmm| vmm.kind() == kind);
        match self.chosen.kind() == kind {
            true => &*self.chosen,
            false => other.map_or(&*self.chosen, |vmm| &**vmm),
        }
    }
}

#[async_trait]
impl Vmm for NodeVmm {
    fn kind(&self) -> VmmKind {
        self.chosen.kind()
    }

    async fn build(&self) -> Result<VmmBuild, VmmError> {
        self.chosen.build().await
    }

    async fn build_for(&self, saved_on: &VmmBuild) -> Result<VmmBuild, VmmError> {
        match self.restorer(saved_on.vmm).build_for(saved_on).await {
            // It is there no more.
            Err(
                VmmError::MissingProgram { .. } | VmmError::Unfit { .. } | VmmError::TooOld { .. },
            ) => self.build().await,
            build => build,
        }
    }

    fn host_boot_id(&self) -> String {
        self.chosen.host_boot_id()
    }

    async fn launch(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, VmmError> {
        self.chosen.launch(spec).await
    }

    async fn restore(&self, spec: &VmSpec, from: &Restore) -> Result<Arc<dyn Vm>, VmmError> {
        self.restorer(from.build.vmm).restore(spec, from).await
    }

    async fn end_strays(&self, spec: &VmSpec) -> Result<(), VmmError> {
        self.chosen.end_strays(spec).await?;
        for vmm in &self.others {
            vmm.end_strays(spec).await?;
        }
        Ok(())
    }

    async fn adopt(
        &self,
        handle: &VmHandle,
        spec: &VmSpec,
    ) -> Result<Option<Arc<dyn Vm>>, VmmError> {
        self.of(handle.vmm).adopt(handle, spec).await
    }

    async fn exit_of(&self, handle: &VmHandle, spec: &VmSpec) -> VmExit {
        self.of(handle.vmm).exit_of(handle, spec).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::sim::{SimTimes, SimVmm, SimWorld};
    use mvm_core::vmm::Accel;

    #[test]
    fn a_microvm_is_looked_after_by_the_vmm_that_started_it() {
        let sim = || Arc::new(SimVmm::new(SimWorld::new(SimTimes::default()))) as Arc<dyn Vmm>;
        let qemu = crate::vmm::qemu::QemuConfig::new(Accel::Tcg);
        let qemu = Arc::new(crate::vmm::qemu::QemuVmm::new(qemu)) as Arc<dyn Vmm>;
        let node = NodeVmm::new(sim(), vec![qemu]);
        assert_eq!(node.kind(), VmmKind::Sim);
        for (vmm, by) in [
            (VmmKind::Qemu, VmmKind::Qemu),
            (VmmKind::Sim, VmmKind::Sim),
            (VmmKind::Firecracker, VmmKind::Sim),
        ] {
            assert_eq!(node.of(vmm).kind(), by);
        }
    }
}
