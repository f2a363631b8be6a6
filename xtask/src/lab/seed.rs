//! A state directory with a guest kernel and the built-in image, made outside the lab, which has no
//! network, for end-to-end tests in it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;

/// What tests need of the state directory.
const KEPT: [&str; 2] = ["kernels", "images"];

/// The directory, made by this `mvm` unless it was made by the very same one before.
pub(super) fn ensure(base: &Path, mvm: &Path) -> anyhow::Result<PathBuf> {
    let (seed, stamp) = (base.join("seed"), base.join("seed-made-by"));
    let metadata = fs::metadata(mvm)?;
    let made_by = format!("{} {}.{}", metadata.size(), metadata.mtime(), metadata.mtime_nsec());
    if fs::read_to_string(&stamp).is_ok_and(|text| text == made_by) {
        return Ok(seed);
    }
    let work = tempfile::Builder::new().prefix("seed-").tempdir_in(base)?;
    let state = work.path();
    let made = (|| {
        mvm_does(mvm, state, "bootstrap --yes")?;
        mvm_does(mvm, state, "tenant create seed")?;
        mvm_does(mvm, state, "pool create seed/pool")?;
        mvm_does(mvm, state, "pool build seed/pool")?;
        mvm_does(mvm, state, "tenant destroy seed --force")
    })();
    // The agent goes whatever came of it.
    let stopped = mvm_does(mvm, state, "agent stop");
    made.and(stopped)?;
    super::fresh(&seed)?;
    for name in KEPT {
        fs::rename(state.join(name), seed.join(name))?;
    }
    fs::write(&stamp, made_by)?;
    Ok(seed)
}

fn mvm_does(mvm: &Path, state: &Path, arguments: &str) -> anyhow::Result<()> {
    let status = Command::new(mvm)
        .args(arguments.split(' '))
        .env("MVM_STATE_DIR", state)
        // The image is the same for every VMM.
        .env("MVM_VMM", "qemu")
        .output()?;
    let said = String::from_utf8_lossy(&status.stderr);
    ensure!(status.status.success(), "`mvm {arguments}` failed: {said}");
    Ok(())
}
