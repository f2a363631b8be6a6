//! `mvm doctor`.

use clap::Args;
use mvm_host::net::Registry;
use mvm_host::platform::{self, Check, Verdict, facts};
use mvm_host::state_dir;

use crate::cli::Context;
use crate::client::Wanted;
use crate::error::{Error, Result};
use crate::output::table::table;

/// Examine this machine: what it has, what it lacks, and what to do about it.
///
/// It changes nothing and starts no agent. The exit code is 1 if a check failed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm doctor
  mvm doctor --vmm qemu --accel tcg
  mvm doctor -o json")]
pub(crate) struct Doctor {}

impl Doctor {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let facts = facts::gather(context.state_dir()).await;
        let mut checks = platform::doctor(&facts);
        checks.extend(choice(context.client.wanted(), &facts));
        checks.push(agent(context).await);
        context.ui.data(&checks, || text(&checks))?;
        match checks.iter().filter(|check| check.verdict == Verdict::Fail).count() {
            0 => Ok(()),
            failed => Err(Error::ChecksFailed(failed)),
        }
    }
}

/// Whether what the command line asks for works here.
fn choice(wanted: Wanted, facts: &facts::Facts) -> Option<Check> {
    if wanted == Wanted::default() {
        return None;
    }
    Some(match platform::choose(wanted.vmm, wanted.accel, facts) {
        Ok(choice) => {
            let detail = format!("{} with {}: {}", choice.vmm, choice.accel, choice.why);
            Check { name: "asked-for", verdict: Verdict::Ok, detail, fix: None }
        }
        Err(error) => Check {
            name: "asked-for",
            verdict: Verdict::Fail,
            detail: error.to_string(),
            fix: Some("leave out --vmm and --accel to have them chosen".to_owned()),
        },
    })
}

async fn agent(context: &Context) -> Check {
    if let Err(error) = state_dir::examine(context.state_dir(), &Registry::of_machine()) {
        let error = Error::StateDir(error);
        let (detail, fix) = (error.to_string(), error.hint());
        return Check { name: "agent", verdict: Verdict::Fail, detail, fix };
    }
    let (verdict, detail, fix) = match context.client.running_agent().await {
        Ok(None) => {
            (Verdict::Ok, "none runs; the next command that needs one starts it".to_owned(), None)
        }
        Ok(Some(node)) => {
            let runs = format!("runs {} with {}, pid {}", node.vmm, node.accel, node.pid);
            let fix = Some("mvm node info".to_owned());
            match (node.bad_records.len(), node.problems.first()) {
                (0, None) => (Verdict::Ok, runs, None),
                (0, Some(problem)) => (Verdict::Warn, format!("{runs}; {problem}"), fix),
                (bad, _) => (Verdict::Fail, format!("{runs}; {bad} records do not parse"), fix),
            }
        }
        Err(error) => {
            let fix = error.hint().unwrap_or_else(|| "mvm agent status".to_owned());
            (Verdict::Fail, error.to_string(), Some(fix))
        }
    };
    Check { name: "agent", verdict, detail, fix }
}

fn text(checks: &[Check]) -> String {
    // What to do stands below what was found: side by side they are wider than any terminal.
    let rows = |check: &Check| {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warning",
            Verdict::Fail => "FAILED",
        };
        let found = [check.name.to_owned(), verdict.to_owned(), check.detail.clone()];
        let fix = check.fix.as_ref().map(|fix| [String::new(), String::new(), format!("-> {fix}")]);
        std::iter::once(found).chain(fix)
    };
    table(["CHECK", "VERDICT", "FOUND, AND WHAT TO DO"], checks.iter().flat_map(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_is_shown_with_what_to_do() {
        let checks = [
            Check { name: "os", verdict: Verdict::Ok, detail: "Linux".into(), fix: None },
            Check {
                name: "guest-kernel",
                verdict: Verdict::Fail,
                detail: "there is none".into(),
                fix: Some("mvm bootstrap".into()),
            },
        ];
        let expected = "\
CHECK          VERDICT   FOUND, AND WHAT TO DO
os             ok        Linux
guest-kernel   FAILED    there is none
                         -> mvm bootstrap";
        assert_eq!(text(&checks), expected);
    }
}
