//! The hooks of one event: programs of the guest's own, run one after the other.
//!
//! ```text
//!         start            it ends, or is cut off            none is left, or no time
//!  Next ─────────> Running ──────────────────────> Next … ───────────────────────────> Last
//!                                                                                        │
//!                                                       the report is sent <── it ends ──┘
//! ```
//!
//! A hook that fails is reported and stops nothing. The server polls the pipes and reaps the
//! processes with everything else, so that a hook that hangs keeps nobody else waiting.

mod hook;

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mvm_core::guest::{
    ExecRequest, ExitStatus, GuestError, GuestMessage, HookReport, HookRun, MOST_HOOKS,
};

use super::{Pipe, Surroundings};
use crate::console::complain;
use crate::failure::refused;
use hook::Hook;

/// How long the kernel may take to end a process that was killed. One that is stuck in a device
/// is left behind.
const KILL_LIMIT: Duration = Duration::from_secs(1);
/// A time limit that is none: the host has its own.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// What is done when no hook is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Last {
    /// Nothing more.
    Nothing,
    /// All filesystems write what they hold back, and data disks are frozen.
    Sync,
}

/// What runs now.
#[derive(Debug)]
enum Current {
    Nothing,
    Hook(Hook),
    /// The writing back, which has no part in the report.
    Sync(Hook),
}

/// The hooks of one event.
#[derive(Debug)]
pub(crate) struct Hooks {
    waiting: VecDeque<(String, PathBuf)>,
    env: Vec<(String, String)>,
    deadline: Instant,
    current: Current,
    last: Last,
    report: HookReport,
    failure: Option<GuestError>,
}

impl Hooks {
    /// The hooks that a directory holds now, if there is one; [`Hooks::settle`] starts them.
    pub(crate) fn new(
        dir: Option<&Path>,
        env: Vec<(String, String)>,
        last: Last,
        limit: Duration,
        now: Instant,
    ) -> Self {
        let (waiting, skipped) = dir.map(list).unwrap_or_default();
        let report = HookReport { runs: Vec::new(), skipped };
        let deadline = now + limit.min(FOREVER);
        Self { waiting, env, deadline, current: Current::Nothing, last, report, failure: None }
    }

    fn running(&self) -> Option<&Hook> {
        match &self.current {
            Current::Nothing => None,
            Current::Hook(hook) | Current::Sync(hook) => Some(hook),
        }
    }

    fn running_mut(&mut self) -> Option<&mut Hook> {
        match &mut self.current {
            Current::Nothing => None,
            Current::Hook(hook) | Current::Sync(hook) => Some(hook),
        }
    }

    /// The descriptors to poll for input now.
    pub(crate) fn wants<'a>(&'a self, add: impl FnMut(Pipe, BorrowedFd<'a>)) {
        if let Some(hook) = self.running() {
            hook.wants(add);
        }
    }

    /// Reads a ready descriptor.
    pub(crate) fn ready(&mut self, pipe: Pipe) {
        if let Some(hook) = self.running_mut() {
            hook.read(pipe);
        }
    }

    /// Whether this is its process, and has not ended.
    pub(crate) fn runs_as(&self, pid: i32) -> bool {
        self.running().is_some_and(|hook| hook.runs_as(pid))
    }

    /// Notes that the process has ended and was reaped.
    pub(crate) fn ended(&mut self, status: ExitStatus, now: Instant) {
        if let Some(hook) = self.running_mut() {
            hook.ended(status, now);
        }
    }

    /// When [`Hooks::settle`] wants to be called at the latest.
    pub(crate) fn alarm(&self) -> Option<Instant> {
        match &self.current {
            Current::Hook(hook) => Some(hook.cut_at().map_or(self.deadline, |at| at + KILL_LIMIT)),
            Current::Nothing | Current::Sync(_) => None,
        }
    }

    /// Kills what runs, and its process group.
    pub(crate) fn kill(&self) {
        if let Some(hook) = self.running() {
            hook.kill();
        }
    }

    /// Goes on as far as it goes without waiting, and tells the last message when all is over.
    pub(crate) fn settle(
        &mut self,
        surroundings: &Surroundings,
        now: Instant,
    ) -> Option<GuestMessage> {
        loop {
            match std::mem::replace(&mut self.current, Current::Nothing) {
                Current::Hook(mut hook) => {
                    if self.deadline <= now {
                        hook.cut_off(now);
                    }
                    let is_stuck = hook.cut_at().is_some_and(|at| at + KILL_LIMIT <= now);
                    if !hook.is_over() && !is_stuck {
                        self.current = Current::Hook(hook);
                        return None;
                    }
                    self.report.runs.push(hook.finish(now));
                }
                Current::Sync(hook) => {
                    if !hook.is_over() {
                        self.current = Current::Sync(hook);
                        return None;
                    }
                    let run = hook.finish(now);
                    if !run.is_success() {
                        self.failure = Some(refused("cannot write filesystems back", run.output));
                    }
                }
                Current::Nothing => {
                    if !self.start_next(surroundings, now) {
                        return Some(self.last_message());
                    }
                }
            }
        }
    }

    /// Starts what comes next; tells whether there is something.
    fn start_next(&mut self, surroundings: &Surroundings, now: Instant) -> bool {
        if self.deadline <= now {
            let names = self.waiting.drain(..).map(|(name, _)| name);
            self.report.skipped.extend(names);
        }
        if let Some((name, path)) = self.waiting.pop_front() {
            let request = ExecRequest {
                argv: vec![path.to_string_lossy().into_owned()],
                env: self.env.clone(),
                cwd: Some("/".to_owned()),
                ..ExecRequest::default()
            };
            match Hook::start(&name, &request, surroundings, now) {
                Ok(hook) => self.current = Current::Hook(hook),
                Err(error) => self.report.runs.push(HookRun {
                    name,
                    status: ExitStatus::Exited { code: 126 },
                    took_ms: 0,
                    output: error.message,
                }),
            }
            return true;
        }
        match std::mem::replace(&mut self.last, Last::Nothing) {
            Last::Nothing => false,
            Last::Sync => {
                let argv = vec!["prepare-sleep".to_owned()];
                let cwd = Some("/".to_owned());
                let request = ExecRequest { argv, cwd, builtin: true, ..ExecRequest::default() };
                match Hook::start("sync", &request, surroundings, now) {
                    Ok(hook) => self.current = Current::Sync(hook),
                    Err(error) => self.failure = Some(error),
                }
                true
            }
        }
    }

    fn last_message(&mut self) -> GuestMessage {
        match self.failure.take() {
            Some(error) => GuestMessage::Error(error),
            None => GuestMessage::Hooks(std::mem::take(&mut self.report).fitted()),
        }
    }
}

/// The executable files of a directory in the order of their names, and what is skipped.
fn list(dir: &Path) -> (VecDeque<(String, PathBuf)>, Vec<String>) {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                complain(&format!("cannot read {}: {error}", dir.display()));
            }
            return (VecDeque::new(), Vec::new());
        }
    };
    let is_hook = |path: &Path| {
        let metadata = fs::metadata(path);
        metadata.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    // No more names are held than are run, however many files somebody put there.
    let mut paths = BTreeSet::new();
    let mut left_out = 0u64;
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_hook(path)) {
        paths.insert(path);
        if paths.len() > MOST_HOOKS {
            paths.pop_last();
            left_out += 1;
        }
    }
    let (mut hooks, mut skipped) = (VecDeque::new(), Vec::new());
    for path in paths {
        let name = path.file_name().unwrap_or_default();
        let shown = name.to_string_lossy().replace(char::is_control, "\u{fffd}");
        match shown.as_bytes() == name.as_bytes() && path.to_str().is_some() {
            true => hooks.push_back((shown, path)),
            false => skipped.push(shown),
        }
    }
    if left_out > 0 {
        skipped.push(format!("{left_out} more: at most {MOST_HOOKS} are run"));
    }
    (hooks, skipped)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = format!("mvm-guest-hooks-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(dir);
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn file(&self, name: &OsStr, mode: u32) {
            let path = self.0.join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn hooks_are_the_executable_files_in_the_order_of_their_names() {
        let dir = Dir::new("order");
        for (name, mode) in [("20-b", 0o700), ("10-a", 0o755), ("9", 0o010), ("readme", 0o644)] {
            dir.file(OsStr::new(name), mode);
        }
        fs::create_dir(dir.0.join("15-dir")).unwrap();
        std::os::unix::fs::symlink("20-b", dir.0.join("30-link")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.0.join("40-dangling")).unwrap();
        for strange in [&b"5\xff"[..], b"5\n"] {
            dir.file(OsStr::from_bytes(strange), 0o755);
        }
        let (hooks, skipped) = list(&dir.0);
        let names: Vec<&str> = hooks.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["10-a", "20-b", "30-link", "9"]);
        assert_eq!(skipped, ["5\u{fffd}", "5\u{fffd}"]);
        assert_eq!(list(&dir.0.join("none")), Default::default());
    }

    #[test]
    fn there_is_a_bound_to_the_hooks_and_the_first_by_name_are_run() {
        let dir = Dir::new("bound");
        for number in (0..MOST_HOOKS + 6).rev() {
            dir.file(OsStr::new(&format!("{number:03}")), 0o755);
        }
        let (hooks, skipped) = list(&dir.0);
        assert_eq!((hooks.len(), hooks[0].0.as_str()), (MOST_HOOKS, "000"));
        assert_eq!(skipped, ["6 more: at most 64 are run"]);
    }

    #[test]
    fn without_time_every_hook_is_skipped() {
        let dir = Dir::new("time");
        dir.file(OsStr::new("a"), 0o755);
        let now = Instant::now();
        let mut hooks = Hooks::new(Some(&dir.0), Vec::new(), Last::Nothing, Duration::ZERO, now);
        let Some(GuestMessage::Hooks(report)) = hooks.settle(&Surroundings::default(), now) else {
            panic!()
        };
        assert_eq!((report.runs, report.skipped), (vec![], vec!["a".to_owned()]));
    }
}
