//! Making the errors that the host is told.

use mvm_core::guest::{ErrorKind, GuestError};

/// Longest message, in bytes: names come from the host and may be as long as a request.
const LONGEST: usize = 1024;

/// An error of this class.
pub(crate) fn failure(kind: ErrorKind, message: impl Into<String>) -> GuestError {
    let mut message: String = message.into();
    if message.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|&at| message.is_char_boundary(at)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    GuestError { kind, message }
}

/// The kernel refused an operation.
pub(crate) fn refused(
    operation: impl std::fmt::Display,
    error: impl std::fmt::Display,
) -> GuestError {
    failure(ErrorKind::System, format!("{operation}: {error}"))
}

/// The request does not make sense.
pub(crate) fn invalid(message: impl Into<String>) -> GuestError {
    failure(ErrorKind::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let error = invalid("ä".repeat(5000));
        assert!(error.message.len() < LONGEST + 4);
        assert!(error.message.ends_with("ä…"));
    }
}
