//! `exec`: the round trip of a trivial program, against one byte that a program which already runs
//! sends back; and how fast data leaves a guest and enters it.
//!
//! The echo is a `cat` that is kept open, as it is the cheapest that crosses all that an exec
//! crosses: this program, the agent, the channel, the guest agent, a pipe to a process, and back.
//! No call of the agent's contract asks the guest agent itself for less. What an exec takes beyond
//! the echo is a process, so the same program run by a shell that is kept open is measured too:
//! that is what the guest's kernel takes for it, without mvm.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context, bail};
use mvm_core::frame::{KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::ExecRequest;
use mvm_wire::{Call, Connection, Item, Reply};

use super::client::{accepted, only};
use super::lab::Lab;
use super::microvm::{MicroVm, megabytes_per_second, ms_since, timed};
use super::report::Report;
use super::statistics::{Summary, median};

/// What an exec may take beyond the echo, in milliseconds.
const BEYOND_ECHO_MS: f64 = 1.0;
/// What an exec has to carry each way, in MB/s.
const RATE: f64 = 50.0;
/// Bytes that are carried.
const BYTES: u64 = 64 << 20;
/// Writes them in a guest. (The `head` of a small image would write single bytes.)
const ZEROS: &str = "dd if=/dev/zero bs=64k count=1024 2>/dev/null";
/// How often they are carried each way.
const CARRIED: u32 = 3;
/// Runs a program for each line that comes.
const FORKS: &str = r#"t=$(which true); while read -r line; do "$t"; echo "$line"; done"#;

#[derive(Default)]
struct Measured {
    /// Milliseconds, as the following ones.
    exec: Vec<f64>,
    started: Vec<f64>,
    echo: Vec<f64>,
    fork: Vec<f64>,
    command: Vec<f64>,
    out: Vec<f64>,
    into: Vec<f64>,
    inside: Vec<f64>,
}

/// Measures this many round trips of each kind.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let microvm = MicroVm::start(lab, &pool).await?;
    let mut measured = Measured::default();
    let mut cat = Resident::start(&microvm, lab, &["cat"]).await?;
    let mut shell = Resident::start(&microvm, lab, &["sh", "-c", FORKS]).await?;
    // The first one of each fills the guest's caches and is not counted.
    cat.round_trip().await?;
    shell.round_trip().await?;
    lab.client().exec(microvm.path()).await?;
    for _ in 0..runs {
        let began = Instant::now();
        let started = lab.client().exec(microvm.path()).await?;
        measured.exec.push(ms_since(began));
        measured.started.push(started.duration_since(began).as_secs_f64() * 1000.0);
        measured.echo.push(cat.round_trip().await?);
        measured.fork.push(shell.round_trip().await?);
        measured.command.push(timed(&mut microvm.exec(&["true"])).await?);
    }
    drop((cat, shell));
    carry(lab, &microvm, &mut measured).await?;
    report(&measured).context("nothing was measured")
}

/// Carries data out of the guest and into it.
async fn carry(lab: &Lab, microvm: &MicroVm<'_>, measured: &mut Measured) -> anyhow::Result<()> {
    let zeros = tempfile::NamedTempFile::new_in(lab.state_dir())?;
    zeros.as_file().set_len(BYTES)?;
    let inside = format!("{ZEROS} | cat >/dev/null");
    for _ in 0..CARRIED {
        let mut out = microvm.exec(&["sh", "-c", ZEROS]);
        measured.out.push(timed(&mut out).await?);
        let mut into = microvm.exec_with_input(&["sh", "-c", "cat >/dev/null"]);
        into.stdin(File::open(zeros.path())?);
        measured.into.push(timed(&mut into).await?);
        measured.inside.push(timed(&mut microvm.exec(&["sh", "-c", &inside])).await?);
    }
    Ok(())
}

/// A program in the guest that is kept open and sends back each line that it gets.
struct Resident(Connection);

impl Resident {
    async fn start(microvm: &MicroVm<'_>, lab: &Lab, argv: &[&str]) -> anyhow::Result<Self> {
        let argv = argv.iter().map(|&word| word.to_owned()).collect();
        let request = ExecRequest { argv, stdin: true, ..ExecRequest::default() };
        let call = Call::Exec { selector: only(microvm.path()), request };
        let mut connection = lab.client().start(&call).await?;
        match accepted(connection.read.message().await?)? {
            Reply::ExecStarted { .. } => Ok(Self(connection)),
            other => bail!("the agent answered with {other:?}"),
        }
    }

    /// Sends a byte (its end of line is for the shell) and waits for it; in milliseconds.
    async fn round_trip(&mut self) -> anyhow::Result<f64> {
        let line = b"x\n";
        let mut left = line.len();
        let began = Instant::now();
        self.0.write.data(KIND_STDIN, line).await?;
        while left > 0 {
            match self.0.read.next().await?.context("the agent hung up in an exec")? {
                Item::Data { kind: KIND_STDOUT, bytes } => left = left.saturating_sub(bytes.len()),
                other => bail!("instead of the echo came {other:?}"),
            }
        }
        Ok(ms_since(began))
    }
}

fn report(measured: &Measured) -> Option<Report> {
    let (exec, echo) = (Summary::of(&measured.exec)?, Summary::of(&measured.echo)?);
    let sample = "one exec of `true`, against a byte sent back by a `cat` that is kept open";
    let mut report = Report::new("exec", sample, exec, Some(echo));
    let started = median(&measured.started);
    report.part("exec: until the program has started", started, "ms");
    report.part("exec: from there until its end has come", exec.p50 - started, "ms");
    report.part("the same program run by a shell that is kept open", median(&measured.fork), "ms");
    report.part("`mvm exec`, the start of the command included", median(&measured.command), "ms");
    let rate = |ms: &[f64]| megabytes_per_second(BYTES, median(ms));
    report.part("through a pipe inside the guest", rate(&measured.inside), "MB/s");
    report.target("exec beyond the echo at p50", exec.p50 - echo.p50, BEYOND_ECHO_MS, "ms");
    report.target_at_least("out of the guest", rate(&measured.out), RATE, "MB/s");
    report.target_at_least("into the guest", rate(&measured.into), RATE, "MB/s");
    Some(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_exec_takes_beyond_the_echo_and_slow_data_are_missed_targets() {
        let measured = Measured {
            exec: vec![7.5],
            started: vec![5.0],
            echo: vec![1.5],
            fork: vec![5.0],
            command: vec![12.0],
            out: vec![1000.0],
            into: vec![2000.0],
            inside: vec![500.0],
        };
        let report = report(&measured).unwrap();
        assert_eq!(report.parts[1].value, 2.5);
        assert_eq!(report.targets[0].value, 6.0);
        assert_eq!(report.missed(), ["exec beyond the echo at p50", "into the guest"]);
    }
}
