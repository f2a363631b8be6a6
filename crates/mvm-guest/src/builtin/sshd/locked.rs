//! Accounts that an SSH server without PAM lets nobody into, whatever key they have: those whose
//! password begins with an exclamation mark. Many images ship root that way, as a `*` would forbid
//! passwords just as well and nothing else.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const PASSWD: &str = "/etc/passwd";
const SHADOW: &str = "/etc/shadow";

/// Whether root's account is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Root {
    /// It is not.
    Open,
    /// It never had a password.
    Locked,
    /// It has a password, which somebody locked.
    LockedWithPassword,
}

/// How root's account is.
pub(super) fn root() -> Root {
    [SHADOW, PASSWD]
        .into_iter()
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .map(|text| field(&text).map_or(Root::Open, |(_, password)| judge(password)))
        .find(|root| *root != Root::Open)
        .unwrap_or(Root::Open)
}

/// Writes a `*` for each exclamation mark that locks root's account. A password that somebody
/// locked stays as it is.
pub(super) fn unlock_root() -> io::Result<()> {
    [SHADOW, PASSWD].into_iter().try_for_each(|path| unlock(Path::new(path)))
}

fn unlock(path: &Path) -> io::Result<()> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text?,
    };
    match field(&text) {
        Some((at, password)) if judge(password) == Root::Locked => {
            // As long as it was: nothing else of the file moves.
            let file = OpenOptions::new().write(true).open(path)?;
            file.write_all_at("*".repeat(password.len()).as_bytes(), at as u64)
        }
        _ => Ok(()),
    }
}

fn judge(password: &str) -> Root {
    match password {
        open if !open.starts_with('!') => Root::Open,
        none if none.bytes().all(|byte| b"!*".contains(&byte)) => Root::Locked,
        _ => Root::LockedWithPassword,
    }
}

/// Where root's password begins, and what it is.
fn field(text: &str) -> Option<(usize, &str)> {
    const NAME: &str = "root:";
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if let Some(rest) = line.strip_prefix(NAME) {
            return Some((at + NAME.len(), rest.split(':').next()?.trim_end()));
        }
        at += line.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_account_that_never_had_a_password_is_unlocked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shadow");
        for (before, after) in [
            ("a:!:1\nroot:!:19000:0:::::\nb:!:\n", "a:!:1\nroot:*:19000:0:::::\nb:!:\n"),
            ("root:!!:1::\n", "root:**:1::\n"),
            ("root:!*:1::\n", "root:**:1::\n"),
            ("root:*:1::\n", "root:*:1::\n"),
            ("root:!$6$salt$hash:1::\n", "root:!$6$salt$hash:1::\n"),
            ("root:$6$salt$hash:1::\n", "root:$6$salt$hash:1::\n"),
            ("toor:!:1\n", "toor:!:1\n"),
        ] {
            std::fs::write(&path, before).unwrap();
            unlock(&path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after);
        }
        assert!(unlock(&dir.path().join("none")).is_ok());
        assert_eq!(judge("!$6$salt$hash"), Root::LockedWithPassword);
    }
}
