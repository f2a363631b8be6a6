//! The guest kernel's log as text lines, in pieces that fit the host's credit.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use mvm_core::credit::SendWindow;
use mvm_core::frame::KIND_STDOUT;
use mvm_core::guest::{GuestError, GuestMessage};

use crate::failure::{invalid, refused};
use crate::session::Link;

/// Text at which a piece is sent.
const PIECE: usize = 16 * 1024;
/// The kernel's largest record, with room.
const RECORD: usize = 16 * 1024;

/// A running request for the kernel's log.
#[derive(Debug)]
pub(crate) struct KernelLog {
    file: File,
    follow: bool,
    window: SendWindow,
    text: Vec<u8>,
    is_at_end: bool,
}

impl KernelLog {
    pub(crate) fn open(follow: bool) -> Result<Self, GuestError> {
        let path = "/dev/kmsg";
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| refused(format!("cannot open {path}"), error))?;
        Ok(Self { file, follow, window: SendWindow::default(), text: Vec::new(), is_at_end: false })
    }

    /// The log, if there is credit for what it says.
    pub(crate) fn wants(&self) -> Option<BorrowedFd<'_>> {
        (self.window.available() > 0).then(|| self.file.as_fd())
    }

    pub(crate) fn grant(&mut self, kind: u8, bytes: u32) -> Result<(), GuestError> {
        if kind != KIND_STDOUT {
            return Err(invalid(format!("credit for frames of kind {kind}, which are not sent")));
        }
        self.window.grant(bytes).map_err(|error| invalid(error.to_string()))
    }

    /// Sends a piece of the log; tells the last message when there is no more.
    pub(crate) fn advance(&mut self, link: Link<'_>) -> Option<GuestMessage> {
        if let Err(error) = self.fill() {
            return Some(GuestMessage::Error(error));
        }
        let len = self.window.take(self.text.len().min(PIECE));
        if len > 0 {
            link.data(KIND_STDOUT, &self.text[..len]);
            self.text.drain(..len);
        }
        let is_over = self.is_at_end && !self.follow && self.text.is_empty();
        is_over.then_some(GuestMessage::Done)
    }

    fn fill(&mut self) -> Result<(), GuestError> {
        let mut record = [0; RECORD];
        while self.text.len() < PIECE {
            match self.file.read(&mut record) {
                Ok(0) => {
                    self.is_at_end = true;
                    return Ok(());
                }
                Ok(len) => append_line(&record[..len], &mut self.text),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => {
                        self.is_at_end = true;
                        return Ok(());
                    }
                    ErrorKind::Interrupted => {}
                    // The records that were to come have been overwritten: go on with the oldest.
                    ErrorKind::BrokenPipe => {}
                    _ => return Err(refused("cannot read /dev/kmsg", error)),
                },
            }
        }
        Ok(())
    }
}

/// Whether the kernel's log says that it killed this process because memory ran out.
pub(crate) fn died_of_memory(pid: i32) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
    let Ok(mut file) = opened else { return false };
    let mut record = [0; RECORD];
    loop {
        match file.read(&mut record) {
            Ok(0) => return false,
            Ok(len) if tells_of_kill(&record[..len], pid) => return true,
            Ok(_) => {}
            Err(error)
                if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::BrokenPipe) => {}
            Err(_) => return false,
        }
    }
}

/// Whether a record is the kernel's own word that it killed a process for its memory. What programs
/// write to the log has another facility than the kernel's 0.
fn tells_of_kill(record: &[u8], pid: i32) -> bool {
    let record = String::from_utf8_lossy(record);
    let Some((header, text)) = record.split_once(';') else { return false };
    let priority = header.split(',').next().and_then(|field| field.parse::<u32>().ok());
    let is_kernels = priority.is_some_and(|priority| priority >> 3 == 0);
    let text = text.lines().next().unwrap_or_default();
    is_kernels
        && (text.to_lowercase().contains(&format!("out of memory: killed process {pid} ("))
            || (text.starts_with("oom-kill:") && text.contains(&format!(",pid={pid},"))))
}

/// Turns `PRIORITY,SEQUENCE,MICROSECONDS,FLAGS…;TEXT\n KEY=VALUE…` into `[SECONDS] TEXT\n`.
fn append_line(record: &[u8], text: &mut Vec<u8>) {
    let Some(semicolon) = record.iter().position(|&byte| byte == b';') else { return };
    let header = String::from_utf8_lossy(&record[..semicolon]);
    let micros: u64 = header.split(',').nth(2).and_then(|field| field.parse().ok()).unwrap_or(0);
    let line = record[semicolon + 1..].split(|&byte| byte == b'\n').next().unwrap_or_default();
    let stamp = format!("[{:5}.{:06}] ", micros / 1_000_000, micros % 1_000_000);
    text.extend_from_slice(stamp.as_bytes());
    text.extend_from_slice(line);
    text.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(record: &[u8]) -> String {
        let mut text = Vec::new();
        append_line(record, &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_record_becomes_a_line_without_its_dictionary() {
        let record = b"6,339,5140900,-,caller=T1;NET: Registered; all\n SUBSYSTEM=net\n";
        assert_eq!(line(record), "[    5.140900] NET: Registered; all\n");
    }

    #[test]
    fn only_the_kernels_own_word_of_this_process_counts() {
        let killed = "Out of memory: Killed process 71 (hog) total-vm:9kB\n SUBSYSTEM=x\n";
        for (record, pid, is_told) in [
            (format!("3,9,100,-;{killed}"), 71, true),
            (format!("3,9,100,-;Memory cgroup {}", killed.to_lowercase()), 71, true),
            ("6,8,99,-;oom-kill:constraint=NONE,task=hog,pid=71,uid=0\n".to_owned(), 71, true),
            (format!("3,9,100,-;{killed}"), 7, false),
            (format!("12,9,100,-;{killed}"), 71, false),
            ("3,9,100,-;x\n out of memory: killed process 71 (\n".to_owned(), 71, false),
            (killed.to_owned(), 71, false),
        ] {
            assert_eq!(tells_of_kill(record.as_bytes(), pid), is_told, "{record} {pid}");
        }
    }

    #[test]
    fn a_malformed_record_is_no_line_or_an_undated_one() {
        assert_eq!(line(b"garbage"), "");
        assert_eq!(line(b"x;y"), "[    0.000000] y\n");
    }
}
