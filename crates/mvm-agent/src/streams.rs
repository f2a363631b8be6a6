//! Calls that stream: watches and logs; and the session of the instance that a call means.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::frame;
use mvm_core::guest::ErrorKind;
use mvm_core::lifecycle::{Phase, State};
use mvm_core::name::{DiskPath, InstancePath, PoolPath, Selector, TenantName};
use mvm_core::record::DesiredState;
use mvm_host::guest::{Session, SessionError};
use mvm_host::vmm::{CONSOLE_LOG, VMM_LOG};
use mvm_wire::{ApiError, Connection, ConnectionError, ErrorCode, LogKind, Reply, WriteHalf};
use tokio::time::Instant;

use crate::node::{Node, chain};
use crate::server::{finish, one};
use crate::state::Mirror;
use crate::views;

/// How long a guest has to answer a question.
pub(crate) const GUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a guest whose session is over has to open another one.
const REJOIN_LIMIT: Duration = Duration::from_secs(10);
/// How often sessions are looked for while one is waited for.
const SESSION_POLL: Duration = Duration::from_millis(20);
/// How often a log file that is followed is looked at.
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);
/// Bytes of a log that are sent at once.
const LOG_PIECE: usize = 64 * 1024;

/// What a caller watches.
pub(crate) struct Watched {
    pub(crate) instances: Vec<InstancePath>,
    pub(crate) pools: Vec<PoolPath>,
    /// A tenant's existence.
    pub(crate) tenant: Option<TenantName>,
    pub(crate) disks: Vec<DiskPath>,
}

/// Sends what is watched now and after each change, until the caller hangs up.
pub(crate) async fn watch(
    node: &Node,
    watched: &Watched,
    connection: Connection,
) -> Result<(), ConnectionError> {
    let Connection { mut read, mut write } = connection;
    let mut state = node.state.follow();
    let mut waiting = node.waiting();
    let mut last = None;
    loop {
        let mirror = state.borrow_and_update().clone();
        waiting.borrow_and_update();
        let snapshot = Reply::Snapshot {
            instances: views::instances(node, &mirror, |path| watched.instances.contains(path)),
            pools: views::pools(&mirror, |path| watched.pools.contains(path)),
            tenant_exists: watched
                .tenant
                .as_ref()
                .is_some_and(|name| mirror.desired.tenants.contains_key(name)),
            disks: views::disks(node, &mirror, |path| watched.disks.contains(path)),
        };
        if last.as_ref() != Some(&snapshot) {
            write.message(&snapshot).await?;
            last = Some(snapshot);
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return Ok(()) },
            changed = waiting.changed() => if changed.is_err() { return Ok(()) },
            // The caller says nothing more: whatever arrives is its hanging up.
            _ = read.next() => return Ok(()),
        }
    }
}

/// A session with an instance that a selector means: any running one will do. One that is starting
/// is waited for, and so, for a while, is a guest that an agent has just adopted.
pub(crate) async fn session(
    node: &Node,
    selector: &Selector,
) -> Result<(InstancePath, Session), ApiError> {
    let mut state = node.state.follow();
    let rejoined_by = Instant::now() + REJOIN_LIMIT;
    loop {
        let mirror = state.borrow_and_update().clone();
        let candidates: Vec<&InstancePath> =
            mirror.desired.instances.keys().filter(|path| selector.matches(path)).collect();
        for path in &candidates {
            let session = node.instance(path).and_then(|i| i.session.borrow().clone());
            if mirror.status(path).state() == State::Running
                && let Some(session) = session
            {
                return Ok(((*path).clone(), session));
            }
        }
        let is_near = |path: &&InstancePath| {
            let wanted = mirror.desired.instances.get(*path);
            wanted.is_some_and(|record| record.desired == DesiredState::Running)
                && match mirror.status(path).phase {
                    Phase::Starting { .. } => true,
                    Phase::Running { .. } => Instant::now() < rejoined_by,
                    _ => false,
                }
        };
        if !candidates.iter().copied().any(|path| is_near(&path)) {
            return Err(unavailable(&mirror, selector, &candidates));
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                return Err(ApiError::new(ErrorCode::Internal, "the agent is ending"));
            },
            // Sessions are not part of the state that is followed.
            () = tokio::time::sleep(SESSION_POLL) => {}
        }
    }
}

fn unavailable(mirror: &Mirror, selector: &Selector, candidates: &[&InstancePath]) -> ApiError {
    match candidates {
        [] => match one(mirror, selector) {
            Err(error) => error,
            Ok(path) => ApiError::new(ErrorCode::Conflict, format!("{path} is not running")),
        },
        [path] => {
            let state = mirror.status(path).state();
            if state == State::Running {
                let message = format!("the guest agent of {path} does not answer");
                return ApiError::new(ErrorCode::Guest, message)
                    .hint(format!("see `mvm why {}`, or `mvm restart {}`", path.id, path.id));
            }
            ApiError::new(ErrorCode::Conflict, format!("{path} is {state}, not running")).hint(
                format!("start it with `mvm start {}`, or see `mvm why {}`", path.id, path.id),
            )
        }
        several => {
            let message =
                format!("none of the {} instances of {selector} is running", several.len());
            ApiError::new(ErrorCode::Conflict, message)
                .hint(format!("start them with `mvm start {selector} --all`"))
        }
    }
}

pub(crate) fn guest_error(instance: &InstancePath, error: &SessionError) -> ApiError {
    if let SessionError::Missing { .. } = error {
        return ApiError::new(ErrorCode::Unsupported, format!("{instance}: {error}"))
            .hint(format!("`mvm restart {}` gives it this version's", instance.id));
    }
    let SessionError::Guest { error: guest, .. } = error else {
        return ApiError::new(ErrorCode::Guest, format!("{instance}: {}", chain(error)));
    };
    let code = match guest.kind {
        ErrorKind::NotFound => ErrorCode::GuestNotFound,
        ErrorKind::Denied => ErrorCode::GuestDenied,
        ErrorKind::Invalid => ErrorCode::Invalid,
        _ => ErrorCode::Guest,
    };
    // What was asked for is what the person typed: the guest's own words say what is wrong with it.
    ApiError::new(code, format!("{instance}: {}", chain(guest)))
}

/// Sends a log.
pub(crate) async fn logs(
    node: &Arc<Node>,
    selector: &Selector,
    kind: LogKind,
    follow: bool,
    tail: Option<u32>,
    connection: Connection,
) -> Result<(), ConnectionError> {
    let Connection { mut read, mut write } = connection;
    let file = match kind {
        LogKind::Console => CONSOLE_LOG,
        LogKind::Vmm => VMM_LOG,
        LogKind::Kernel => {
            let sending = kernel_log(node, selector, follow, tail, &mut write);
            return tokio::select! {
                sent = sending => sent,
                _ = read.next() => Ok(()),
            };
        }
    };
    let path = match one(&node.state.now(), selector) {
        Ok(path) => path,
        Err(error) => return finish(&mut write, Err(error)).await,
    };
    let file = node.instance_dir(&path.id).join(file);
    let sending = async {
        let sent = file_log(&file, follow, tail, &mut write).await?;
        let reply = sent.map(|()| Reply::Done).map_err(|error| {
            ApiError::new(ErrorCode::Internal, format!("cannot read {}: {error}", file.display()))
        });
        finish(&mut write, reply).await
    };
    tokio::select! {
        sent = sending => sent,
        _ = read.next() => Ok(()),
    }
}

async fn kernel_log(
    node: &Node,
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

/// Sends a log file from its beginning, or its last lines; then, if asked, what is added to it. A
/// file that is replaced (the instance was started again) is followed from its new beginning.
async fn file_log(
    path: &Path,
    follow: bool,
    tail: Option<u32>,
    write: &mut WriteHalf,
) -> Result<std::io::Result<()>, ConnectionError> {
    let mut open: Option<(File, u64)> = None;
    let mut tail = tail;
    let mut piece = vec![0; LOG_PIECE];
    loop {
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
        if !follow {
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
}
