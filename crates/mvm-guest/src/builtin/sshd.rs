//! The image's own SSH server, run for one connection at a time on standard input and output.
//!
//! Nothing listens, and no network is needed. What it is told lies in `/run/mvm`, apart from the
//! image's configuration and its users' own keys, which go on to count.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PLACES: [&str; 5] = ["/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/bin", "/usr/local/bin"];
const DIR: &str = "/run/mvm/ssh";
const KEYS: &str = "/run/mvm/ssh/authorized_keys";
const HOST_KEYS: &str = "/etc/ssh";
/// The host key that is made here.
const OWN_KEY: &str = "/etc/ssh/ssh_host_ed25519_key";
/// The remark by which it is told from those of the image.
const OWN_REMARK: &str = "mvm";

/// Lets a key log in, sees to it that there is a host key, and prints the public host keys.
pub(super) fn prepare(key: &str) -> Result<(), String> {
    find("sshd").ok_or_else(missing)?;
    for dir in ["/run/mvm", DIR, "/run/sshd"] {
        fs::create_dir_all(dir).map_err(|error| format!("cannot make {dir}: {error}"))?;
        at(dir, fs::set_permissions(dir, Permissions::from_mode(0o755)))?;
    }
    // The server reads it as the user who logs in. It appears whole: another may be logging in.
    let draft = format!("{KEYS}.{}", std::process::id());
    at(&draft, fs::write(&draft, format!("{key}\n")))?;
    at(&draft, fs::set_permissions(&draft, Permissions::from_mode(0o644)))?;
    at(KEYS, fs::rename(&draft, KEYS))?;
    let mut keys = host_keys();
    if keys.is_empty() {
        make_host_key()?;
        keys = host_keys();
    }
    for key in keys {
        let text = at(&key.display().to_string(), fs::read_to_string(&key))?;
        // Whoever asked may have gone.
        let _ = io::Write::write_all(&mut io::stdout(), format!("{}\n", text.trim()).as_bytes());
    }
    Ok(())
}

/// Becomes the server; returns only if that fails, with the reason.
pub(super) fn serve() -> String {
    let Some(program) = find("sshd") else { return missing() };
    let files = format!("AuthorizedKeysFile={KEYS} .ssh/authorized_keys .ssh/authorized_keys2");
    let options = [files.as_str(), "PermitRootLogin=prohibit-password", "PubkeyAuthentication=yes"];
    let mut command = Command::new(&program);
    command.args(["-i", "-e", "-o", "LogLevel=ERROR"]);
    for option in options {
        command.args(["-o", option]);
    }
    format!("cannot run {}: {}", program.display(), command.exec())
}

fn missing() -> String {
    "there is no SSH server (sshd) in its image".to_owned()
}

fn find(name: &str) -> Option<PathBuf> {
    PLACES.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

/// The public halves of the server's keys.
fn host_keys() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(HOST_KEYS) else { return Vec::new() };
    let is_key = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("ssh_host_")
            && name.ends_with("_key.pub")
            && path.with_extension("").is_file()
    };
    let mut keys: Vec<PathBuf> =
        entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).filter(is_key).collect();
    keys.sort();
    keys
}

/// Makes a host key, which the instance keeps.
fn make_host_key() -> Result<(), String> {
    let program =
        find("ssh-keygen").ok_or("there is no host key, and no ssh-keygen to make one")?;
    at(HOST_KEYS, fs::create_dir_all(HOST_KEYS))?;
    let output = Command::new(program)
        .args(["-q", "-t", "ed25519", "-N", "", "-C", OWN_REMARK, "-f", OWN_KEY])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run ssh-keygen: {error}"))?;
    match output.status.success() || !host_keys().is_empty() {
        true => Ok(()),
        false => Err(format!("ssh-keygen: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Forgets who may log in, and the host key if it was made here: another instance has both, too.
/// The next [`prepare`] makes them anew.
pub(crate) fn forget() -> io::Result<()> {
    let mut paths = vec![PathBuf::from(KEYS)];
    let public = PathBuf::from(format!("{OWN_KEY}.pub"));
    if fs::read_to_string(&public).is_ok_and(|text| is_own(&text)) {
        paths.extend([PathBuf::from(OWN_KEY), public]);
    }
    for path in paths {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Whether a public key carries the remark of those that are made here.
fn is_own(public_key: &str) -> bool {
    public_key.split_ascii_whitespace().nth(2) == Some(OWN_REMARK)
}

fn at<T>(path: &str, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("{path}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_key_of_the_image_is_not_taken_for_an_own_one() {
        assert!(is_own("ssh-ed25519 AAAA mvm\n"));
        for text in ["", "ssh-ed25519 AAAA\n", "ssh-ed25519 AAAA root@mvm\n", "mvm mvm\n"] {
            assert!(!is_own(text), "{text}");
        }
    }
}
