//! Private keys that packages make when they are installed, and that each instance is to have to
//! itself: the host keys of an SSH server, and the self-signed certificate of Debian's `ssl-cert`.
//!
//! mvm leaves them out of the images that it makes. Here they are made before anything runs that
//! wants them, and made anew in a fork. What an image of other people brings stays in its instances.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::console::{complain, note};
use crate::process;

const PLACES: [&str; 5] = ["/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/bin", "/usr/local/bin"];
const SSH: &str = "/etc/ssh";
const PREFIX: &str = "ssh_host_";
/// The remark in a host key that is made here.
const REMARK: &str = "mvm";

/// What stands for `ssl-cert`, which makes the certificate.
const MAKE_SSL_CERT: &str = "/usr/sbin/make-ssl-cert";
const CERTIFICATE: &str = "/etc/ssl/certs/ssl-cert-snakeoil.pem";
const CERTIFICATE_KEY: &str = "/etc/ssl/private/ssl-cert-snakeoil.key";
/// Whose members may read the certificate's key.
const CERTIFICATE_GROUP: &str = "ssl-cert";

/// A program of the image, looked for where servers are.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    PLACES.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

/// The public halves of the SSH server's keys.
pub(crate) fn host_keys() -> Vec<PathBuf> {
    let is_whole = |path: &PathBuf| {
        path.extension().is_some_and(|end| end == "pub")
            && kind_of(path).is_some()
            && path.with_extension("").is_file()
    };
    let mut keys: Vec<PathBuf> = key_files().into_iter().filter(is_whole).collect();
    keys.sort();
    keys
}

/// Makes a host key, which the instance keeps.
pub(crate) fn make_host_key(kind: &str) -> Result<(), String> {
    let program = find("ssh-keygen").ok_or("there is no ssh-keygen to make a host key")?;
    fs::create_dir_all(SSH).map_err(|error| format!("{SSH}: {error}"))?;
    let mut command = Command::new(program);
    let file = format!("{SSH}/{PREFIX}{kind}_key");
    command.args(["-q", "-t", kind, "-N", "", "-C", REMARK, "-f", &file]);
    let made = run(&mut command);
    if made.is_ok() || Path::new(&format!("{file}.pub")).is_file() {
        // Another may have been quicker.
        return Ok(());
    }
    if fs::metadata(&file).is_ok_and(|metadata| metadata.len() == 0) {
        // There was no room for it. It would be in the way of the next one.
        let _ = fs::remove_file(&file);
    }
    made
}

/// Makes the keys that the image's programs count on and that are not there.
pub(super) fn ensure() {
    if find("sshd").is_some() && find("ssh-keygen").is_some() && host_keys().is_empty() {
        tell("an SSH host key", make_host_key("ed25519"));
    }
    let is_missing = |path: &str| fs::symlink_metadata(path).is_err();
    if Path::new(MAKE_SSL_CERT).is_file() && is_missing(CERTIFICATE_KEY) {
        tell("a certificate", make_certificate());
    }
}

/// Makes anew what there is: another instance has it, too.
pub(super) fn renew() {
    let files = key_files();
    let kinds: Vec<&str> = files.iter().filter_map(|path| kind_of(path)).collect();
    if !kinds.is_empty() {
        // Better none than one that another instance has, too: who wants it is told why.
        for path in &files {
            if let Err(error) = fs::remove_file(path) {
                complain(&format!("{} cannot be removed: {error}", path.display()));
            }
        }
        for kind in renewed(&kinds) {
            tell("an SSH host key", make_host_key(kind));
        }
        reload_ssh_servers();
    }
    if Path::new(MAKE_SSL_CERT).is_file() && Path::new(CERTIFICATE_KEY).is_file() {
        tell("a certificate", make_certificate());
    }
}

fn tell(what: &str, made: Result<(), String>) {
    match made {
        Ok(()) => note(&format!("{what} was made")),
        Err(error) => complain(&format!("{what} cannot be made: {error}")),
    }
}

/// The files of host keys, private and public.
fn key_files() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(SSH) else { return Vec::new() };
    let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    paths.filter(|path| kind_of(path).is_some()).collect()
}

/// `ssh_host_KIND_key`, whatever comes behind it.
fn kind_of(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    let (kind, rest) = name.strip_prefix(PREFIX)?.split_once("_key")?;
    matches!(rest, "" | ".pub" | "-cert.pub").then_some(kind)
}

/// The kinds of keys to make in place of these. RSA takes a guest seconds, so that it is made only if
/// clients know nothing else of the guest.
fn renewed(kinds: &[&str]) -> Vec<&'static str> {
    let quick = ["ed25519", "ecdsa"].into_iter().filter(|kind| kinds.contains(kind));
    match quick.collect::<Vec<_>>() {
        none if none.is_empty() => vec!["ed25519", "rsa"],
        quick => quick,
    }
}

/// Has servers that run take their keys from the files again; their connections stay.
fn reload_ssh_servers() {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let title = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if is_listener(&String::from_utf8_lossy(&title)) {
            process::signal(pid, libc::SIGHUP);
        }
    }
}

fn is_listener(title: &str) -> bool {
    title.starts_with("sshd: ") && title.contains("[listener]")
}

/// As `make-ssl-cert generate-default-snakeoil` does, but with an elliptic curve: an RSA key would
/// take a guest seconds.
fn make_certificate() -> Result<(), String> {
    let program = find("openssl").ok_or("there is no openssl")?;
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let draft = |path: &str| format!("{path}.mvm-new");
    let mut command = Command::new(program);
    command
        .args(["req", "-x509", "-nodes", "-days", "3650", "-newkey", "ec"])
        .args(["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", &format!("/CN={name}")])
        .args(["-addext", &format!("subjectAltName=DNS:{name}")])
        .args(["-keyout", &draft(CERTIFICATE_KEY), "-out", &draft(CERTIFICATE)]);
    let made = run(&mut command).and_then(|()| {
        let group = group_id(&fs::read_to_string("/etc/group").unwrap_or_default());
        let place = |path: &str, mode, group| -> io::Result<()> {
            fs::set_permissions(draft(path), Permissions::from_mode(mode))?;
            chown(draft(path), Some(0), group)?;
            fs::rename(draft(path), path)
        };
        place(CERTIFICATE_KEY, 0o640, group)
            .and_then(|()| place(CERTIFICATE, 0o644, None))
            .map_err(|error| error.to_string())
    });
    if made.is_err() {
        for path in [CERTIFICATE_KEY, CERTIFICATE] {
            // It may not have come so far.
            let _ = fs::remove_file(draft(path));
        }
    }
    made
}

fn group_id(groups: &str) -> Option<u32> {
    let of_group = |line: &str| {
        let rest = line.strip_prefix(CERTIFICATE_GROUP)?.strip_prefix(':')?;
        rest.split(':').nth(1)?.parse().ok()
    };
    groups.lines().find_map(of_group)
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_keys_are_told_by_their_files_names() {
        for (name, kind) in [
            ("ssh_host_rsa_key", Some("rsa")),
            ("ssh_host_ed25519_key.pub", Some("ed25519")),
            ("ssh_host_ed25519_key-cert.pub", Some("ed25519")),
            ("ssh_host_rsa_key.bak", None),
            ("sshd_config", None),
            ("moduli", None),
        ] {
            assert_eq!(kind_of(&Path::new("/etc/ssh").join(name)), kind, "{name}");
        }
    }

    #[test]
    fn keys_are_renewed_by_quick_ones_where_clients_have_known_one() {
        assert_eq!(renewed(&["rsa", "ecdsa", "ed25519", "ed25519"]), ["ed25519", "ecdsa"]);
        assert_eq!(renewed(&["ed25519"]), ["ed25519"]);
        assert_eq!(renewed(&["rsa"]), ["ed25519", "rsa"]);
    }

    #[test]
    fn a_server_that_listens_is_told_from_its_connections() {
        assert!(is_listener("sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups\0"));
        for other in ["sshd: root@pts/0\0", "/usr/sbin/sshd\0-D\0", "grep\0[listener]\0"] {
            assert!(!is_listener(other), "{other}");
        }
    }

    #[test]
    fn the_group_of_the_certificates_key_is_found_by_its_name() {
        let groups = "root:x:0:\nssl-certs:x:7:\nssl-cert:x:110:postgres\n";
        assert_eq!(group_id(groups), Some(110));
        assert_eq!(group_id("root:x:0:\n"), None);
    }
}
