//! `mvm doctor`.

use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::bootstrap::Missing;
use crate::cli::Context;
use crate::client::Wanted;
use crate::error::{Error, Result};
use crate::output::table::table;

/// Examine this machine: what it has, what it lacks, and what to do about it.
///
/// It changes nothing and starts nothing. The exit code is 1 if a check failed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm doctor
  mvm doctor --vmm qemu --accel tcg
  mvm doctor -o json")]
pub(crate) struct Doctor {}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// All is well.
    Ok,
    /// It works, but not as well as it could.
    Warning,
    /// MicroVMs will not run.
    Failed,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    /// What was examined.
    check: String,
    /// How it came out.
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it.
    fix: Option<String>,
}

impl Check {
    fn ok(check: &str, found: impl Into<String>) -> Self {
        Self { check: check.to_owned(), verdict: Verdict::Ok, found: found.into(), fix: None }
    }

    fn failed(check: &str, found: impl Into<String>, fix: &str) -> Self {
        Self { verdict: Verdict::Failed, fix: Some(fix.to_owned()), ..Self::ok(check, found) }
    }

    fn warning(check: &str, found: impl Into<String>, fix: &str) -> Self {
        Self { verdict: Verdict::Warning, ..Self::failed(check, found, fix) }
    }
}

impl Doctor {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let mut checks = examine(context.state_dir(), context.client.wanted());
        checks.push(agent(context).await);
        context.ui.data(&checks, || text(&checks))?;
        match checks.iter().filter(|check| check.verdict == Verdict::Failed).count() {
            0 => Ok(()),
            failed => Err(Error::ChecksFailed(failed)),
        }
    }
}

/// Examines the machine for the VMM that is wanted.
fn examine(state_dir: &Path, _wanted: Wanted) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.push(if rustix::process::geteuid().is_root() {
        Check::ok("root", "the command runs as root")
    } else {
        let found = "the command does not run as root, as starting the agent needs";
        Check::warning("root", found, "run commands with `sudo`")
    });
    let missing = Missing::look(state_dir);
    checks.push(match missing.programs.as_slice() {
        [] => Check::ok("tools", "all that mvm runs are installed"),
        programs => Check::failed(
            "tools",
            format!("not installed: {}", programs.join(", ")),
            "install them with `mvm bootstrap`",
        ),
    });
    checks.push(match missing.kernel {
        None => Check::ok("guest kernel", "there is one"),
        Some(missing) => Check::failed(
            "guest kernel",
            format!("this machine lacks {missing}"),
            "fetch one with `mvm bootstrap`",
        ),
    });
    checks
}

async fn agent(context: &Context) -> Check {
    match context.client.running_agent().await {
        Ok(None) => Check::ok("agent", "none runs; the next command that needs one starts it"),
        Ok(Some(node)) => {
            let bad = node.bad_records.len();
            let found = format!("runs {} with {}, pid {}", node.vmm, node.accel, node.pid);
            match (bad, node.problems.as_slice()) {
                (0, []) => Check::ok("agent", found),
                (0, [problem, ..]) => {
                    Check::warning("agent", format!("{found}; {problem}"), "see `mvm node info`")
                }
                (bad, _) => {
                    let found = format!("{found}; {bad} records do not parse");
                    Check::failed("agent", found, "see `mvm node info`")
                }
            }
        }
        Err(error) => {
            let fix = error.hint().unwrap_or_else(|| "see `mvm agent status`".to_owned());
            Check::failed("agent", error.to_string(), &fix)
        }
    }
}

fn text(checks: &[Check]) -> String {
    let row = |check: &Check| {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed => "FAILED",
        };
        let fix = check.fix.clone().unwrap_or_default();
        [check.check.clone(), verdict.to_owned(), check.found.clone(), fix]
    };
    table(["CHECK", "VERDICT", "FOUND", "WHAT TO DO"], checks.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_state_directory_lacks_a_kernel_and_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let checks = examine(dir.path(), Wanted::default());
        let kernel = checks.iter().find(|check| check.check == "guest kernel").unwrap();
        assert_eq!(kernel.verdict, Verdict::Failed);
        assert!(text(&checks).contains("mvm bootstrap"));
    }
}
