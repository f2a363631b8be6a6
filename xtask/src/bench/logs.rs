//! `logs`: what a main process can write while its output is kept, against the same program in an
//! exec; and how long it takes to read what was kept.

use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, ensure};
use mvm_core::main_process::ProcessSpec;
use mvm_core::spec::PoolSpec;

use super::lab::Lab;
use super::microvm::{MicroVm, megabytes_per_second, ms_since, timed};
use super::report::Report;
use super::statistics::{Summary, median};

/// Bytes that are written.
const BYTES: u64 = 8 << 20;
/// Lines of the log's end that are read.
const TAIL: usize = 100;
/// Of what was written at least this much is kept.
const KEPT: usize = 4 << 20;
/// Writes the text whenever it is told to, and tells when all of it was taken.
const MAIN: &str = "\
yes 'a line of a log that is as long as the lines of most logs are, more or less' \
  | head -c $BYTES >/dev/shm/text
mkfifo /dev/shm/go /dev/shm/done
while cat /dev/shm/go >/dev/null; do cat /dev/shm/text; echo >/dev/shm/done; done";
/// Waits until the main process can be told.
const READY: &str = "until [ -p /dev/shm/done ]; do sleep 0.1; done";
/// Has the main process write.
const WRITE: &str = "echo >/dev/shm/go; cat /dev/shm/done >/dev/null";

#[derive(Default)]
struct Measured {
    /// Milliseconds, as the following ones.
    write: Vec<f64>,
    exec: Vec<f64>,
    whole: Vec<f64>,
    tail: Vec<f64>,
    /// Bytes of the whole log.
    kept: u64,
}

/// Measures this many rounds.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let main = MAIN.replace("$BYTES", &BYTES.to_string());
    let command = Some(["sh", "-ec", &main].map(str::to_owned).to_vec());
    let process = ProcessSpec { command, ..ProcessSpec::default() };
    let pool = lab.pool_of(PoolSpec { process, ..PoolSpec::default() }).await?;
    let microvm = MicroVm::start(lab, &pool).await?;
    microvm.sh(READY).await?;
    let mut measured = Measured::default();
    for _ in 0..runs {
        measured.exec.push(timed(&mut microvm.exec(&["cat", "/dev/shm/text"])).await?);
        measured.write.push(timed(&mut microvm.exec(&["sh", "-c", WRITE])).await?);
        let (ms, log) = logs(&microvm, &[]).await?;
        ensure!(log.len() >= KEPT, "only {} bytes were kept", log.len());
        measured.kept = log.len() as u64;
        measured.whole.push(ms);
        let (ms, log) = logs(&microvm, &["-n", &TAIL.to_string()]).await?;
        let lines = log.iter().filter(|&&byte| byte == b'\n').count();
        // The text ends in the middle of a line, which is one too.
        ensure!((TAIL - 1..=TAIL).contains(&lines), "{lines} lines came instead of {TAIL}");
        measured.tail.push(ms);
    }
    report(&measured).context("nothing was measured")
}

/// Runs `mvm logs`; its time in milliseconds, and what it printed.
async fn logs(microvm: &MicroVm<'_>, options: &[&str]) -> anyhow::Result<(f64, Vec<u8>)> {
    let mut command = microvm.mvm(&["logs", &microvm.path().to_string()]);
    command.args(options).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let began = Instant::now();
    let output = command.spawn()?.wait_with_output().await?;
    let ms = ms_since(began);
    ensure!(output.status.success(), "`mvm logs` ended with {}", output.status);
    Ok((ms, output.stdout))
}

fn report(measured: &Measured) -> Option<Report> {
    let (write, exec) = (Summary::of(&measured.write)?, Summary::of(&measured.exec)?);
    let sample = "8 MiB written by a main process whose output is kept, against the same program \
                  in an exec";
    let mut report = Report::new("logs", sample, write, Some(exec));
    let rate = |ms| megabytes_per_second(BYTES, ms);
    report.part("written by the main process", rate(write.p50), "MB/s");
    report.part("written by the exec", rate(exec.p50), "MB/s");
    let whole = median(&measured.whole);
    report.part("`mvm logs`, whole", whole, "ms");
    report.part("`mvm logs`, whole", megabytes_per_second(measured.kept, whole), "MB/s");
    report.part(format!("`mvm logs -n {TAIL}`"), median(&measured.tail), "ms");
    Some(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_is_rated_by_what_was_kept() {
        let measured = Measured {
            write: vec![200.0],
            exec: vec![100.0],
            whole: vec![50.0],
            tail: vec![10.0],
            kept: 5_000_000,
        };
        let report = report(&measured).unwrap();
        assert_eq!(report.ratio_p50, Some(2.0));
        assert_eq!(report.parts[3].value, 100.0);
    }
}
