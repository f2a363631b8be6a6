//! Which `mvm` is tested.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package is in the repository")
}

/// The program under test: what `MVM_BIN` names, or else a debug build, made if need be.
///
/// # Panics
/// It cannot be built.
pub fn mvm() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("MVM_BIN") {
            return PathBuf::from(path);
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let build = Command::new(cargo)
            .args(["build", "--quiet", "--locked", "-p", "mvm"])
            .current_dir(repository())
            .status();
        assert!(build.expect("cargo starts").success(), "mvm does not build");
        repository().join("target/debug/mvm")
    })
}
