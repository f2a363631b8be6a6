//! `cp`: a large file and a tree of small ones, into a guest and out of it, against `cat` and `tar`
//! over an exec. Both take turns, and neither waits for what the other has left to write.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, ensure};
use tokio::process::Command;

use super::lab::Lab;
use super::microvm::{MicroVm, megabytes_per_second, timed, timed_pipe};
use super::report::Report;
use super::say;
use super::statistics::{Summary, median};

/// Bytes of the large file.
const FILE: u64 = 64 << 20;
/// Small files, in how many directories, and bytes of each.
const FILES: u64 = 1000;
const DIRS: u64 = 10;
const SMALL: u64 = 1024;
/// What `mvm cp` has to reach of the speed by hand.
const SPEED: f64 = 0.7;

/// What is copied where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    FileIn,
    FileOut,
    TreeIn,
    TreeOut,
}

impl Way {
    const ALL: [Self; 4] = [Self::FileIn, Self::FileOut, Self::TreeIn, Self::TreeOut];

    fn name(self) -> &'static str {
        match self {
            Self::FileIn => "a file into the guest",
            Self::FileOut => "a file out of the guest",
            Self::TreeIn => "a tree into the guest",
            Self::TreeOut => "a tree out of the guest",
        }
    }

    fn is_file(self) -> bool {
        matches!(self, Self::FileIn | Self::FileOut)
    }

    fn bytes(self) -> u64 {
        if self.is_file() { FILE } else { FILES * SMALL }
    }
}

/// Milliseconds of all copies of one way.
#[derive(Debug, Default, Clone)]
struct Times {
    ours: Vec<f64>,
    raw: Vec<f64>,
}

/// Measures this many copies of each kind.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let microvm = MicroVm::start(lab, &pool).await?;
    let dir = tempfile::Builder::new().prefix("cp-").tempdir_in(lab.state_dir())?;
    let copier = Copier { microvm: &microvm, dir: dir.path() };
    copier.prepare().await?;
    let mut times = Way::ALL.map(|way| (way, Times::default()));
    for run in 0..runs {
        for (way, times) in &mut times {
            for is_ours in [run % 2 == 0, run % 2 != 0] {
                copier.clear().await?;
                let ms = match is_ours {
                    true => copier.ours(*way).await?,
                    false => copier.raw(*way).await?,
                };
                copier.check(*way).await?;
                let who = if is_ours { "ours" } else { "raw" };
                say(&format!("round {}: {who:4} {ms:6.0} ms, {}", run + 1, way.name()));
                if is_ours { &mut times.ours } else { &mut times.raw }.push(ms);
            }
        }
    }
    report(&times).context("nothing was measured")
}

/// Copies between `source` and `target` of a directory here and of `/bench` in the guest.
struct Copier<'a> {
    microvm: &'a MicroVm<'a>,
    dir: &'a Path,
}

impl Copier<'_> {
    /// Makes what is copied, on both sides.
    async fn prepare(&self) -> anyhow::Result<()> {
        let source = self.dir.join("source");
        fs::create_dir(&source)?;
        // Not zeros, which need not be stored.
        fs::write(source.join("file"), [0x5a].repeat(usize::try_from(FILE)?))?;
        for index in 0..FILES {
            let dir = source.join("tree").join((index % DIRS).to_string());
            fs::create_dir_all(&dir)?;
            let body = [b'a'].repeat(usize::try_from(SMALL)?);
            fs::write(dir.join(format!("{index}.txt")), body)?;
        }
        self.microvm.sh("mkdir /bench").await?;
        let source = self.here("source")?;
        let to = self.microvm.at("/bench/source");
        timed(&mut self.microvm.mvm(&["cp", &source, &to])).await.map(drop)
    }

    /// Clears both targets, and lets both sides finish writing.
    async fn clear(&self) -> anyhow::Result<()> {
        let target = self.dir.join("target");
        if target.exists() {
            fs::remove_dir_all(&target)?;
        }
        fs::create_dir(&target)?;
        self.microvm.sh("rm -rf /bench/target; mkdir /bench/target; sync").await?;
        rustix::fs::sync();
        Ok(())
    }

    async fn ours(&self, way: Way) -> anyhow::Result<f64> {
        let what = if way.is_file() { "file" } else { "tree" };
        let (from, to) = match way {
            Way::FileIn | Way::TreeIn => (
                self.here(&format!("source/{what}"))?,
                self.microvm.at(&format!("/bench/target/{what}")),
            ),
            Way::FileOut | Way::TreeOut => (
                self.microvm.at(&format!("/bench/source/{what}")),
                self.here(&format!("target/{what}"))?,
            ),
        };
        timed(&mut self.microvm.mvm(&["cp", &from, &to])).await
    }

    /// What one would type without `mvm cp`.
    async fn raw(&self, way: Way) -> anyhow::Result<f64> {
        let microvm = self.microvm;
        match way {
            Way::FileIn => {
                let mut exec = microvm.exec_with_input(&["sh", "-c", "cat >/bench/target/file"]);
                exec.stdin(File::open(self.dir.join("source/file"))?);
                timed(&mut exec).await
            }
            Way::FileOut => {
                let mut exec = microvm.exec(&["cat", "/bench/source/file"]);
                exec.stdout(File::create(self.dir.join("target/file"))?);
                timed(&mut exec).await
            }
            Way::TreeIn => {
                let mut tar = Command::new("tar");
                tar.arg("-C").arg(self.dir.join("source")).args(["-c", "tree"]);
                let unpack = ["tar", "-x", "-C", "/bench/target"];
                timed_pipe(&mut tar, &mut microvm.exec_with_input(&unpack)).await
            }
            Way::TreeOut => {
                let mut tar = Command::new("tar");
                tar.arg("-C").arg(self.dir.join("target")).arg("-x");
                let pack = ["tar", "-c", "-C", "/bench/source", "tree"];
                timed_pipe(&mut microvm.exec(&pack), &mut tar).await
            }
        }
    }

    /// Refuses a copy that is not whole.
    async fn check(&self, way: Way) -> anyhow::Result<()> {
        let expected = way.bytes();
        if matches!(way, Way::FileIn | Way::TreeIn) {
            let count = "find /bench/target -type f -exec cat {} + | wc -c";
            let script = format!("[ \"$({count})\" = {expected} ]");
            return self.microvm.sh(&script).await.context("the copy in the guest is not whole");
        }
        let copied = file_bytes(&self.dir.join("target"))?;
        ensure!(copied == expected, "only {copied} of {expected} bytes were copied");
        Ok(())
    }

    fn here(&self, name: &str) -> anyhow::Result<String> {
        let path = self.dir.join(name);
        Ok(path.to_str().context("the repository's path is not UTF-8")?.to_owned())
    }
}

/// Bytes of all files below a directory.
fn file_bytes(dir: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        bytes += match entry.file_type()?.is_dir() {
            true => file_bytes(&entry.path())?,
            false => entry.metadata()?.len(),
        };
    }
    Ok(bytes)
}

fn report(times: &[(Way, Times)]) -> Option<Report> {
    let sums = |of: fn(&Times) -> &Vec<f64>| -> Vec<f64> {
        let runs = times.iter().map(|(_, times)| of(times).len()).min().unwrap_or(0);
        (0..runs).map(|run| times.iter().map(|(_, times)| of(times)[run]).sum()).collect()
    };
    let (ours, raw) = (sums(|times| &times.ours), sums(|times| &times.raw));
    let (ours, raw) = (Summary::of(&ours)?, Summary::of(&raw)?);
    let sample = "a file of 64 MiB and a tree of 1,000 files, each into the guest and out of it, \
                  against `cat` and `tar` over `mvm exec`";
    let mut report = Report::new("cp", sample, ours, Some(raw));
    for (way, times) in times {
        for (who, ms) in [("ours", median(&times.ours)), ("raw", median(&times.raw))] {
            let name = format!("{who}: {}", way.name());
            report.part(&name, ms, "ms");
            if way.is_file() {
                report.part(name, megabytes_per_second(FILE, ms), "MB/s");
            }
        }
    }
    for (way, times) in times {
        let speed = median(&times.raw) / median(&times.ours);
        report.target_at_least(format!("speed of {}", way.name()), speed, SPEED, "x");
    }
    Some(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_has_to_reach_its_share_of_the_speed_by_hand() {
        let mut times = Way::ALL.map(|way| {
            let (ours, raw) = (vec![1000.0], vec![1000.0]);
            (way, Times { ours, raw })
        });
        assert!(report(&times).unwrap().missed().is_empty());
        times[2].1.ours = vec![1500.0];
        let report = report(&times).unwrap();
        assert_eq!(report.missed(), ["speed of a tree into the guest"]);
        assert_eq!((report.ours_ms.p50, report.raw_ms.unwrap().p50), (4500.0, 4000.0));
    }

    #[test]
    fn the_bytes_of_a_tree_are_those_of_its_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        for name in ["x", "a/y"] {
            fs::write(dir.path().join(name), [1; 10]).unwrap();
        }
        assert_eq!(file_bytes(dir.path()).unwrap(), 20);
    }
}
