//! A guest's part in its sleep and wake: what every guest does, and the hooks of the real agent.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]

mod guest_support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use guest_support::{Guest, LIMIT, command, eventually, runs};
use mvm_core::guest::{
    ErrorKind, ExitStatus, Feature, GuestMessage, HookReport, HostMessage, LONGEST_HOOK_OUTPUT,
    MOST_HOOKS, SleepRequest, WakeReason, WakeRequest,
};
use mvm_host::guest::{Session, SessionError, SessionMode};

const EXITED: ExitStatus = ExitStatus::Exited { code: 0 };

async fn an_event_without_hooks_is_answered_at_once(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    session.need(Feature::Sleep).unwrap();
    for _ in 0..2 {
        let report = session.prepare_sleep(LIMIT, LIMIT).await.unwrap();
        assert_eq!(report, HookReport::default());
        let report = session.woken(WakeReason::Restored, LIMIT, LIMIT).await.unwrap();
        assert_eq!(report, HookReport::default());
    }
    assert!(!session.health(LIMIT).await.unwrap().busy);
}

#[tokio::test]
async fn a_simulated_guest_counts_its_wakes() {
    let (guest, sim) = Guest::simulated();
    an_event_without_hooks_is_answered_at_once(guest).await;
    assert_eq!(sim.wakes(), [WakeReason::Restored; 2]);
}

#[tokio::test]
async fn a_guest_without_a_place_for_hooks_has_none() {
    an_event_without_hooks_is_answered_at_once(Guest::real()).await;
}

/// A root directory with hooks.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        let root = Self(tempfile::tempdir().unwrap());
        for event in ["pre-sleep", "post-wake"] {
            fs::create_dir_all(root.path().join(format!("etc/mvm/hooks/{event}.d"))).unwrap();
        }
        root
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, event: &str, name: &str, text: &str, mode: u32) {
        let path = self.path().join(format!("etc/mvm/hooks/{event}.d/{name}"));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn hook(&self, event: &str, name: &str, script: &str) {
        self.file(event, name, &format!("#!/bin/sh\n{script}\n"), 0o755);
    }

    fn shown(&self, name: &str) -> String {
        fs::read_to_string(self.path().join("run/mvm").join(name)).unwrap_or_default()
    }

    /// The number in a file, once it is there.
    async fn pid(&self, name: &str) -> u32 {
        let path = self.path().join(name);
        let pid = || fs::read_to_string(&path).ok()?.trim().parse().ok();
        eventually("a process has said its id", async || pid().is_some()).await;
        pid().unwrap()
    }

    async fn session(&self) -> (Guest, Session) {
        let guest = Guest::real_in(self.path());
        let session = guest.session(SessionMode::Fresh).await;
        (guest, session)
    }
}

#[tokio::test]
async fn hooks_run_one_after_the_other_and_a_failure_stops_nothing() {
    let root = Root::new();
    let log = root.path().join("log");
    let note = format!("echo $(basename $0) $MVM_EVENT ${{MVM_WAKES:-none}} >> {}", log.display());
    root.hook("pre-sleep", "20-fails", &format!("{note}; echo out; echo err >&2; exit 3"));
    root.hook("pre-sleep", "10-first", &format!("sleep 0.1; {note}"));
    root.hook("pre-sleep", "30-killed", &format!("{note}; kill -TERM $$"));
    root.file("pre-sleep", "40-orphan", "#!/no/such/interpreter\n", 0o755);
    root.file("pre-sleep", "50-noformat", "neither script nor program", 0o755);
    root.file("pre-sleep", "15-readme", "not for running", 0o644);
    root.hook("pre-sleep", "60-last", &format!("{note}; pwd; id -u; ps -o pgid= -p $$; echo $$"));
    let (_guest, session) = root.session().await;
    let report = session.prepare_sleep(LIMIT, LIMIT).await.unwrap();
    let told: Vec<_> = report.runs.iter().map(|run| (run.name.as_str(), run.status)).collect();
    let code = |code| ExitStatus::Exited { code };
    assert_eq!(
        told,
        [
            ("10-first", EXITED),
            ("20-fails", code(3)),
            ("30-killed", ExitStatus::Signaled { signal: 15, out_of_memory: false }),
            ("40-orphan", code(127)),
            ("50-noformat", code(126)),
            ("60-last", EXITED),
        ]
    );
    assert_eq!(report.skipped, [""; 0]);
    assert!(report.runs[0].took_ms >= 100);
    let mut lines: Vec<_> = report.runs[1].output.lines().collect();
    lines.sort();
    assert_eq!(lines, ["err", "out"]);
    assert!(report.runs[3].output.contains("its interpreter"), "{:?}", report.runs[3]);
    let last: Vec<_> = report.runs[5].output.split_ascii_whitespace().collect();
    let own_uid = rustix::process::geteuid().as_raw().to_string();
    assert_eq!(last[..2], ["/", own_uid.as_str()]);
    assert_eq!(last[2], last[3], "a process group of its own");
    let log = fs::read_to_string(log).unwrap();
    let expected = ["10-first", "20-fails", "30-killed", "60-last"];
    assert_eq!(log, expected.map(|name| format!("{name} pre-sleep none\n")).concat());
}

#[tokio::test]
async fn a_hook_that_hangs_is_cut_off_with_its_children_and_keeps_nobody_waiting() {
    let root = Root::new();
    let child = root.path().join("child");
    root.hook("pre-sleep", "1-quick", "true");
    let hang = format!("sleep 4007 & echo $! > {}; echo before; wait", child.display());
    root.hook("pre-sleep", "2-hangs", &hang);
    root.hook("pre-sleep", "3-late", "true");
    root.hook("pre-sleep", "4-later", "true");
    let (_guest, session) = root.session().await;
    let asleep = tokio::spawn({
        let session = session.clone();
        async move { session.prepare_sleep(Duration::from_secs(2), LIMIT).await }
    });
    let child = root.pid("child").await;
    assert!(!asleep.is_finished() && runs(child));
    let output = session.exec(command(&["echo", "x"]), LIMIT).await.unwrap();
    assert_eq!(output.output(99).await.unwrap().stdout, b"x\n");
    let busy = session.woken(WakeReason::Resumed, LIMIT, LIMIT).await;
    let Err(SessionError::Guest { error, .. }) = busy else { panic!("{busy:?}") };
    assert_eq!(error.kind, ErrorKind::Limit);
    let report = asleep.await.unwrap().unwrap();
    assert_eq!(report.runs[0].status, EXITED);
    assert_eq!(report.runs[1].status, ExitStatus::TimedOut);
    assert_eq!(report.runs[1].output, "before\n");
    assert_eq!((report.runs.len(), report.skipped), (2, vec!["3-late".into(), "4-later".into()]));
    eventually("the hook's child is gone", async || !runs(child)).await;
    assert_eq!(session.woken(WakeReason::Resumed, LIMIT, LIMIT).await.unwrap().runs, []);
    assert_eq!(root.shown("wakes"), "1\n", "a refused wake does not count");
}

#[tokio::test]
async fn hooks_end_with_who_asked_for_them() {
    let root = Root::new();
    let child = root.path().join("child");
    root.hook("pre-sleep", "1", &format!("sleep 4008 & echo $! > {}; wait", child.display()));
    let (guest, session) = root.session().await;
    let short = session.prepare_sleep(LIMIT, Duration::from_millis(300)).await;
    assert!(matches!(short, Err(SessionError::Timeout { .. })), "{short:?}");
    let first = root.pid("child").await;
    eventually("the hook of a request given up is gone", async || !runs(first)).await;

    fs::remove_file(&child).unwrap();
    // Two sessions that read one stream would take each other's bytes away.
    drop(session);
    let mut host = guest.raw(1);
    host.open();
    host.send(1, &HostMessage::PrepareSleep(SleepRequest { hooks_ms: 60_000 }));
    let second = root.pid("child").await;
    drop(host);
    let _next = guest.session(SessionMode::Existing).await;
    eventually("the hook of an earlier session is gone", async || !runs(second)).await;
}

#[tokio::test]
async fn a_report_is_bounded_however_much_there_is_to_tell() {
    let root = Root::new();
    for number in 0..MOST_HOOKS + 3 {
        let text = format!("head -c 300000 /dev/zero; echo end {number}; exit 1");
        root.hook("pre-sleep", &format!("{number:03}"), &text);
    }
    root.hook("post-wake", "flood", "head -c 2000000 /dev/zero | tr '\\0' x; echo end");
    let left = root.path().join("left");
    let leave = format!("sleep 4009 & echo $! > {}; yes no | head -c 70000 >&2", left.display());
    root.hook("post-wake", "leaves", &leave);
    let (_guest, session) = root.session().await;
    let report = session.prepare_sleep(LIMIT, LIMIT).await.unwrap();
    assert_eq!(report.runs.len(), MOST_HOOKS);
    assert_eq!(report.skipped, ["3 more: at most 64 are run"]);
    for (number, run) in report.runs.iter().enumerate() {
        assert!(run.output.ends_with(&format!("end {number}\n")), "{run:?}");
    }
    let report = session.woken(WakeReason::Restored, LIMIT, LIMIT).await.unwrap();
    let [flood, leaves] = &report.runs[..] else { panic!("{report:?}") };
    assert_eq!(flood.output.len(), LONGEST_HOOK_OUTPUT);
    assert!(flood.output.ends_with("xxx\nend\n") || flood.output.ends_with("xxxend\n"));
    assert!(leaves.status == EXITED && leaves.output.contains("no\n"));
    let left = root.pid("left").await;
    assert!(runs(left), "what a hook leaves in the background goes on, and is not waited for");
    // It was just seen alive, and nothing else ends it.
    let pid = rustix::process::Pid::from_raw(left as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn programs_see_wakes_and_may_say_that_they_are_busy() {
    let root = Root::new();
    let log = root.path().join("log");
    let show =
        "$MVM_EVENT $MVM_WAKE_REASON $MVM_WAKES $(cat $(dirname $0)/../../../../run/mvm/wakes)";
    root.hook("post-wake", "note", &format!("echo {show} >> {}", log.display()));
    let (guest, session) = root.session().await;
    assert_eq!((root.shown("wakes").as_str(), root.shown("woken").as_str()), ("0\n", ""));
    for reason in [WakeReason::Restored, WakeReason::Resumed] {
        let report = session.woken(reason, LIMIT, LIMIT).await.unwrap();
        assert_eq!(report.runs[0].status, EXITED, "{report:?}");
    }
    drop(session);
    let session = guest.session(SessionMode::Existing).await;
    session.woken(WakeReason::Forked, LIMIT, LIMIT).await.unwrap();
    assert_eq!(root.shown("wakes"), "3\n");
    let woken = root.shown("woken");
    let (unix_ms, reason) = woken.trim_end().split_once(' ').unwrap();
    assert!(unix_ms.parse::<u64>().unwrap() > 1_600_000_000_000 && reason == "forked", "{woken}");
    let expected = "post-wake restored 1 1\npost-wake resumed 2 2\npost-wake forked 3 3\n";
    assert_eq!(fs::read_to_string(log).unwrap(), expected);

    let busy = root.path().join("run/mvm/busy");
    assert!(!session.health(LIMIT).await.unwrap().busy);
    fs::write(&busy, "").unwrap();
    assert!(session.health(LIMIT).await.unwrap().busy);
    fs::remove_file(&busy).unwrap();
    // An image's own init may mount another `/run`.
    fs::remove_dir_all(root.path().join("run")).unwrap();
    assert!(!session.health(LIMIT).await.unwrap().busy);
    assert_eq!(root.shown("wakes"), "3\n");
}

#[tokio::test]
async fn a_host_that_says_less_is_understood() {
    let root = Root::new();
    root.hook("pre-sleep", "1", "true");
    let (guest, session) = root.session().await;
    drop(session);
    let answers = tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(7);
        host.open();
        host.send_frame(1, 0, br#"{"type":"prepare_sleep"}"#);
        let without_time = host.last_message(1);
        host.send(2, &HostMessage::PrepareSleep(SleepRequest { hooks_ms: u64::MAX }));
        let with_all = host.last_message(2);
        host.send(3, &HostMessage::Woken(WakeRequest::default()));
        (without_time, with_all, host.last_message(3))
    });
    let (without_time, with_all, woken) = answers.await.unwrap();
    let skipped = HookReport { runs: vec![], skipped: vec!["1".into()] };
    assert_eq!(without_time, GuestMessage::Hooks(skipped));
    let GuestMessage::Hooks(report) = with_all else { panic!("{with_all:?}") };
    assert_eq!(report.runs.len(), 1);
    assert!(matches!(woken, GuestMessage::Hooks(_)));
    assert!(root.shown("woken").ends_with(" unknown\n"));
}
