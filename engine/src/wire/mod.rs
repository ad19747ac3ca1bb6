//! Bytes between two ranks. A wire has one verb, [`Wire::exchange`]: everything that one round of a schedule sends and
//! receives, in flight at once. What the bytes mean is the communicator's business. Shared memory (`shm`) needs no
//! messages and is no [`Wire`]: its ranks meet, and load and store for themselves.

pub mod frame;
pub mod ledger;
pub(crate) mod shm;
pub mod sim;
pub mod stream;

mod waiting;

use std::time::Duration;

use crate::{
    buffer::{Piece, Slab},
    clock::Clock,
    error::Result,
    signal::Signal,
};
use frame::Stamp;
use ledger::Ledger;
pub(crate) use waiting::Waiting;

/// One message: its pieces of memory, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// To whom, or from whom.
    pub peer: usize,
    /// Where the payload is, or goes, in order.
    pub pieces: Vec<Piece>,
}

impl Parcel {
    /// Bytes of payload.
    pub fn bytes(&self, memory: &[Slab]) -> usize {
        let bytes = |piece: &Piece| piece.range.len() * memory[piece.slab].dtype().size();
        self.pieces.iter().map(bytes).sum()
    }
}

/// All messages of one round. Between two ranks they keep their order. What is received overlaps nothing else in the round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// What leaves.
    pub sends: Vec<Parcel>,
    /// What comes.
    pub recvs: Vec<Parcel>,
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

    /// Send and receive all messages of one round of operation `stamp`, from and into pieces of `memory`.
    ///
    /// # Errors
    /// When a peer is gone or has diverged, when `deadline` (on the vigil's clock) passes, or when the signal is raised.
    /// The wire is unusable afterwards.
    fn exchange(
        &mut self,
        stamp: &Stamp,
        round: u32,
        traffic: &Traffic,
        memory: &mut [Slab],
        deadline: Option<Duration>,
    ) -> Result<()>;

    /// What was sent so far.
    fn sent(&self) -> Sent;

    /// How long a part of a long vector is best reduced at a time; the same on all ranks, `None` for all of it.
    fn window_bytes(&self) -> Option<usize> {
        None
    }
}

/// What a wire has sent since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Messages.
    pub messages: u64,
    /// Bytes of payload, headers not counted.
    pub payload_bytes: u64,
}
