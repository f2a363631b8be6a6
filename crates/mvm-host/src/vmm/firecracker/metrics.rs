//! What a Firecracker counts, summed since it started.
//!
//! Firecracker appends a line of JSON to a file once a minute, and when it is told to: by how much each
//! counter has grown since the line before. The lines are summed into a second file, and what was
//! summed is punched out of the first one. So nothing is lost while no agent looks, and however long a
//! microVM runs, both stay small. A Firecracker that somebody has taken over may write what it likes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mvm_core::vmm::DiskIo;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::super::{VmCounters, VmmError, file_error};
use crate::hole::make_hole;
use crate::image::durable::replace_file;

/// The file that Firecracker writes.
const METRICS: &str = "metrics";
/// What it said until now.
const SUMS: &str = "metrics.sums";
/// The longest line that is read, in bytes; Firecracker's have some 10 KiB.
const LINE_MAX: u64 = 256 * 1024;
/// How much is read at once, in bytes.
const READ_MAX: u64 = 64 << 20;
/// How many counters are kept, and how long their names are; Firecracker has some 300.
const COUNTERS_MAX: usize = 2000;
const NAME_MAX: usize = 100;
/// Allocated bytes of the file above which its lines are summed although nobody asks: those of an hour.
const KEEP_MAX: u64 = 1 << 20;

/// Makes the file that a Firecracker which will start has to write, in the directory of its jail.
pub(super) fn make_file(jail: &Path) -> Result<PathBuf, VmmError> {
    let path = jail.join(METRICS);
    File::create_new(&path).map_err(file_error(&path))?;
    Ok(path)
}

/// Keeps the file small while nobody asks.
pub(super) async fn bound(jail: &Path) -> Result<(), VmmError> {
    let path = jail.join(METRICS);
    let metadata = fs::metadata(&path).map_err(file_error(&path))?;
    match metadata.blocks() * 512 > KEEP_MAX {
        true => counters(jail).await.map(drop),
        false => Ok(()),
    }
}

/// What the Firecracker of this jail has said that it counted.
pub(super) async fn counters(jail: &Path) -> Result<VmCounters, VmmError> {
    let (path, jail) = (jail.join(METRICS), jail.to_owned());
    let summing = tokio::task::spawn_blocking(move || sum_up(&jail));
    let sums = summing.await.map_err(io::Error::other).flatten().map_err(file_error(&path))?;
    Ok(VmCounters { disk_io: sums.disk_io(), own: sums.counters })
}

/// What was read of a file of metrics.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sums {
    /// Where the next line begins.
    read_to: u64,
    /// `GROUP.NAME`, and its value if that is not zero.
    counters: BTreeMap<String, u64>,
}

/// Adds the lines that are new, and takes them out of the file.
fn sum_up(jail: &Path) -> io::Result<Sums> {
    // One at a time, whichever agent it is. The file itself could be locked by Firecracker, too.
    let lock = File::open(jail)?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let file = OpenOptions::new().read(true).write(true).open(jail.join(METRICS))?;
    let path = jail.join(SUMS);
    let mut sums = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Sums::default(),
        Err(error) => return Err(error),
    };
    let begin = sums.read_to;
    sums.read(&file)?;
    if sums.read_to > begin {
        // First what would be lost.
        replace_file(&path, &serde_json::to_vec(&sums)?, 0o600).map_err(io::Error::other)?;
        make_hole(&file, begin, sums.read_to - begin)?;
    }
    Ok(sums)
}

impl Sums {
    fn read(&mut self, mut file: &File) -> io::Result<()> {
        file.seek(SeekFrom::Start(self.read_to))?;
        let mut lines = BufReader::new(file.take(READ_MAX));
        let mut line = Vec::new();
        loop {
            line.clear();
            let len = lines.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)? as u64;
            let is_whole = line.last() == Some(&b'\n');
            if !is_whole && len < LINE_MAX {
                // The rest of it is not written yet.
                return Ok(());
            }
            self.read_to += len;
            if let Ok(Value::Object(groups)) = serde_json::from_slice(&line) {
                self.add(&groups);
            }
        }
    }

    /// Adds what a line says. Its times, which are no counters, are left out.
    fn add(&mut self, groups: &Map<String, Value>) {
        for (group, values) in groups.iter().filter(|(group, _)| *group != "latencies_us") {
            let values = values.as_object().into_iter().flatten();
            for (name, value) in values.filter(|(name, _)| !name.starts_with("process_startup")) {
                let Some(value) = value.as_u64().filter(|value| *value > 0) else { continue };
                let key = format!("{group}.{name}");
                let has_room = self.counters.len() < COUNTERS_MAX && key.len() <= NAME_MAX;
                if !has_room && !self.counters.contains_key(&key) {
                    continue;
                }
                let sum = self.counters.entry(key).or_default();
                *sum = match is_gauge(group, name) {
                    true => value,
                    false => sum.saturating_add(value),
                };
            }
        }
    }

    fn disk_io(&self) -> DiskIo {
        let of = |name: &str| self.counters.get(&format!("block.{name}")).copied().unwrap_or(0);
        DiskIo {
            reads: of("read_count"),
            writes: of("write_count"),
            flushes: of("flush_count"),
            read_bytes: of("read_bytes"),
            written_bytes: of("write_bytes"),
            failed: of("execute_fails").saturating_add(of("invalid_reqs_count")),
            throttled: Some(of("rate_limiter_throttled_events")),
        }
    }
}

/// Whether each line tells the whole value, not by how much it has grown.
fn is_gauge(group: &str, name: &str) -> bool {
    matches!((group, name), ("seccomp" | "signals", _) | ("vmm", "panic_count"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A jail whose Firecracker has just started, and how it writes: not for appending.
    fn begun() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        let file = OpenOptions::new().write(true).open(make_file(dir.path()).unwrap()).unwrap();
        (dir, file)
    }

    fn line(read_bytes: u64) -> String {
        format!(
            "{{\"utc_timestamp_ms\":1767225600000,\"block\":{{\"read_bytes\":{read_bytes},\
             \"read_count\":1,\"flush_count\":0,\"rate_limiter_throttled_events\":2,\
             \"execute_fails\":1,\"read_agg\":{{\"min_us\":1,\"max_us\":9,\"sum_us\":10}}}},\
             \"seccomp\":{{\"num_faults\":3}},\"latencies_us\":{{\"pause_vm\":40}},\
             \"api_server\":{{\"process_startup_time_us\":5}}}}\n"
        )
    }

    #[test]
    fn lines_are_summed_once_also_by_another_agent() {
        let (dir, mut file) = begun();
        assert_eq!(sum_up(dir.path()).unwrap(), Sums::default());
        for bytes in [4096, 512] {
            file.write_all(line(bytes).as_bytes()).unwrap();
        }
        let sums = sum_up(dir.path()).unwrap();
        let expected = [
            ("block.execute_fails", 2),
            ("block.rate_limiter_throttled_events", 4),
            ("block.read_bytes", 4608),
            ("block.read_count", 2),
            ("seccomp.num_faults", 3),
        ];
        assert_eq!(sums.counters, expected.map(|(name, value)| (name.to_owned(), value)).into());
        let io = DiskIo {
            reads: 2,
            read_bytes: 4608,
            failed: 2,
            throttled: Some(4),
            ..DiskIo::default()
        };
        assert_eq!(sums.disk_io(), io);
        assert_eq!(sum_up(dir.path()).unwrap(), sums);
        file.write_all(line(1).as_bytes()).unwrap();
        assert_eq!(sum_up(dir.path()).unwrap().disk_io().read_bytes, 4609);
    }

    #[test]
    fn a_line_counts_once_it_is_whole() {
        let (dir, mut file) = begun();
        let text = line(7);
        let (first, rest) = text.split_at(30);
        file.write_all(first.as_bytes()).unwrap();
        assert_eq!(sum_up(dir.path()).unwrap(), Sums::default());
        file.write_all(rest.as_bytes()).unwrap();
        assert_eq!(sum_up(dir.path()).unwrap().disk_io().read_bytes, 7);
    }

    #[test]
    fn what_was_summed_takes_no_space() {
        let (dir, mut file) = begun();
        let count = 8000;
        for _ in 0..count {
            file.write_all(line(1).as_bytes()).unwrap();
        }
        let sums = sum_up(dir.path()).unwrap();
        assert_eq!(sums.disk_io().read_bytes, count);
        let metadata = file.metadata().unwrap();
        assert!(metadata.len() > 1 << 20, "{metadata:?}");
        assert!(metadata.blocks() * 512 <= 64 << 10, "{metadata:?}");
    }

    #[tokio::test]
    async fn a_file_that_nobody_asks_for_is_summed_once_it_has_grown() {
        let (dir, mut file) = begun();
        file.write_all(line(1).as_bytes()).unwrap();
        bound(dir.path()).await.unwrap();
        assert!(!dir.path().join(SUMS).exists());
        let count = KEEP_MAX / line(1).len() as u64 + 1;
        for _ in 0..count {
            file.write_all(line(1).as_bytes()).unwrap();
        }
        bound(dir.path()).await.unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
        assert_eq!(sum_up(dir.path()).unwrap().disk_io().read_bytes, count + 1);
    }

    #[test]
    fn whatever_is_written_is_bounded_and_the_next_line_is_read() {
        let (dir, mut file) = begun();
        file.write_all(&vec![b'['; LINE_MAX as usize * 2]).unwrap();
        file.write_all(b"\n{\"block\":7}\n\n\0\xff\n{\"block\":{\"read_bytes\":-1}}\n").unwrap();
        file.write_all(b"{\"block\":{\"read_bytes\":18446744073709551615}}\n").unwrap();
        let many: Map<String, Value> =
            (0..COUNTERS_MAX * 2).map(|number| (number.to_string(), 1.into())).collect();
        let text = serde_json::json!({ "many": many, "x": { "y".repeat(200): 1 } }).to_string();
        file.write_all(format!("{text}\n{}", line(9)).as_bytes()).unwrap();
        let sums = sum_up(dir.path()).unwrap();
        assert_eq!(sums.disk_io().read_bytes, u64::MAX);
        assert_eq!(sums.counters.len(), COUNTERS_MAX);
        assert!(sums.counters.keys().all(|name| name.len() <= NAME_MAX));
        fs::write(dir.path().join(SUMS), "no sums").unwrap();
        assert!(sum_up(dir.path()).is_err());
    }
}
