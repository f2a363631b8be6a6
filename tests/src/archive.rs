//! Archives as `docker save` writes them, of trees that a test has made.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::run::tool;

/// An archive of an image with this one layer and this command. It is made in `dir`, in which the
/// layer must be too.
///
/// # Panics
/// It cannot be made.
#[track_caller]
pub fn docker_archive(dir: &Path, layer: &str, command: &[&str]) -> PathBuf {
    let digest = tool("sha256sum", &[&text(&dir.join(layer))]).ok().stdout;
    let digest = format!("sha256:{}", digest.split(' ').next().unwrap_or_default());
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Cmd": command },
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

/// A path as an argument.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
