//! Lists that come in pieces: one side takes a piece apart while the other puts the next together,
//! and a list is not bounded by the size of a frame.
//!
//! The agent cuts, whoever asked joins. A list is whole or an error, never short.

use crate::{ConnectionError, ReadHalf, Reply};

/// Instances in one piece of a list.
pub const INSTANCES_AT_ONCE: usize = 128;

impl ReadHalf {
    /// The reply to a question, put together if it comes in pieces.
    ///
    /// # Errors
    /// The connection broke, hung up before the last piece, or carries something else.
    pub async fn reply(&mut self) -> Result<Reply, ConnectionError> {
        let mut reply = self.message().await?;
        while let Reply::Instances { instances, more: more @ true } = &mut reply {
            match self.message().await? {
                Reply::Instances { instances: piece, more: is_next } => {
                    instances.extend(piece);
                    *more = is_next;
                }
                // The agent cannot go on, and says why.
                error @ Reply::Error(_) => return Ok(error),
                _ => return Err(ConnectionError::OtherPiece),
            }
        }
        Ok(reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ApiError, Connection, ErrorCode};

    fn piece(more: bool) -> Reply {
        Reply::Instances { instances: vec![], more }
    }

    async fn received(replies: &[Reply]) -> Result<Reply, ConnectionError> {
        let (agent, command) = tokio::io::duplex(64 * 1024);
        let (mut agent, mut command) = (Connection::new(agent), Connection::new(command));
        for reply in replies {
            agent.write.message(reply).await.unwrap();
        }
        drop(agent);
        command.read.reply().await
    }

    #[tokio::test]
    async fn a_list_ends_with_its_last_piece() {
        let whole = received(&[piece(true), piece(true), piece(false)]).await.unwrap();
        assert_eq!(whole, piece(false));
        assert_eq!(received(&[Reply::Done]).await.unwrap(), Reply::Done);
    }

    #[tokio::test]
    async fn a_list_that_is_cut_off_is_an_error_and_not_a_short_list() {
        let cut = received(&[piece(true), piece(true)]).await.unwrap_err();
        assert!(matches!(cut, ConnectionError::HungUp), "{cut}");
        let other = received(&[piece(true), Reply::Done]).await.unwrap_err();
        assert!(matches!(other, ConnectionError::OtherPiece), "{other}");
        let error = Reply::Error(ApiError::new(ErrorCode::Internal, "out of memory"));
        assert_eq!(received(&[piece(true), error.clone()]).await.unwrap(), error);
    }
}
