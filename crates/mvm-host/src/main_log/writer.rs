//! Appends to a log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};

use super::{FILE_MAX, LogSource, Mark, RECORD_MAX, decode, encode};
use crate::state_dir::InstanceDir;

/// The one writer of an instance's log.
#[derive(Debug)]
pub struct LogWriter {
    dir: InstanceDir,
    file: File,
    len: u64,
    /// What is kept, this far.
    mark: Mark,
}

impl LogWriter {
    /// Opens the log in an instance's directory; makes it if it is not there. What an earlier
    /// writer did not finish is cut off.
    ///
    /// # Errors
    /// The file cannot be opened, read or cut.
    pub fn open(dir: &InstanceDir) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(dir.main_log())?;
        let mut content = Vec::new();
        file.read_to_end(&mut content)?;
        let (mut mark, mut at) = (Mark::default(), 0);
        while let Some((record, len)) = decode(&content[at..]) {
            at += len;
            match record.source {
                LogSource::Mark => mark = serde_json::from_slice(&record.bytes).unwrap_or_default(),
                source => count(&mut mark, source, record.bytes.len()),
            }
        }
        let len = at as u64;
        file.set_len(len)?;
        file.seek(SeekFrom::Start(len))?;
        Ok(Self { dir: dir.clone(), file, len, mark })
    }

    /// Begins or goes on with a boot. Tells how many bytes of its standard output and error are
    /// kept, and whether it is a new one.
    ///
    /// # Errors
    /// The mark cannot be written.
    pub fn begin(&mut self, boot_id: &str, at_unix_ms: u64) -> io::Result<([u64; 2], bool)> {
        let is_new = self.mark.boot_id != boot_id;
        if is_new {
            let mark = Mark { boot_id: boot_id.to_owned(), ..Mark::default() };
            self.put_mark(&mark, at_unix_ms)?;
            self.mark = mark;
        }
        Ok(([self.mark.stdout, self.mark.stderr], is_new))
    }

    /// Notes that the guest goes on from here, however much is missing.
    ///
    /// # Errors
    /// The mark cannot be written.
    pub fn skip_to(&mut self, [stdout, stderr]: [u64; 2], at_unix_ms: u64) -> io::Result<()> {
        let mark = Mark { stdout, stderr, ..self.mark.clone() };
        self.put_mark(&mark, at_unix_ms)?;
        self.mark = mark;
        Ok(())
    }

    /// Appends what came from a source. On return the kernel has it: the end of the agent does
    /// not lose it.
    ///
    /// # Errors
    /// It cannot be written; nothing of it is kept.
    pub fn append(&mut self, source: LogSource, bytes: &[u8], at_unix_ms: u64) -> io::Result<()> {
        for piece in bytes.chunks(RECORD_MAX) {
            if self.len >= FILE_MAX {
                self.rotate(at_unix_ms)?;
            }
            self.put(source, piece, at_unix_ms)?;
            count(&mut self.mark, source, piece.len());
        }
        Ok(())
    }

    fn rotate(&mut self, at_unix_ms: u64) -> io::Result<()> {
        let path = self.dir.main_log();
        fs::rename(&path, self.dir.older_main_log())?;
        self.file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        self.len = 0;
        self.put_mark(&self.mark.clone(), at_unix_ms)
    }

    fn put_mark(&mut self, mark: &Mark, at_unix_ms: u64) -> io::Result<()> {
        let bytes = serde_json::to_vec(mark)?;
        self.put(LogSource::Mark, &bytes, at_unix_ms)
    }

    fn put(&mut self, source: LogSource, bytes: &[u8], at_unix_ms: u64) -> io::Result<()> {
        let mut record = Vec::with_capacity(super::HEADER_LEN + bytes.len());
        encode(source, at_unix_ms, bytes, &mut record);
        match self.file.write_all(&record) {
            Ok(()) => {
                self.len += record.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Half a record must not hide the ones after it.
                let _ = self.file.set_len(self.len);
                let _ = self.file.seek(SeekFrom::Start(self.len));
                Err(error)
            }
        }
    }
}

fn count(mark: &mut Mark, source: LogSource, bytes: usize) {
    match source {
        LogSource::Stdout => mark.stdout += bytes as u64,
        LogSource::Stderr => mark.stderr += bytes as u64,
        LogSource::Agent | LogSource::Mark => {}
    }
}
