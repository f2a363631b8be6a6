//! Guests to test against: the simulated one, and the real agent as an ordinary process.
#![allow(dead_code)] // each test binary uses its part

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use mvm_core::frame::{self, Decoder, Frame, KIND_MESSAGE};
use mvm_core::guest::{
    ExecRequest, GUEST_MAGIC, GuestMessage, HOST_MAGIC, HostMessage, MAX_BODY, Preamble,
};
use mvm_host::guest::sim::{SimGuest, serve};
use mvm_host::guest::{AGENT_BINARY, Session, SessionMode};
use mvm_host::vmm::GuestStream;

/// Far more than anything takes, on a machine however busy.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Makes each function of the suite a test of each guest.
#[allow(unused_macros)] // not each test binary has a suite
macro_rules! on_every_guest {
    ($($name:ident)*) => {
        mod simulated {
            $(#[tokio::test]
            async fn $name() {
                super::$name(crate::guest_support::Guest::simulated().0).await;
            })*
        }
        mod real {
            $(#[tokio::test]
            async fn $name() {
                super::$name(crate::guest_support::Guest::real()).await;
            })*
        }
    };
}
#[allow(unused_imports)] // not each test binary has a suite
pub(crate) use on_every_guest;

/// The other end of a guest's byte stream, which stays open while sessions come and go.
pub(crate) struct Guest {
    socket: UnixStream,
    pub(crate) process: Option<Child>,
}

impl Guest {
    /// The real agent, as an ordinary process.
    pub(crate) fn real() -> Self {
        Self::serving(&[])
    }

    /// The real agent with a directory for hooks and for what programs see of a wake.
    pub(crate) fn real_in(root: &Path) -> Self {
        Self::serving(&[root.as_os_str()])
    }

    fn serving(more: &[&OsStr]) -> Self {
        let (host, guest) = UnixStream::pair().unwrap();
        let process = Command::new(agent())
            .args(["--serve-fd", "0"])
            .args(more)
            .stdin(Stdio::from(OwnedFd::from(guest)))
            .spawn()
            .unwrap();
        Self { socket: host, process: Some(process) }
    }

    /// The simulated guest, in this process.
    pub(crate) fn simulated() -> (Self, SimGuest) {
        let (host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        let stream = tokio::net::UnixStream::from_std(guest).unwrap();
        let sim = SimGuest::new("boot-1", 128 * 1024);
        tokio::spawn(serve(stream, sim.clone()));
        (Self { socket: host, process: None }, sim)
    }

    /// The byte stream, as a VMM would hand it out.
    pub(crate) fn stream(&self) -> Box<dyn GuestStream> {
        let socket = self.socket.try_clone().unwrap();
        socket.set_nonblocking(true).unwrap();
        Box::new(tokio::net::UnixStream::from_std(socket).unwrap())
    }

    /// Opens a session.
    pub(crate) async fn session(&self, mode: SessionMode) -> Session {
        Session::open(self.stream(), mode, LIMIT).await.unwrap()
    }

    /// A host that speaks frame by frame, and as badly as a test wants.
    pub(crate) fn raw(&self, nonce: u8) -> RawHost {
        let socket = self.socket.try_clone().unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        RawHost { socket, nonce: [nonce; 16], decoder: Decoder::new(0, 0) }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The agent ends with its stream, and takes along what it runs: killed, it could not.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(process) = &mut self.process {
            let deadline = Instant::now() + LIMIT;
            while process.try_wait().unwrap().is_none() {
                if Instant::now() > deadline {
                    process.kill().unwrap();
                    panic!("the agent outlives its stream");
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// The agent's file; written before any process is started, or starting it might find it busy.
fn agent() -> &'static PathBuf {
    static AGENT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_dir, path) = AGENT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mvm-guest");
        std::fs::write(&path, AGENT_BINARY).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    });
    path
}

/// A program without anything special.
pub(crate) fn command(argv: &[&str]) -> ExecRequest {
    ExecRequest { argv: argv.iter().map(|&arg| arg.to_owned()).collect(), ..Default::default() }
}

/// A shell script.
pub(crate) fn script(text: &str) -> ExecRequest {
    command(&["sh", "-c", text])
}

/// Bytes in which nothing repeats with a frame's or a pipe's size, and every value occurs.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Waits until something is so.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so().await {
        assert!(Instant::now() < deadline, "in vain waited until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether a process of this machine runs (a zombie does not).
pub(crate) fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

/// A host by hand.
pub(crate) struct RawHost {
    socket: UnixStream,
    nonce: [u8; 16],
    decoder: Decoder,
}

impl RawHost {
    fn preamble(&self) -> Preamble {
        Preamble { magic: HOST_MAGIC, nonce: self.nonce, version: 1, max_version: 1 }
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Sends a preamble, finds its answer and takes the hello.
    pub(crate) fn open(&mut self) -> GuestMessage {
        let preamble = self.preamble();
        self.send_bytes(&preamble.encode());
        let answer = self.answer();
        assert_eq!(answer.version, 1);
        self.message().1
    }

    /// Finds the answer to a preamble of this nonce.
    pub(crate) fn answer(&mut self) -> Preamble {
        let mut buffer = Vec::new();
        let answer = loop {
            let more = self.read();
            buffer.extend(more);
            if let Some(answer) = Preamble::scan(&mut buffer, GUEST_MAGIC, Some(self.nonce)) {
                break answer;
            }
        };
        self.decoder = Decoder::new(answer.tag(), MAX_BODY);
        self.decoder.push(&buffer);
        answer
    }

    pub(crate) fn send_frame(&mut self, stream: u32, kind: u8, body: &[u8]) {
        let mut bytes = Vec::new();
        frame::encode(self.preamble().tag(), stream, kind, body, &mut bytes);
        self.send_bytes(&bytes);
    }

    pub(crate) fn send(&mut self, stream: u32, message: &HostMessage) {
        self.send_frame(stream, KIND_MESSAGE, &serde_json::to_vec(message).unwrap());
    }

    pub(crate) fn frame(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return frame;
            }
            let more = self.read();
            self.decoder.push(&more);
        }
    }

    /// The next message; data is skipped.
    pub(crate) fn message(&mut self) -> (u32, GuestMessage) {
        loop {
            let frame = self.frame();
            if frame.kind == KIND_MESSAGE {
                return (frame.stream, serde_json::from_slice(&frame.body).unwrap());
            }
        }
    }

    /// The last message of a stream.
    pub(crate) fn last_message(&mut self, stream: u32) -> GuestMessage {
        loop {
            let (id, message) = self.message();
            if id == stream && message.ends_stream() {
                return message;
            }
        }
    }

    fn read(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; 64 * 1024];
        // The socket is shared with streams that may have made it non-blocking.
        let len = self.socket.read(&mut bytes).unwrap();
        assert!(len > 0, "the guest closed the stream");
        bytes.truncate(len);
        bytes
    }
}
