//! Reads a log from its beginning, and what is added later.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::{LogSource, MAIN_LOG, OLDER_MAIN_LOG, Record, decode};

/// A reader of an instance's log. It goes on where it was, also in a file that was put aside.
#[derive(Debug)]
pub struct LogReader {
    dir: PathBuf,
    /// The file that is being read, and how far.
    file: Option<(File, u64)>,
}

impl LogReader {
    /// A reader of the log in an instance's directory, which need not be there yet.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), file: None }
    }

    /// Whether there is a log in an instance's directory.
    pub fn exists(dir: &Path) -> bool {
        dir.join(MAIN_LOG).exists()
    }

    /// The records that were added since the last call; all, at the first one. Marks are left out.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn read(&mut self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        let Some(newest) = open(&self.dir.join(MAIN_LOG))? else { return Ok(records) };
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
                if let Some(older) = open(&self.dir.join(OLDER_MAIN_LOG))?
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
        if record.source != LogSource::Mark {
            records.push(record);
        }
    }
    Ok(at + end as u64)
}
