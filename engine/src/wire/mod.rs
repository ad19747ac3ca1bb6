//! Bytes between two ranks. A wire has one verb, [`Wire::exchange`]: everything that one round of a schedule sends and
//! receives, in flight at once. What the bytes mean is the communicator's business. Shared memory (`shm`) needs no
//! messages and is no [`Wire`]: its ranks meet, and load and store for themselves.

pub mod frame;
pub mod ledger;
pub(crate) mod shm;
pub mod sim;
pub mod tcp;

use std::time::Duration;

use fabric_kernels::{Span, SpanMut};

use crate::{clock::Clock, error::Result, signal::Signal};
use frame::Stamp;
use ledger::Ledger;

/// One message to send: its pieces, one after the other.
pub struct Outgoing<'a> {
    /// To whom.
    pub to: usize,
    /// The payload, in order.
    pub parts: Vec<Span<'a>>,
}

/// One message to receive, into pieces of private memory, one after the other.
pub struct Incoming<'a> {
    /// From whom.
    pub from: usize,
    /// Where the payload goes, in order.
    pub parts: Vec<SpanMut<'a>>,
}

/// What bounds a wait, and what is known while waiting.
#[derive(Clone)]
pub struct Vigil {
    /// The clock that deadlines are read on.
    pub clock: Clock,
    /// Raised when somebody fails.
    pub signal: Signal,
    /// Who was last seen where.
    pub ledger: Ledger,
}

/// Messages between the ranks of a group.
pub trait Wire: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// Send and receive all messages of one round of operation `stamp`; messages between two ranks keep their order.
    ///
    /// # Errors
    /// When a peer is gone or has diverged, when `deadline` (on the vigil's clock) passes, or when the signal is raised.
    /// The wire is unusable afterwards.
    fn exchange(
        &mut self,
        stamp: &Stamp,
        round: u32,
        sends: &[Outgoing<'_>],
        recvs: Vec<Incoming<'_>>,
        deadline: Option<Duration>,
    ) -> Result<()>;

    /// What was sent so far.
    fn sent(&self) -> Sent;
}

/// What a wire has sent since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Messages.
    pub messages: u64,
    /// Bytes of payload, headers not counted.
    pub payload_bytes: u64,
}
