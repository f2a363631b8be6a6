//! What the two sides of a connection say of themselves before the call: which versions of the contract they
//! speak, who asks, and what the asking is confined to.
//!
//! A caller that says nothing, as those of the first release, is understood as one of version 1 without a scope.

use mvm_core::name::TenantName;
use serde::{Deserialize, Serialize};

use crate::api::{ApiError, ErrorCode};

/// The oldest version of the contract that this release speaks.
pub const OLDEST_PROTOCOL: u32 = 1;
/// The newest one. It is raised by a change that an older side would misunderstand; what is merely more needs none.
pub const NEWEST_PROTOCOL: u32 = 1;

/// A caller's first words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The version of mvm that it is, for messages.
    pub version: String,
    /// The oldest version of the contract that it speaks.
    pub oldest_protocol: u32,
    /// The newest one.
    pub newest_protocol: u32,
    /// The tenant to which what it asks is confined; nothing is if absent.
    #[serde(default)]
    pub scope: Option<TenantName>,
    /// How long it waits for an answer that is no stream, in milliseconds, counted from when it asks.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// What a caller hears in return.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version of mvm that the agent is.
    pub version: String,
    /// The version of the contract that is spoken from now on.
    pub protocol: u32,
    /// Whom the caller is taken for, such as `uid 0`.
    pub principal: String,
}

impl Hello {
    /// The words of this release.
    pub fn new(scope: Option<TenantName>, deadline_ms: Option<u64>) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            oldest_protocol: OLDEST_PROTOCOL,
            newest_protocol: NEWEST_PROTOCOL,
            scope,
            deadline_ms,
        }
    }

    /// The newest version of the contract that both sides speak.
    ///
    /// # Errors
    /// There is none.
    pub fn protocol(&self) -> Result<u32, ApiError> {
        let newest = self.newest_protocol.min(NEWEST_PROTOCOL);
        if newest >= self.oldest_protocol.max(OLDEST_PROTOCOL) {
            return Ok(newest);
        }
        let message = format!(
            "the command (mvm {}) speaks versions {} to {} of the agent's protocol, and the agent (mvm {}) {} to {}",
            self.version,
            self.oldest_protocol,
            self.newest_protocol,
            env!("CARGO_PKG_VERSION"),
            OLDEST_PROTOCOL,
            NEWEST_PROTOCOL,
        );
        Err(ApiError::new(ErrorCode::Protocol, message).hint(
            "use the mvm that started the agent, or have this one start another: `mvm agent stop` leaves microVMs \
             running",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(oldest_protocol: u32, newest_protocol: u32) -> Hello {
        Hello { oldest_protocol, newest_protocol, ..Hello::new(None, None) }
    }

    #[test]
    fn the_newest_version_that_both_speak_is_spoken() {
        assert_eq!(hello(0, 1).protocol(), Ok(1));
        assert_eq!(hello(1, 7).protocol(), Ok(NEWEST_PROTOCOL));
        for (oldest, newest) in [(2, 7), (0, 0), (5, 3)] {
            let error = hello(oldest, newest).protocol().unwrap_err();
            assert_eq!(error.code, ErrorCode::Protocol);
            assert!(error.message.contains(&format!("{oldest} to {newest}")), "{error}");
            assert!(error.hint.is_some_and(|hint| hint.contains("mvm agent stop")));
        }
    }

    #[test]
    fn more_words_of_a_newer_caller_are_passed_over() {
        let newer = r#"{"version":"9","oldest_protocol":1,"newest_protocol":4,"mood":"good"}"#;
        let hello: Hello = serde_json::from_str(newer).unwrap();
        assert_eq!((hello.scope.clone(), hello.deadline_ms, hello.protocol()), (None, None, Ok(1)));
    }
}
