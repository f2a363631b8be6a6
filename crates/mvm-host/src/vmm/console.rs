//! The logs that a microVM leaves in its directory: its serial console and the VMM's own words.
//!
//! The VMM drivers rotate them, the agent reads their ends into error messages and records and
//! keeps them bounded. It never blocks a guest: a console that grows is cut, not stopped.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::CONSOLE_LOG;

/// The console of the boot before, or what was cut off a console that grew too long.
pub const PREVIOUS_CONSOLE_LOG: &str = "console.log.1";
/// How much of a log's end is looked at, in bytes.
const TAIL_BYTES: u64 = 64 * 1024;

/// Puts the previous boot's console aside and opens a new one for appending.
///
/// # Errors
/// The directory does not exist, or the disk is full.
pub fn rotate(dir: &Path) -> io::Result<File> {
    match std::fs::rename(dir.join(CONSOLE_LOG), dir.join(PREVIOUS_CONSOLE_LOG)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(dir.join(CONSOLE_LOG))
}

/// Cuts a console that has grown beyond `max_bytes`: its newest half is kept as the previous one,
/// and the file that the VMM appends to starts afresh. Returns whether it was cut.
///
/// # Errors
/// The log cannot be read or cut.
pub fn bound(dir: &Path, max_bytes: u64) -> io::Result<bool> {
    let path = dir.join(CONSOLE_LOG);
    let mut console = OpenOptions::new().read(true).write(true).open(path)?;
    let size = console.metadata()?.len();
    if size <= max_bytes {
        return Ok(false);
    }
    console.seek(SeekFrom::Start(size - max_bytes / 2))?;
    let mut kept = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(dir.join(PREVIOUS_CONSOLE_LOG))?;
    io::copy(&mut Read::by_ref(&mut console).take(max_bytes), &mut kept)?;
    console.set_len(0)?;
    Ok(true)
}

/// The last lines of a log, oldest first; none if there is no log. Bytes that are not text and
/// terminal controls are replaced, because a guest chooses them.
///
/// # Errors
/// The log exists and cannot be read.
pub fn tail(path: &Path, lines: usize) -> io::Result<Vec<String>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    // Where the middle of a line was read, it is not shown as if it were a whole one.
    let whole = if start > 0 { text.split_once('\n').map_or("", |(_, rest)| rest) } else { &text };
    let all: Vec<&str> = whole.lines().collect();
    Ok(all[all.len().saturating_sub(lines)..].iter().map(|line| printable(line)).collect())
}

fn printable(line: &str) -> String {
    let keep = |c: char| if c.is_control() && c != '\t' { '\u{fffd}' } else { c };
    line.trim_end_matches('\r').chars().map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn each_boot_has_its_own_console_and_the_one_before_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        for boot in ["first\n", "second\n", "third\n"] {
            rotate(dir.path()).unwrap().write_all(boot.as_bytes()).unwrap();
        }
        assert_eq!(tail(&dir.path().join(CONSOLE_LOG), 9).unwrap(), ["third"]);
        assert_eq!(tail(&dir.path().join(PREVIOUS_CONSOLE_LOG), 9).unwrap(), ["second"]);
    }

    #[test]
    fn a_console_that_grows_is_cut_while_its_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = rotate(dir.path()).unwrap();
        assert!(!bound(dir.path(), 100).unwrap());
        for line in 0..20 {
            writeln!(writer, "line {line:04}").unwrap();
        }
        assert!(bound(dir.path(), 100).unwrap());
        writeln!(writer, "after").unwrap();
        assert_eq!(std::fs::read(dir.path().join(CONSOLE_LOG)).unwrap(), b"after\n");
        let kept = std::fs::read_to_string(dir.path().join(PREVIOUS_CONSOLE_LOG)).unwrap();
        assert!(kept.ends_with("line 0019\n") && kept.len() == 50, "{kept}");
    }

    #[test]
    fn the_tail_is_printable_bounded_and_has_only_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert!(tail(&path, 3).unwrap().is_empty());
        std::fs::write(&path, b"one\r\ntwo \x1b[2J\xff\nthree").unwrap();
        assert_eq!(tail(&path, 2).unwrap(), ["two \u{fffd}[2J\u{fffd}", "three"]);
        std::fs::write(&path, format!("{}\nend\n", "x".repeat(100_000))).unwrap();
        assert_eq!(tail(&path, 5).unwrap(), ["end"]);
    }
}
