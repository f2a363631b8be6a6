//! The open streams of a session: what the guest sent on each, bounded by the credit it was given.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_core::credit::{ReceiveWindow, SendWindow};
use mvm_core::frame::{Frame, KIND_MESSAGE, KIND_STDERR, KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::{GuestMessage, MAX_BODY, MAX_PUBLISHED, MAX_STREAMS};
use tokio::sync::Notify;

use super::error::SessionError;
use super::outgoing::Outgoing;

/// Items of a stream at which data of one kind is joined with earlier data of that kind, even over
/// data of the other: a guest that sends single bytes must not cost more than what it sends.
const MOST_ITEMS: usize = 256;

/// Whom a stream is for, which decides how many there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// The agent's own questions and orders, such as health and shutdown, which always find room:
    /// whoever asks waits for the answer, so that there are never more than askers.
    Agent,
    /// What an operator runs or connects to.
    Operator,
    /// A connection to a published port: anybody's.
    Published,
}

/// Something that came on a stream.
#[derive(Debug)]
pub(super) enum Item {
    /// Data of a kind.
    Data(u8, Vec<u8>),
    /// `started`, `connected`, `eof`, or the stream's last message.
    Message(GuestMessage),
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<Item>,
    stdout: ReceiveWindow,
    stderr: ReceiveWindow,
    stdin: SendWindow,
    is_started: bool,
    is_eof: bool,
    /// Whether the guest has sent the last message, or the session is over.
    is_ended: bool,
    error: Option<SessionError>,
}

impl State {
    fn with_credit(size: u32) -> Self {
        Self { stdout: ReceiveWindow::of(size), stdin: SendWindow::of(size), ..Self::default() }
    }
}

/// One stream, as its consumer and the session share it.
#[derive(Debug, Default)]
pub(super) struct Stream {
    state: Mutex<State>,
    arrived: Notify,
    granted: Notify,
}

impl Stream {
    /// The next item; waits for one. Data that is taken gives the guest credit for more.
    pub(super) async fn next(&self, id: u32, outgoing: &Outgoing) -> Result<Item, SessionError> {
        loop {
            if let Some(item) = self.take(id, outgoing)? {
                return Ok(item);
            }
            self.arrived.notified().await;
        }
    }

    fn take(&self, id: u32, outgoing: &Outgoing) -> Result<Option<Item>, SessionError> {
        let mut state = self.state();
        let Some(item) = state.items.pop_front() else {
            let over = || SessionError::protocol(format!("stream {id} is over"));
            return match state.is_ended {
                true => Err(state.error.clone().unwrap_or_else(over)),
                false => Ok(None),
            };
        };
        if let Item::Data(kind, data) = &item {
            let window = match *kind {
                KIND_STDERR => &mut state.stderr,
                _ => &mut state.stdout,
            };
            let credit = window.consume(data.len());
            if let Some(bytes) = credit.filter(|_| !state.is_ended) {
                outgoing.credit(id, *kind, bytes);
            }
        }
        Ok(Some(item))
    }

    /// Takes credit for up to this many bytes of standard input; waits for some.
    pub(super) async fn take_stdin_credit(
        &self,
        wanted: usize,
    ) -> Result<StdinCredit<'_>, SessionError> {
        loop {
            if let Some(credit) = self.try_take_stdin_credit(wanted)? {
                return Ok(credit);
            }
            self.granted.notified().await;
        }
    }

    fn try_take_stdin_credit(
        &self,
        wanted: usize,
    ) -> Result<Option<StdinCredit<'_>>, SessionError> {
        let mut state = self.state();
        if state.is_ended {
            return Err(state.error.clone().unwrap_or(SessionError::InputClosed));
        }
        let len = state.stdin.take(wanted);
        // Built only if there is some: dropping it would wait for the lock that is held here.
        Ok((len > 0).then(|| StdinCredit { stream: self, len }))
    }

    /// Lets nobody wait for the guest any more; what has come can still be taken.
    pub(super) fn end(&self, error: Option<SessionError>) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.is_ended, true) {
            state.error = error;
        }
        drop(state);
        self.arrived.notify_one();
        self.granted.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Credit that is given back unless it is spent.
#[derive(Debug)]
pub(super) struct StdinCredit<'a> {
    stream: &'a Stream,
    /// Bytes that may be sent.
    pub(super) len: usize,
}

impl StdinCredit<'_> {
    /// Notes that the bytes were sent.
    pub(super) fn spend(mut self) {
        self.len = 0;
    }
}

impl Drop for StdinCredit<'_> {
    fn drop(&mut self) {
        // What was taken can always be granted again.
        let _ = self.stream.state().stdin.grant(self.len as u32);
    }
}

impl State {
    fn add_data(&mut self, kind: u8, body: Vec<u8>) {
        let is_full = self.items.len() >= MOST_ITEMS;
        let fits = |data: &Vec<u8>| is_full || data.len() + body.len() <= MAX_BODY as usize;
        let candidates = self.items.iter_mut().rev().take(if is_full { MOST_ITEMS } else { 1 });
        for item in candidates {
            if let Item::Data(of, data) = item
                && *of == kind
                && fits(data)
            {
                data.extend_from_slice(&body);
                return;
            }
        }
        self.items.push_back(Item::Data(kind, body));
    }
}

#[derive(Debug, Default)]
struct Registry {
    streams: BTreeMap<u32, (Share, Arc<Stream>)>,
    last: u32,
    error: Option<SessionError>,
}

/// All streams of a session.
#[derive(Debug, Default)]
pub(super) struct Streams {
    registry: Mutex<Registry>,
}

impl Streams {
    /// Opens a stream under a fresh number.
    pub(super) fn open(
        &self,
        share: Share,
        credit: u32,
        outgoing: &Outgoing,
    ) -> Result<(u32, Arc<Stream>), SessionError> {
        let mut registry = self.registry();
        if let Some(error) = &registry.error {
            return Err(error.clone());
        }
        let open_of = |share| registry.streams.values().filter(|(of, _)| *of == share).count();
        let (open, max) = match share {
            Share::Agent => (0, usize::MAX),
            Share::Operator => (registry.streams.len(), MAX_STREAMS),
            Share::Published => (open_of(Share::Published), MAX_PUBLISHED),
        };
        // Streams that the guest has not been told the end of are open for the guest.
        if open + outgoing.pending_cancels() >= max {
            return Err(SessionError::Limit { max });
        }
        let mut id = registry.last;
        loop {
            id = id.checked_add(1).unwrap_or(1);
            if !registry.streams.contains_key(&id) {
                break;
            }
        }
        registry.last = id;
        let state = Mutex::new(State::with_credit(credit));
        let stream = Arc::new(Stream { state, ..Stream::default() });
        registry.streams.insert(id, (share, stream.clone()));
        Ok((id, stream))
    }

    /// Forgets a stream; tells whether the guest has not ended it.
    pub(super) fn forget(&self, id: u32) -> bool {
        self.registry().streams.remove(&id).is_some()
    }

    /// Whether a stream is open.
    pub(super) fn holds(&self, id: u32) -> bool {
        self.registry().streams.contains_key(&id)
    }

    /// Ends all streams, now and in future.
    pub(super) fn end(&self, error: &SessionError) {
        let mut registry = self.registry();
        registry.error.get_or_insert_with(|| error.clone());
        for (_, stream) in std::mem::take(&mut registry.streams).into_values() {
            stream.end(Some(error.clone()));
        }
    }

    /// Hands a frame to its stream. What comes for a stream that is not open is dropped: it may
    /// have crossed a cancellation.
    ///
    /// # Errors
    /// The guest breaks the protocol: the session must end.
    pub(super) fn dispatch(&self, frame: Frame) -> Result<(), SessionError> {
        let id = frame.stream;
        let stream = self.registry().streams.get(&id).map(|(_, stream)| stream.clone());
        match (frame.kind, stream) {
            (KIND_MESSAGE, stream) => {
                let message = serde_json::from_slice(&frame.body).map_err(|error| {
                    SessionError::protocol(format!("malformed message on stream {id}: {error}"))
                })?;
                match stream {
                    Some(stream) => self.dispatch_message(id, &stream, message),
                    None if id == 0 => about_session(message),
                    None => Ok(()),
                }
            }
            (KIND_STDOUT | KIND_STDERR, Some(stream)) if !frame.body.is_empty() => {
                let mut state = stream.state();
                let window = match frame.kind {
                    KIND_STDERR => &mut state.stderr,
                    _ => &mut state.stdout,
                };
                window
                    .receive(frame.body.len())
                    .map_err(|error| SessionError::Credit { stream: id, error })?;
                state.add_data(frame.kind, frame.body);
                drop(state);
                stream.arrived.notify_one();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn dispatch_message(
        &self,
        id: u32,
        stream: &Stream,
        message: GuestMessage,
    ) -> Result<(), SessionError> {
        if message.ends_stream() {
            self.registry().streams.remove(&id);
            stream.state().items.push_back(Item::Message(message));
            stream.end(None);
            return Ok(());
        }
        let mut state = stream.state();
        match message {
            GuestMessage::Started { .. } | GuestMessage::Connected | GuestMessage::Main(_)
                if state.is_started =>
            {
                return Err(SessionError::protocol(format!("stream {id} started twice")));
            }
            GuestMessage::Started { .. } | GuestMessage::Connected | GuestMessage::Main(_) => {
                state.is_started = true;
                state.items.push_back(Item::Message(message));
                drop(state);
                stream.arrived.notify_one();
            }
            GuestMessage::Eof { kind: KIND_STDOUT } if !state.is_eof => {
                state.is_eof = true;
                state.items.push_back(Item::Message(message));
                drop(state);
                stream.arrived.notify_one();
            }
            GuestMessage::Credit { kind: KIND_STDIN, bytes } => {
                state
                    .stdin
                    .grant(bytes)
                    .map_err(|error| SessionError::Credit { stream: id, error })?;
                drop(state);
                stream.granted.notify_one();
            }
            _ => {}
        }
        Ok(())
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message on stream 0.
fn about_session(message: GuestMessage) -> Result<(), SessionError> {
    match message {
        GuestMessage::Error(error) => Err(SessionError::Guest { request: "session", error }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_core::guest::INITIAL_CREDIT;

    fn data(stream: u32, kind: u8, len: usize) -> Frame {
        Frame { stream, kind, body: vec![b'x'; len] }
    }

    fn message(stream: u32, text: &str) -> Frame {
        Frame { stream, kind: KIND_MESSAGE, body: text.into() }
    }

    #[test]
    fn single_bytes_cost_no_more_than_what_was_sent() {
        let (streams, outgoing) = (Streams::default(), Outgoing::new(1));
        let (id, stream) = streams.open(Share::Operator, INITIAL_CREDIT, &outgoing).unwrap();
        for _ in 0..INITIAL_CREDIT {
            streams.dispatch(data(id, KIND_STDOUT, 1)).unwrap();
            streams.dispatch(data(id, KIND_STDERR, 1)).unwrap();
            streams.dispatch(data(id, KIND_STDERR, 0)).unwrap();
        }
        assert!(stream.state().items.len() <= MOST_ITEMS);
        let error = streams.dispatch(data(id, KIND_STDOUT, 1)).unwrap_err();
        assert!(matches!(error, SessionError::Credit { .. }));
    }

    #[test]
    fn what_comes_for_no_stream_is_dropped() {
        let streams = Streams::default();
        streams.dispatch(data(9, KIND_STDOUT, 1000)).unwrap();
        streams.dispatch(data(9, 77, 1000)).unwrap();
        streams.dispatch(message(9, r#"{"type":"done"}"#)).unwrap();
        streams.dispatch(message(0, r#"{"type":"from_the_future"}"#)).unwrap();
    }

    #[test]
    fn what_makes_no_sense_ends_the_session() {
        let (streams, outgoing) = (Streams::default(), Outgoing::new(1));
        let (id, _stream) = streams.open(Share::Operator, INITIAL_CREDIT, &outgoing).unwrap();
        let bad = [
            message(id, "not json"),
            message(9, "{"),
            message(id, r#"{"type":"credit","kind":1,"bytes":1}"#),
            message(0, r#"{"type":"error","kind":"invalid","message":"no"}"#),
        ];
        for frame in bad {
            assert!(streams.dispatch(frame.clone()).is_err(), "{frame:?}");
        }
        let started = message(id, r#"{"type":"started","pid":3}"#);
        streams.dispatch(started.clone()).unwrap();
        assert!(streams.dispatch(started).is_err());
    }

    #[test]
    fn streams_are_limited_and_numbers_not_reused_while_open() {
        let (streams, outgoing) = (Streams::default(), Outgoing::new(1));
        let mut ids = std::collections::BTreeSet::new();
        for _ in 0..MAX_STREAMS {
            ids.insert(streams.open(Share::Operator, INITIAL_CREDIT, &outgoing).unwrap().0);
        }
        assert_eq!(ids.len(), MAX_STREAMS);
        assert!(!ids.contains(&0));
        assert!(matches!(
            streams.open(Share::Operator, INITIAL_CREDIT, &outgoing),
            Err(SessionError::Limit { max: MAX_STREAMS })
        ));
        streams.registry().last = u32::MAX;
        assert!(streams.forget(5));
        assert_eq!(streams.open(Share::Operator, INITIAL_CREDIT, &outgoing).unwrap().0, 5);
    }

    #[test]
    fn strangers_leave_room_for_the_operator_and_nobody_keeps_the_agent_from_asking() {
        let (streams, outgoing) = (Streams::default(), Outgoing::new(1));
        let open = |share| streams.open(share, INITIAL_CREDIT, &outgoing).map(|(id, _)| id);
        for _ in 0..MAX_PUBLISHED {
            open(Share::Published).unwrap();
        }
        assert!(matches!(open(Share::Published), Err(SessionError::Limit { max: MAX_PUBLISHED })));
        for _ in MAX_PUBLISHED..MAX_STREAMS {
            open(Share::Operator).unwrap();
        }
        assert!(open(Share::Operator).is_err());
        let asked = open(Share::Agent).unwrap();
        assert!(streams.forget(asked) && streams.forget(1));
        open(Share::Published).unwrap();
    }
}
