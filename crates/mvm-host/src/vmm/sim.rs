//! The simulated VMM: no process and no guest kernel, but the same life, in modelled time.
//!
//! The fleet simulator, the benchmarks of large fleets and the tests of everything above the VMM
//! seam run on it. A [`SimWorld`] stands for the host: it outlives the [`SimVmm`] drivers made over
//! it, so that dropping one and making another is an agent's restart. Time is tokio's, so a paused
//! clock works. A microVM's tasks run on the runtime that launched it.

mod agent;
mod guest;
mod machine;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use mvm_core::name::InstanceId;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{Accel, ProcessEnd, ShutdownReason, VmExit, VmHandle, VmmKind};

pub use agent::guest_agents;
pub use guest::{SimGuestControl, SimGuestService};
use machine::{Begin, Machine, Past, SimVm};

use super::{DiskAccess, Restore, TapPlace, Vm, VmSpec, Vmm, VmmError, console};
use crate::held::Held;

/// How long the simulated parts take.
#[derive(Debug, Clone, Copy)]
pub struct SimTimes {
    /// From `launch` until the VMM's process runs.
    pub launch: Duration,
    /// From then until the guest agent listens.
    pub boot: Duration,
}

impl Default for SimTimes {
    fn default() -> Self {
        Self { launch: Duration::from_millis(60), boot: Duration::from_millis(1_800) }
    }
}

/// What goes wrong with one launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SimFault {
    /// The VMM ends before its guest runs, with these last words.
    LaunchFails(String),
    /// The guest never serves its agent's port.
    NeverSaysHello,
    /// The guest's kernel panics this long after its process started.
    PanicsAfter(Duration),
    /// The VMM crashes this long after its process started.
    VmmDiesAfter(Duration),
}

/// A simulated host with its live microVMs. Clones are the same host.
#[derive(Clone)]
pub struct SimWorld {
    state: Arc<Mutex<WorldState>>,
    service: Option<SimGuestService>,
    times: SimTimes,
    tap_place: TapPlace,
    held: Held<InstanceId>,
}

struct WorldState {
    boot: u64,
    next_pid: u32,
    machines: BTreeMap<u32, Arc<Machine>>,
    exits: BTreeMap<(u32, u64), VmExit>,
    faults: BTreeMap<InstanceId, Vec<SimFault>>,
    /// Instances whose next microVM finds no space.
    full: BTreeSet<InstanceId>,
}

impl SimWorld {
    /// A host without microVMs, whose guests are silent.
    pub fn new(times: SimTimes) -> Self {
        let state = WorldState {
            boot: 1,
            next_pid: 1_000,
            machines: BTreeMap::new(),
            exits: BTreeMap::new(),
            faults: BTreeMap::new(),
            full: BTreeSet::new(),
        };
        let state = Arc::new(Mutex::new(state));
        Self { state, service: None, times, tap_place: TapPlace::Host, held: Held::default() }
    }

    /// The same host, whose VMMs open their taps here.
    #[must_use]
    pub fn with_taps(mut self, place: TapPlace) -> Self {
        self.tap_place = place;
        self
    }

    /// The same host, with guests that run this service on their agent's port.
    #[must_use]
    pub fn with_guests(mut self, service: SimGuestService) -> Self {
        self.service = Some(service);
        self
    }

    /// Blocks every search for, start and end of this instance's microVM from now on, or unblocks it.
    pub fn hold(&self, id: &InstanceId, is_held: bool) {
        self.held.hold(id.clone(), is_held);
    }

    /// Lets the next launch of this instance go wrong; several faults are for several launches.
    pub fn inject(&self, id: &InstanceId, fault: SimFault) {
        self.state().faults.entry(id.clone()).or_default().push(fault);
    }

    /// The instances whose microVM runs, one entry for each VMM process.
    pub fn running(&self) -> Vec<InstanceId> {
        let mut state = self.state();
        state.bury();
        state.machines.values().map(|machine| machine.id().clone()).collect()
    }

    /// How many microVMs were ended by force, with all that their guests had not written out.
    pub fn power_cuts(&self) -> u32 {
        let mut state = self.state();
        state.bury();
        let is_cut = |exit: &&VmExit| matches!(exit.process, ProcessEnd::Signaled { signal: 9 });
        u32::try_from(state.exits.values().filter(is_cut).count()).unwrap_or(u32::MAX)
    }

    /// What this instance's next microVM writes finds no space on the host, from its first moment on.
    pub fn fill_next(&self, id: &InstanceId) {
        self.state().full.insert(id.clone());
    }

    /// From now on what this instance's guest writes finds no space on the host, or does again.
    pub fn set_full(&self, id: &InstanceId, is_full: bool) {
        let state = self.state();
        for machine in state.machines.values().filter(|machine| machine.id() == id) {
            machine.set_full(is_full);
        }
    }

    /// Ends everything at once, as a power cut does, and boots the host anew.
    pub fn reboot_host(&self) {
        let mut state = self.state();
        for machine in std::mem::take(&mut state.machines).into_values() {
            machine.vanish();
        }
        state.exits.clear();
        state.boot += 1;
        state.next_pid = 1_000;
    }

    fn state(&self) -> MutexGuard<'_, WorldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WorldState {
    /// Moves machines that have ended from the living to the dead.
    fn bury(&mut self) {
        let exits = &mut self.exits;
        self.machines.retain(|pid, machine| match machine.exit() {
            None => true,
            Some(exit) => {
                exits.insert((*pid, machine.handle().start_ticks), exit);
                false
            }
        });
    }

    fn boot_id(&self) -> String {
        format!("simulated-boot-{}", self.boot)
    }

    fn take_fault(&mut self, id: &InstanceId) -> Option<SimFault> {
        let faults = self.faults.get_mut(id)?;
        (!faults.is_empty()).then(|| faults.remove(0))
    }

    fn find(&self, handle: &VmHandle) -> Option<Arc<Machine>> {
        let machine = self.machines.get(&handle.pid)?;
        (machine.handle() == handle).then(|| Arc::clone(machine))
    }
}

/// The driver: what one agent holds of a [`SimWorld`].
#[derive(Clone)]
pub struct SimVmm {
    world: SimWorld,
}

impl SimVmm {
    /// A driver over a host that may already run microVMs.
    pub fn new(world: SimWorld) -> Self {
        Self { world }
    }

    /// Starts a machine that boots, or goes on from its past.
    async fn start(&self, spec: &VmSpec, past: Option<Past>) -> Result<Arc<dyn Vm>, VmmError> {
        spec.check()?;
        for path in [&spec.kernel, &spec.initrd] {
            check_file(path)?;
        }
        for disk in &spec.disks {
            check_file(&disk.path)?;
        }
        tokio::time::sleep(self.world.times.launch).await;
        let mut state = self.world.state();
        state.bury();
        let fault = state.take_fault(&spec.id);
        if let Some(SimFault::LaunchFails(log)) = fault {
            return Err(VmmError::DiedAtStart { log });
        }
        refuse_second_writer(&state, spec)?;
        let console = console::rotate(&spec.dir)
            .map_err(|source| VmmError::File { path: spec.dir.to_path_buf(), source })?;
        state.next_pid += 1;
        let handle = VmHandle {
            vmm: VmmKind::Sim,
            accel: Accel::Tcg,
            pid: state.next_pid,
            start_ticks: u64::from(state.next_pid) * 100,
            host_boot_id: state.boot_id(),
        };
        let begin = match past {
            None => Begin::Boot(self.world.times.boot),
            Some(past) => Begin::GoOn(past),
        };
        let service = self.world.service.clone();
        let machine = Machine::start(handle, spec, begin, console, fault, service);
        if state.full.remove(&spec.id) {
            machine.set_full(true);
        }
        state.machines.insert(machine.handle().pid, Arc::clone(&machine));
        Ok(Arc::new(SimVm::new(machine)))
    }
}

#[async_trait]
impl Vmm for SimVmm {
    fn kind(&self) -> VmmKind {
        VmmKind::Sim
    }

    async fn build(&self) -> Result<VmmBuild, VmmError> {
        Ok(machine::build())
    }

    async fn build_for(&self, _saved_on: &VmmBuild) -> Result<VmmBuild, VmmError> {
        self.build().await
    }

    fn tap_place(&self, _vmm: Option<VmmKind>) -> TapPlace {
        self.world.tap_place
    }

    fn host_boot_id(&self) -> String {
        self.world.state().boot_id()
    }

    async fn launch(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, VmmError> {
        self.start(spec, None).await
    }

    async fn restore(&self, spec: &VmSpec, from: &Restore) -> Result<Arc<dyn Vm>, VmmError> {
        let past = Past::load(&from.dir.device_state())?;
        self.start(spec, Some(past)).await
    }

    async fn adopt(
        &self,
        handle: &VmHandle,
        spec: &VmSpec,
    ) -> Result<Option<Arc<dyn Vm>>, VmmError> {
        self.world.held.pass(&spec.id).await;
        let found = self.world.state().find(handle).filter(|machine| machine.exit().is_none());
        Ok(found.map(|machine| Arc::new(SimVm::new(machine)) as Arc<dyn Vm>))
    }

    async fn end_strays(&self, spec: &VmSpec) -> Result<(), VmmError> {
        self.world.held.pass(&spec.id).await;
        let state = self.world.state();
        for machine in state.machines.values().filter(|machine| *machine.id() == spec.id) {
            machine.end_by_signal();
        }
        Ok(())
    }

    async fn exit_of(&self, handle: &VmHandle, _spec: &VmSpec) -> VmExit {
        let mut state = self.world.state();
        state.bury();
        let known = state.exits.get(&(handle.pid, handle.start_ticks));
        let reason: Option<ShutdownReason> =
            known.filter(|_| handle.host_boot_id == state.boot_id()).and_then(|exit| exit.reason);
        // As on a real host: the process's own status went to whoever reaped it.
        VmExit { process: ProcessEnd::Unobserved, reason }
    }
}

fn check_file(path: &Path) -> Result<(), VmmError> {
    match File::open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(VmmError::File { path: path.to_owned(), source }),
    }
}

fn refuse_second_writer(state: &WorldState, spec: &VmSpec) -> Result<(), VmmError> {
    let live = state.machines.values().flat_map(|machine| machine.disks());
    for theirs in live {
        let shared = spec.disks.iter().find(|own| own.path == theirs.path);
        let Some(own) = shared else { continue };
        if own.access == DiskAccess::ReadWrite || theirs.access == DiskAccess::ReadWrite {
            return Err(VmmError::DiskInUse { path: own.path.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
