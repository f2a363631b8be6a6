//! The lab: a machine with a real KVM on any machine, in which suites run that need one.
//!
//! ```text
//!  this machine ── QEMU, emulating an AMD processor with SVM ──> lab (Debian kernel, /dev/kvm)
//!     built test programs ── 9p ──> /lab                           └── KVM ──> guests of the suites
//!     target/lab/out  <── 9p ── logs and exit codes
//! ```
//!
//! Contributors and the gate call it. Everything in it runs emulated, so its times say nothing.

mod image;
mod machine;
mod seed;
mod suite;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Deserialize;

use crate::cargo::cargo;
use image::Image;
pub(crate) use image::missing_tools;
pub(crate) use suite::Suite;

/// How long one test program may take, in seconds.
const PROGRAM_LIMIT_S: u64 = 900;
/// How long the lab may take on top.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// What to run.
#[derive(Args)]
pub(crate) struct LabArgs {
    /// Run these suites (all by default), or `shell` for a console of the lab.
    #[arg(value_enum)]
    suites: Vec<Suite>,
}

impl LabArgs {
    /// These suites.
    pub(crate) fn of(suites: &[Suite]) -> Self {
        Self { suites: suites.to_vec() }
    }
}

/// What became of a suite.
enum Outcome {
    Passed,
    Failed,
    NotRun(String),
}

/// Runs suites in the lab.
pub(crate) fn run(args: &LabArgs) -> anyhow::Result<()> {
    let suites = if args.suites.is_empty() { &Suite::ALL[..] } else { &args.suites };
    if let Some(missing) = missing_tools() {
        bail!(missing);
    }
    let base = repository()?.join("target/lab");
    let began = Instant::now();
    let mut outcomes: Vec<(Suite, Outcome)> = Vec::new();
    let (runnable, blocked): (Vec<Suite>, Vec<Suite>) =
        suites.iter().partition(|suite| suite.obstacle().is_none());
    if !runnable.is_empty() {
        let image = image::ensure(&base)?;
        let out = fresh(&base.join("out"))?;
        let share = fill_share(&base, &image, &runnable)?;
        let programs: usize = runnable.iter().map(|suite| suite.programs().len()).sum();
        let is_console = runnable.contains(&Suite::Shell);
        let limit = Duration::from_secs(PROGRAM_LIMIT_S) * u32::try_from(programs)? + BOOT_LIMIT;
        machine::boot(&image, &share, &out, (!is_console).then_some(limit))?;
        for suite in runnable.into_iter().filter(|suite| *suite != Suite::Shell) {
            let outcome = match machine::result_of(&out, suite.name())? {
                0 => Outcome::Passed,
                _ => Outcome::Failed,
            };
            outcomes.push((suite, outcome));
        }
        println!("logs: {}", out.display());
    }
    let reasons = blocked.into_iter().filter_map(|suite| Some((suite, suite.obstacle()?)));
    outcomes.extend(reasons.map(|(suite, why)| (suite, Outcome::NotRun(why))));
    summarise(&outcomes, began.elapsed())
}

fn summarise(outcomes: &[(Suite, Outcome)], took: Duration) -> anyhow::Result<()> {
    println!("── lab, {:.0} s ──", took.as_secs_f64());
    for (suite, outcome) in outcomes {
        let text = match outcome {
            Outcome::Passed => "passed".to_owned(),
            Outcome::Failed => "FAILED".to_owned(),
            Outcome::NotRun(why) => format!("not run: {why}"),
        };
        println!("{:18} {text}", suite.name());
    }
    ensure!(
        !outcomes.iter().any(|(_, outcome)| matches!(outcome, Outcome::Failed)),
        "a suite failed"
    );
    Ok(())
}

/// The directory that the lab sees as `/lab`.
fn fill_share(base: &Path, image: &Image, suites: &[Suite]) -> anyhow::Result<PathBuf> {
    let share = fresh(&base.join("share"))?;
    // A test may have the name of a program.
    fs::create_dir(share.join("tests"))?;
    fs::create_dir(share.join("bin"))?;
    for program in suites.iter().flat_map(|suite| suite.programs()) {
        let to = suite::binary_path(&share, program.test);
        if !to.exists() {
            let built = match program.test {
                suite::XTASK => std::env::current_exe()?,
                test => build_test(test)?,
            };
            strip(&built, &to)?;
        }
    }
    let is_whole = |suite: &Suite| {
        *suite == Suite::Shell || suite.programs().iter().any(|program| program.vmm.is_some())
    };
    if suites.iter().any(is_whole) {
        let mvm = build_mvm()?;
        strip(&mvm, &share.join("bin/mvm"))?;
        copy_tree(&seed::ensure(base, &mvm)?, &share.join("seed"))?;
    }
    if suites.iter().any(|suite| !matches!(suite, Suite::Qemu | Suite::GuestsQemu)) {
        for program in suite::firecracker().into_iter().flatten() {
            let name = program.file_name().context("a program has a name")?;
            fs::copy(&program, share.join("bin").join(name))?;
        }
    }
    if let Some(filter) = suite::seccomp_filter() {
        fs::copy(filter, share.join("bin/seccomp.bpf"))?;
    }
    copy_tree(&image.guest_kernel, &share.join("guest-kernel"))?;
    let script = share.join("run.sh");
    let repository = repository()?.to_str().context("the repository's path is not UTF-8")?;
    fs::write(&script, suite::script(suites, repository, PROGRAM_LIMIT_S))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(share)
}

/// Copies a program without what is there for debuggers, which an emulated machine would read too.
fn strip(from: &Path, to: &Path) -> anyhow::Result<()> {
    image::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(from))
}

/// Links a tree of files that nobody changes.
fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    image::run(Command::new("cp").arg("-al").arg(from).arg(to))
}

/// Builds `mvm` and returns its path. What is not optimised takes minutes in an emulated machine.
fn build_mvm() -> anyhow::Result<PathBuf> {
    let built = cargo().args(["build", "--release", "--locked", "-p", "mvm"]).status();
    ensure!(built.context("cannot run cargo")?.success(), "mvm does not build");
    Ok(repository()?.join("target/release/mvm"))
}

/// Builds a test program and returns its path.
fn build_test(test: &str) -> anyhow::Result<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        target: Option<Target>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    let output = cargo()
        // Of all members, so that dependencies are built as `cargo xtask test` builds them.
        .args(["test", "--locked", "--no-run", "--workspace", "--test", test])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "test {test} does not build");
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let built =
        messages.filter(|message| message.target.as_ref().is_some_and(|it| it.name == test));
    let path = built.filter_map(|message| message.executable).next_back();
    path.with_context(|| format!("cargo names no program for test {test}"))
}

fn fresh(dir: &Path) -> anyhow::Result<PathBuf> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir_all(dir)?;
    Ok(dir.to_owned())
}

fn repository() -> anyhow::Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent")
}
