//! Starts an agent in the background for a command that finds none, so that a first use needs no
//! daemon to be set up.
//!
//! Only [`crate::client`] calls it. It never stops an agent.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mvm_core::vmm::VmmKind;
use mvm_host::net::Registry;
use rustix::process::{Pid, WaitOptions, waitpid};
use tokio::time::{Instant, sleep, timeout_at};

use crate::client::Client;
use crate::error::{Error, Result, exit};
use crate::output::Ui;

/// How long a new agent has until it answers.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How often a new agent is asked whether it answers.
const POLL: Duration = Duration::from_millis(20);
/// How long after an agent found another one a new one is tried.
const AGAIN: Duration = Duration::from_millis(100);
/// Lines of the agent's log that are kept of a start that failed.
const LOG_TAIL_LINES: usize = 10;

/// Starts an agent and waits until it answers.
pub(crate) async fn start(client: &Client, ui: &Ui) -> Result<()> {
    let state_dir = client.state_dir();
    let is_simulated = client.wanted().vmm == Some(VmmKind::Sim);
    if !is_simulated && !rustix::process::geteuid().is_root() {
        let what = "starting the agent, which makes microVMs, networks and firewall rules,";
        return Err(Error::NeedsRoot { what: what.to_owned() });
    }
    // Said at once, and not in a log.
    mvm_host::state_dir::examine(state_dir, &Registry::of_machine())?;
    let failed = |source| Error::AgentStart { state_dir: state_dir.to_path_buf(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(failed)?;
    let log = state_dir.log();
    let log_start = fs::metadata(&log).map_or(0, |metadata| metadata.len());
    let deadline = Instant::now() + START_LIMIT;
    let mut pid = spawn_agent(client, &log).map_err(failed)?;
    loop {
        // Asked before the process is looked at: another command may have started an agent at the
        // same moment, and then the one that comes second ends.
        if let Ok(Ok(Some(node))) = timeout_at(deadline, client.running_agent()).await {
            if node.pid == pid {
                ui.say(&format!(
                    "started the agent for {} (pid {pid}); stop it with `mvm agent stop`",
                    state_dir.display()
                ));
            }
            return Ok(());
        }
        let how = match (process_state(pid), Instant::now() < deadline) {
            (ProcessState::Runs, true) => {
                sleep(POLL).await;
                continue;
            }
            // The other agent may be one that is about to end, whose socket has gone already.
            (ProcessState::MetAnother, true) => {
                sleep(AGAIN).await;
                pid = spawn_agent(client, &log).map_err(failed)?;
                continue;
            }
            (ProcessState::Runs, false) => "does not answer",
            (ProcessState::MetAnother | ProcessState::Ended, _) => "ended at once",
        };
        let tail = log_tail(&log, log_start);
        return Err(Error::AgentDied { pid, how, log, tail });
    }
}

/// Starts the agent's process, which is this program.
fn spawn_agent(client: &Client, log: &Path) -> io::Result<u32> {
    mvm_host::process::spawn_daemon(&own_program()?, &serve_arguments(client), log)
}

/// This program's file, or the running image itself if the file was replaced since.
fn own_program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    Ok(if path.exists() { path } else { PathBuf::from("/proc/self/exe") })
}

fn serve_arguments(client: &Client) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["agent".into(), "serve".into(), "--state-dir".into()];
    args.push(client.state_dir().into());
    let wanted = client.wanted();
    let options = [
        ("--vmm", wanted.vmm.map(|vmm| vmm.to_string())),
        ("--accel", wanted.accel.map(|accel| accel.to_string())),
        ("--log", client.log_filter().map(str::to_owned)),
    ];
    for (name, value) in options {
        if let Some(value) = value {
            args.extend([name.into(), value.into()]);
        }
    }
    args
}

/// What became of an agent that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProcessState {
    Runs,
    /// It ended because another agent has the state directory.
    MetAnother,
    Ended,
}

/// Looks at a process, which is a child of this one.
fn process_state(pid: u32) -> ProcessState {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return ProcessState::Ended;
    };
    match waitpid(Some(pid), WaitOptions::NOHANG) {
        Ok(None) => ProcessState::Runs,
        Ok(Some((_, status))) if status.exit_status() == Some(exit::CONFLICT.into()) => {
            ProcessState::MetAnother
        }
        Ok(Some(_)) | Err(_) => ProcessState::Ended,
    }
}

/// The log's last lines, without those of earlier agents.
fn log_tail(log: &Path, start: u64) -> Vec<String> {
    let bytes = fs::read(log).unwrap_or_default();
    let own = bytes.get(usize::try_from(start).unwrap_or(0)..).unwrap_or(&bytes);
    let text = String::from_utf8_lossy(own);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LOG_TAIL_LINES);
    lines[from..].iter().map(|line| (*line).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::client::Wanted;
    use crate::output::capture;

    #[test]
    fn the_agent_is_started_with_what_the_command_was_given() {
        let (ui, _) = capture::ui();
        let wanted = Wanted { vmm: Some(VmmKind::Sim), accel: None };
        let client = Client::new("/s".into(), wanted, Some("debug".into()), None, Rc::new(ui));
        let expected = ["agent", "serve", "--state-dir", "/s", "--vmm", "sim", "--log", "debug"];
        assert_eq!(serve_arguments(&client), expected);
    }

    #[test]
    fn the_tail_leaves_earlier_agents_out() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("agent.log");
        fs::write(&log, "old\nnew 1\nnew 2\n").unwrap();
        assert_eq!(log_tail(&log, 4), ["new 1", "new 2"]);
        assert!(log_tail(&dir.path().join("none"), 4).is_empty());
    }
}
