//! Reads a log from its beginning, and what is added later.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::{LogSource, Mark, Record, decode};
use crate::console::printable;
use crate::state_dir::InstanceDir;

/// A reader of an instance's log. It goes on where it was, also in a file that was put aside.
#[derive(Debug)]
pub struct LogReader {
    dir: InstanceDir,
    /// The file that is being read, and how far.
    file: Option<(File, u64)>,
}

impl LogReader {
    /// A reader of the log in an instance's directory, which need not be there yet.
    pub fn new(dir: &InstanceDir) -> Self {
        Self { dir: dir.clone(), file: None }
    }

    /// Whether there is a log in an instance's directory.
    pub fn exists(dir: &InstanceDir) -> bool {
        dir.main_log().exists()
    }

    /// The records that were added since the last call; all, at the first one. Marks are left out.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn read(&mut self) -> io::Result<Vec<Record>> {
        let mut records = self.read_all()?;
        records.retain(|record| record.source != LogSource::Mark);
        Ok(records)
    }

    fn read_all(&mut self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        let Some(newest) = open(&self.dir.main_log())? else { return Ok(records) };
        let current = self.file.take();
        let is_current = |(file, _): &(File, u64)| same(file, &newest);
        match current {
            Some(current) if is_current(&current).unwrap_or(false) => {
                self.file = Some(current);
            }
            Some((file, at)) => {
                // It was put aside meanwhile, perhaps more than once.
                read_from(&file, at, &mut records)?;
                self.file = Some((newest, 0));
            }
            None => {
                // Opened second: it may be the newest by now, but never older than the one before.
                if let Some(older) = open(&self.dir.older_main_log())?
                    && !same(&older, &newest)?
                {
                    read_from(&older, 0, &mut records)?;
                }
                self.file = Some((newest, 0));
            }
        }
        if let Some((file, at)) = &mut self.file {
            *at = read_from(file, *at, &mut records)?;
        }
        Ok(records)
    }
}

/// The last lines that the main process of the last boot wrote, oldest first, as they can be shown;
/// none if it wrote nothing or there is no log.
///
/// # Errors
/// A file cannot be read.
pub fn last_words(dir: &InstanceDir, lines: usize) -> io::Result<Vec<String>> {
    let mut records = LogReader::new(dir).read_all()?;
    let boot = |record: &Record| match record.source {
        LogSource::Mark => {
            serde_json::from_slice(&record.bytes).ok().map(|mark: Mark| mark.boot_id)
        }
        _ => None,
    };
    // Each boot begins with a mark; so does each file, with that of the boot before it.
    if let Some(last) = records.iter().rev().find_map(boot) {
        let start = records.iter().position(|record| boot(record).as_ref() == Some(&last));
        records.drain(..start.unwrap_or(0));
    }
    records.retain(|record| matches!(record.source, LogSource::Stdout | LogSource::Stderr));
    // Lines with the place of their last bytes, and what each source has begun.
    let mut written: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut begun = [(0, Vec::new()), (0, Vec::new())];
    for (place, record) in records.iter().enumerate() {
        let line = &mut begun[usize::from(record.source == LogSource::Stderr)];
        for piece in record.bytes.split_inclusive(|byte| *byte == b'\n') {
            line.0 = place;
            line.1.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                written.push(std::mem::take(line));
            }
        }
    }
    written.extend(begun);
    written.sort_by_key(|(place, _)| *place);
    let shown = written.iter().map(|(_, line)| printable(&String::from_utf8_lossy(line)));
    let mut shown: Vec<String> = shown.filter(|line| !line.is_empty()).collect();
    Ok(shown.split_off(shown.len().saturating_sub(lines)))
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn same(a: &File, b: &File) -> io::Result<bool> {
    let (a, b) = (a.metadata()?, b.metadata()?);
    Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
}

/// Reads whole records from an offset on, and tells where they end.
fn read_from(mut file: &File, at: u64, records: &mut Vec<Record>) -> io::Result<u64> {
    file.seek(SeekFrom::Start(at))?;
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    let mut end = 0;
    while let Some((record, len)) = decode(&content[end..]) {
        end += len;
        records.push(record);
    }
    Ok(at + end as u64)
}
