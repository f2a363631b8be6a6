//! Logs of an instance: its console, its VMM's, its guest kernel's, and its main process's.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mvm_core::frame;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, Selector};
use mvm_core::plan::Waiting;
use mvm_host::main_log::{self, LogReader, LogSource, Render};
use mvm_host::state_dir::InstanceDir;
use mvm_wire::{
    ApiError, Connection, ConnectionError, ErrorCode, LogKind, LogQuery, Reply, WriteHalf,
};

use crate::door::{finish, one};
use crate::node::Node;
use crate::sessions::{GUEST_TIMEOUT, guest_error, session};

/// How often a log file that is followed is looked at.
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);
/// Bytes of a log that are sent at once.
const LOG_PIECE: usize = 64 * 1024;

/// Sends a log.
pub(crate) async fn logs(
    node: &Arc<Node>,
    selector: &Selector,
    query: LogQuery,
    connection: Connection,
) -> Result<(), ConnectionError> {
    let Connection { mut read, mut write } = connection;
    let sending = send(node, selector, query, &mut write);
    tokio::select! {
        sent = sending => sent,
        // The caller says nothing more: whatever arrives is its hanging up.
        _ = read.next() => Ok(()),
    }
}

async fn send(
    node: &Arc<Node>,
    selector: &Selector,
    query: LogQuery,
    write: &mut WriteHalf,
) -> Result<(), ConnectionError> {
    let LogQuery { kind, follow, tail, since_unix_ms, timestamps } = query;
    if kind == LogKind::Kernel && since_unix_ms.is_none() {
        return kernel_log(node, selector, follow, tail, write).await;
    }
    let path = match one(node, selector) {
        Ok(path) => path,
        Err(error) => return finish(write, Err(error)).await,
    };
    let dir = node.instance_dir(&path.id);
    let file = match kind {
        LogKind::Vmm => dir.vmm_log(),
        LogKind::Console => dir.console_log(),
        LogKind::Auto if !LogReader::exists(&dir) => dir.console_log(),
        LogKind::Kernel => dir.join("the kernel's log"),
        _ => {
            let sent = main_log(&dir, query, || is_over(node, &path), write).await?;
            let reply = sent.map(|()| Reply::Done).map_err(|error| {
                let message = format!("cannot read the log in {}: {error}", dir.display());
                ApiError::new(ErrorCode::Internal, message)
            });
            return finish(write, reply).await;
        }
    };
    if since_unix_ms.is_some() || timestamps {
        let name = file.file_name().unwrap_or_default().display();
        let message = format!("{name} of {path} has no times by which it could be shown");
        let error = ApiError::new(ErrorCode::Invalid, message)
            .hint("leave --since and --timestamps out, or see the main process's --source all");
        return finish(write, Err(error)).await;
    }
    let goes_on = || follow && !is_over(node, &path);
    let sent = file_log(&file, goes_on, tail, write).await?;
    let reply = sent.map(|()| Reply::Done).map_err(|error| {
        ApiError::new(ErrorCode::Internal, format!("cannot read {}: {error}", file.display()))
    });
    finish(write, reply).await
}

/// Whether nothing more will be logged of an instance: it does not run, and nobody is about to start
/// it.
fn is_over(node: &Node, path: &InstancePath) -> bool {
    let mirror = node.state.now();
    let Some(record) = mirror.desired.instances.get(path) else { return true };
    let status = mirror.status(path);
    let is_at_rest = status.activity().is_none()
        && matches!(
            status.state(),
            State::Created | State::Stopped | State::Failed | State::Destroyed
        );
    let waiting = node.waiting();
    let is_left = matches!(waiting.borrow().get(path), Some(Waiting::RestartPolicy { .. }));
    is_at_rest && (!record.desired.is_alive() || is_left)
}

/// Sends what the main process wrote, also of an instance that has ended. What is followed ends when
/// nothing more will come.
async fn main_log(
    dir: &InstanceDir,
    query: LogQuery,
    is_over: impl Fn() -> bool,
    write: &mut WriteHalf,
) -> Result<std::io::Result<()>, ConnectionError> {
    let wants = move |source| match query.kind {
        LogKind::Stdout => source == LogSource::Stdout,
        LogKind::Stderr => source == LogSource::Stderr,
        LogKind::Agent => source == LogSource::Agent,
        LogKind::All => true,
        _ => source != LogSource::Agent,
    };
    let since = query.since_unix_ms.unwrap_or(0);
    let stamp = query.timestamps.then_some(&rfc3339 as &(dyn Fn(u64) -> String + Send + Sync));
    let mut render = Render::new(&wants, since, stamp);
    let mut reader = LogReader::new(dir);
    let mut tail = query.tail;
    loop {
        // Asked before the log is read, so that its last lines are sent.
        let goes_on = query.follow && !is_over();
        let mut records = match reader.read() {
            Ok(records) => records,
            Err(error) => return Ok(Err(error)),
        };
        records.retain(|record| render.is_wanted(record));
        if let Some(lines) = tail.take() {
            records = main_log::tail(records, lines);
        }
        for record in records {
            let piece = render.piece(record);
            let kind = match piece.source {
                LogSource::Stderr => frame::KIND_STDERR,
                _ => frame::KIND_STDOUT,
            };
            for bytes in piece.bytes.chunks(LOG_PIECE) {
                write.data(kind, bytes).await?;
            }
        }
        if !goes_on {
            return Ok(Ok(()));
        }
        tokio::time::sleep(FOLLOW_PAUSE).await;
    }
}

fn rfc3339(unix_ms: u64) -> String {
    let time: SystemTime = UNIX_EPOCH + Duration::from_millis(unix_ms);
    humantime::format_rfc3339_millis(time).to_string()
}

async fn kernel_log(
    node: &Arc<Node>,
    selector: &Selector,
    follow: bool,
    tail: Option<u32>,
    write: &mut WriteHalf,
) -> Result<(), ConnectionError> {
    let (instance, session) = match session(node, selector).await {
        Ok(found) => found,
        Err(error) => return finish(write, Err(error)).await,
    };
    let mut log = match session.kernel_log(follow, GUEST_TIMEOUT).await {
        Ok(log) => log,
        Err(error) => return finish(write, Err(guest_error(&instance, &error))).await,
    };
    let mut kept = Vec::new();
    loop {
        match log.next().await {
            // The last lines are known only when the log has ended.
            Some(Ok(bytes)) if tail.is_some() && !follow => kept.extend_from_slice(&bytes),
            Some(Ok(bytes)) => write.data(frame::KIND_STDOUT, &bytes).await?,
            Some(Err(error)) => {
                return finish(write, Err(guest_error(&instance, &error))).await;
            }
            None => break,
        }
    }
    let kept = &kept[tail_start(&kept, tail)..];
    for piece in kept.chunks(LOG_PIECE) {
        write.data(frame::KIND_STDOUT, piece).await?;
    }
    finish(write, Ok(Reply::Done)).await
}

/// Sends a log file from its beginning, or its last lines; then what is added to it, as long as it
/// goes on. A file that is replaced (the instance was started again) is followed from its new beginning.
async fn file_log(
    path: &Path,
    goes_on: impl Fn() -> bool,
    tail: Option<u32>,
    write: &mut WriteHalf,
) -> Result<std::io::Result<()>, ConnectionError> {
    let mut open: Option<(File, u64)> = None;
    let mut tail = tail;
    let mut piece = vec![0; LOG_PIECE];
    loop {
        let goes_on = goes_on();
        match File::open(path) {
            Ok(file) => {
                if open.as_ref().is_none_or(|(before, _)| !same_file(before, &file)) {
                    let start = match log_start(&file, tail.take()) {
                        Ok(start) => start,
                        Err(error) => return Ok(Err(error)),
                    };
                    open = Some((file, start));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Ok(Err(error)),
        }
        if let Some((file, offset)) = &mut open {
            loop {
                let read = file.seek(SeekFrom::Start(*offset)).and_then(|_| file.read(&mut piece));
                match read {
                    Ok(0) => break,
                    Ok(n) => {
                        write.data(frame::KIND_STDOUT, &piece[..n]).await?;
                        *offset += n as u64;
                    }
                    Err(error) => return Ok(Err(error)),
                }
            }
        }
        if !goes_on {
            return Ok(Ok(()));
        }
        tokio::time::sleep(FOLLOW_PAUSE).await;
    }
}

fn same_file(a: &File, b: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Where to begin: behind what was given back to the filesystem, or before the last lines.
fn log_start(file: &File, tail: Option<u32>) -> std::io::Result<u64> {
    let start = mvm_host::console::content_start(file)?;
    if tail.is_none() {
        return Ok(start);
    }
    let mut content = Vec::new();
    let mut file = file;
    file.seek(SeekFrom::Start(start))?;
    file.take(mvm_host::console::KEEP_MAX).read_to_end(&mut content)?;
    Ok(start + tail_start(&content, tail) as u64)
}

/// The offset of the last `tail` lines.
fn tail_start(content: &[u8], tail: Option<u32>) -> usize {
    let Some(lines) = tail else { return 0 };
    let body = content.strip_suffix(b"\n").unwrap_or(content);
    let mut ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    match lines.checked_sub(1) {
        None => content.len(),
        Some(skip) => ends.nth(skip as usize).map_or(0, |(at, _)| at + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_log_are_found() {
        let log = b"one\ntwo\nthree\n";
        for (lines, rest) in
            [(0, ""), (1, "three\n"), (2, "two\nthree\n"), (9, "one\ntwo\nthree\n")]
        {
            assert_eq!(&log[tail_start(log, Some(lines))..], rest.as_bytes(), "{lines}");
        }
        assert_eq!(tail_start(b"", Some(3)), 0);
        assert_eq!(tail_start(log, None), 0);
    }

    #[test]
    fn a_lines_time_is_written_as_rfc_3339() {
        assert_eq!(rfc3339(951_827_696_789), "2000-02-29T12:34:56.789Z");
    }
}
