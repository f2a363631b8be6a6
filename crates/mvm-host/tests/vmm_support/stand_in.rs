//! The program that stands in for Firecracker and its jailer, driven like the real one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mvm_host::vmm::Vmm;
use mvm_host::vmm::firecracker::{FirecrackerConfig, FirecrackerVmm, Isolation};
use serde_json::Value;

use super::Backend;
use crate::stand_in_program;

/// The file beside a program that says how it behaves.
pub(crate) const BEHAVIOUR: &str = "behaviour.json";

pub(crate) struct StandIn {
    files: tempfile::TempDir,
    request_limit: Option<Duration>,
}

impl StandIn {
    /// The backend, or why it cannot be used here.
    pub(crate) fn new() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root may start a jailer".into());
        }
        let files = tempfile::tempdir().map_err(|error| error.to_string())?;
        let program = stand_in_program::path()?;
        for name in ["firecracker", "jailer"] {
            install(program, &files.path().join(name)).map_err(|error| error.to_string())?;
        }
        for (name, content) in [("kernel", &b"\x7fELF"[..]), ("initrd", b"")] {
            std::fs::write(files.path().join(name), content).map_err(|error| error.to_string())?;
        }
        Ok(Self { files, request_limit: None })
    }

    /// Has it answer each request within this time, as far as the driver is concerned.
    pub(crate) fn within(self, limit: Duration) -> Self {
        Self { request_limit: Some(limit), ..self }
    }

    /// A driver that keeps what it starts in a directory.
    pub(crate) fn vmm_that_keeps(&self, dir: &Path) -> FirecrackerVmm {
        let config = FirecrackerConfig::new(self.program());
        FirecrackerVmm::new(FirecrackerConfig { kept_in: Some(dir.to_owned()), ..config })
    }

    /// A driver that gives microVMs a seccomp filter, and refuses some.
    pub(crate) fn vmm_that_isolates(
        &self,
        isolation: Isolation,
        seccomp_filter: Option<PathBuf>,
    ) -> FirecrackerVmm {
        let config = FirecrackerConfig::new(self.program());
        FirecrackerVmm::new(FirecrackerConfig { isolation, seccomp_filter, ..config })
    }

    /// A driver that gives microVMs a template of their processor.
    pub(crate) fn vmm_with_template(&self, template: &Path) -> FirecrackerVmm {
        let config = FirecrackerConfig::new(self.program());
        let cpu_template = Some(template.to_owned());
        FirecrackerVmm::new(FirecrackerConfig { cpu_template, ..config })
    }

    /// What whoever starts from now on does; see the program's module on behaviour.
    pub(crate) fn behave(&self, behaviour: &Value) {
        let path = self.files.path().join(BEHAVIOUR);
        std::fs::write(path, behaviour.to_string()).unwrap();
    }

    /// Its program, which has its jailer beside it.
    pub(crate) fn program(&self) -> PathBuf {
        self.files.path().join("firecracker")
    }
}

/// A link to the program, or a copy on another filesystem.
fn install(program: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::hard_link(program, to).or_else(|_| std::fs::copy(program, to).map(drop))
}

impl Backend for StandIn {
    fn vmm(&self) -> Arc<dyn Vmm> {
        let mut config = FirecrackerConfig::new(self.program());
        if let Some(limit) = self.request_limit {
            config.request_limit = limit;
            config.start_limit = limit;
        }
        Arc::new(FirecrackerVmm::new(config))
    }

    fn vmm_without_program(&self) -> Option<Arc<dyn Vmm>> {
        let config = FirecrackerConfig::new("firecracker-nowhere".into());
        Some(Arc::new(FirecrackerVmm::new(config)))
    }

    fn boot_files(&self) -> (PathBuf, PathBuf) {
        (self.files.path().join("kernel"), self.files.path().join("initrd"))
    }
}
