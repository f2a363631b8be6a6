//! The VMMs of one node: the one that starts microVMs, and those that started some earlier.
//!
//! A microVM starts on the node's choice, or on the VMM that its pool names. An operator may install
//! a VMM or choose another one while microVMs run. Those go on under the VMM that they were started
//! with, which their handle names, and a saved one is restored by the one that saved it. The agent's
//! set-up makes it.

use std::sync::Arc;

use async_trait::async_trait;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{VmExit, VmHandle, VmmKind};

use super::{Restore, TapPlace, Vm, VmSpec, Vmm, VmmError};

/// A VMM that starts microVMs, and others for those that are not its own.
pub struct NodeVmm {
    chosen: Arc<dyn Vmm>,
    others: Vec<Other>,
    starts: StartedBy,
}

/// A VMM that was not chosen.
struct Other {
    vmm: Arc<dyn Vmm>,
    /// Why it would start none.
    obstacle: Option<String>,
}

/// Which VMMs start microVMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StartedBy {
    /// The one that a pool names, and the one that saved it.
    WhoIsAskedFor,
    /// None but the chosen one.
    TheChosen,
}

impl NodeVmm {
    /// Starts microVMs with this one, unless another is asked for.
    pub fn new(chosen: Arc<dyn Vmm>) -> Self {
        Self { chosen, others: Vec::new(), starts: StartedBy::WhoIsAskedFor }
    }

    /// Has another VMM, too; `obstacle` is why it would start no microVM here.
    #[must_use]
    pub fn and(mut self, vmm: Arc<dyn Vmm>, obstacle: Option<String>) -> Self {
        self.others.push(Other { vmm, obstacle });
        self
    }

    /// Has microVMs started by the chosen one alone: those of others are looked after until they
    /// end.
    #[must_use]
    pub fn with_none_but_the_chosen(self) -> Self {
        Self { starts: StartedBy::TheChosen, ..self }
    }

    fn restorer(&self, kind: VmmKind) -> &dyn Vmm {
        match self.starts {
            StartedBy::WhoIsAskedFor => self.of(kind),
            StartedBy::TheChosen => &*self.chosen,
        }
    }

    fn of(&self, kind: VmmKind) -> &dyn Vmm {
        let other = self.others.iter().find(|other| other.vmm.kind() == kind);
        match self.chosen.kind() == kind {
            true => &*self.chosen,
            false => other.map_or(&*self.chosen, |other| &*other.vmm),
        }
    }

    fn all(&self) -> impl Iterator<Item = &dyn Vmm> {
        let others = self.others.iter().map(|other| &*other.vmm);
        std::iter::once(&*self.chosen).chain(others)
    }

    /// The VMM that is to start a microVM.
    fn starter(&self, spec: &VmSpec) -> Result<&dyn Vmm, VmmError> {
        let chosen = self.chosen.kind();
        let Some(kind) = spec.vmm.filter(|kind| *kind != chosen) else { return Ok(&*self.chosen) };
        let other = self.others.iter().find(|other| other.vmm.kind() == kind);
        let why = match (self.starts, other) {
            (StartedBy::TheChosen, _) => format!("this node starts microVMs on {chosen} alone"),
            (_, Some(Other { vmm, obstacle: None })) => return Ok(&**vmm),
            (_, Some(Other { obstacle: Some(obstacle), .. })) => obstacle.clone(),
            (_, None) => "this node does not have it".to_owned(),
        };
        let message = format!("its pool is to run on {kind}, and it cannot: {why}");
        Err(VmmError::Spec { id: spec.id.clone(), message })
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

    fn tap_place(&self, vmm: Option<VmmKind>) -> TapPlace {
        vmm.map_or(&*self.chosen, |kind| self.of(kind)).tap_place(vmm)
    }

    fn host_boot_id(&self) -> String {
        self.chosen.host_boot_id()
    }

    async fn launch(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, VmmError> {
        self.starter(spec)?.launch(spec).await
    }

    async fn restore(&self, spec: &VmSpec, from: &Restore) -> Result<Arc<dyn Vm>, VmmError> {
        self.restorer(from.build.vmm).restore(spec, from).await
    }

    async fn clear(&self, spec: &VmSpec) -> Result<(), VmmError> {
        for vmm in self.all() {
            vmm.clear(spec).await?;
        }
        Ok(())
    }

    async fn end_strays(&self, spec: &VmSpec) -> Result<(), VmmError> {
        for vmm in self.all() {
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

    fn sim() -> Arc<dyn Vmm> {
        Arc::new(SimVmm::new(SimWorld::new(SimTimes::default())))
    }

    fn qemu() -> Arc<dyn Vmm> {
        let config = crate::vmm::qemu::QemuConfig::new(Accel::Tcg);
        Arc::new(crate::vmm::qemu::QemuVmm::new(config))
    }

    #[test]
    fn a_microvm_is_started_by_the_vmm_that_its_pool_names_or_not_at_all() {
        let starter = |node: &NodeVmm, vmm| {
            let starter = node.starter(&VmSpec { vmm, ..VmSpec::example() });
            starter.map(|vmm| vmm.kind()).map_err(|error| error.to_string())
        };
        let node = NodeVmm::new(sim()).and(qemu(), None);
        for (asked, kind) in [
            (None, VmmKind::Sim),
            (Some(VmmKind::Sim), VmmKind::Sim),
            (Some(VmmKind::Qemu), VmmKind::Qemu),
        ] {
            assert_eq!(starter(&node, asked), Ok(kind));
        }
        let refused = |node: &NodeVmm, vmm| starter(node, Some(vmm)).unwrap_err();
        let error = refused(&node, VmmKind::Firecracker);
        assert!(
            error.contains("to run on firecracker") && error.contains("not have it"),
            "{error}"
        );
        let node = NodeVmm::new(sim()).and(qemu(), Some("the disk is on fire".into()));
        assert!(refused(&node, VmmKind::Qemu).ends_with("the disk is on fire"));
        let node = NodeVmm::new(sim()).and(qemu(), None).with_none_but_the_chosen();
        assert!(refused(&node, VmmKind::Qemu).ends_with("on sim alone"));
    }

    #[test]
    fn a_microvm_is_looked_after_by_the_vmm_that_started_it() {
        let node = NodeVmm::new(sim()).and(qemu(), None);
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
