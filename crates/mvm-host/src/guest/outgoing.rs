//! What the host will send to a guest.
//!
//! Requests and data wait for room, so that a guest that does not read stops those who write to
//! it. Credit and cancellations cannot wait, because consumers and destructors send them: they are
//! kept per stream instead of per message, which bounds them too.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mvm_core::frame::{self, KIND_LAST_PART, KIND_MESSAGE, KIND_PART};
use mvm_core::guest::{HostMessage, LONGEST_MESSAGE, MAX_BODY};
use tokio::sync::{Notify, Semaphore};

use super::error::SessionError;

/// Encoded bytes that may wait for the guest to read.
const ROOM: usize = 1024 * 1024;
/// Bytes written at once.
const CHUNK: usize = 64 * 1024;

/// What a frame does to its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// It is the stream's first.
    Open,
    /// It is a later one.
    Continue,
}

#[derive(Debug)]
struct Queued {
    stream: u32,
    step: Step,
    bytes: Vec<u8>,
    /// Room to give back.
    permits: usize,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Queued>,
    credits: BTreeMap<(u32, u8), u32>,
    cancels: BTreeSet<u32>,
}

/// The queue to the guest.
#[derive(Debug)]
pub(super) struct Outgoing {
    tag: u32,
    state: Mutex<State>,
    work: Notify,
    room: Semaphore,
}

impl Outgoing {
    pub(super) fn new(tag: u32) -> Self {
        Self { tag, state: Mutex::default(), work: Notify::new(), room: Semaphore::new(ROOM) }
    }

    /// Queues a message; waits for room. One that is longer than a frame goes in parts, if the guest
    /// puts them together.
    pub(super) async fn message(
        &self,
        stream: u32,
        step: Step,
        request: &'static str,
        message: &HostMessage,
        takes_parts: bool,
    ) -> Result<(), SessionError> {
        let body = encode(message)?;
        let (len, frame) = (body.len(), MAX_BODY as usize);
        if len <= frame {
            return self.frame(stream, step, KIND_MESSAGE, &body).await;
        }
        let max = if takes_parts { LONGEST_MESSAGE } else { frame };
        if len > max {
            return Err(SessionError::TooLarge { request, len, max });
        }
        let mut step = step;
        let mut parts = body.chunks(frame).peekable();
        while let Some(part) = parts.next() {
            let kind = if parts.peek().is_some() { KIND_PART } else { KIND_LAST_PART };
            self.frame(stream, step, kind, part).await?;
            step = Step::Continue;
        }
        Ok(())
    }

    /// Queues a frame; waits for room. The body is at most [`MAX_BODY`] bytes.
    pub(super) async fn frame(
        &self,
        stream: u32,
        step: Step,
        kind: u8,
        body: &[u8],
    ) -> Result<(), SessionError> {
        let mut bytes = Vec::new();
        frame::encode(self.tag, stream, kind, body, &mut bytes);
        let permits = bytes.len();
        // A session that has ended closes the semaphore.
        let room = self.room.acquire_many(u32::try_from(permits).unwrap_or(u32::MAX)).await;
        room.map_err(|_| SessionError::Closed)?.forget();
        self.state().queue.push_back(Queued { stream, step, bytes, permits });
        self.work.notify_one();
        Ok(())
    }

    /// Queues a small message behind what the stream has queued, without waiting. At most one per
    /// stream.
    pub(super) fn last_message(&self, stream: u32, message: &HostMessage) {
        let Ok(body) = encode(message) else { return };
        let mut bytes = Vec::new();
        frame::encode(self.tag, stream, KIND_MESSAGE, &body, &mut bytes);
        let queued = Queued { stream, step: Step::Continue, bytes, permits: 0 };
        self.state().queue.push_back(queued);
        self.work.notify_one();
    }

    /// Returns credit to the guest.
    pub(super) fn credit(&self, stream: u32, kind: u8, bytes: u32) {
        let mut state = self.state();
        let credit = state.credits.entry((stream, kind)).or_default();
        *credit = credit.saturating_add(bytes);
        drop(state);
        self.work.notify_one();
    }

    /// Drops what a stream has queued, and lets the guest end it if it knows of it.
    pub(super) fn cancel(&self, stream: u32) {
        let mut state = self.state();
        let mut is_unknown = false;
        state.queue.retain(|queued| {
            if queued.stream == stream {
                is_unknown |= queued.step == Step::Open;
                self.room.add_permits(queued.permits);
            }
            queued.stream != stream
        });
        state.credits.retain(|&(of, _), _| of != stream);
        if !is_unknown {
            state.cancels.insert(stream);
        }
        drop(state);
        self.work.notify_one();
    }

    /// Cancellations that the guest has not been sent.
    pub(super) fn pending_cancels(&self) -> usize {
        self.state().cancels.len()
    }

    /// The bytes to write next; waits for some.
    pub(super) async fn next_chunk(&self) -> Vec<u8> {
        loop {
            let chunk = self.take_chunk();
            if !chunk.is_empty() {
                return chunk;
            }
            self.work.notified().await;
        }
    }

    /// Lets nobody wait for room any more.
    pub(super) fn close(&self) {
        self.room.close();
    }

    fn take_chunk(&self) -> Vec<u8> {
        let mut chunk = Vec::new();
        let mut state = self.state();
        let mut small = |stream, message: &HostMessage| {
            if let Ok(body) = encode(message) {
                frame::encode(self.tag, stream, KIND_MESSAGE, &body, &mut chunk);
            }
        };
        for stream in std::mem::take(&mut state.cancels) {
            small(stream, &HostMessage::Cancel);
        }
        for ((stream, kind), bytes) in std::mem::take(&mut state.credits) {
            small(stream, &HostMessage::Credit { kind, bytes });
        }
        while chunk.len() < CHUNK
            && let Some(queued) = state.queue.pop_front()
        {
            chunk.extend_from_slice(&queued.bytes);
            self.room.add_permits(queued.permits);
        }
        chunk
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn encode(message: &HostMessage) -> Result<Vec<u8>, SessionError> {
    serde_json::to_vec(message)
        .map_err(|error| SessionError::protocol(format!("cannot encode a request: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_core::frame::{Decoder, Frame};
    use mvm_core::guest::{ExecRequest, Parts};

    fn sent(outgoing: &Outgoing) -> Vec<Frame> {
        let mut decoder = Decoder::new(7, MAX_BODY);
        decoder.push(&outgoing.take_chunk());
        std::iter::from_fn(|| decoder.next_frame().unwrap()).collect()
    }

    #[tokio::test]
    async fn a_request_that_was_not_sent_is_taken_back_without_a_word() {
        let outgoing = Outgoing::new(7);
        let health = HostMessage::Health;
        outgoing.message(1, Step::Open, "health", &health, true).await.unwrap();
        outgoing.cancel(1);
        assert_eq!(sent(&outgoing), []);
        assert_eq!(outgoing.room.available_permits(), ROOM);
    }

    #[tokio::test]
    async fn a_request_that_was_sent_is_cancelled_and_its_data_dropped() {
        let outgoing = Outgoing::new(7);
        let health = HostMessage::Health;
        outgoing.message(1, Step::Open, "health", &health, true).await.unwrap();
        assert_eq!(sent(&outgoing).len(), 1);
        outgoing.frame(1, Step::Continue, 1, b"data").await.unwrap();
        outgoing.credit(1, 2, 10);
        outgoing.cancel(1);
        let frames = sent(&outgoing);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].body, br#"{"type":"cancel"}"#);
    }

    #[tokio::test]
    async fn a_long_message_goes_in_parts_only_to_a_guest_that_joins_them() {
        let outgoing = Outgoing::new(7);
        let argv = vec!["x".repeat(100_000), "y".repeat(70_000)];
        let exec = HostMessage::Exec(ExecRequest { argv, ..ExecRequest::default() });
        let refused = outgoing.message(1, Step::Open, "exec", &exec, false).await;
        assert!(matches!(refused, Err(SessionError::TooLarge { .. })), "{refused:?}");
        outgoing.message(1, Step::Open, "exec", &exec, true).await.unwrap();
        let mut frames = sent(&outgoing);
        frames.extend(sent(&outgoing));
        frames.extend(sent(&outgoing));
        let kinds: Vec<u8> = frames.iter().map(|frame| frame.kind).collect();
        assert_eq!(kinds, [KIND_PART, KIND_PART, KIND_LAST_PART]);
        let mut parts = Parts::default();
        parts.push(1, &frames[0].body).unwrap();
        parts.push(1, &frames[1].body).unwrap();
        let whole = parts.complete(1, &frames[2].body).unwrap();
        assert_eq!(serde_json::from_slice::<HostMessage>(&whole).unwrap(), exec);
    }

    #[tokio::test]
    async fn a_guest_that_does_not_read_stops_writers_and_not_consumers() {
        let outgoing = Outgoing::new(7);
        let body = vec![0; MAX_BODY as usize];
        let flood = async {
            loop {
                outgoing.frame(1, Step::Continue, 1, &body).await.unwrap();
            }
        };
        let limit = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(limit, flood).await.is_err());
        assert!(outgoing.room.available_permits() < body.len() + 64);
        for _ in 0..100_000 {
            outgoing.credit(1, 2, 1);
        }
        assert_eq!(outgoing.state().credits.len(), 1);
    }
}
