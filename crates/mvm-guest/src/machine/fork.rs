//! What a fork draws anew: a guest that was restored from another instance's snapshot is to be
//! told from that instance, and from its other forks.

use std::fs;
use std::io;

use mvm_core::guest::GuestError;

use super::{keys, names};
use crate::builtin::sshd;
use crate::console::{complain, note};
use crate::failure::refused;

/// With which a program of the source has asked not to be put to sleep.
const BUSY: &str = "/run/mvm/busy";

/// Whether a guest that was one instance is another from now on. A host that is older than the
/// name leaves it empty, which says nothing.
pub(super) fn is_fork(before: &str, now: &str) -> bool {
    !before.is_empty() && !now.is_empty() && before != now
}

/// Draws the machine id, the boot id and the host's keys anew, and forgets who may log in through
/// mvm's own SSH and what kept the source awake.
pub(super) fn draw_anew() -> Result<(), GuestError> {
    note("another instance from now on");
    names::renew_machine_id()?;
    if let Err(error) = names::renew_boot_id() {
        complain(&error.message);
    }
    match fs::remove_file(BUSY) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            complain(&format!("cannot remove {BUSY}: {error}"));
        }
        _ => {}
    }
    sshd::forget().map_err(|error| refused("cannot forget an SSH key", error))?;
    keys::renew();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_name_makes_a_fork() {
        assert!(is_fork("acme/web/i-1", "acme/web/i-2"));
        for (before, now) in [("", "acme/web/i-1"), ("acme/web/i-1", ""), ("a", "a"), ("", "")] {
            assert!(!is_fork(before, now), "{before} {now}");
        }
    }
}
