//! One connection carried to a socket in a guest, over a connection to the agent.

use std::path::Path;

use mvm_core::frame::{KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::ForwardTarget;
use mvm_core::name::Selector;
use mvm_wire::connection::DATA_PIECE;
use mvm_wire::{Call, Connection, ConnectionError, Item, ReadHalf, Reply, WriteHalf};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::client::unexpected;
use crate::error::{Error, Result};

/// Connects to a socket in a guest; on return somebody has accepted there.
///
/// # Errors
/// Nobody accepted, or there is no such guest.
pub(crate) async fn connect(
    socket: &Path,
    selector: Selector,
    target: ForwardTarget,
) -> Result<Connection> {
    let stream = mvm_host::unix_socket::connect(socket).await.map_err(|source| {
        Error::Unreachable { socket: socket.to_owned(), source: Box::new(source) }
    })?;
    let mut connection = Connection::new(stream);
    connection.write.message(&Call::Forward { selector, target }).await?;
    match connection.read.message().await? {
        Reply::Connected { .. } => Ok(connection),
        Reply::Error(error) => Err(error.into()),
        other => Err(unexpected(&other)),
    }
}

/// Carries bytes both ways until both directions have ended, each by itself.
///
/// # Errors
/// The connection to the guest was lost, or our side cannot be written to.
pub(crate) async fn carry(
    connection: Connection,
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
) -> Result<()> {
    let Connection { read, write } = connection;
    tokio::select! {
        received = receive(read, to) => received,
        error = send(write, from) => Err(error),
    }
}

async fn receive(mut read: ReadHalf, mut to: impl AsyncWrite + Unpin) -> Result<()> {
    loop {
        match read.next().await?.ok_or(ConnectionError::HungUp)? {
            Item::Data { kind: KIND_STDOUT, bytes } if bytes.is_empty() => {
                to.shutdown().await.map_err(Error::output)?;
            }
            Item::Data { kind: KIND_STDOUT, bytes } => {
                to.write_all(&bytes).await.map_err(Error::output)?;
                to.flush().await.map_err(Error::output)?;
            }
            Item::Data { .. } => {}
            message @ Item::Message(_) => match message.parse()? {
                Reply::Done => return Ok(()),
                Reply::Error(error) => return Err(error.into()),
                other => return Err(unexpected(&other)),
            },
        }
    }
}

/// Sends what comes, and its end. It returns only if our side breaks: a connection that takes no
/// more may still bring data.
async fn send(mut write: WriteHalf, mut from: impl AsyncRead + Unpin) -> Error {
    let mut piece = vec![0; DATA_PIECE];
    loop {
        match from.read(&mut piece).await {
            Ok(len) => {
                // An empty piece is the end.
                if write.data(KIND_STDIN, &piece[..len]).await.is_err() || len == 0 {
                    std::future::pending::<()>().await;
                }
            }
            Err(source) => {
                return Error::Read { what: "the forwarded connection".to_owned(), source };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let (ours, theirs) = duplex(1024);
        let (near, mut far) = duplex(1024);
        let (from, to) = tokio::io::split(near);
        let carrying = tokio::spawn(carry(Connection::new(ours), from, to));
        let mut agent = Connection::new(theirs);
        far.write_all(b"question").await.unwrap();
        far.shutdown().await.unwrap();
        for bytes in [b"question".to_vec(), vec![]] {
            let expected = Item::Data { kind: KIND_STDIN, bytes };
            assert_eq!(agent.read.next().await.unwrap(), Some(expected));
        }
        agent.write.data(KIND_STDOUT, b"answer").await.unwrap();
        agent.write.data(KIND_STDOUT, b"").await.unwrap();
        let mut answer = Vec::new();
        far.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        assert!(!carrying.is_finished());
        agent.write.message(&Reply::Done).await.unwrap();
        carrying.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_lost_agent_is_an_error() {
        let (ours, theirs) = duplex(1024);
        let (near, _far) = duplex(1024);
        let (from, to) = tokio::io::split(near);
        drop(theirs);
        assert_eq!(carry(Connection::new(ours), from, to).await.unwrap_err().exit_code(), 7);
    }
}
