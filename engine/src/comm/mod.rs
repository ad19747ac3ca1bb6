//! Groups of ranks that act together. One verb, [`Communicator::submit`]: memory goes in, an owned [`Work`] comes out,
//! and `wait` gives the memory back. Tracing, faults and time-outs wrap in that one method.

mod call;
mod forms;
pub mod host;
mod link;
#[cfg(feature = "cuda")]
pub mod nccl;
pub mod solo;
pub mod trace;
mod work;

use std::sync::Arc;

use fabric_kernels::{Device, Dtype};

pub use call::{Call, Data, Op, ReduceOp};
pub use forms::Collectives;
pub use link::Link;
pub use work::Work;

pub use crate::wire::frame::Label;
use crate::{
    buffer::Slab,
    error::{Error, Result},
    rendezvous::Control,
    signal::Signal,
};

/// A rank's number in its group.
pub type Rank = usize;

/// A group of ranks that act together. All ranks of a group submit the same calls in the same order; the order of
/// submission is the order of work.
pub trait Communicator: Send {
    /// This rank's number in the group.
    fn rank(&self) -> Rank;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// Zeroed memory that this communicator reaches without a copy.
    ///
    /// # Errors
    /// When there is no more.
    fn alloc(&self, dtype: Dtype, numel: usize) -> Result<Slab>;

    /// The device in whose memory [`Communicator::alloc`] allocates; `None` is the host.
    fn device(&self) -> Option<Arc<dyn Device>> {
        None
    }

    /// Zeroed memory of the host that this communicator reaches without a copy, also where it has a device.
    ///
    /// # Errors
    /// When there is no more.
    fn alloc_host(&self, dtype: Dtype, numel: usize) -> Result<Slab> {
        self.alloc(dtype, numel)
    }

    /// Start `call` on `data`.
    ///
    /// # Errors
    /// When the call does not fit the data, or the communicator has failed before (the first error, again). Errors of
    /// the operation itself come from [`Work::wait`].
    fn submit(&mut self, call: Call, data: Data) -> Result<Work>;

    /// Do `call` on `data` and wait for it: as [`Communicator::submit`] and [`Work::wait`], but nothing is moved about, which the
    /// shortest calls take a good part of their time for. The call blocks, whatever it says itself.
    ///
    /// # Errors
    /// As those two. Memory that peers may still reach is kept by the communicator; `data` is [`Data::None`] then.
    fn run(&mut self, call: &Call, data: &mut Data) -> Result<()> {
        let taken = std::mem::replace(data, Data::None);
        *data = self.submit(call.clone().blocking(), taken)?.wait()?;
        Ok(())
    }

    /// The group's subgroup of all ranks that give the same `color`, ordered by `key`, then by rank.
    ///
    /// # Errors
    /// When the subgroup cannot be connected.
    fn split(&mut self, color: u32, key: u32) -> Result<Box<dyn Communicator>>;

    /// A handle that stops everything, also while another thread waits.
    fn aborter(&self) -> Aborter;

    /// What this rank will have sent for `call` on `numel` elements of `dtype` (of the full vector), by the schedule.
    fn price(&self, call: &Call, dtype: Dtype, numel: usize) -> Spent;

    /// What this rank has sent so far.
    fn spent(&self) -> Spent;

    /// Bytes of memory that the system has given this communicator for slabs which peers reach: what does not count as this
    /// process's own.
    fn shared_bytes(&self) -> u64 {
        0
    }

    /// The record of what happened.
    fn trace(&self) -> trace::Trace;
}

/// What collectives cost one rank: counted by the communicator, and predicted by the schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Spent {
    /// Collectives completed.
    pub collectives: u64,
    /// Messages sent (on shared memory: steps that touch a peer's memory).
    pub messages: u64,
    /// Bytes of payload sent (on shared memory: loaded from or stored to a peer's memory).
    pub bytes: u64,
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, other: Self) {
        self.collectives += other.collectives;
        self.messages += other.messages;
        self.bytes += other.bytes;
    }
}

impl std::ops::Sub for Spent {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self {
            collectives: self.collectives - other.collectives,
            messages: self.messages - other.messages,
            bytes: self.bytes - other.bytes,
        }
    }
}

/// Stops a communicator from any thread.
#[derive(Clone)]
pub struct Aborter {
    pub(crate) rank: Rank,
    pub(crate) signal: Signal,
    pub(crate) control: Option<Control>,
}

impl Aborter {
    /// End all operations, here and on the other ranks; every later call returns this reason.
    pub fn abort(&self, reason: impl Into<String>) {
        match &self.control {
            Some(control) => control.abort(self.rank, reason),
            None => drop(self.signal.raise(Error::Aborted {
                rank: self.rank,
                reason: reason.into(),
            })),
        }
    }

    /// The slot in which the first error is kept.
    pub fn signal(&self) -> &Signal {
        &self.signal
    }
}
