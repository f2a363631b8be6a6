//! `mvm doctor`.

use clap::Args;
use mvm_host::platform::{self, Check, Facts, Verdict, facts};

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

/// What an agent of another choice than the machine's own would run.
const CHOICE: &str = "vmm";
/// The local agent.
const AGENT: &str = "agent";

impl Doctor {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let facts = facts::gather(context.state_dir()).await;
        let mut checks = examine(&facts, context.client.wanted());
        checks.push(agent(context).await);
        context.ui.data(&checks, || text(&checks))?;
        match checks.iter().filter(|check| check.verdict == Verdict::Fail).count() {
            0 => Ok(()),
            failed => Err(Error::ChecksFailed(failed)),
        }
    }
}

/// Judges the machine for the VMM that is wanted.
fn examine(facts: &Facts, wanted: Wanted) -> Vec<Check> {
    let mut checks = platform::doctor(facts);
    if let (Wanted { vmm: None, accel: None }, _) | (_, None) =
        (wanted, checks.iter().position(|check| check.name == CHOICE))
    {
        return checks;
    }
    let choice = match platform::choose(wanted.vmm, wanted.accel, facts) {
        Ok(choice) => {
            let detail = format!("{} with {}: {}", choice.vmm, choice.accel, choice.why);
            Check { name: CHOICE, verdict: Verdict::Ok, detail, fix: None }
        }
        Err(error) => {
            let fix = Some("leave --vmm and --accel out to have them chosen".to_owned());
            Check { name: CHOICE, verdict: Verdict::Fail, detail: error.to_string(), fix }
        }
    };
    for check in checks.iter_mut().filter(|check| check.name == CHOICE) {
        *check = choice.clone();
    }
    checks
}

async fn agent(context: &Context) -> Check {
    let check = |verdict, detail: String, fix: Option<&str>| Check {
        name: AGENT,
        verdict,
        detail,
        fix: fix.map(str::to_owned),
    };
    let see = Some("see `mvm node info`");
    match context.client.running_agent().await {
        Ok(None) => {
            let detail = "none runs; the next command that needs one starts it";
            check(Verdict::Ok, detail.to_owned(), None)
        }
        Ok(Some(node)) => {
            let detail = format!("runs {} with {}, pid {}", node.vmm, node.accel, node.pid);
            match (node.bad_records.len(), node.problems.as_slice()) {
                (0, []) => check(Verdict::Ok, detail, None),
                (0, [problem, ..]) => check(Verdict::Warn, format!("{detail}; {problem}"), see),
                (bad, _) => {
                    check(Verdict::Fail, format!("{detail}; {bad} records do not parse"), see)
                }
            }
        }
        Err(error) => {
            let fix = error.hint().unwrap_or_else(|| "see `mvm agent status`".to_owned());
            check(Verdict::Fail, error.to_string(), Some(&fix))
        }
    }
}

fn text(checks: &[Check]) -> String {
    let row = |check: &Check| {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warning",
            Verdict::Fail => "FAILED",
        };
        let fix = check.fix.clone().unwrap_or_default();
        [check.name.to_owned(), verdict.to_owned(), check.detail.clone(), fix]
    };
    table(["CHECK", "VERDICT", "FOUND", "WHAT TO DO"], checks.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_core::vmm::VmmKind;

    #[tokio::test]
    async fn a_new_state_directory_lacks_a_kernel_and_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let facts = facts::gather(dir.path()).await;
        let checks = examine(&facts, Wanted::default());
        let kernel = checks.iter().find(|check| check.name == "guest-kernel").unwrap();
        assert_eq!(kernel.verdict, Verdict::Fail);
        assert!(text(&checks).contains("mvm bootstrap"));
    }

    #[tokio::test]
    async fn a_vmm_that_is_asked_for_is_the_one_that_is_judged() {
        let dir = tempfile::tempdir().unwrap();
        let facts = facts::gather(dir.path()).await;
        let wanted = Wanted { vmm: Some(VmmKind::Firecracker), ..Wanted::default() };
        let checks = examine(&facts, wanted);
        let choice = checks.iter().find(|check| check.name == CHOICE).unwrap();
        assert_eq!(choice.verdict, Verdict::Fail);
        assert!(choice.detail.contains("Firecracker"), "{}", choice.detail);
    }
}
