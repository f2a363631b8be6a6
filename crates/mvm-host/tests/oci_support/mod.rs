//! What the tests of container images share: images that tests make themselves, and trees compared
//! file by file.
// Each test binary uses a part; a skipped test says why.
#![allow(dead_code, clippy::print_stdout, clippy::unwrap_used)]

pub(crate) mod layout;
pub(crate) mod registry;
pub(crate) mod tree;

use std::path::Path;
use std::process::Command;

use mvm_host::image::progress::Progress;
use mvm_host::process::find_program;

/// Ignores progress.
pub(crate) fn quiet(_: Progress) {}

/// Says why a test is skipped, unless everything it needs is there.
pub(crate) fn can_run(programs: &[&str]) -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return false;
    }
    for program in programs {
        if find_program(program).is_none() {
            println!("skipped: `{program}` is not installed");
            return false;
        }
    }
    true
}

/// Runs a program of the host, which must succeed, and returns what it printed.
#[allow(clippy::disallowed_methods)] // the tests make and check images with the system's own tools
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

/// What `umoci` makes of an image.
pub(crate) fn umoci_tree(layout: &Path, tag: &str, dest: &Path) -> tree::Snapshot {
    let image = format!("{}:{tag}", layout.display());
    run("umoci", &["raw", "unpack", "--image", &image, dest.to_str().unwrap()]);
    tree::snapshot(dest)
}

/// Names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
