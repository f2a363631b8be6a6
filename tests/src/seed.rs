//! What every node needs and none should make anew: the guest kernel and the built-in image.
//!
//! They are made once for each binary that is tested, below `target/`, and hard-linked into the
//! nodes' state directories. `MVM_TEST_SEED` names one that is ready. All of it is immutable to mvm; a test that damages a file takes a
//! copy of its own first ([`own_copy`]).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::binary::{mvm, repository};
use crate::run::Running;

/// Directories of a state directory that nodes share.
const SHARED: [&str; 3] = ["kernels", "images", "cache"];
/// Downloads and two builds.
const LIMIT: Duration = Duration::from_secs(600);

/// Fills a state directory from the seed, which is made first if need be.
///
/// # Panics
/// The seed cannot be made or linked.
pub fn fill(state_dir: &Path) {
    let seed = ensure();
    for name in SHARED {
        let from = seed.join(name);
        if from.exists() {
            link_tree(&from, &state_dir.join(name)).expect("the seed can be linked");
        }
    }
}

/// Makes a file that may be shared with other nodes this node's alone.
///
/// # Panics
/// It cannot be copied.
pub fn own_copy(path: &Path) {
    let copy = path.with_extension("own-copy");
    fs::copy(path, &copy).and_then(|_| fs::rename(&copy, path)).expect("the file can be copied");
}

fn ensure() -> PathBuf {
    // Made elsewhere, for machines that have no network.
    if let Some(ready) = std::env::var_os("MVM_TEST_SEED") {
        return PathBuf::from(ready);
    }
    let base = repository().join("target/e2e");
    fs::create_dir_all(&base).expect("target/ is writable");
    let lock = File::create(base.join("lock")).expect("target/ is writable");
    lock.lock().expect("a file can be locked");
    let seed = base.join("seed");
    let stamp = base.join("made-by");
    let made_by = identity_of(mvm());
    if fs::read_to_string(&stamp).is_ok_and(|text| text == made_by) {
        return seed;
    }
    let _ = fs::remove_file(&stamp);
    // Another binary has another guest agent, and so other images.
    let _ = fs::remove_dir_all(seed.join("images"));
    run(&seed, &["bootstrap", "--yes"]);
    run(&seed, &["tenant", "create", "seed"]);
    run(&seed, &["pool", "create", "seed/pool"]);
    run(&seed, &["pool", "build", "seed/pool"]);
    run(&seed, &["tenant", "destroy", "seed", "--force"]);
    run(&seed, &["agent", "stop"]);
    fs::write(&stamp, made_by).expect("target/ is writable");
    seed
}

fn identity_of(binary: &Path) -> String {
    let metadata = fs::metadata(binary);
    let metadata = metadata.unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
    let (size, seconds, nanos) = (metadata.size(), metadata.mtime(), metadata.mtime_nsec());
    format!("{} {size} {seconds}.{nanos}\n", binary.display())
}

fn run(seed: &Path, args: &[&str]) {
    let mut command = Command::new(mvm());
    command.args(args).env("MVM_STATE_DIR", seed);
    Running::start(command, None).wait(LIMIT).ok();
}

fn link_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            link_tree(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, &target)?;
        } else if fs::hard_link(entry.path(), &target).is_err() {
            // Another filesystem.
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}
