//! Attaching to a tap interface that somebody else has made.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long a tap may stay attached to somebody else, and how often it is tried again.
///
/// The descriptor that the tap was made with is closed, but another thread's child keeps a copy
/// between its fork and its exec.
const BUSY_LIMIT: Duration = Duration::from_secs(2);
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// Attaches to an existing persistent tap with virtio headers, as QEMU wants it.
///
/// # Errors
/// There is no such persistent tap, or another process stays attached to it.
pub(super) async fn attach(name: &str) -> io::Result<OwnedFd> {
    let deadline = Instant::now() + BUSY_LIMIT;
    loop {
        match open(name) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
            {
                sleep(BUSY_PAUSE).await;
            }
            result => return result,
        }
    }
}

fn open(name: &str) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = interface_request(name, flags)?;
    control(&device, libc::TUNSETIFF, &mut request)?;
    control(&device, libc::TUNGETIFF, &mut request)?;
    if flags_of(&request) & libc::IFF_PERSIST == 0 {
        // The kernel has just made one, and removes it with the descriptor.
        return Err(io::Error::new(io::ErrorKind::NotFound, "no such persistent tap interface"));
    }
    Ok(device.into())
}

#[allow(unsafe_code)]
fn interface_request(name: &str, flags: libc::c_int) -> io::Result<libc::ifreq> {
    // SAFETY: plain integers and bytes, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays for the terminating zero.
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an interface name"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    Ok(request)
}

#[allow(unsafe_code)]
fn flags_of(request: &libc::ifreq) -> libc::c_int {
    // SAFETY: both requests that are made leave the flags in the union.
    libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags })
}

#[allow(unsafe_code)]
fn control(device: &File, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: both codes read and write one `ifreq`, which outlives the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), code, std::ptr::from_mut(request)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::print_stderr, unsafe_code)] // a skipped test says why
    fn a_tap_whose_maker_has_a_copy_left_is_waited_for() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root may make a tap");
            return;
        }
        // In a network of its own, which ends with the thread.
        let work = || {
            let network = rustix::thread::UnshareFlags::NEWNET;
            // SAFETY: only this thread's network changes; no memory or files are unshared.
            unsafe { rustix::thread::unshare_unsafe(network) }.unwrap();
            let maker = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            let mut request = interface_request("busy0", flags).unwrap();
            control(&maker, libc::TUNSETIFF, &mut request).unwrap();
            persist(&maker);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
            runtime.unwrap().block_on(async {
                assert_eq!(open("busy0").unwrap_err().kind(), io::ErrorKind::ResourceBusy);
                let (attached, ()) = tokio::join!(attach("busy0"), async {
                    tokio::task::yield_now().await;
                    drop(maker);
                });
                attached.unwrap();
            });
        };
        std::thread::spawn(work).join().unwrap();
    }

    #[allow(unsafe_code)]
    fn persist(device: &File) {
        // SAFETY: TUNSETPERSIST takes a flag by value.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST, 1) };
        assert_eq!(result, 0);
    }

    #[test]
    #[allow(clippy::print_stderr)] // a skipped test says why
    fn a_tap_that_does_not_exist_is_not_made() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root may attach to a tap");
            return;
        }
        assert_eq!(open("mvmtestno0").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!std::path::Path::new("/sys/class/net/mvmtestno0").exists());
        assert_eq!(open("a-name-too-long-x").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
