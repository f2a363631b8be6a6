//! Records as people want to see them: some sources, since a time, the last lines, with times.

use super::{LogSource, Record};

/// Bytes to show, as from this source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where they are from.
    pub source: LogSource,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Turns records into pieces. Lines that came in several records are put together.
pub struct Render<'a> {
    wants: &'a (dyn Fn(LogSource) -> bool + Send + Sync),
    since_unix_ms: u64,
    /// How a time is written, if it is to be written.
    stamp: Option<&'a (dyn Fn(u64) -> String + Send + Sync)>,
    /// Sources that are in the middle of a line.
    in_line: [bool; 3],
}

impl<'a> Render<'a> {
    /// Shows the sources that are wanted, from a time on, each line with its time if `stamp` says
    /// how.
    pub fn new(
        wants: &'a (dyn Fn(LogSource) -> bool + Send + Sync),
        since_unix_ms: u64,
        stamp: Option<&'a (dyn Fn(u64) -> String + Send + Sync)>,
    ) -> Self {
        Self { wants, since_unix_ms, stamp, in_line: [false; 3] }
    }

    /// Whether a record is to be shown.
    pub fn is_wanted(&self, record: &Record) -> bool {
        record.at_unix_ms >= self.since_unix_ms && (self.wants)(record.source)
    }

    /// The piece that a wanted record becomes.
    pub fn piece(&mut self, record: Record) -> Piece {
        let Record { source, at_unix_ms, bytes } = record;
        let Some(stamp) = self.stamp else { return Piece { source, bytes } };
        let in_line = &mut self.in_line[usize::from(source.byte() - 1).min(2)];
        let stamp = stamp(at_unix_ms);
        let mut out = Vec::with_capacity(bytes.len() + stamp.len() + 1);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if !*in_line {
                out.extend_from_slice(stamp.as_bytes());
                out.push(b' ');
            }
            out.extend_from_slice(line);
            *in_line = !line.ends_with(b"\n");
        }
        Piece { source, bytes: out }
    }
}

/// The last lines of records. A line of one source that runs through those of another is cut.
pub fn tail(mut records: Vec<Record>, lines: u32) -> Vec<Record> {
    let mut left = lines;
    // Whether a later byte of the source is shown, so that a newline before it ends another line.
    let mut is_followed = [false; 5];
    for index in (0..records.len()).rev() {
        let record = &mut records[index];
        let followed = &mut is_followed[usize::from(record.source.byte())];
        for at in (0..record.bytes.len()).rev() {
            if !*followed || record.bytes[at] == b'\n' {
                if left == 0 {
                    record.bytes.drain(..=at);
                    return records.split_off(index);
                }
                left -= 1;
            }
            *followed = true;
        }
    }
    records
}
