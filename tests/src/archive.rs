//! Archives as `docker save` writes them, of trees that a test has made.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::Node;
use crate::run::tool;

/// An archive of an image with this one layer and this command, as [`docker_archive_of`] makes it.
///
/// # Panics
/// It cannot be made.
#[track_caller]
pub fn docker_archive(dir: &Path, layer: &str, command: &[&str]) -> PathBuf {
    docker_archive_of(dir, layer, &json!({ "Cmd": command }))
}

/// An archive of an image with this one layer, which is run in this way. It is made in `dir`, in
/// which the layer must be too.
///
/// # Panics
/// It cannot be made.
#[track_caller]
pub fn docker_archive_of(dir: &Path, layer: &str, run: &Value) -> PathBuf {
    let digest = tool("sha256sum", &[&text(&dir.join(layer))]).ok().stdout;
    let digest = format!("sha256:{}", digest.split(' ').next().unwrap_or_default());
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": [digest] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["test:1"], "Layers": [layer] }]);
    for (name, document) in [("config.json", config), ("manifest.json", manifest)] {
        fs::write(dir.join(name), document.to_string()).expect("the directory is writable");
    }
    let archive = dir.join("image.tar");
    let files = ["manifest.json", "config.json", layer];
    tool("tar", &[&["-C", &text(dir), "-cf", &text(&archive)][..], &files].concat()).ok();
    archive
}

/// A directory `root` in `dir` with busybox, these of its programs in `/bin`, and the directories
/// that every root has.
///
/// # Panics
/// It cannot be made.
#[track_caller]
pub fn busybox_root(node: &Node, dir: &Path, programs: &[&str]) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "sbin", "etc", "dev", "proc", "sys", "run", "tmp"] {
        fs::create_dir_all(root.join(name)).expect("the directory is writable");
    }
    let packages = fs::read_dir(node.dir().join("cache/packages")).expect("a node has packages");
    let package = packages
        .map(|entry| entry.expect("the directory can be read").path())
        .find(|path| path.file_name().is_some_and(is_busybox))
        .expect("every node has busybox for the image that is built in");
    let unpacked = dir.join("busybox");
    tool("dpkg-deb", &["-x", &text(&package), &text(&unpacked)]).ok();
    fs::copy(unpacked.join("bin/busybox"), root.join("bin/busybox")).expect("there is room");
    for name in programs {
        symlink("busybox", root.join("bin").join(name)).expect("the directory is writable");
    }
    root
}

fn is_busybox(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with("busybox-static")
}

/// An archive of an image with this root, which is run in this way. It is made in `dir`.
///
/// # Panics
/// It cannot be made.
#[track_caller]
pub fn archive_of_root(dir: &Path, root: &Path, run: &Value) -> PathBuf {
    let parts = dir.join("parts");
    fs::create_dir(&parts).expect("the directory is writable");
    let layer = parts.join("layer.tar");
    let owners = ["--owner=0", "--group=0"];
    tool("tar", &[&["-C", &text(root)], &owners[..], &["-cf", &text(&layer), "."]].concat()).ok();
    docker_archive_of(&parts, "layer.tar", run)
}

/// A path as an argument.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
