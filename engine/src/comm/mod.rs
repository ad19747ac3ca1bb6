//! Groups of ranks that act together. One verb, [`Communicator::submit`]: memory goes in, an owned [`Work`] comes out,
//! and `wait` gives the memory back. Tracing, faults and time-outs wrap in that one method.

mod forms;
pub mod host;
mod link;
pub mod solo;
pub mod trace;
mod work;

use std::time::Duration;

use fabric_kernels::{Dtype, Fold};

pub use forms::Collectives;
pub use link::Link;
pub use work::Work;

pub use crate::wire::frame::Label;
use crate::{
    buffer::Slab,
    error::{Error, Result},
    rendezvous::Control,
    schedule::Kind,
    signal::Signal,
    wire::frame::{OpCode, ReduceCode},
};

/// A rank's number in its group.
pub type Rank = usize;

/// How the ranks' elements become one. All follow one fold order, the canonical binary tree over rank numbers, so the
/// bits depend neither on the algorithm nor on the wire.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The sum, multiplied once by 1/n in the accumulator's type; integers are divided and truncated.
    Avg,
    /// The product.
    Prod,
    /// The smallest; NaN wins, -0 is smaller than +0.
    Min,
    /// The largest; NaN wins, +0 is larger than -0.
    Max,
    /// The sum of each rank's elements times that rank's own factor, multiplied in the accumulator's type.
    PreMulSum(f64),
}

impl ReduceOp {
    /// The fold that the tree applies.
    pub(crate) fn fold(self) -> Fold {
        match self {
            Self::Sum | Self::Avg | Self::PreMulSum(_) => Fold::Sum,
            Self::Prod => Fold::Prod,
            Self::Min => Fold::Min,
            Self::Max => Fold::Max,
        }
    }

    fn code(self) -> ReduceCode {
        match self {
            Self::Sum => ReduceCode::Sum,
            Self::Avg => ReduceCode::Avg,
            Self::Prod => ReduceCode::Prod,
            Self::Min => ReduceCode::Min,
            Self::Max => ReduceCode::Max,
            Self::PreMulSum(_) => ReduceCode::PreMulSum,
        }
    }

    /// The type in which partial results are kept: f32 for the small floats, except that the smallest and the largest
    /// need no wider type.
    pub fn partial(self, dtype: Dtype) -> Dtype {
        match self {
            Self::Min | Self::Max => dtype,
            _ => dtype.accumulator(),
        }
    }
}

/// A collective. In-place positions are those of nccl-tests: a reduce_scatter leaves its result in this rank's slice of
/// the input, an all_gather finds its input in this rank's slice of the output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// Everybody gets the fold of everybody's elements.
    AllReduce(ReduceOp),
    /// Rank r gets slice r of the fold. The input has world size x the output's elements.
    ReduceScatter(ReduceOp),
    /// Everybody gets everybody's elements, by rank.
    AllGather,
    /// Everybody gets the root's elements.
    Broadcast {
        /// Whose elements.
        root: Rank,
    },
    /// Nobody leaves before everybody has come.
    Barrier,
}

impl Op {
    pub(crate) fn code(self) -> (OpCode, ReduceCode) {
        match self {
            Self::AllReduce(op) => (OpCode::AllReduce, op.code()),
            Self::ReduceScatter(op) => (OpCode::ReduceScatter, op.code()),
            Self::AllGather => (OpCode::AllGather, ReduceCode::None),
            Self::Broadcast { .. } => (OpCode::Broadcast, ReduceCode::None),
            Self::Barrier => (OpCode::Barrier, ReduceCode::None),
        }
    }

    /// What a schedule calls it.
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::AllReduce(_) => Kind::AllReduce,
            Self::ReduceScatter(_) => Kind::ReduceScatter,
            Self::AllGather => Kind::AllGather,
            Self::Broadcast { root } => Kind::Broadcast { root },
            Self::Barrier => Kind::Barrier,
        }
    }

    /// Whether each rank's elements are changed before they are folded.
    pub(crate) fn is_lifted(self) -> bool {
        matches!(self.reduce(), Some(ReduceOp::PreMulSum(_)))
    }

    /// The reduction, where there is one.
    pub fn reduce(self) -> Option<ReduceOp> {
        match self {
            Self::AllReduce(op) | Self::ReduceScatter(op) => Some(op),
            _ => None,
        }
    }
}

/// One collective to be done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Call {
    /// Which.
    pub op: Op,
    /// What for, in the words of an error message.
    pub label: Label,
    /// How long it may take; `None` is the communicator's own limit.
    pub deadline: Option<Duration>,
    /// The caller waits at once: on an idle communicator the call then runs on the caller's own thread.
    pub blocking: bool,
}

impl Call {
    /// A call that runs beside the caller.
    pub fn new(op: Op) -> Self {
        Self {
            op,
            label: Label::User,
            deadline: None,
            blocking: false,
        }
    }

    /// The same, with a label.
    pub fn label(self, label: Label) -> Self {
        Self { label, ..self }
    }

    /// The same, for a caller that waits at once.
    pub fn blocking(self) -> Self {
        Self {
            blocking: true,
            ..self
        }
    }
}

/// The memory of a collective: given with the call, and back from [`Work::wait`].
#[derive(Debug)]
pub enum Data {
    /// No elements: a barrier.
    None,
    /// Input and output in one slab, at nccl-tests' positions.
    InPlace(Slab),
    /// Input and output apart.
    Out {
        /// The input.
        from: Slab,
        /// The output.
        into: Slab,
    },
}

impl Data {
    /// The slab with the output.
    ///
    /// # Panics
    /// When there is none.
    pub fn into_output(self) -> Slab {
        match self {
            Self::InPlace(slab) | Self::Out { into: slab, .. } => slab,
            Self::None => panic!("a barrier has no output"),
        }
    }
}

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

    /// Start `call` on `data`.
    ///
    /// # Errors
    /// When the call does not fit the data, or the communicator has failed before (the first error, again). Errors of
    /// the operation itself come from [`Work::wait`].
    fn submit(&mut self, call: Call, data: Data) -> Result<Work>;

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
