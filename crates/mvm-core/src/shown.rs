//! What is only shown to people and programs: a newer agent may say what this program does not know, and
//! that makes one value unknown, never a whole list unreadable.
//!
//! An enum that nothing acts on has an `Unknown` variant of its own. One that something acts on has none,
//! so that what is not known cannot be acted on: where it is shown, it is [`Shown`].

use std::fmt;

use serde::{Deserialize, Serialize};

/// A value that is shown, or what a newer agent has in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Shown<T> {
    /// It is known.
    Known(T),
    /// It is not; it is passed on as it came.
    Unknown(serde_json::Value),
}

impl<T> Shown<T> {
    /// The value, if it is known.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unknown(_) => None,
        }
    }
}

impl<T> From<T> for Shown<T> {
    fn from(value: T) -> Self {
        Self::Known(value)
    }
}

impl<T: Default> Default for Shown<T> {
    fn default() -> Self {
        Self::Known(T::default())
    }
}

impl<T: PartialEq> PartialEq<T> for Shown<T> {
    fn eq(&self, other: &T) -> bool {
        self.known() == Some(other)
    }
}

impl<T: fmt::Display> fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(value) => value.fmt(f),
            Self::Unknown(_) => f.pad("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::VmmKind;

    #[test]
    fn what_is_not_known_is_unknown_to_people_and_passed_on_to_programs() {
        let read = |text: &str| serde_json::from_str::<Shown<VmmKind>>(text).unwrap();
        let known = read(r#""qemu""#);
        assert_eq!(known, VmmKind::Qemu);
        assert_eq!((known.to_string().as_str(), known.known()), ("qemu", Some(&VmmKind::Qemu)));
        for text in [r#""crosvm""#, r#"{"vmm":"crosvm"}"#] {
            let unknown = read(text);
            assert_ne!(unknown, VmmKind::Qemu);
            assert_eq!((unknown.to_string().as_str(), unknown.known()), ("unknown", None));
            assert_eq!(serde_json::to_string(&unknown).unwrap(), text);
        }
    }
}
