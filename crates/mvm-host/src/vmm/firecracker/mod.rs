//! Firecracker, jailed, on KVM.
//!
//! ```text
//!  agent (root)                              jailer ──> firecracker (own uid, chroot, PIDs, net, cgroup)
//!    links kernel, disks, memory into jail/ ──────────>  sees the jail and nothing else
//!    jail/…/api.sock   <── HTTP ──────────────────────   its API
//!    jail/…/v.sock     <── CONNECT port ──────────────   the guest's vsock
//!    console.log       <── standard output ───────────   the serial console
//! ```
//!
//! **How an end is learned.** Firecracker ends by itself when the guest resets the machine, which
//! is also how a guest without a power switch goes off. Why it did so is in the last lines of its
//! console, which is a file that needs no agent; see [`reason`].
//!
//! The instance actors use it through the [`Vmm`] trait.

mod api;
mod cgroup;
mod isolation;
mod jail;
mod kept;
mod kernel;
mod launch;
mod locks;
mod metrics;
mod reason;
mod save;
mod version;
mod vm;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{Accel, ProcessEnd, VmExit, VmHandle, VmmKind};
use tokio::sync::OnceCell;

pub use isolation::Isolation;
pub(crate) use kept::{Kept, keep};
pub(crate) use version::JAILER;
pub use version::{FirecrackerVersion, MINIMUM_VERSION};

use super::{Restore, TapPlace, Vm, VmSpec, Vmm, VmmError, this_processor};
use crate::process::{self, ProcessIdentity};
use crate::state_dir::StateDir;

/// Firecracker's program, to be found in `PATH`; its jailer is beside it.
pub const PROGRAM: &str = "firecracker";
/// The variable that names another one.
pub const PROGRAM_VARIABLE: &str = "MVM_FIRECRACKER";

/// How the driver runs Firecracker.
#[derive(Debug, Clone)]
pub struct FirecrackerConfig {
    /// The program, by path or by a name to be found in `PATH`.
    pub program: PathBuf,
    /// Where a copy of it is kept for what it saves; nowhere if absent.
    pub kept_in: Option<PathBuf>,
    /// What a microVM must not lack to run.
    pub isolation: Isolation,
    /// A compiled seccomp filter in place of Firecracker's own.
    pub seccomp_filter: Option<PathBuf>,
    /// A template of the processor that guests see, as Firecracker's API has it.
    pub cpu_template: Option<PathBuf>,
    /// Whether guests hand back the memory that they free.
    pub free_page_reporting: bool,
    /// How long a fresh Firecracker has until it serves its API.
    pub start_limit: Duration,
    /// How long it has for one request: saving takes as long as the disk does.
    pub request_limit: Duration,
}

impl FirecrackerConfig {
    /// The Firecracker that [`PROGRAM_VARIABLE`] names, or the installed one.
    pub fn from_environment() -> Self {
        Self::new(named().unwrap_or_else(|| PROGRAM.into()))
    }

    /// That of this state directory's agent: the Firecracker that [`PROGRAM_VARIABLE`] names, the
    /// newest that is kept, or the installed one.
    pub fn of(state_dir: &StateDir) -> Self {
        let dir = state_dir.firecrackers();
        let program = named().or_else(|| kept::newest(&dir)).unwrap_or_else(|| PROGRAM.into());
        Self { kept_in: Some(dir), ..Self::new(program) }
    }

    /// This Firecracker.
    pub fn new(program: PathBuf) -> Self {
        Self {
            program,
            kept_in: None,
            isolation: Isolation::default(),
            seccomp_filter: None,
            cpu_template: None,
            free_page_reporting: true,
            start_limit: Duration::from_secs(30),
            request_limit: Duration::from_secs(120),
        }
    }
}

fn named() -> Option<PathBuf> {
    std::env::var_os(PROGRAM_VARIABLE).filter(|name| !name.is_empty()).map(PathBuf::from)
}

/// A Firecracker and its jailer that were found to be usable.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(crate) firecracker: PathBuf,
    pub(crate) jailer: PathBuf,
    pub(crate) version: FirecrackerVersion,
}

/// The Firecracker driver.
#[derive(Debug)]
pub struct FirecrackerVmm {
    config: FirecrackerConfig,
    programs: OnceCell<Programs>,
    /// Those of other versions, which nobody changes once they are kept.
    kept: Mutex<BTreeMap<FirecrackerVersion, Programs>>,
}

impl FirecrackerVmm {
    /// A driver; nothing is started or looked up yet.
    pub fn new(config: FirecrackerConfig) -> Self {
        Self { config, programs: OnceCell::new(), kept: Mutex::default() }
    }

    /// The version that is used.
    ///
    /// # Errors
    /// Firecracker or its jailer is not installed, does not run, or has faults that mvm cannot live
    /// with.
    pub async fn version(&self) -> Result<FirecrackerVersion, VmmError> {
        match self.programs.get() {
            Some(programs) => Ok(programs.version),
            None => find(&self.config.program).await.map(|programs| programs.version),
        }
    }

    /// The programs that microVMs are launched with: looked up, judged and kept once.
    async fn programs(&self) -> Result<&Programs, VmmError> {
        let ready = async || {
            let found = find(&self.config.program).await?;
            Ok(match &self.config.kept_in {
                None => found,
                Some(dir) => kept_or_as_found(dir.clone(), found).await,
            })
        };
        self.programs.get_or_try_init(ready).await
    }

    /// The programs of a version, if it is there, and else those that microVMs are launched with.
    async fn programs_for(&self, version: &str) -> Result<Programs, VmmError> {
        let usual = self.programs().await;
        if usual.as_ref().is_ok_and(|usual| usual.version.to_string() == version) {
            return usual.cloned();
        }
        let kept = FirecrackerVersion::parse(version).zip(self.config.kept_in.as_ref());
        let kept = kept.and_then(|(version, dir)| Some((version, kept::program(dir, version)?)));
        let Some((version, program)) = kept else { return usual.cloned() };
        if let Some(known) = self.kept().get(&version) {
            return Ok(known.clone());
        }
        let found = find(&program).await?;
        self.kept().insert(version, found.clone());
        Ok(found)
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<FirecrackerVersion, Programs>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kept copy of the programs; themselves if they cannot be kept.
async fn kept_or_as_found(dir: PathBuf, found: Programs) -> Programs {
    let (version, programs) = (found.version.to_string(), found.clone());
    let (to, name) = (dir.clone(), version.clone());
    let keeping = tokio::task::spawn_blocking(move || keep(&to, &programs));
    match keeping.await {
        Ok(Ok(Kept::Made | Kept::AlreadyThere)) => {
            let firecracker = dir.join(name).join(PROGRAM);
            return Programs { jailer: firecracker.with_file_name(JAILER), firecracker, ..found };
        }
        Ok(Ok(Kept::Others)) => {
            tracing::warn!(
                version,
                "another Firecracker of this version is kept; neither is replaced"
            );
        }
        Ok(Err(error)) => {
            tracing::warn!(version, error = with_source(&error), "cannot keep Firecracker")
        }
        Err(error) => tracing::warn!(version, %error, "cannot keep Firecracker"),
    }
    found
}

/// Finds and judges a Firecracker and its jailer.
pub(crate) async fn find(program: &Path) -> Result<Programs, VmmError> {
    let name = program.to_string_lossy().into_owned();
    let missing = || VmmError::MissingProgram { program: name.clone() };
    let firecracker = match program.components().count() {
        1 => process::find_program(program).ok_or_else(missing)?,
        _ => program.to_owned(),
    };
    let found = version::query(&firecracker).await?;
    if let Some(problem) = found.problem() {
        return Err(VmmError::Unfit { program: name, found: found.to_string(), problem });
    }
    let jailer = version::jailer_of(&firecracker)?;
    Ok(Programs { firecracker, jailer, version: found })
}

#[async_trait]
impl Vmm for FirecrackerVmm {
    fn kind(&self) -> VmmKind {
        VmmKind::Firecracker
    }

    async fn build(&self) -> Result<VmmBuild, VmmError> {
        build_of(&self.programs().await?.version.to_string())
    }

    async fn build_for(&self, saved_on: &VmmBuild) -> Result<VmmBuild, VmmError> {
        build_of(&self.programs_for(&saved_on.version).await?.version.to_string())
    }

    fn tap_place(&self, _vmm: Option<VmmKind>) -> TapPlace {
        TapPlace::Own
    }

    fn host_boot_id(&self) -> String {
        process::boot_id().unwrap_or_default()
    }

    async fn end_strays(&self, spec: &VmSpec) -> Result<(), VmmError> {
        match process::end_all_of(spec.uid, &spec.dir).await {
            Ok(0) => {}
            Ok(count) => {
                tracing::warn!(instance = %spec.id, count, "ended a microVM that no record knew");
            }
            Err(source) => {
                return Err(VmmError::System {
                    operation: format!("end the processes of user {}", spec.uid),
                    source,
                });
            }
        }
        cgroup::remove(spec.uid, &spec.id);
        Ok(())
    }

    async fn launch(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, VmmError> {
        spec.check()?;
        let programs = self.programs().await?;
        let vm = launch::launch(programs, &self.config, spec).await?;
        Ok(Arc::new(vm))
    }

    async fn clear(&self, spec: &VmSpec) -> Result<(), VmmError> {
        // An earlier release let one without a microVM wait for the wake of what sleeps.
        if jail::is_served(spec).await {
            self.end_strays(spec).await?;
        }
        // It holds a copy of Firecracker, which is of no use to what sleeps or is stopped.
        jail::remove(spec)
    }

    async fn restore(&self, spec: &VmSpec, from: &Restore) -> Result<Arc<dyn Vm>, VmmError> {
        spec.check()?;
        let programs = self.programs_for(&from.build.version).await?;
        let vm = launch::restore(&programs, &self.config, spec, from).await?;
        Ok(Arc::new(vm))
    }

    async fn adopt(
        &self,
        handle: &VmHandle,
        spec: &VmSpec,
    ) -> Result<Option<Arc<dyn Vm>>, VmmError> {
        let found = process::adopt_holder(ProcessIdentity::from(handle), &spec.dir);
        let process = found.map_err(|source| VmmError::System {
            operation: format!("find process {}", handle.pid),
            source,
        })?;
        let Some(process) = process else { return Ok(None) };
        let vm = vm::FirecrackerVm::new(handle.clone(), process, spec, self.config.request_limit);
        if let Err(error) = vm.state().await {
            // Its guest may well be served: whether to end it is not for the driver to decide.
            tracing::warn!(instance = %spec.id, %error, "an adopted Firecracker does not answer");
        }
        Ok(Some(Arc::new(vm)))
    }

    async fn exit_of(&self, _handle: &VmHandle, spec: &VmSpec) -> VmExit {
        VmExit { process: ProcessEnd::Unobserved, reason: reason::of(&spec.dir) }
    }
}

/// A Firecracker of this version, as it describes itself, on this machine.
fn build_of(version: &str) -> Result<VmmBuild, VmmError> {
    let number = FirecrackerVersion::parse(version).map(|version| version.to_string());
    let version = number.unwrap_or_else(|| version.to_owned());
    Ok(VmmBuild { vmm: VmmKind::Firecracker, version, accel: Accel::Kvm, cpu: this_processor()? })
}

fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
