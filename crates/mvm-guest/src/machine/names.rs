//! The files in `/etc` that say who the guest is and whom it asks for names.

use std::fs;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use mvm_core::guest::GuestError;

use crate::failure::refused;

/// Sets the host name, for the kernel and in files.
pub(super) fn ensure_hostname(name: &str, address: Option<Ipv4Addr>) -> Result<(), GuestError> {
    rustix::system::sethostname(name.as_bytes())
        .map_err(|error| refused("cannot set the host name", error))?;
    ensure_file("/etc/hostname", &format!("{name}\n"))?;
    ensure_file("/etc/hosts", &hosts(name, address))
}

/// Draws a machine id if the image left it open.
pub(super) fn ensure_machine_id() -> Result<(), GuestError> {
    let path = "/etc/machine-id";
    let present = fs::read_to_string(path).unwrap_or_default();
    if !["", "uninitialized"].contains(&present.trim()) {
        return Ok(());
    }
    renew_machine_id()
}

/// Draws a machine id, whatever there is. The random numbers are this guest's own by now: each
/// session stirs them before it asks for anything.
pub(super) fn renew_machine_id() -> Result<(), GuestError> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| refused("cannot draw a machine id", error))?;
    let text = machine_id(bytes);
    // Where D-Bus has a copy and not a link, it is to be the same.
    let copy = "/var/lib/dbus/machine-id";
    if fs::symlink_metadata(copy).is_ok_and(|metadata| metadata.is_file()) {
        ensure_file(copy, &text)?;
    }
    ensure_file("/etc/machine-id", &text)
}

/// Names the servers to ask; without any, the image's own file stays.
pub(super) fn ensure_nameservers(servers: &[IpAddr]) -> Result<(), GuestError> {
    if servers.is_empty() {
        return Ok(());
    }
    let text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    ensure_file("/etc/resolv.conf", &text)
}

fn hosts(name: &str, address: Option<Ipv4Addr>) -> String {
    // Without an address of its own the name is still to be found.
    let own = address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1));
    let short = name.split('.').next().unwrap_or(name);
    let names = if short == name { name.to_owned() } else { format!("{name} {short}") };
    format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}\t{names}\n")
}

/// A random UUID (version 4) without dashes, as machine-id(5) wants it.
fn machine_id(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits + "\n"
}

fn ensure_file(path: &str, text: &str) -> Result<(), GuestError> {
    replace(Path::new(path), text).map_err(|error| refused(format!("cannot write {path}"), error))
}

/// Makes a file hold this text. What stands at the path is replaced, not followed: images like to
/// leave links there to what their own init would have made.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let is_file = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file());
    if is_file && fs::read(path).is_ok_and(|present| present == text.as_bytes()) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let fresh = path.with_extension("mvm-new");
    fs::write(&fresh, text)?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_knows_the_full_and_the_short_name() {
        let text = hosts("web-1.acme", Some(Ipv4Addr::new(10, 240, 1, 3)));
        assert!(text.ends_with("\n10.240.1.3\tweb-1.acme web-1\n"));
        assert!(hosts("web", None).ends_with("\n127.0.1.1\tweb\n"));
    }

    #[test]
    fn a_machine_id_is_a_random_uuid_in_one_line() {
        assert_eq!(machine_id([0xff; 16]), "ffffffffffff4fffbfffffffffffffff\n");
    }

    #[test]
    fn a_dangling_link_is_replaced_by_a_file() {
        let dir = std::env::temp_dir().join(format!("mvm-guest-names-{}", std::process::id()));
        let path = dir.join("etc/resolv.conf");
        fs::create_dir_all(dir.join("etc")).unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", &path).unwrap();
        for _ in 0..2 {
            replace(&path, "nameserver 10.240.0.1\n").unwrap();
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
            assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 10.240.0.1\n");
        }
        assert_eq!(fs::read_dir(dir.join("etc")).unwrap().count(), 1);
        fs::remove_dir_all(dir).unwrap();
    }
}
