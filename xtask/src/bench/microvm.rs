//! One microVM that runs, and the commands that a person would type at it. The benchmarks of the
//! ways into a guest go through the release binary where they move data: what they measure is what
//! a person gets, the start of the command included, on both sides of each comparison.

use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, ensure};
use mvm_core::name::{InstancePath, PoolPath};
use tokio::process::Command;

use super::lab::Lab;
use super::parallel::start_all;

/// A microVM that runs until the lab is closed.
pub(super) struct MicroVm<'a> {
    lab: &'a Lab,
    path: InstancePath,
}

impl<'a> MicroVm<'a> {
    /// Starts one.
    pub(super) async fn start(lab: &'a Lab, pool: &PoolPath) -> anyhow::Result<Self> {
        let view = start_all(lab, pool, 1).await?.views.pop().context("no instance runs")?;
        Ok(Self { lab, path: view.path })
    }

    /// Its name.
    pub(super) fn path(&self) -> &InstancePath {
        &self.path
    }

    /// A place in it, as `mvm cp` names it.
    pub(super) fn at(&self, path: &str) -> String {
        format!("{}:{path}", self.path)
    }

    /// A command of the binary under test, without input and with its output thrown away.
    pub(super) fn mvm(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.lab.program());
        command.arg("--state-dir").arg(self.lab.state_dir()).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        command
    }

    /// `mvm exec` of a program.
    pub(super) fn exec(&self, program: &[&str]) -> Command {
        let mut command = self.mvm(&["exec", &self.path.to_string(), "--"]);
        command.args(program);
        command
    }

    /// `mvm exec -i` of a program; its input is for the caller to name.
    pub(super) fn exec_with_input(&self, program: &[&str]) -> Command {
        let mut command = self.mvm(&["exec", "-i", &self.path.to_string(), "--"]);
        command.args(program);
        command
    }

    /// Runs a script in the guest.
    pub(super) async fn sh(&self, script: &str) -> anyhow::Result<()> {
        timed(&mut self.exec(&["sh", "-ec", script])).await.map(drop)
    }
}

/// Runs a command that has to succeed; its time in milliseconds.
pub(super) async fn timed(command: &mut Command) -> anyhow::Result<f64> {
    let began = Instant::now();
    let status = command.status().await.with_context(|| format!("cannot run {command:?}"))?;
    let ms = ms_since(began);
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(ms)
}

/// Runs two commands, the first one's output being the second one's input; the time in milliseconds
/// until both have succeeded.
pub(super) async fn timed_pipe(from: &mut Command, to: &mut Command) -> anyhow::Result<f64> {
    let began = Instant::now();
    from.stdout(Stdio::piped()).kill_on_drop(true);
    let mut first = from.spawn().with_context(|| format!("cannot run {from:?}"))?;
    let output = first.stdout.take().context("the pipe is gone")?;
    let input: Stdio = output.try_into()?;
    to.stdin(input).kill_on_drop(true);
    let mut second = to.spawn().with_context(|| format!("cannot run {to:?}"))?;
    // The pipe breaks for the first one when the second one ends: nobody else has it.
    to.stdin(Stdio::null());
    let (first, second) = tokio::try_join!(first.wait(), second.wait())?;
    let ms = ms_since(began);
    ensure!(first.success(), "{from:?} ended with {first}");
    ensure!(second.success(), "{to:?} ended with {second}");
    Ok(ms)
}

/// Milliseconds since then.
pub(super) fn ms_since(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}

/// MB/s (a million bytes each) of so many bytes in so many milliseconds.
pub(super) fn megabytes_per_second(bytes: u64, ms: f64) -> f64 {
    bytes as f64 / 1000.0 / ms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_bytes_in_a_second_are_one_megabyte_per_second() {
        assert_eq!(megabytes_per_second(1_000_000, 1000.0), 1.0);
        assert_eq!(megabytes_per_second(50_000_000, 500.0), 100.0);
    }

    #[tokio::test]
    async fn a_pipe_fails_if_either_side_does() {
        let sh = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        timed_pipe(&mut sh("echo x"), &mut sh("read x && [ $x = x ]")).await.unwrap();
        timed_pipe(&mut sh("echo x; exit 3"), &mut sh("read x")).await.unwrap_err();
        timed_pipe(&mut sh("echo x"), &mut sh("read x; exit 3")).await.unwrap_err();
    }
}
