//! Unix sockets whose path may be longer than the 107 bytes that a socket address holds.
//!
//! The VMM drivers bind control sockets in an instance's directory with it, the guest channel and
//! the agent's API connect through it. The address names the directory by descriptor
//! (`/proc/self/fd/N/name`), so that only the file name counts. It never takes a socket away from
//! a process that still listens on it.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// Connections that may wait to be accepted: as many as a burst of commands brings.
const BACKLOG: i32 = 1024;
/// Bytes that are read at once from a connection that nobody listens to any more.
const DRAIN_PIECE: usize = 64 * 1024;

/// Why a socket could not be bound or reached.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} socket {path}")]
pub struct SocketError {
    /// `bind` or `connect to`.
    action: &'static str,
    /// The socket's file.
    path: PathBuf,
    /// Why.
    #[source]
    source: io::Error,
}

impl SocketError {
    /// The kind of the underlying failure.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

/// Listens on a socket file that only its owner may connect to. A file that an earlier process
/// left behind is replaced.
///
/// # Errors
/// Somebody listens there, or the file is not a socket, or the directory does not exist.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    bind_fd(path).and_then(|fd| {
        let listener = std::os::unix::net::UnixListener::from(fd);
        listener.set_nonblocking(true).map_err(failed("bind", path))?;
        UnixListener::from_std(listener).map_err(failed("bind", path))
    })
}

/// Like [`bind`], as a blocking descriptor to hand to another process.
///
/// # Errors
/// As [`bind`].
pub fn bind_fd(path: &Path) -> Result<OwnedFd, SocketError> {
    listen(path).map_err(failed("bind", path))
}

/// Connects to a socket file.
///
/// # Errors
/// The file does not exist, or nobody listens on it.
pub async fn connect(path: &Path) -> Result<UnixStream, SocketError> {
    let short = ShortPath::open(path).map_err(failed("connect to", path))?;
    UnixStream::connect(short.name()).await.map_err(failed("connect to", path))
}

/// Notices that the other end of a socket was closed, even behind data that nobody has read.
#[derive(Debug)]
pub struct HangUp(Option<UnixStream>);

impl HangUp {
    /// Watches a socket from now on.
    ///
    /// # Errors
    /// There are too many descriptors.
    pub fn of(socket: &UnixStream) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixStream::from(socket.as_fd().try_clone_to_owned()?);
        Ok(Self(Some(UnixStream::from_std(socket)?)))
    }

    /// Of a connection whose end can only be read.
    pub fn never() -> Self {
        Self(None)
    }

    /// Waits until the other end is closed.
    pub async fn wait(&self) {
        if let Some(socket) = &self.0 {
            // Data is no news for this interest, the end is.
            if matches!(socket.ready(Interest::PRIORITY).await, Ok(ready) if ready.is_read_closed())
            {
                return;
            }
        }
        std::future::pending().await
    }

    /// Ends the sending direction, then reads and drops what the other end still sends, until it
    /// hangs up or the time is over. A socket that is closed with unread data in it may take its
    /// last words away from the other end.
    pub async fn drain(&self, limit: Duration) {
        let Some(socket) = &self.0 else { return };
        if rustix::net::shutdown(socket, Shutdown::Write).is_err() {
            return;
        }
        let mut piece = vec![0; DRAIN_PIECE];
        let drained = async {
            while socket.readable().await.is_ok() {
                match socket.try_read(&mut piece) {
                    Ok(0) => return,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
        };
        // Whoever still sends then is not heard.
        drop(tokio::time::timeout(limit, drained).await);
    }
}

/// Sends one byte with a descriptor, of which the receiver gets a copy.
///
/// # Errors
/// The peer is gone, or does not take it.
pub(crate) async fn send_descriptor(
    stream: &UnixStream,
    byte: u8,
    descriptor: &impl AsFd,
) -> io::Result<()> {
    loop {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let descriptors = [descriptor.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // The space is made for one.
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            let byte = [IoSlice::new(std::slice::from_ref(&byte))];
            Ok(rustix::net::sendmsg(stream, &byte, &mut control, SendFlags::NOSIGNAL)?)
        });
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => return sent.map(drop),
        }
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError { action, path, source }
}

fn listen(path: &Path) -> io::Result<OwnedFd> {
    let short = ShortPath::open(path)?;
    remove_stale(&short.name())?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The file gets the socket's mode when it is bound: at no time can others connect.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(short.name())?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the file is not a socket"));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Err(error) => Err(error),
    }
}

/// A path with its directory named by descriptor.
struct ShortPath {
    dir: OwnedFd,
    file_name: PathBuf,
}

impl ShortPath {
    fn open(path: &Path) -> io::Result<Self> {
        let file_name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let dir = match path.parent() {
            Some(dir) if dir.as_os_str() != OsStr::new("") => dir,
            _ => Path::new("."),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(dir, flags, Mode::empty())?;
        Ok(Self { dir, file_name: file_name.into() })
    }

    fn name(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.dir.as_raw_fd().to_string()).join(&self.file_name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_hang_up_is_noticed_behind_data_that_nobody_reads_and_not_before() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let hang_up = HangUp::of(&ours).unwrap();
        theirs.write_all(&[0; 1000]).await.unwrap();
        let soon = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, hang_up.wait()).await.is_err());
        drop(theirs);
        hang_up.wait().await;
    }

    #[tokio::test]
    async fn last_words_arrive_although_the_other_end_still_sends() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let hang_up = HangUp::of(&ours).unwrap();
        ours.write_all(b"no").await.unwrap();
        drop(ours);
        let sending = async {
            theirs.write_all(&[0; 4 << 20]).await.unwrap();
            let mut words = String::new();
            theirs.read_to_string(&mut words).await.unwrap();
            drop(theirs);
            words
        };
        let limit = Duration::from_secs(60);
        let ((), words) = tokio::join!(hang_up.drain(limit), sending);
        assert_eq!(words, "no");
    }
    use std::os::unix::fs::PermissionsExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn deep_dir(root: &Path) -> PathBuf {
        let dir = root.join("a".repeat(90)).join("b".repeat(90));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[tokio::test]
    async fn a_path_longer_than_a_socket_address_works_and_is_private() {
        let root = tempfile::tempdir().unwrap();
        let path = deep_dir(root.path()).join("agent.sock");
        let listener = bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut client = connect(&path).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        client.write_all(b"hello").await.unwrap();
        let mut got = [0; 5];
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"hello");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_a_live_one_and_other_files_are_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.sock");
        let first = bind(&path).unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        connect(&path).await.unwrap();
        drop(first);
        let error = connect(&path).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        drop(bind(&path).unwrap());

        let file = root.path().join("precious");
        std::fs::write(&file, "data").unwrap();
        let error = bind(&file).unwrap_err();
        assert!(error.to_string().contains("precious"), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), b"data");
    }
}
