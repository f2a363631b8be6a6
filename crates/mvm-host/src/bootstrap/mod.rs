//! Makes a machine ready for microVMs: the host's tools and a guest kernel.
//!
//! The CLI calls it on first use and by hand. It installs nothing but the few tools that mvm runs,
//! never installs the guest's kernel on the host, never prints, and says what it did and what was
//! already there.

use std::path::PathBuf;

use crate::image::durable::FileError;
use crate::image::progress::OnProgress;
use crate::process::ToolError;

pub(crate) mod apt;
pub(crate) mod deb;
pub mod firecracker;
pub mod kernel;
mod kernel_build;
pub mod kernel_file;
mod kernel_packages;
mod kernel_store;
pub(crate) mod modinfo;
mod module_image;
mod modules;
pub mod packages;

use crate::state_dir::StateDir;
pub use kernel::Kernel;
pub use kernel_store::KernelStore;
use packages::{PackagesReport, Program};

/// Whether an operation changed anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It made what was missing.
    Made,
    /// Everything was there.
    AlreadyThere,
}

/// Why the machine could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// A tool of the host failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The machine has no `apt-get`, so there is nowhere to fetch packages from.
    #[error("{needed} cannot be fetched: this machine has no `apt-get`; {instead}")]
    NoApt {
        /// What is needed.
        needed: &'static str,
        /// What the user can do.
        instead: &'static str,
    },
    /// The package lists do not know a package.
    #[error("the machine's package sources have no package named {names}")]
    UnknownPackage {
        /// The names that were tried.
        names: String,
    },
    /// Firecracker cannot be installed.
    #[error(transparent)]
    Firecracker(#[from] firecracker::InstallError),
    /// A downloaded package is not the one that the package lists promise.
    #[error("{path} does not match the package lists: expected SHA-256 {expected}, got {actual}")]
    WrongDigest {
        /// The downloaded file.
        path: PathBuf,
        /// The promised digest.
        expected: String,
        /// The file's digest.
        actual: String,
    },
    /// A package file cannot be read.
    #[error("{path} is not a usable package: {problem}")]
    BadPackage {
        /// The package file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file is not a kernel that a microVM can boot.
    #[error("{path} is not a usable kernel: {problem}")]
    BadKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A kernel module file cannot be read.
    #[error("{path} is not a usable kernel module: {problem}")]
    BadModule {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A kernel lacks something that every microVM needs.
    #[error("the kernel has no `{module}`, neither built in nor as a module in {place}")]
    MissingModule {
        /// The module's name, or alternatives.
        module: String,
        /// Where it was looked for.
        place: String,
    },
    /// A stored kernel is incomplete or was changed.
    #[error("the guest kernel is damaged: {path} {problem}; `mvm bootstrap` fetches it again")]
    DamagedKernel {
        /// The file that is damaged.
        path: PathBuf,
        /// How.
        problem: String,
        /// The kernel's directory.
        dir: PathBuf,
    },
    /// There is no kernel of this name.
    #[error("there is no guest kernel {id}")]
    NoSuchKernel {
        /// The kernel's id.
        id: String,
    },
    /// The operation needs a package manager that mvm can drive.
    #[error("{programs} not installed; run: {command}")]
    InstallByHand {
        /// The missing programs.
        programs: String,
        /// What to type.
        command: String,
    },
}

/// What [`Bootstrap::run`] did.
#[derive(Debug)]
pub struct BootstrapReport {
    /// The host's packages.
    pub packages: PackagesReport,
    /// The default guest kernel.
    pub kernel: Kernel,
    /// Whether the kernel was fetched now.
    pub kernel_outcome: Outcome,
}

/// The first-use set-up of one state directory.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    state: StateDir,
}

impl Bootstrap {
    /// For the state directory of this machine's agent.
    pub fn new(state: impl Into<StateDir>) -> Self {
        Self { state: state.into() }
    }

    /// Installs missing tools and fetches a guest kernel. What is there is left alone, so a second
    /// run changes nothing and needs no network.
    ///
    /// # Errors
    /// A tool cannot be installed or the kernel cannot be fetched; what was done stays done.
    pub async fn run(&self, progress: OnProgress<'_>) -> Result<BootstrapReport, BootstrapError> {
        let packages = packages::ensure_installed(&Program::NEEDED, progress).await?;
        let (kernel, kernel_outcome) =
            KernelStore::new(&self.state).ensure_default(progress).await?;
        Ok(BootstrapReport { packages, kernel, kernel_outcome })
    }
}
