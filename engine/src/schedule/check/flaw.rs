//! What can be wrong with a schedule, said so that it can be found.

use std::fmt;

use crate::schedule::{Form, Kind, Problem, Rank, Region};

/// A symbol in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Not written yet.
    Nothing,
    /// A rank's input, as it came.
    Leaf {
        /// Whose.
        rank: Rank,
        /// Element of the full vector.
        elem: usize,
    },
    /// The canonical sum over a block of ranks; of one rank: its leaf, widened and lifted.
    Sum {
        /// The block's first rank.
        lo: Rank,
        /// How many ranks.
        len: usize,
        /// Element of the full vector.
        elem: usize,
    },
    /// The sum over all ranks, scaled and rounded once.
    Finished {
        /// Element of the full vector.
        elem: usize,
    },
}

impl Value {
    /// This value in the accumulator's form. `input`: read from Input itself, where lifting happens.
    pub(super) fn widened(self, lifted: bool, input: bool) -> Option<Value> {
        match self {
            Value::Leaf { rank, elem } if input || !lifted => Some(Value::Sum {
                lo: rank,
                len: 1,
                elem,
            }),
            Value::Sum { .. } => Some(self),
            _ => None,
        }
    }

    /// The sum of the two halves of a block; `None` of anything else.
    pub(super) fn folded(self, with: Value, world: usize) -> Option<Value> {
        let (
            Value::Sum {
                lo: a,
                len: a_len,
                elem,
            },
            Value::Sum {
                lo: b,
                len: b_len,
                elem: other,
            },
        ) = (self, with)
        else {
            return None;
        };
        let (lo, left, mid, right) = if a < b {
            (a, a_len, b, b_len)
        } else {
            (b, b_len, a, a_len)
        };
        let halves = left.is_power_of_two()
            && lo.is_multiple_of(2 * left)
            && mid == lo + left
            && right == left.min(world - mid);
        (halves && elem == other).then_some(Value::Sum {
            lo,
            len: left + right,
            elem,
        })
    }

    /// What a rank must end with as element `elem` of the full vector.
    pub(super) fn is_answer(self, problem: &Problem, elem: usize) -> bool {
        match problem.kind {
            Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce { .. } => {
                let alone =
                    problem.world == 1 && !problem.lifted && self == Value::Leaf { rank: 0, elem };
                alone || self == Value::Finished { elem }
            }
            Kind::AllGather | Kind::Gather { .. } | Kind::AllToAll => {
                let Value::Leaf { rank, elem: found } = self else {
                    return false;
                };
                found == elem && problem.slices[rank].contains(&elem)
            }
            Kind::Broadcast { root } | Kind::Scatter { root } => {
                self == Value::Leaf { rank: root, elem }
            }
            Kind::Barrier => true,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Nothing => f.write_str("nothing"),
            Value::Leaf { rank, elem } => write!(f, "rank {rank}'s leaf {elem}"),
            Value::Sum { lo, len: 1, elem } => write!(f, "rank {lo}'s element {elem}, widened"),
            Value::Sum { lo, len, elem } => {
                write!(f, "element {elem} over ranks {lo}..{}", lo + len)
            }
            Value::Finished { elem } => write!(f, "element {elem}, finished"),
        }
    }
}

/// One element of one region of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Whose memory.
    pub rank: Rank,
    /// Which memory.
    pub region: Region,
    /// Element of the region.
    pub index: usize,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cell {
            rank,
            region,
            index,
        } = self;
        match region {
            Region::Input => write!(f, "input[{index}] of rank {rank}"),
            Region::Output => write!(f, "output[{index}] of rank {rank}"),
            Region::Scratch(slot) => write!(f, "scratch {slot}[{index}] of rank {rank}"),
        }
    }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the fields are named by the sentences of Display"
)]
#[non_exhaustive]
pub enum Flaw {
    /// Ranks have different numbers of rounds.
    Rounds {
        rank: Rank,
        found: usize,
        expected: usize,
    },
    /// Ranks have different numbers of syncs.
    Syncs {
        rank: Rank,
        found: usize,
        expected: usize,
    },
    /// A fold or copy in the wire, or a send or receive outside it.
    Misplaced { rank: Rank, round: usize },
    /// A message to or from oneself, or outside the world.
    Peer {
        rank: Rank,
        round: usize,
        peer: Rank,
    },
    /// A location outside its region, or a slot that is not there.
    Bounds {
        cell: Cell,
        round: usize,
        len: usize,
    },
    /// A receive without its send.
    Unsent { from: Rank, to: Rank, round: usize },
    /// A send without its receive.
    Unreceived { from: Rank, to: Rank, round: usize },
    /// A send and its receive, or the two sides of a local move, differ in length.
    Length {
        from: Rank,
        to: Rank,
        round: usize,
        sent: usize,
        taken: usize,
    },
    /// A send and its receive differ in form.
    Form {
        from: Rank,
        to: Rank,
        round: usize,
        sent: Form,
        taken: Form,
    },
    /// A move that this region or form does not allow: Input is never written, only partial slots are folded into, and
    /// a partial becomes a payload only in Output.
    Target { cell: Cell, round: usize },
    /// A read of what was never written.
    Undefined { cell: Cell, round: usize },
    /// A receive onto what is sent or received at the same time.
    Race { cell: Cell, round: usize },
    /// A copy or fold between memory that overlaps but is not the same.
    Overlap { cell: Cell, round: usize },
    /// A read of Input after Output was written there.
    LateInput { cell: Cell, round: usize },
    /// A fold of two values that are not the halves of a block.
    Order {
        cell: Cell,
        round: usize,
        into: Value,
        with: Value,
    },
    /// A leaf that should have been lifted, or a finished value, taken for a partial one.
    Widened {
        cell: Cell,
        round: usize,
        found: Value,
    },
    /// A sum finished before it was over all ranks.
    Early {
        cell: Cell,
        round: usize,
        found: Value,
    },
    /// An output that ends with the wrong value.
    Answer { cell: Cell, found: Value },
    /// A rank leaves the barrier without having heard of another.
    Ignorant { rank: Rank, of: Rank },
    /// Shared memory: one rank writes what another reads or writes in the same phase.
    Hazard {
        cell: Cell,
        writer: Rank,
        other: Rank,
    },
    /// Shared memory: a peer's memory is touched before the first sync or after the last.
    Unguarded { cell: Cell, rank: Rank },
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Flaw::Rounds {
                rank,
                found,
                expected,
            } => {
                write!(
                    f,
                    "rank {rank} has {found} rounds where rank 0 has {expected}"
                )
            }
            Flaw::Syncs {
                rank,
                found,
                expected,
            } => {
                write!(
                    f,
                    "rank {rank} has {found} syncs where rank 0 has {expected}"
                )
            }
            Flaw::Misplaced { rank, round } => write!(
                f,
                "rank {rank}, round {round}: folds and copies are local, sends and receives on the wire"
            ),
            Flaw::Peer { rank, round, peer } => {
                write!(f, "rank {rank}, round {round}: no message to rank {peer}")
            }
            Flaw::Bounds { cell, round, len } => {
                write!(f, "round {round}: {cell} is outside its {len} elements")
            }
            Flaw::Unsent { from, to, round } => {
                write!(
                    f,
                    "round {round}: rank {to} receives from rank {from}, which does not send"
                )
            }
            Flaw::Unreceived { from, to, round } => {
                write!(
                    f,
                    "round {round}: rank {from} sends to rank {to}, which does not receive"
                )
            }
            Flaw::Length {
                from,
                to,
                round,
                sent,
                taken,
            } => write!(
                f,
                "round {round}: {sent} elements from rank {from} into {taken} elements of rank {to}"
            ),
            Flaw::Form {
                from,
                to,
                round,
                sent,
                taken,
            } => {
                write!(
                    f,
                    "round {round}: rank {from} sends {sent:?}, rank {to} receives {taken:?}"
                )
            }
            Flaw::Target { cell, round } => {
                write!(f, "round {round}: this move may not write {cell}")
            }
            Flaw::Undefined { cell, round } => {
                write!(f, "round {round}: {cell} is read and was never written")
            }
            Flaw::Race { cell, round } => {
                write!(
                    f,
                    "round {round}: a receive writes {cell}, which is sent or received at the same time"
                )
            }
            Flaw::Overlap { cell, round } => {
                write!(
                    f,
                    "round {round}: source and target overlap at {cell} and are not the same"
                )
            }
            Flaw::LateInput { cell, round } => {
                write!(
                    f,
                    "round {round}: {cell} is read after the output in its place was written"
                )
            }
            Flaw::Order {
                cell,
                round,
                into,
                with,
            } => {
                write!(
                    f,
                    "round {round}: {cell} is {into} and is folded with {with}: not the halves of one block"
                )
            }
            Flaw::Widened { cell, round, found } => {
                write!(
                    f,
                    "round {round}: {cell} is {found} and is used as a partial sum"
                )
            }
            Flaw::Early { cell, round, found } => {
                write!(
                    f,
                    "round {round}: {cell} is {found} and is finished before it holds all ranks"
                )
            }
            Flaw::Answer { cell, found } => write!(f, "{cell} ends as {found}"),
            Flaw::Ignorant { rank, of } => {
                write!(f, "rank {rank} leaves the barrier unaware of rank {of}")
            }
            Flaw::Hazard {
                cell,
                writer,
                other,
            } => {
                write!(f, "rank {writer} writes {cell} while rank {other} uses it")
            }
            Flaw::Unguarded { cell, rank } => {
                write!(
                    f,
                    "rank {rank} touches {cell} before the first sync or after the last"
                )
            }
        }
    }
}

impl std::error::Error for Flaw {}
