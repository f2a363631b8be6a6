//! What a fork draws anew: a guest that was restored from another instance's snapshot is to be
//! told from that instance, and from its other forks.

use mvm_core::guest::GuestError;

use super::names;
use crate::builtin::sshd;
use crate::console::note;
use crate::failure::refused;

/// Whether a guest that was one instance is another from now on. A host that is older than the
/// name leaves it empty, which says nothing.
pub(super) fn is_fork(before: &str, now: &str) -> bool {
    !before.is_empty() && !now.is_empty() && before != now
}

/// Draws the machine id anew, and forgets the keys of mvm's own SSH.
pub(super) fn draw_anew() -> Result<(), GuestError> {
    note("another instance from now on");
    names::renew_machine_id()?;
    sshd::forget().map_err(|error| refused("cannot forget an SSH key", error))
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
