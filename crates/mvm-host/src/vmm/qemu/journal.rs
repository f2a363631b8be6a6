//! The record that QEMU keeps of its own events, so that the cause of an end is known to an agent
//! that was not there.
//!
//! QEMU gets a second QMP monitor on a `pipe` character device: `qmp.in` is a FIFO that already
//! holds the command that opens the session (QEMU opens it for writing too, so it never ends), and
//! `qmp.out` is a plain file that the events go to. Both are in a directory of their own, which
//! QEMU reaches by descriptor and in which it can make nothing new.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use mvm_core::vmm::ShutdownReason;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate};

use super::super::qmp::QmpEvent;
use crate::console;
use crate::state_dir::InstanceDir;

/// Directory of the journal in the instance's directory.
/// The name that QEMU is given, to which it adds `.in` and `.out`.
pub(super) const STEM: &str = "qmp";
const INPUT: &str = "qmp.in";
const OUTPUT: &str = "qmp.out";
const OPENING: &[u8] = b"{\"execute\":\"qmp_capabilities\"}\n";
/// How much of the journal's end is read, in bytes: the last events are a few hundred.
const TAIL: u64 = 64 * 1024;
/// Space that the journal has whatever else fills the filesystem, in bytes.
const SET_ASIDE: u64 = 16 * 1024;

/// A fresh journal, open for QEMU to take over.
#[derive(Debug)]
pub(super) struct Journal {
    /// The directory, to hand over.
    pub(super) dir: OwnedFd,
    /// Keeps the opening command in the FIFO until QEMU has opened it.
    _input: File,
}

/// Replaces the journal of an earlier run.
pub(super) fn create(instance_dir: &InstanceDir, uid: u32) -> io::Result<Journal> {
    remove(instance_dir)?;
    let dir = instance_dir.events();
    DirBuilder::new().mode(0o711).create(&dir)?;
    // Whatever the umask was, QEMU's user may pass through.
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o711))?;
    let (input, output) = (dir.join(INPUT), dir.join(OUTPUT));
    rustix::fs::mkfifoat(rustix::fs::CWD, &input, Mode::from_raw_mode(0o600))?;
    let events = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&output)?;
    // What QEMU has to say of a full filesystem finds room there. Where space cannot be set aside, or
    // there is none, QEMU itself is asked.
    let set_aside = fallocate(&events, FallocateFlags::KEEP_SIZE, 0, SET_ASIDE);
    if let Err(error) = set_aside {
        tracing::debug!(path = %output.display(), %error, "no space is set aside for events");
    }
    for path in [&input, &output] {
        std::os::unix::fs::chown(path, Some(uid), Some(uid))?;
    }
    let mut input = OpenOptions::new().read(true).write(true).open(&input)?;
    input.write_all(OPENING)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&dir, flags, Mode::empty())?;
    Ok(Journal { dir, _input: input })
}

/// Removes the journal, if there is one.
pub(super) fn remove(instance_dir: &InstanceDir) -> io::Result<()> {
    crate::removal::remove_tree(&instance_dir.events())
}

/// Keeps the journal small: a guest can bring about as many events as it likes.
pub(super) fn bound(instance_dir: &InstanceDir) -> io::Result<()> {
    console::bound(&instance_dir.events().join(OUTPUT))
}

/// Whether the journal's last word on the vCPUs is that they stopped.
pub(super) fn has_stopped(instance_dir: &InstanceDir) -> bool {
    let path = instance_dir.events().join(OUTPUT);
    read_tail(&path).is_ok_and(|text| parse_has_stopped(&text))
}

fn parse_has_stopped(text: &str) -> bool {
    let events = text.lines().rev().filter_map(|line| serde_json::from_str::<QmpEvent>(line).ok());
    let mut of_vcpus = events.filter(|event| matches!(event.name.as_str(), "STOP" | "RESUME"));
    of_vcpus.next().is_some_and(|event| event.name == "STOP")
}

/// What the journal says about why the microVM stopped.
pub(super) fn reason(instance_dir: &InstanceDir) -> Option<ShutdownReason> {
    let path = instance_dir.events().join(OUTPUT);
    match read_tail(&path) {
        Ok(text) => parse_reason(&text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read QEMU's journal");
            None
        }
    }
}

fn read_tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn parse_reason(text: &str) -> Option<ShutdownReason> {
    let events = text.lines().filter_map(|line| serde_json::from_str::<QmpEvent>(line).ok());
    let mut reason = None;
    for event in events {
        let word = event.data.get("reason").and_then(|reason| reason.as_str()).unwrap_or_default();
        match (event.name.as_str(), word) {
            // A panic is followed by the reset or the end that it causes.
            ("GUEST_PANICKED", _) => return Some(ShutdownReason::GuestPanic),
            ("SHUTDOWN", word) => reason = shutdown_reason(word).or(reason),
            _ => {}
        }
    }
    reason
}

/// QEMU's `ShutdownCause`.
fn shutdown_reason(word: &str) -> Option<ShutdownReason> {
    Some(match word {
        "guest-shutdown" => ShutdownReason::GuestShutdown,
        "guest-reset" => ShutdownReason::GuestReset,
        "guest-panic" => ShutdownReason::GuestPanic,
        "host-signal" => ShutdownReason::HostSignal,
        "host-qmp-quit" => ShutdownReason::HostQuit,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    const START: &str = "{\"QMP\": {\"version\": {}}}\r\n{\"return\": {}}\r\n";

    fn shutdown(word: &str) -> String {
        format!(
            "{{\"timestamp\": {{\"seconds\": 1}}, \"event\": \"SHUTDOWN\", \
             \"data\": {{\"guest\": true, \"reason\": \"{word}\"}}}}\r\n"
        )
    }

    #[test]
    fn each_cause_is_read() {
        for (word, reason) in [
            ("guest-shutdown", Some(ShutdownReason::GuestShutdown)),
            ("guest-reset", Some(ShutdownReason::GuestReset)),
            ("guest-panic", Some(ShutdownReason::GuestPanic)),
            ("host-signal", Some(ShutdownReason::HostSignal)),
            ("host-qmp-quit", Some(ShutdownReason::HostQuit)),
            ("something-new", None),
        ] {
            assert_eq!(parse_reason(&format!("{START}{}", shutdown(word))), reason, "{word}");
        }
        assert_eq!(parse_reason(START), None);
    }

    #[test]
    fn a_panic_counts_more_than_the_reset_that_follows() {
        let panic = "{\"event\": \"GUEST_PANICKED\", \"data\": {\"action\": \"poweroff\"}}\r\n";
        let text = format!("{START}{panic}{}", shutdown("guest-reset"));
        assert_eq!(parse_reason(&text), Some(ShutdownReason::GuestPanic));
    }

    #[test]
    fn the_last_word_on_the_vcpus_counts() {
        let event = |name: &str| format!("{{\"event\": \"{name}\", \"data\": {{}}}}\r\n");
        let (stop, resume) = (event("STOP"), event("RESUME"));
        assert!(!parse_has_stopped(START));
        assert!(parse_has_stopped(&format!("{START}{stop}{}", event("BLOCK_IO_ERROR"))));
        assert!(!parse_has_stopped(&format!("{stop}{resume}{}", event("VSERPORT_CHANGE"))));
    }

    #[test]
    fn a_long_or_damaged_journal_still_gives_its_end() {
        let temp = tempfile::tempdir().unwrap();
        let dir = InstanceDir::from(temp.path());
        assert_eq!(reason(&dir), None);
        let uid = rustix::process::getuid().as_raw();
        let _journal = create(&dir, uid).unwrap();
        let mut text = "{\"event\": \"VSERPORT_CHANGE\", \"data\": {}}\r\n".repeat(10_000);
        text.push_str("{\"event\": \u{0}\r\n");
        text.push_str(&shutdown("guest-reset"));
        std::fs::write(dir.events().join(OUTPUT), text).unwrap();
        assert_eq!(reason(&dir), Some(ShutdownReason::GuestReset));
        // However long it is.
        let path = dir.events().join(OUTPUT);
        let mut text = "{\"event\": \"VSERPORT_CHANGE\", \"data\": {}}\r\n".repeat(300_000);
        text.push_str(&shutdown("guest-shutdown"));
        std::fs::write(&path, text).unwrap();
        bound(&dir).unwrap();
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 2 << 20);
        assert_eq!(reason(&dir), Some(ShutdownReason::GuestShutdown));
        let _fresh = create(&dir, uid).unwrap();
        assert_eq!(reason(&dir), None, "an earlier run's word");
    }
}
