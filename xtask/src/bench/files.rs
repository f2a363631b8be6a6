//! `files`: the start of an instance from an image of 50,000 files, against one of ten files. Both
//! take turns.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, ensure};
use mvm_core::admit::Request;
use mvm_core::name::PoolPath;
use mvm_core::spec::{PoolSpec, RestartPolicy};

use super::lab::Lab;
use super::report::Report;
use super::start::{destroy, one_start};
use super::statistics::Summary;

/// How many files the images have.
const FEW: usize = 10;
const MANY: usize = 50_000;
/// Files in one directory.
const IN_DIRECTORY: usize = 500;
/// The ratio that the larger image may cost.
const RATIO: f64 = 1.10;
/// A static program of the host's that is a shell and everything else.
const BUSYBOX: &str = "/bin/busybox";

/// Measures this many starts of each.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let trees = tempfile::Builder::new().prefix("trees-").tempdir_in(lab.state_dir())?;
    let few = lab.pool_of(spec(trees.path(), "few", FEW)?).await?;
    let many = PoolPath { pool: "many".parse()?, ..few.clone() };
    let spec = spec(trees.path(), "many", MANY)?;
    lab.client().submit(Request::PoolCreate { path: many.clone(), spec: spec.into() }).await?;
    lab.client().build(&many).await?;
    let (mut of_few, mut of_many) = (Vec::new(), Vec::new());
    // The first pair fills the page cache and is not counted.
    for run in 0..=runs {
        for is_many in [run % 2 == 0, run % 2 != 0] {
            let (steps, view) = one_start(lab, if is_many { &many } else { &few }).await?;
            destroy(lab, &view.path).await?;
            if run > 0 {
                let times = if is_many { &mut of_many } else { &mut of_few };
                times.push(steps.exec.as_secs_f64() * 1000.0);
            }
        }
    }
    let ours = Summary::of(&of_many).context("nothing was measured")?;
    let sample = format!("a start from an image of {MANY} files, against one of {FEW} files");
    let mut report = Report::new("files", sample, ours, Summary::of(&of_few));
    report.target_ratio(RATIO);
    Ok(report)
}

/// What instances of so many files are like.
fn spec(trees: &Path, name: &str, files: usize) -> anyhow::Result<PoolSpec> {
    let tree = trees.join(name);
    make_tree(&tree, files).with_context(|| format!("cannot make {}", tree.display()))?;
    Ok(PoolSpec {
        image: format!("rootfs:{}", tree.display()).parse().map_err(anyhow::Error::msg)?,
        restart: RestartPolicy::Never,
        boot_timeout_s: 600,
        ..PoolSpec::default()
    })
}

fn make_tree(tree: &Path, files: usize) -> anyhow::Result<()> {
    ensure!(Path::new(BUSYBOX).exists(), "{BUSYBOX} is missing: install busybox-static");
    fs::create_dir_all(tree.join("bin"))?;
    fs::copy(BUSYBOX, tree.join("bin/busybox"))?;
    for name in ["sh", "true"] {
        symlink("busybox", tree.join("bin").join(name))?;
    }
    for number in 3..files {
        let dir = tree.join("data").join((number / IN_DIRECTORY).to_string());
        if number == 3 || number % IN_DIRECTORY == 0 {
            fs::create_dir_all(&dir)?;
        }
        fs::write(dir.join(number.to_string()), format!("file {number}\n"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_as_many_files_as_were_asked_for() {
        if !Path::new(BUSYBOX).exists() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        make_tree(&dir.path().join("tree"), 1_203).unwrap();
        let mut dirs = vec![dir.path().join("tree")];
        let mut files = 0;
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => dirs.push(entry.path()),
                    false => files += 1,
                }
            }
        }
        assert_eq!(files, 1_203);
    }
}
