//! Which QEMU is installed.

use std::path::Path;
use std::time::Duration;

use super::super::VmmError;
use super::super::qmp::Version;
use crate::process::{Tool, ToolError};

/// The oldest QEMU that the driver is made for: Debian 12's.
pub const MINIMUM_VERSION: Version = Version { major: 7, minor: 2, micro: 0 };

const LIMIT: Duration = Duration::from_secs(20);

/// Asks the program, and refuses one that is too old.
pub(super) async fn query(program: &Path) -> Result<Version, VmmError> {
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
    let version = parse_version(&text)
        .ok_or_else(|| unknown(format!("got `{}`", text.lines().next().unwrap_or_default())))?;
    if version < MINIMUM_VERSION {
        let (found, required) = (version.to_string(), MINIMUM_VERSION.to_string());
        return Err(VmmError::TooOld { program: name, found, required });
    }
    Ok(version)
}

/// The version in what `qemu-system-* --version` prints.
pub fn parse_version(text: &str) -> Option<Version> {
    let (_, after) = text.lines().next()?.split_once("version ")?;
    let end = after.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(after.len());
    let mut numbers = after[..end].split('.').map(str::parse);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(Version { major, minor, micro: numbers.next().and_then(Result::ok).unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_distributions_print() {
        for (text, version) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright",
                (7, 2, 22),
            ),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", (10, 0, 2)),
            ("QEMU emulator version 9.2.0-rc1", (9, 2, 0)),
            ("QEMU emulator version 8.1", (8, 1, 0)),
        ] {
            let (major, minor, micro) = version;
            assert_eq!(parse_version(text), Some(Version { major, minor, micro }), "{text}");
        }
        assert_eq!(parse_version("qemu: command not found"), None);
        assert_eq!(parse_version(""), None);
    }

    #[tokio::test]
    async fn a_missing_or_foreign_program_is_named() {
        let error = query(Path::new("no-such-qemu")).await.unwrap_err();
        assert_eq!(error.to_string(), "`no-such-qemu` is not installed");
        let error = query(Path::new("true")).await.unwrap_err();
        assert!(matches!(error, VmmError::Control { .. }), "{error}");
    }

    #[tokio::test]
    async fn an_old_qemu_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("qemu");
        std::fs::write(&program, "#!/bin/sh\necho QEMU emulator version 6.2.0\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let error = query(&program).await.unwrap_err().to_string();
        assert!(error.ends_with("is version 6.2.0: at least 7.2.0 is needed"), "{error}");
    }
}
