//! What the main process has written: in order, bounded, and kept for a host that comes later.
//!
//! ```text
//!   forgotten │ kept, sent and acknowledged │ sent, not acknowledged │ not sent │ to come
//! ```
//!
//! While there is a host, be it one that is about to attach, nothing is forgotten that it has not
//! acknowledged: the process waits instead. Without a host the oldest is forgotten, so that the
//! process goes on. Acknowledged
//! output is kept for as long as there is room, because a host may have died before it wrote
//! down what it had acknowledged.

use std::collections::VecDeque;

/// Cost of what is kept at most.
const CAPACITY: usize = 1024 * 1024;
/// Unacknowledged bytes at which the process has to wait for an attached host.
const UNACKNOWLEDGED: u64 = 512 * 1024;
/// What a piece costs besides its bytes.
const PIECE_COST: usize = 64;

/// Standard output or standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    Stdout,
    Stderr,
}

impl Channel {
    /// Both.
    pub(super) const ALL: [Self; 2] = [Self::Stdout, Self::Stderr];

    fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }
}

#[derive(Debug)]
struct Piece {
    channel: Channel,
    /// Its position in its channel.
    start: u64,
    bytes: Vec<u8>,
}

impl Piece {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn cost(&self) -> usize {
        PIECE_COST + self.bytes.len()
    }
}

/// Positions in one channel, in bytes since the process started.
#[derive(Debug, Default, Clone, Copy)]
struct Position {
    written: u64,
    sent: u64,
    acknowledged: u64,
}

/// The output of a main process.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    pieces: VecDeque<Piece>,
    cost: usize,
    /// Pieces at the front that are sent.
    sent: usize,
    positions: [Position; 2],
    has_host: bool,
    is_attached: bool,
}

impl Backlog {
    /// Whether more may be added.
    pub(super) fn has_room(&self) -> bool {
        let waiting = |position: &Position| position.written - position.acknowledged;
        !self.has_host || self.positions.iter().map(waiting).sum::<u64>() < UNACKNOWLEDGED
    }

    /// Adds what the process wrote.
    pub(super) fn push(&mut self, channel: Channel, bytes: Vec<u8>) {
        let position = &mut self.positions[channel.index()];
        let piece = Piece { channel, start: position.written, bytes };
        position.written = piece.end();
        self.cost += piece.cost();
        self.pieces.push_back(piece);
        self.forget();
    }

    fn forget(&mut self) {
        while self.cost > CAPACITY {
            let Some(oldest) = self.pieces.front() else { return };
            let position = &mut self.positions[oldest.channel.index()];
            if self.has_host && oldest.end() > position.acknowledged {
                return;
            }
            position.sent = position.sent.max(oldest.end());
            position.acknowledged = position.acknowledged.max(oldest.end());
            self.cost -= oldest.cost();
            self.sent = self.sent.saturating_sub(1);
            self.pieces.pop_front();
        }
    }

    /// A host has come that has this much of each channel. Tells from where on it will be sent.
    pub(super) fn attach(&mut self, from: [u64; 2]) -> [u64; 2] {
        self.has_host = true;
        self.is_attached = true;
        self.sent = 0;
        for channel in Channel::ALL {
            let oldest = self.pieces.iter().find(|piece| piece.channel == channel);
            let position = &mut self.positions[channel.index()];
            let oldest = oldest.map_or(position.written, |piece| piece.start);
            position.sent = from[channel.index()].clamp(oldest, position.written);
            position.acknowledged = position.sent;
        }
        self.positions.map(|position| position.sent)
    }

    /// The host listens no more; it, or another one, is about to attach again.
    pub(super) fn detach(&mut self) {
        self.is_attached = false;
    }

    /// The host is gone, for who knows how long.
    pub(super) fn abandon(&mut self) {
        self.is_attached = false;
        self.has_host = false;
        self.forget();
    }

    /// The next output to send, at most `longest` bytes of it, if `credit` allows any.
    pub(super) fn next(
        &mut self,
        longest: usize,
        credit: impl Fn(Channel) -> usize,
    ) -> Option<(Channel, &[u8])> {
        while let Some(piece) = self.pieces.get(self.sent) {
            if piece.end() > self.positions[piece.channel.index()].sent {
                break;
            }
            self.sent += 1;
        }
        let piece = self.pieces.get(self.sent).filter(|_| self.is_attached)?;
        let channel = piece.channel;
        let position = &mut self.positions[channel.index()];
        let begin = usize::try_from(position.sent - piece.start).unwrap_or(usize::MAX);
        let rest = piece.bytes.get(begin..).unwrap_or_default();
        let len = rest.len().min(longest).min(credit(channel));
        if len == 0 {
            return None;
        }
        position.sent += len as u64;
        Some((channel, &rest[..len]))
    }

    /// The host has taken this much of a channel.
    pub(super) fn acknowledge(&mut self, channel: Channel, bytes: u32) {
        let position = &mut self.positions[channel.index()];
        position.acknowledged = (position.acknowledged + u64::from(bytes)).min(position.sent);
        self.forget();
    }

    /// Whether everything was sent.
    pub(super) fn is_sent(&self) -> bool {
        self.positions.iter().all(|position| position.sent == position.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUT: Channel = Channel::Stdout;
    const ERR: Channel = Channel::Stderr;

    fn sent(backlog: &mut Backlog) -> Vec<(Channel, String)> {
        let mut all = Vec::new();
        while let Some((channel, bytes)) = backlog.next(4, |_| usize::MAX) {
            all.push((channel, String::from_utf8(bytes.to_vec()).unwrap()));
        }
        all
    }

    fn piece(channel: Channel, text: &str) -> (Channel, String) {
        (channel, text.to_owned())
    }

    #[test]
    fn both_channels_are_sent_in_the_order_in_which_they_were_written() {
        let mut backlog = Backlog::default();
        backlog.push(OUT, b"abcdef".to_vec());
        backlog.push(ERR, b"x".to_vec());
        backlog.push(OUT, b"g".to_vec());
        assert_eq!(backlog.next(9, |_| 9), None, "nobody is attached");
        assert_eq!(backlog.attach([0, 0]), [0, 0]);
        let expected = [piece(OUT, "abcd"), piece(OUT, "ef"), piece(ERR, "x"), piece(OUT, "g")];
        assert_eq!(sent(&mut backlog), expected);
        assert!(backlog.is_sent());
    }

    #[test]
    fn a_host_that_comes_again_goes_on_where_it_says() {
        let mut backlog = Backlog::default();
        backlog.attach([0, 0]);
        backlog.push(OUT, b"abcd".to_vec());
        backlog.push(ERR, b"xy".to_vec());
        sent(&mut backlog);
        backlog.acknowledge(OUT, 4);
        backlog.detach();
        backlog.push(OUT, b"ef".to_vec());
        assert_eq!(backlog.attach([2, 2]), [2, 2]);
        assert_eq!(sent(&mut backlog), [piece(OUT, "cd"), piece(OUT, "ef")]);
        assert_eq!(backlog.attach([0, 1]), [0, 1]);
        let again = [piece(OUT, "abcd"), piece(ERR, "y"), piece(OUT, "ef")];
        assert_eq!(sent(&mut backlog), again);
        assert_eq!(backlog.attach([99, 99]), [6, 2], "a host cannot have what was not written");
    }

    #[test]
    fn an_attached_host_stops_the_process_and_loses_nothing() {
        let mut backlog = Backlog::default();
        backlog.attach([0, 0]);
        let mut written = 0_u64;
        while backlog.has_room() {
            backlog.push(OUT, vec![b'x'; 1000]);
            written += 1000;
        }
        assert!((UNACKNOWLEDGED..UNACKNOWLEDGED + 1001).contains(&written));
        let mut total = 0;
        while let Some((_, bytes)) = backlog.next(4096, |_| 4096) {
            total += bytes.len() as u64;
        }
        assert_eq!(total, written);
        backlog.acknowledge(OUT, 1);
        assert!(!backlog.has_room());
        backlog.detach();
        assert!(!backlog.has_room(), "another host is about to come");
        backlog.acknowledge(OUT, 1000);
        assert!(backlog.has_room());
    }

    #[test]
    fn without_a_host_the_oldest_is_forgotten_and_the_gap_can_be_told() {
        let mut backlog = Backlog::default();
        for _ in 0..CAPACITY / 1000 + 100 {
            assert!(backlog.has_room());
            backlog.push(OUT, vec![b'x'; 1000]);
        }
        backlog.push(ERR, b"last".to_vec());
        assert!(backlog.cost <= CAPACITY);
        let [stdout, stderr] = backlog.attach([0, 0]);
        assert!(stdout > 100_000 && stderr == 0, "{stdout}");
        let mut total = stdout;
        while let Some((channel, bytes)) = backlog.next(4096, |_| 4096) {
            total += if channel == OUT { bytes.len() as u64 } else { 0 };
        }
        assert_eq!(total, backlog.positions[0].written);
        assert!(backlog.is_sent());
        for _ in 0..UNACKNOWLEDGED / 1000 + 1 {
            backlog.push(OUT, vec![b'x'; 1000]);
        }
        assert!(!backlog.has_room());
        backlog.abandon();
        assert!(backlog.has_room(), "nobody is there to wait for");
    }

    #[test]
    fn single_bytes_do_not_cost_more_than_there_is_room_for() {
        let mut backlog = Backlog::default();
        for _ in 0..CAPACITY / 16 {
            backlog.push(ERR, vec![0]);
        }
        assert!(backlog.pieces.len() <= CAPACITY / PIECE_COST);
    }

    #[test]
    fn output_for_which_there_is_no_credit_waits() {
        let mut backlog = Backlog::default();
        backlog.attach([0, 0]);
        backlog.push(ERR, b"abc".to_vec());
        let credit = |amount| move |channel| if channel == ERR { amount } else { 9 };
        assert_eq!(backlog.next(9, credit(2)), Some((ERR, &b"ab"[..])));
        assert_eq!(backlog.next(9, credit(0)), None);
        assert!(!backlog.is_sent());
        assert_eq!(backlog.next(9, credit(5)), Some((ERR, &b"c"[..])));
    }
}
