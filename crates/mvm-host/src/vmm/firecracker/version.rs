//! Which Firecracker is installed, and whether the driver can work with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::VmmError;
use crate::process::{Tool, ToolError, find_program};

/// The oldest Firecracker that the driver is made for: older ones may corrupt snapshots.
pub const MINIMUM_VERSION: FirecrackerVersion = FirecrackerVersion(1, 15, 1);
/// Versions on which the guest channel hangs once a microVM was paused and resumed.
const LOSES_CHANNEL: [FirecrackerVersion; 2] =
    [FirecrackerVersion(1, 16, 0), FirecrackerVersion(1, 16, 1)];

const LIMIT: Duration = Duration::from_secs(20);

/// A version: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FirecrackerVersion(pub u32, pub u32, pub u32);

impl std::fmt::Display for FirecrackerVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl FirecrackerVersion {
    /// The version that a text such as `1.15.1` or `1.17.0-dev` begins with.
    pub fn parse(text: &str) -> Option<Self> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let mut parts = text[..end].split('.').map(|part| part.parse().ok());
        let version = Self(parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(version)
    }

    /// Why the driver does not work with it, if it does not.
    pub fn problem(self) -> Option<String> {
        if self < MINIMUM_VERSION {
            return Some(format!("at least {MINIMUM_VERSION} is needed"));
        }
        LOSES_CHANNEL
            .contains(&self)
            .then(|| format!("it loses the guest's channel when paused; use {MINIMUM_VERSION}"))
    }
}

/// The name of the jailer's program.
pub(crate) const JAILER: &str = "jailer";

/// Finds the jailer: beside Firecracker's program, or in `PATH`.
pub(super) fn jailer_of(firecracker: &Path) -> Result<PathBuf, VmmError> {
    let beside = firecracker.with_file_name(JAILER);
    if beside.is_file() {
        return Ok(beside);
    }
    find_program(Path::new(JAILER))
        .ok_or_else(|| VmmError::MissingProgram { program: JAILER.to_owned() })
}

/// Asks the program for its version, whatever it is.
///
/// # Errors
/// It is not installed, or does not tell.
pub(super) async fn query(program: &Path) -> Result<FirecrackerVersion, VmmError> {
    let name = program.to_string_lossy().into_owned();
    let unknown = |message: String| VmmError::Control {
        operation: format!("ask `{name}` for its version"),
        message,
    };
    let asked = Tool::new(program).arg("--version").within(LIMIT).run().await;
    let text = asked.map_err(|error| match error {
        ToolError::Missing { program } => VmmError::MissingProgram { program },
        ToolError::Spawn { program, source } => VmmError::Spawn { program, source },
        other => unknown(other.to_string()),
    })?;
    parse(&text)
        .ok_or_else(|| unknown(format!("got `{}`", text.lines().next().unwrap_or_default())))
}

/// The version in what `firecracker --version` prints.
fn parse(text: &str) -> Option<FirecrackerVersion> {
    let number = text.lines().find_map(|line| line.strip_prefix("Firecracker v"))?;
    FirecrackerVersion::parse(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_what_firecracker_prints() {
        for (text, version) in [
            (
                "Firecracker v1.15.1\n\nSupported snapshot data format versions: v8.0.0\n",
                (1, 15, 1),
            ),
            ("Firecracker v1.17.0-dev\n", (1, 17, 0)),
        ] {
            let (major, minor, patch) = version;
            assert_eq!(parse(text), Some(FirecrackerVersion(major, minor, patch)));
        }
        for text in ["", "Firecracker v1.15", "QEMU emulator version 7.2.22"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn versions_with_known_faults_are_refused_with_the_reason() {
        for good in [(1, 15, 1), (1, 16, 2), (1, 17, 0), (2, 0, 0)] {
            assert_eq!(FirecrackerVersion(good.0, good.1, good.2).problem(), None, "{good:?}");
        }
        let old = FirecrackerVersion(1, 15, 0).problem();
        assert_eq!(old.as_deref(), Some("at least 1.15.1 is needed"));
        for bad in LOSES_CHANNEL {
            assert!(bad.problem().is_some_and(|why| why.contains("when paused")), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_missing_or_foreign_program_is_named() {
        let error = query(Path::new("no-such-firecracker")).await.unwrap_err();
        assert!(matches!(error, VmmError::MissingProgram { .. }), "{error}");
        let error = query(Path::new("true")).await.unwrap_err();
        assert!(matches!(error, VmmError::Control { .. }), "{error}");
    }
}
