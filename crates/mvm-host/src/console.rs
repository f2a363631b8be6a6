//! Consoles kept on the host: the last lines for people, and a bound on their size.
//!
//! A console is written by a guest, which may be hostile: what is shown has no control characters,
//! and a flood costs a bounded amount of disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::hole::make_hole;

/// Allocated bytes of a console above which its oldest part is given back to the filesystem.
pub const KEEP_MAX: u64 = 8 * 1024 * 1024;
/// Bytes that are kept then.
pub const KEEP_MIN: u64 = 1024 * 1024;
/// Bytes at the end of a console in which its last lines are looked for.
const TAIL_WINDOW: u64 = 64 * 1024;
/// Longest line that is shown, in characters.
const LINE_MAX: usize = 400;

/// The last lines of a console, oldest first; none if there is no console.
///
/// # Errors
/// The file is there and cannot be read.
pub fn tail(path: &Path, lines: usize) -> io::Result<Vec<String>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_WINDOW)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_WINDOW).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<String> = text.lines().map(printable).filter(|line| !line.is_empty()).collect();
    let skip = all.len().saturating_sub(lines);
    Ok(all.into_iter().skip(skip).collect())
}

/// A line without control characters and escape sequences, cut at a sane length.
pub fn printable(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // CSI sequences end with a letter; anything else after ESC is one character.
            if chars.next() == Some('[') {
                while chars.next().is_some_and(|c| !c.is_ascii_alphabetic()) {}
            }
        } else if c == '\t' {
            out.push(' ');
        } else if !c.is_control() {
            out.push(c);
        }
    }
    if out.chars().count() > LINE_MAX {
        out = out.chars().take(LINE_MAX).collect();
        out.push('…');
    }
    out.trim_end().to_owned()
}

/// Gives the oldest part of a console, or of what else a VMM goes on writing, back to the filesystem if
/// it has grown too large. Offsets stay, so that the VMM goes on; the part that is gone reads as zeros.
///
/// # Errors
/// The filesystem refused.
pub fn bound(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if metadata.blocks() * 512 <= KEEP_MAX {
        return Ok(());
    }
    let end = metadata.len().saturating_sub(KEEP_MIN) & !4095;
    make_hole(&file, 0, end)?;
    Ok(())
}

/// Where a console's content begins: behind what [`bound`] gave back.
///
/// # Errors
/// The file cannot be read.
pub fn content_start(file: &File) -> io::Result<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0)) {
        Ok(start) => Ok(start),
        // No data at all, or a filesystem that cannot tell.
        Err(rustix::io::Errno::NXIO | rustix::io::Errno::INVAL) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_tail_has_the_last_lines_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert_eq!(tail(&path, 5).unwrap(), Vec::<String>::new());
        std::fs::write(&path, b"one\r\n\x1b[2J\x1b[31mtwo\x1b[0m\x07\r\n\r\nthree \xff").unwrap();
        assert_eq!(tail(&path, 2).unwrap(), ["two", "three \u{fffd}"]);
    }

    #[test]
    fn a_flood_is_bounded_and_the_end_is_kept() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut file = File::create(&path).unwrap();
        let piece = vec![b'x'; 1024 * 1024];
        for _ in 0..10 {
            file.write_all(&piece).unwrap();
        }
        file.write_all(b"\nlast words\n").unwrap();
        bound(&path).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert!(metadata.blocks() * 512 <= KEEP_MIN + 8192, "{}", metadata.blocks() * 512);
        assert_eq!(metadata.len(), 10 * 1024 * 1024 + 12);
        assert_eq!(tail(&path, 1).unwrap(), ["last words"]);
        assert!(content_start(&File::open(&path).unwrap()).unwrap() > 8 * 1024 * 1024);
    }
}
