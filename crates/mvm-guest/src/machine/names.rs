//! The files in `/etc` that say who the guest is and whom it asks for names.

use std::fs;
use std::io::Read as _;
use std::net::Ipv4Addr;
use std::path::Path;

use mvm_core::guest::{GuestError, NetworkConfiguration};

use super::files;
use crate::failure::refused;

/// What programs and libraries read to tell one boot from another.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

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
    let text = digits(draw_uuid()?) + "\n";
    // Where D-Bus has a copy and not a link, it is to be the same.
    let copy = "/var/lib/dbus/machine-id";
    if fs::symlink_metadata(copy).is_ok_and(|metadata| metadata.is_file()) {
        ensure_file(copy, &text)?;
    }
    ensure_file("/etc/machine-id", &text)
}

/// Names the servers to ask, and how; without any, the image's own file stays.
pub(super) fn ensure_resolver(network: &NetworkConfiguration) -> Result<(), GuestError> {
    match resolv_conf(network) {
        Some(text) => ensure_file("/etc/resolv.conf", &text),
        None => Ok(()),
    }
}

fn resolv_conf(network: &NetworkConfiguration) -> Option<String> {
    if network.nameservers.is_empty() {
        return None;
    }
    let mut text: String =
        network.nameservers.iter().map(|server| format!("nameserver {server}\n")).collect();
    for (keyword, words) in [("search", &network.search), ("options", &network.resolver_options)] {
        if !words.is_empty() {
            text.push_str(&format!("{keyword} {}\n", words.join(" ")));
        }
    }
    Some(text)
}

fn hosts(name: &str, address: Option<Ipv4Addr>) -> String {
    // Without an address of its own the name is still to be found.
    let own = address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1));
    let short = name.split('.').next().unwrap_or(name);
    let names = if short == name { name.to_owned() } else { format!("{name} {short}") };
    format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}\t{names}\n")
}

/// The kernel's boot id, which forks of a guest have in common: from now on programs read another
/// one in its place.
pub(super) fn renew_boot_id() -> Result<(), GuestError> {
    let digits = digits(draw_uuid()?);
    let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
    files::put_over(Path::new(BOOT_ID), &format!("{}\n", parts.join("-")))
        .map_err(|error| refused("cannot draw a boot id", error))
}

/// A random UUID (version 4), as machine-id(5) wants it, too.
fn draw_uuid() -> Result<[u8; 16], GuestError> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| refused("cannot draw an id", error))?;
    Ok(uuid(bytes))
}

fn uuid(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

fn digits(bytes: [u8; 16]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn ensure_file(path: &str, text: &str) -> Result<(), GuestError> {
    files::ensure(Path::new(path), text)
        .map_err(|error| refused(format!("cannot write {path}"), error))
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
    fn the_hosts_search_domains_and_options_are_taken_over() {
        let network = |nameservers: &[&str], search: &[&str]| NetworkConfiguration {
            address: Ipv4Addr::new(10, 240, 1, 3),
            prefix_len: 24,
            gateway: Ipv4Addr::new(10, 240, 1, 1),
            nameservers: nameservers.iter().map(|server| server.parse().unwrap()).collect(),
            search: search.iter().map(ToString::to_string).collect(),
            resolver_options: search.iter().map(|_| "ndots:2".to_owned()).collect(),
            mtu: None,
            mac: None,
        };
        assert_eq!(resolv_conf(&network(&[], &["a.example"])), None);
        let text = resolv_conf(&network(&["10.240.1.1"], &[])).unwrap();
        assert_eq!(text, "nameserver 10.240.1.1\n");
        let text = resolv_conf(&network(&["10.240.1.1", "10.0.0.2"], &["a.example"])).unwrap();
        assert_eq!(
            text,
            "nameserver 10.240.1.1\nnameserver 10.0.0.2\nsearch a.example\noptions ndots:2\n"
        );
    }

    #[test]
    fn a_machine_id_is_a_random_uuid() {
        assert_eq!(digits(uuid([0xff; 16])), "ffffffffffff4fffbfffffffffffffff");
    }
}
