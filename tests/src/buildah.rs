//! Images made with `buildah`, as people make theirs: a directory with a `Containerfile`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::run::tool_within;

/// Copies of whole systems, on a loaded machine.
const LIMIT: Duration = Duration::from_secs(300);

/// Builds what the `Containerfile` in a directory describes and puts it where skopeo would find it,
/// such as `oci:DIR:TAG`. It needs no network and leaves nothing else behind.
///
/// # Panics
/// It cannot be built.
#[track_caller]
pub fn build(context: &Path, to: &str) {
    let store = tempfile::tempdir_in(context.parent().unwrap_or(context)).expect("it is writable");
    let path = |name: &str| store.path().join(name).display().to_string();
    let (root, run) = (path("root"), path("run"));
    // The plainest ways: they work in containers and namespaces too.
    let store = ["--storage-driver", "vfs", "--root", &root, "--runroot", &run];
    let buildah = |args: &[&str]| {
        tool_within(LIMIT, "buildah", &[&store[..], args].concat()).ok();
    };
    let context = context.display().to_string();
    buildah(&["build", "--quiet", "--isolation", "chroot", "--tag", "made", &context]);
    buildah(&["push", "--quiet", "--tls-verify=false", "made", to]);
}

/// Writes a `Containerfile` and other files beside it.
///
/// # Panics
/// They cannot be written.
#[track_caller]
pub fn context(dir: &Path, containerfile: &str, files: &[(&str, &str)]) {
    for (name, text) in [&[("Containerfile", containerfile)], files].concat() {
        fs::write(dir.join(name), text).expect("the directory is writable");
    }
}
