//! What programs see of sleep and wake, and say about it: files in `/run/mvm`.
//!
//! `wakes` counts, `woken` tells when and why, and both appear whole, in that directory, so that a
//! program can wait for them with inotify. `busy` is the programs' own.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use mvm_core::guest::WakeReason;

use crate::console::complain;

/// The directory, and how often this boot has woken.
#[derive(Debug)]
pub(crate) struct Wakes {
    dir: PathBuf,
    count: u64,
}

impl Wakes {
    /// A boot that has never slept.
    pub(crate) fn begin(dir: &Path) -> Self {
        let wakes = Self { dir: dir.to_owned(), count: 0 };
        wakes.show();
        wakes
    }

    /// Counts a wake, and shows it; `unix_ms` is the wall clock's time.
    pub(crate) fn raise(&mut self, reason: WakeReason, unix_ms: u128) -> u64 {
        self.count += 1;
        // Who waits for the count finds the reason there.
        if let Err(error) = self.put("woken", &format!("{unix_ms} {reason}\n")) {
            complain(&format!("cannot show the wake in {}: {error}", self.dir.display()));
        }
        self.show();
        self.count
    }

    /// Whether a program asks not to be put to sleep.
    pub(crate) fn is_busy(&self) -> bool {
        fs::symlink_metadata(self.dir.join("busy")).is_ok()
    }

    /// Shows the count again if it is gone: an image's own init may mount another `/run`.
    pub(crate) fn ensure_shown(&self) {
        if fs::symlink_metadata(self.dir.join("wakes")).is_err() {
            self.show();
        }
    }

    fn show(&self) {
        if let Err(error) = self.put("wakes", &format!("{}\n", self.count)) {
            complain(&format!("cannot count wakes in {}: {error}", self.dir.display()));
        }
    }

    fn put(&self, name: &str, text: &str) -> io::Result<()> {
        if !self.dir.is_dir() {
            fs::create_dir_all(&self.dir)?;
            fs::set_permissions(&self.dir, Permissions::from_mode(0o755))?;
        }
        let draft = self.dir.join(format!(".{name}.new"));
        fs::write(&draft, text)?;
        fs::set_permissions(&draft, Permissions::from_mode(0o644))?;
        fs::rename(&draft, self.dir.join(name))
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]
mod tests {
    use super::*;

    #[test]
    fn wakes_are_counted_from_nothing_and_come_back_when_they_are_hidden() {
        let root = std::env::temp_dir().join(format!("mvm-guest-wakes-{}", std::process::id()));
        let dir = root.join("run/mvm");
        let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let mut wakes = Wakes::begin(&dir);
        assert_eq!((text("wakes").as_str(), text("woken").as_str()), ("0\n", ""));
        assert_eq!(wakes.raise(WakeReason::Restored, 17), 1);
        assert_eq!((text("wakes").as_str(), text("woken").as_str()), ("1\n", "17 restored\n"));

        fs::remove_dir_all(&root).unwrap();
        wakes.ensure_shown();
        assert_eq!((text("wakes").as_str(), text("woken").as_str()), ("1\n", ""));
        assert_eq!(wakes.raise(WakeReason::Forked, 18), 2);
        assert_eq!((text("wakes").as_str(), text("woken").as_str()), ("2\n", "18 forked\n"));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);

        assert!(!wakes.is_busy());
        fs::write(dir.join("busy"), "").unwrap();
        assert!(wakes.is_busy());
        fs::remove_dir_all(root).unwrap();
    }
}
