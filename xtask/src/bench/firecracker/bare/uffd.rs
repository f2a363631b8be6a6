//! A handler of page faults, as Firecracker can have one in place of a mapped memory file: each page that
//! the guest touches is copied when it does.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{PidfdFlags, pidfd_open};
use serde::Deserialize;

/// `UFFDIO_COPY` of `linux/userfaultfd.h`.
const COPY: Opcode = 0xc028_aa03;
/// `UFFD_EVENT_PAGEFAULT` of the same.
const PAGE_FAULT: u8 = 0x12;
/// Bytes of one message, and where a fault's address is in it.
const MESSAGE: usize = 32;
const ADDRESS: std::ops::Range<usize> = 16..24;
const PAGE: u64 = 4096;

/// Where a part of the guest's memory is, in Firecracker and in the file.
#[derive(Debug, Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

/// Serves the faults of the next Firecracker that is told of this socket, out of this file, until that ends.
pub(super) fn serve(socket: &Path, memory: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::bind(socket)?;
    let memory = File::open(memory)?;
    std::thread::Builder::new().name("uffd".into()).spawn(move || {
        let served = take(&listener).and_then(|firecracker| {
            firecracker.answer(&memory).context("cannot answer page faults")
        });
        // Without it the guest stands still, and the wake fails by its time limit.
        if let Err(error) = served {
            super::super::say(&format!("the handler of page faults: {error:#}"));
        }
    })?;
    Ok(())
}

/// What a Firecracker hands over.
struct Firecracker {
    process: OwnedFd,
    faults: OwnedFd,
    mappings: Vec<Mapping>,
}

fn take(listener: &UnixListener) -> anyhow::Result<Firecracker> {
    let (stream, _) = listener.accept()?;
    let process = pidfd_open(socket_peercred(&stream)?.pid, PidfdFlags::empty())?;
    let mut text = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut handed_over = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut text)];
    let received = recvmsg(&stream, parts, &mut handed_over, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = handed_over.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let faults = descriptors.next().and_then(|mut it| it.next()).context("no descriptor came")?;
    let mappings = serde_json::from_slice(&text[..received.bytes])?;
    Ok(Firecracker { process, faults, mappings })
}

impl Firecracker {
    /// Answers its faults until it ends.
    fn answer(&self, memory: &File) -> io::Result<()> {
        let mut page = [0; PAGE as usize];
        loop {
            let watched = [&self.faults, &self.process];
            let mut fds = watched.map(|fd| PollFd::new(fd, PollFlags::IN));
            poll(&mut fds, None)?;
            if !fds[1].revents().is_empty() {
                return Ok(());
            }
            let mut message = [0; MESSAGE];
            match rustix::io::read(self.faults.as_fd(), &mut message) {
                Ok(MESSAGE) if message[0] == PAGE_FAULT => {}
                Ok(_) | Err(Errno::AGAIN) => continue,
                Err(error) => return Err(error.into()),
            }
            let mut address = [0; 8];
            address.copy_from_slice(&message[ADDRESS]);
            let address = u64::from_ne_bytes(address) & !(PAGE - 1);
            let place = self.mappings.iter().find_map(|mapping| mapping.place_of(address));
            memory.read_exact_at(&mut page, place.ok_or(io::ErrorKind::InvalidData)?)?;
            let from = page.as_ptr().addr() as u64;
            let mut copy = Copy { to: address, from, bytes: PAGE, mode: 0, copied: 0 };
            // SAFETY: the kernel reads one page of ours, which lives on, into the other process,
            // and writes how much it was into the structure that this request has.
            let copied = unsafe { ioctl(&self.faults, Updater::<COPY, Copy>::new(&mut copy)) };
            match copied {
                // Another vCPU's fault has brought it, or the process ends.
                Ok(()) | Err(Errno::EXIST | Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Mapping {
    /// Where the page at an address of Firecracker's is in the file.
    fn place_of(&self, address: u64) -> Option<u64> {
        let within = address.checked_sub(self.base_host_virt_addr)?;
        (within < self.size).then_some(within + self.offset)
    }
}
