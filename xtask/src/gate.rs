//! The gate: one command that CI, the README and contributors run before anything lands.
//!
//! Fast stages come first. A stage that cannot run here is reported as skipped with its reason, in
//! the summary too; it never counts as passed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use crate::lab::{self, LabArgs, Suite};

/// What to run.
#[derive(Args)]
pub(crate) struct TestArgs {
    /// Run only these stages (all by default).
    #[arg(value_enum)]
    stages: Vec<Stage>,
}

/// One part of the gate.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// rustfmt.
    Format,
    /// clippy on all targets, warnings denied.
    Lint,
    /// Licences, bans and sources of dependencies; none that is not used.
    Deny,
    /// Unit, property and contract tests, the simulated fleet, and tests in network namespaces.
    Test,
    /// rustdoc, warnings denied.
    Doc,
    /// QEMU on a KVM that works, which an emulated machine has.
    Lab,
    /// The whole product on real microVMs, with the release binary.
    Vm,
}

enum Outcome {
    Passed,
    Failed,
    Skipped(String),
}

/// Runs the gate.
pub(crate) fn run(args: &TestArgs) -> anyhow::Result<()> {
    let stages = if args.stages.is_empty() { Stage::value_variants() } else { &args.stages };
    let mut results = Vec::new();
    for stage in stages {
        println!("── {} ──", stage.name());
        let began = Instant::now();
        let outcome = stage.run()?;
        let failed = matches!(outcome, Outcome::Failed);
        results.push((*stage, outcome, began.elapsed()));
        if failed {
            break;
        }
    }
    summarise(stages, &results)
}

fn summarise(stages: &[Stage], results: &[(Stage, Outcome, Duration)]) -> anyhow::Result<()> {
    println!("── summary ──");
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (stage, outcome, took) in results {
        let text = match outcome {
            Outcome::Passed => {
                passed += 1;
                "passed".to_owned()
            }
            Outcome::Failed => {
                failed += 1;
                "FAILED".to_owned()
            }
            Outcome::Skipped(why) => {
                skipped += 1;
                format!("skipped: {why}")
            }
        };
        println!("{:8} {:>6.1} s  {text}", stage.name(), took.as_secs_f64());
    }
    for stage in stages.iter().skip(results.len()) {
        println!("{:8}           not run", stage.name());
    }
    println!("stages: {passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 {
        bail!("the gate failed");
    }
    Ok(())
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Lint => "lint",
            Self::Deny => "deny",
            Self::Test => "test",
            Self::Doc => "doc",
            Self::Lab => "lab",
            Self::Vm => "vm",
        }
    }

    fn run(self) -> anyhow::Result<Outcome> {
        match self {
            Self::Format => cargo(&["fmt", "--all", "--check"], &[]),
            Self::Lint => cargo(
                &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"],
                &[],
            ),
            Self::Deny => {
                for tool in ["deny", "machete"] {
                    let installed = crate::cargo::cargo().args([tool, "--version"]).output();
                    if !installed.is_ok_and(|output| output.status.success()) {
                        return Ok(Outcome::Skipped(format!(
                            "cargo-{tool} is not installed (`cargo install --locked cargo-{tool}`)"
                        )));
                    }
                }
                match cargo(&["deny", "--locked", "check", "licenses", "bans", "sources"], &[])? {
                    Outcome::Passed => cargo(&["machete"], &[]),
                    failed => Ok(failed),
                }
            }
            Self::Test => {
                let tests = ["--workspace", "--exclude", "mvm-tests"];
                cargo(&[&["test", "--locked", "--no-fail-fast"], &tests[..]].concat(), &[])
            }
            Self::Doc => cargo(
                &["doc", "--workspace", "--no-deps", "--locked", "--document-private-items"],
                // Private items are documented too: this documentation is for those who work on mvm.
                &[("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links")],
            ),
            Self::Lab => in_the_lab(),
            Self::Vm => vm(),
        }
    }
}

/// Firecracker's suites are not part of the gate: no package has it.
fn in_the_lab() -> anyhow::Result<Outcome> {
    if let Some(missing) = lab::missing_tools() {
        return Ok(Outcome::Skipped(missing));
    }
    match lab::run(&LabArgs::of(&[Suite::Qemu])) {
        Ok(()) => Ok(Outcome::Passed),
        Err(error) => {
            println!("{error:#}");
            Ok(Outcome::Failed)
        }
    }
}

fn vm() -> anyhow::Result<Outcome> {
    if !cfg!(target_os = "linux") {
        return Ok(Outcome::Skipped("microVMs need Linux".to_owned()));
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(Outcome::Skipped("microVMs and their networks need root".to_owned()));
    }
    if let Outcome::Failed = cargo(&["build", "--release", "--locked", "-p", "mvm"], &[])? {
        return Ok(Outcome::Failed);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent")?;
    let binary = root.join("target/release/mvm");
    let binary = binary.to_str().context("the repository's path is not UTF-8")?;
    // Each test boots a few microVMs: more tests at once would only wait for each other.
    let threads = ["--", "--test-threads", "2"];
    // Chosen by their names among all members': so dependencies are built as for the other tests.
    let mut args: Vec<String> =
        ["test", "--locked", "--no-fail-fast", "--workspace"].map(str::to_owned).into();
    for name in test_names(&root.join("tests/tests"))? {
        args.extend(["--test".to_owned(), name]);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).chain(threads).collect();
    cargo(&args, &[("MVM_BIN", binary)])
}

/// The names of the tests that are files in a directory.
fn test_names(dir: &Path) -> anyhow::Result<Vec<String>> {
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut names = Vec::new();
    for path in entries.map(|entry| entry.map(|entry| entry.path())) {
        let path = path?;
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().and_then(|name| name.to_str()).map(str::to_owned));
        }
    }
    names.sort();
    Ok(names)
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> anyhow::Result<Outcome> {
    let status = crate::cargo::cargo()
        .args(args)
        .envs(env.iter().copied())
        .status()
        .with_context(|| format!("cannot run `cargo {}`", args.join(" ")))?;
    Ok(if status.success() { Outcome::Passed } else { Outcome::Failed })
}
