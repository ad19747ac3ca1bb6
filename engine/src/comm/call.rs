//! What is to be done, [`Call`], and on which memory, [`Data`].

use std::{sync::Arc, time::Duration};

use fabric_kernels::{Dtype, Fold};

use super::{Label, Rank};
use crate::{
    buffer::Slab,
    schedule::Kind,
    wire::frame::{OpCode, ReduceCode},
};

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
    /// Every bit that all have; integers and bool.
    BitAnd,
    /// Every bit that one has; integers and bool.
    BitOr,
    /// Every bit that an odd number have; integers and bool.
    BitXor,
}

impl ReduceOp {
    /// The fold that the tree applies.
    pub(crate) fn fold(self) -> Fold {
        match self {
            Self::Sum | Self::Avg | Self::PreMulSum(_) => Fold::Sum,
            Self::Prod => Fold::Prod,
            Self::Min => Fold::Min,
            Self::Max => Fold::Max,
            Self::BitAnd => Fold::And,
            Self::BitOr => Fold::Or,
            Self::BitXor => Fold::Xor,
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
            Self::BitAnd => ReduceCode::BitAnd,
            Self::BitOr => ReduceCode::BitOr,
            Self::BitXor => ReduceCode::BitXor,
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

/// A collective, or a message from one rank to another.
///
/// In-place positions are those of nccl-tests: a reduce_scatter leaves its result in this rank's slice of the input, an
/// all_gather finds its input in this rank's slice of the output. With a root, the root's slab is the whole vector, and any
/// other rank's is its part alone: its input to a gather or a reduce, its output from a scatter. An all_to_all has no form in
/// place. Where a rank has no input, or no output, that slab of [`Data::Out`] may be empty and is left alone.
///
/// Slices are even unless [`Call::counts`] says otherwise.
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
    /// The root gets the fold of everybody's elements.
    Reduce {
        /// How they become one.
        op: ReduceOp,
        /// Who gets it.
        root: Rank,
    },
    /// The root gets everybody's elements, by rank.
    Gather {
        /// Who gets them.
        root: Rank,
    },
    /// Rank r gets slice r of the root's elements.
    Scatter {
        /// Whose elements.
        root: Rank,
    },
    /// Rank r gets block r of everybody's elements, by rank.
    AllToAll,
    /// This rank's elements go to another, which calls [`Op::Recv`]. The two alone take part: the others need not know.
    Send {
        /// To whom.
        to: Rank,
    },
    /// Elements from another rank, which calls [`Op::Send`].
    Recv {
        /// From whom.
        from: Rank,
    },
    /// A send and a receive at once, so that ranks in a ring need not take turns; sends and receives of other ranks match
    /// either half. Input and output are apart, and may differ in length.
    SendRecv {
        /// To whom the input goes.
        to: Rank,
        /// From whom the output comes.
        from: Rank,
    },
    /// Nobody leaves before everybody has come.
    Barrier,
}

impl Op {
    /// How many operations there are.
    pub(super) const KINDS: usize = 12;

    /// A number for each operation, whatever its reduction and its root, from 0 on.
    #[inline]
    pub(super) fn index(self) -> usize {
        match self {
            Self::AllReduce(_) => 0,
            Self::ReduceScatter(_) => 1,
            Self::AllGather => 2,
            Self::Broadcast { .. } => 3,
            Self::Reduce { .. } => 4,
            Self::Gather { .. } => 5,
            Self::Scatter { .. } => 6,
            Self::AllToAll => 7,
            Self::Send { .. } => 8,
            Self::Recv { .. } => 9,
            Self::SendRecv { .. } => 10,
            Self::Barrier => 11,
        }
    }

    pub(crate) fn code(self) -> (OpCode, ReduceCode) {
        let code = match self {
            Self::AllReduce(_) => OpCode::AllReduce,
            Self::ReduceScatter(_) => OpCode::ReduceScatter,
            Self::AllGather => OpCode::AllGather,
            Self::Broadcast { .. } => OpCode::Broadcast,
            Self::Reduce { .. } => OpCode::Reduce,
            Self::Gather { .. } => OpCode::Gather,
            Self::Scatter { .. } => OpCode::Scatter,
            Self::AllToAll => OpCode::AllToAll,
            Self::Send { .. } | Self::Recv { .. } | Self::SendRecv { .. } => OpCode::SendRecv,
            Self::Barrier => OpCode::Barrier,
        };
        (code, self.reduce().map_or(ReduceCode::None, ReduceOp::code))
    }

    /// What a schedule calls it; there is none for what only two ranks do.
    pub(crate) fn kind(self) -> Option<Kind> {
        Some(match self {
            Self::AllReduce(_) => Kind::AllReduce,
            Self::ReduceScatter(_) => Kind::ReduceScatter,
            Self::AllGather => Kind::AllGather,
            Self::Broadcast { root } => Kind::Broadcast { root },
            Self::Reduce { root, .. } => Kind::Reduce { root },
            Self::Gather { root } => Kind::Gather { root },
            Self::Scatter { root } => Kind::Scatter { root },
            Self::AllToAll => Kind::AllToAll,
            Self::Send { .. } | Self::Recv { .. } | Self::SendRecv { .. } => return None,
            Self::Barrier => Kind::Barrier,
        })
    }

    /// To whom, and from whom, where it is a message.
    pub(crate) fn ends(self) -> (Option<Rank>, Option<Rank>) {
        match self {
            Self::Send { to } => (Some(to), None),
            Self::Recv { from } => (None, Some(from)),
            Self::SendRecv { to, from } => (Some(to), Some(from)),
            _ => (None, None),
        }
    }

    /// Whether each rank's elements are changed before they are folded.
    pub(crate) fn is_lifted(self) -> bool {
        matches!(self.reduce(), Some(ReduceOp::PreMulSum(_)))
    }

    /// The reduction, where there is one.
    pub fn reduce(self) -> Option<ReduceOp> {
        match self {
            Self::AllReduce(op) | Self::ReduceScatter(op) | Self::Reduce { op, .. } => Some(op),
            _ => None,
        }
    }
}

/// One collective to be done.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Which.
    pub op: Op,
    /// What for, in the words of an error message.
    pub label: Label,
    /// How long it may take; `None` is the communicator's own limit.
    pub deadline: Option<Duration>,
    /// The caller waits at once: on an idle communicator the call then runs on the caller's own thread.
    pub blocking: bool,
    /// How many elements each rank's slice has, the same list on all ranks; in an all_to_all, how many go from one rank to
    /// another, at `from * world size + to`. `None`: all alike. (NCCL and MPI call these operations reduce_scatter_v,
    /// all_gather_v, gather_v, scatter_v, all_to_all_v.)
    pub counts: Option<Arc<[usize]>>,
}

impl Call {
    /// A call that runs beside the caller.
    pub fn new(op: Op) -> Self {
        Self {
            op,
            label: Label::User,
            deadline: None,
            blocking: false,
            counts: None,
        }
    }

    /// The same, with a label.
    pub fn label(self, label: Label) -> Self {
        Self { label, ..self }
    }

    /// The same, with uneven slices: see [`Call::counts`](#structfield.counts).
    pub fn counts(self, counts: impl Into<Arc<[usize]>>) -> Self {
        Self {
            counts: Some(counts.into()),
            ..self
        }
    }

    /// Whether its slices are told by the very list `counts`, or by none as those are: what can be told at a glance.
    #[inline]
    pub(super) fn is_cut_as(&self, counts: &Option<Arc<[usize]>>) -> bool {
        match (&self.counts, counts) {
            (None, None) => true,
            (Some(own), Some(counts)) => Arc::ptr_eq(own, counts),
            _ => false,
        }
    }

    /// The same, for a caller that waits at once.
    pub fn blocking(self) -> Self {
        Self {
            blocking: true,
            ..self
        }
    }
}

/// The memory of a collective: given with the call, and back from [`Work::wait`](super::Work::wait).
#[derive(Debug)]
pub enum Data {
    /// No elements: a barrier.
    None,
    /// Input and output in one slab, at nccl-tests' positions.
    InPlace(Slab),
    /// Several slabs that are reduced or broadcast as if they were one, in place: many small ones cost one operation. For
    /// all_reduce, reduce and broadcast.
    Many(Vec<Slab>),
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
    /// When there is none, or there are several.
    pub fn into_output(self) -> Slab {
        match self {
            Self::InPlace(slab) | Self::Out { into: slab, .. } => slab,
            Self::None => panic!("a barrier has no output"),
            Self::Many(_) => panic!("there is more than one output"),
        }
    }

    /// The slabs of [`Data::Many`].
    ///
    /// # Panics
    /// When it is something else.
    pub fn into_many(self) -> Vec<Slab> {
        match self {
            Self::Many(slabs) => slabs,
            other => panic!("{other:?} is not several slabs"),
        }
    }
}
