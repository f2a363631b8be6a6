//! Credit: how both ends of the guest protocol bound what is in flight.
//!
//! Each stream and data kind has one [`SendWindow`] at the sender and one [`ReceiveWindow`] at the
//! receiver. Sans-I/O; the sessions on both sides of the protocol own the windows.

use crate::guest::INITIAL_CREDIT;

/// The part of a window that is unreturned when a receiver sends credit: often enough that a sender
/// never stalls on a fast receiver, seldom enough that it hardly counts: in an emulated guest each
/// message to the host takes as long as tens of kilobytes of data.
const RETURN_AT: u32 = 2;

/// The peer does not keep to the credit that it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CreditError {
    /// More data came than there was credit for.
    #[error("{bytes} bytes of data came with credit for {credit} left")]
    Overrun {
        /// Bytes that came.
        bytes: usize,
        /// Bytes that might have come.
        credit: u32,
    },
    /// More credit came back than was spent.
    #[error("credit for {bytes} bytes came back while {spent} were unreturned")]
    Overgrant {
        /// Bytes that came back.
        bytes: u32,
        /// Bytes that were spent and not returned.
        spent: u32,
    },
}

/// What a sender may still send.
#[derive(Debug, Clone)]
pub struct SendWindow {
    credit: u32,
    size: u32,
}

impl Default for SendWindow {
    fn default() -> Self {
        Self::of(INITIAL_CREDIT)
    }
}

impl SendWindow {
    /// A window of this many bytes, as the receiver's is.
    pub fn of(size: u32) -> Self {
        Self { credit: size, size }
    }

    /// Bytes that may be sent now.
    pub fn available(&self) -> usize {
        self.credit as usize
    }

    /// Takes up to `wanted` bytes of credit and tells how many were taken.
    pub fn take(&mut self, wanted: usize) -> usize {
        let taken = wanted.min(self.available());
        self.credit -= taken as u32;
        taken
    }

    /// Adds credit that the receiver returned.
    ///
    /// # Errors
    /// It was never spent.
    pub fn grant(&mut self, bytes: u32) -> Result<(), CreditError> {
        let spent = self.size - self.credit;
        if bytes > spent {
            return Err(CreditError::Overgrant { bytes, spent });
        }
        self.credit += bytes;
        Ok(())
    }
}

/// What a receiver has been sent and not given back.
#[derive(Debug, Clone)]
pub struct ReceiveWindow {
    size: u32,
    /// Received and not consumed.
    held: u32,
    /// Consumed and not yet returned.
    unreturned: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self::of(INITIAL_CREDIT)
    }
}

impl ReceiveWindow {
    /// A window of this many bytes, as the sender's is.
    pub fn of(size: u32) -> Self {
        Self { size, held: 0, unreturned: 0 }
    }

    /// Notes data that came.
    ///
    /// # Errors
    /// The sender had no credit for it; nothing is noted.
    pub fn receive(&mut self, bytes: usize) -> Result<(), CreditError> {
        let credit = self.size - self.held - self.unreturned;
        match u32::try_from(bytes) {
            Ok(bytes) if bytes <= credit => self.held += bytes,
            _ => return Err(CreditError::Overrun { bytes, credit }),
        }
        Ok(())
    }

    /// Notes that received data was passed on; answers with credit to return to the sender, if it
    /// is time to return some.
    pub fn consume(&mut self, bytes: usize) -> Option<u32> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.held);
        self.held -= bytes;
        self.unreturned += bytes;
        (self.unreturned >= self.size / RETURN_AT).then(|| std::mem::take(&mut self.unreturned))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A sender that keeps to its window never overruns the receiver, and never stalls for
        /// good once the receiver has consumed everything.
        #[test]
        fn both_windows_agree_whatever_the_sizes(
            size in 1u32..2 * INITIAL_CREDIT,
            steps in proptest::collection::vec((0usize..100_000, 0usize..100_000), 1..200)
        ) {
            let (mut send, mut receive) = (SendWindow::of(size), ReceiveWindow::of(size));
            let mut held = 0;
            for (wanted, consumed) in steps {
                let sent = send.take(wanted);
                receive.receive(sent).unwrap();
                held += sent;
                let consumed = consumed.min(held);
                held -= consumed;
                if let Some(credit) = receive.consume(consumed) {
                    send.grant(credit).unwrap();
                }
            }
            if let Some(credit) = receive.consume(held) {
                send.grant(credit).unwrap();
            }
            prop_assert!(send.available() as u32 > size - (size / RETURN_AT).max(1));
        }
    }

    #[test]
    fn data_beyond_the_credit_is_refused() {
        let mut window = ReceiveWindow::default();
        window.receive(INITIAL_CREDIT as usize).unwrap();
        assert_eq!(window.receive(1), Err(CreditError::Overrun { bytes: 1, credit: 0 }));
    }

    #[test]
    fn credit_that_was_never_spent_is_refused() {
        let mut window = SendWindow::default();
        assert_eq!(window.take(10), 10);
        assert_eq!(window.grant(11), Err(CreditError::Overgrant { bytes: 11, spent: 10 }));
        window.grant(10).unwrap();
    }
}
