//! Keeps the result of [`super::kvm_probe`] for as long as it holds: until the host boots again or
//! `/dev/kvm` is made anew by another KVM module.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::kvm::Probe;
use super::kvm_probe;
use crate::image::durable::replace_file;
use crate::process::boot_id;
use crate::state_dir::StateDir;

/// Rises when the probe learns to see more, so that older results are not believed.
const REVISION: u32 = 1;

/// What a result holds for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Scope {
    revision: u32,
    boot_id: String,
    /// Seconds and nanoseconds of the device file's last change.
    device_changed: (i64, i64),
}

impl Scope {
    fn now() -> io::Result<Self> {
        let device = fs::metadata("/dev/kvm")?;
        let device_changed = (device.ctime(), device.ctime_nsec());
        Ok(Self { revision: REVISION, boot_id: boot_id()?, device_changed })
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    scope: Scope,
    probe: Probe,
}

/// The result for this boot, from the state directory or from a new guest. May take half a second.
pub(super) fn probe(state_dir: &StateDir) -> Probe {
    let Ok(scope) = Scope::now() else {
        return kvm_probe::run();
    };
    cached(&state_dir.kvm_probe(), scope, kvm_probe::run)
}

fn cached(path: &Path, scope: Scope, run: impl FnOnce() -> Probe) -> Probe {
    // A file that does not parse is of another version or damaged; it is only a saving of time.
    let known = fs::read(path).ok().and_then(|text| serde_json::from_slice::<Entry>(&text).ok());
    if let Some(entry) = known.filter(|entry| entry.scope == scope) {
        return entry.probe;
    }
    let entry = Entry { scope, probe: run() };
    let is_kept = entry.probe.is_conclusive() && path.parent().is_some_and(Path::is_dir);
    if is_kept
        && let Ok(text) = serde_json::to_vec(&entry)
        && let Err(error) = replace_file(path, &text, 0o644)
    {
        tracing::debug!(%error, "the result of the KVM probe is not kept");
    }
    entry.probe
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::kvm::Stage;

    fn scope(boot_id: &str) -> Scope {
        Scope { revision: REVISION, boot_id: boot_id.into(), device_changed: (7, 8) }
    }

    fn result(guest_us: u64) -> Probe {
        Probe::Finished { guest_us, host_us: 1, refused_msr: Some(0x10a) }
    }

    fn fresh() -> Probe {
        panic!("the cached result is used")
    }

    #[test]
    fn a_result_holds_until_the_next_boot() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("probe.json");
        assert_eq!(cached(&file, scope("one"), || result(1)), result(1));
        assert_eq!(cached(&file, scope("one"), fresh), result(1));
        assert_eq!(cached(&file, scope("two"), || result(2)), result(2));
        assert_eq!(cached(&file, scope("two"), fresh), result(2));
    }

    #[test]
    fn a_new_device_file_or_probe_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("probe.json");
        cached(&file, scope("one"), || result(1));
        let reloaded = Scope { device_changed: (7, 9), ..scope("one") };
        assert_eq!(cached(&file, reloaded, || result(2)), result(2));
        let better = Scope { revision: REVISION + 1, ..scope("one") };
        assert_eq!(cached(&file, better, || result(3)), result(3));
    }

    #[test]
    fn a_damaged_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("probe.json");
        fs::write(&file, "{").unwrap();
        assert_eq!(cached(&file, scope("one"), || result(1)), result(1));
        assert_eq!(cached(&file, scope("one"), fresh), result(1));
    }

    #[test]
    fn what_a_busy_machine_says_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("probe.json");
        let stalled = Probe::Stalled { reached: Stage::Start, ran_ms: 1, limit_ms: 700 };
        cached(&file, scope("one"), || stalled);
        assert_eq!(cached(&file, scope("one"), || result(1)), result(1));
    }

    #[test]
    fn a_state_directory_is_not_made_for_a_result() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state/probe.json");
        assert_eq!(cached(&file, scope("one"), || result(1)), result(1));
        assert!(!file.parent().unwrap().exists());
    }
}
