//! The image's own SSH server, run for one connection at a time on standard input and output.
//!
//! Nothing listens, and no network is needed. What it is told lies in `/run/mvm`, apart from the
//! image's configuration and its users' own keys, which go on to count.

mod locked;

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::machine::keys::{find, host_keys, make_host_key};
use locked::Root;

const DIR: &str = "/run/mvm/ssh";
const KEYS: &str = "/run/mvm/ssh/authorized_keys";
/// Where names are looked up before anyone is asked.
const HOSTS: &str = "/etc/hosts";
/// What the server, and what it logs and accounts with, call a client that has no address; each
/// would ask the name servers for it, and wait as long as they do not answer.
const CLIENT: &str = "UNKNOWN";

/// Lets a key log in, sees to it that there is a host key, and prints the public host keys.
pub(super) fn prepare(key: &str) -> Result<(), String> {
    let server = find("sshd").ok_or_else(missing)?;
    for dir in ["/run/mvm", DIR, "/run/sshd"] {
        fs::create_dir_all(dir).map_err(|error| format!("cannot make {dir}: {error}"))?;
        at(dir, fs::set_permissions(dir, Permissions::from_mode(0o755)))?;
    }
    // The server reads it as the user who logs in. It appears whole: another may be logging in.
    let draft = format!("{KEYS}.{}", std::process::id());
    at(&draft, fs::write(&draft, format!("{key}\n")))?;
    at(&draft, fs::set_permissions(&draft, Permissions::from_mode(0o644)))?;
    at(KEYS, fs::rename(&draft, KEYS))?;
    if host_keys().is_empty() {
        make_host_key("ed25519")?;
    }
    if locked::root() == Root::Locked && !uses_pam(&server) {
        // The server's start tells if root stays locked.
        let _ = locked::unlock_root();
    }
    // It costs time if that fails, and no more.
    let _ = ensure_known(Path::new(HOSTS), CLIENT);
    for key in host_keys() {
        let text = at(&key.display().to_string(), fs::read_to_string(&key))?;
        // Whoever asked may have gone.
        let _ = io::Write::write_all(&mut io::stdout(), format!("{}\n", text.trim()).as_bytes());
    }
    Ok(())
}

/// Becomes the server; returns only if that fails, with the reason.
pub(super) fn serve() -> String {
    let Some(program) = find("sshd") else { return missing() };
    if locked::root() != Root::Open && !uses_pam(&program) {
        super::say(
            "root's password is locked, and the guest's SSH server lets no locked account in: \
             `passwd -u root` in the guest, or log in as another user with -l",
        );
    }
    let files = format!("AuthorizedKeysFile={KEYS} .ssh/authorized_keys .ssh/authorized_keys2");
    let options = [
        files.as_str(),
        "PermitRootLogin=prohibit-password",
        "PubkeyAuthentication=yes",
        // There is no address that a name could belong to.
        "UseDNS=no",
    ];
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

/// Whether the server leaves it to PAM who may log in: PAM lets a locked account in that has a key.
fn uses_pam(server: &Path) -> bool {
    let output = Command::new(server).arg("-T").output();
    output.is_ok_and(|output| {
        let settings = String::from_utf8_lossy(&output.stdout);
        settings.lines().any(|line| line.trim() == "usepam yes")
    })
}

/// Has a name mean this machine itself, unless it means something already.
fn ensure_known(hosts: &Path, name: &str) -> io::Result<()> {
    let text = fs::read_to_string(hosts)?;
    let mut words = text
        .lines()
        .flat_map(|line| line.split('#').next().unwrap_or_default().split_whitespace().skip(1));
    if words.any(|word| word == name) {
        return Ok(());
    }
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let mut file = fs::OpenOptions::new().append(true).open(hosts)?;
    io::Write::write_all(&mut file, format!("{end}127.0.0.1\t{name}\n").as_bytes())
}

/// Forgets who may log in: another instance has the key, too. The next [`prepare`] brings it anew.
pub(crate) fn forget() -> io::Result<()> {
    match fs::remove_file(KEYS) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn at<T>(path: &str, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("{path}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_without_an_address_is_known_once_whatever_the_file_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        for (before, after) in [
            ("127.0.0.1 localhost\n", "127.0.0.1 localhost\n127.0.0.1\tUNKNOWN\n"),
            (
                "127.0.0.1 localhost # UNKNOWN",
                "127.0.0.1 localhost # UNKNOWN\n127.0.0.1\tUNKNOWN\n",
            ),
            ("", "127.0.0.1\tUNKNOWN\n"),
            ("192.0.2.1 a UNKNOWN\n", "192.0.2.1 a UNKNOWN\n"),
        ] {
            fs::write(&path, before).unwrap();
            for _ in 0..2 {
                ensure_known(&path, CLIENT).unwrap();
                assert_eq!(fs::read_to_string(&path).unwrap(), after);
            }
        }
    }
}
