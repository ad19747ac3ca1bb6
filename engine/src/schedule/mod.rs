//! Collectives as data: an algorithm is a pure function from (problem, rank) to the list of moves that rank makes.
//!
//! Two lowerings: [`messages`] for a wire, [`shared()`] for memory that all ranks have mapped. Two readers besides the
//! executors: [`check`] proves both by symbolic execution of all ranks, [`price`] counts what they send. Nothing here
//! has seen a byte, a socket or a clock.
//!
//! [Note: fold order] Every element is summed over ranks in one binary tree over rank numbers, whatever the algorithm:
//!
//! ```text
//!  0   1   2   3   4        blocks of 2^k ranks, aligned at multiples of 2^k;
//!   \ /     \ /    |        value(block) = value(left half) + value(right half),
//!   01       23    |        and a missing right half is skipped:
//!     \     /      |
//!      0123        |        ((0+1)+(2+3))+4
//!          \      /
//!           01234
//! ```
//!
//! One owner map (`owners.rs`) says who holds a block's value; direct, halving, tree and doubling are four such maps.
//!
//! [Note: in place] The executor may give Input and Output the same memory: for all-reduce and broadcast they are equal,
//! for reduce-scatter (and scatter, at its root) Output is the rank's slice of Input, for all-gather (and gather, at its
//! root) Input is the rank's slice of Output. An all-to-all has no such form: its blocks would have to trade places. A schedule
//! is right both ways: no part of Input is read after the matching part of Output was first written.
#![forbid(unsafe_code)]

mod barrier;
pub mod check;
pub mod choose;
mod direct;
mod owners;
pub mod price;
mod problem;
mod reduce;
mod ring;
mod shared;
mod spread;
mod tree;
mod windows;

use std::fmt;
use std::ops::Range;

pub use self::problem::Problem;
pub use self::shared::{Ranks, Shared, posted, shared};
pub use self::windows::windows;

/// A rank's number within its group, from 0.
pub type Rank = usize;

/// What a collective does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Every rank ends with the sum of all inputs.
    AllReduce,
    /// Rank r ends with slice r of the sum of all inputs.
    ReduceScatter,
    /// Every rank ends with all slices, slice r from rank r.
    AllGather,
    /// Every rank ends with the root's input.
    Broadcast {
        /// The rank whose input travels.
        root: Rank,
    },
    /// The root ends with the sum of all inputs.
    Reduce {
        /// The rank that gets it.
        root: Rank,
    },
    /// The root ends with all slices, slice r from rank r.
    Gather {
        /// The rank that gets them.
        root: Rank,
    },
    /// Rank r ends with slice r of the root's input.
    Scatter {
        /// The rank whose input is cut.
        root: Rank,
    },
    /// Rank r ends with block r of every rank's input, in rank order.
    AllToAll,
    /// No rank leaves before all have entered.
    Barrier,
}

impl Kind {
    /// All of them; those with a root have rank 0's.
    pub const ALL: [Kind; 9] = [
        Kind::AllReduce,
        Kind::ReduceScatter,
        Kind::AllGather,
        Kind::Broadcast { root: 0 },
        Kind::Reduce { root: 0 },
        Kind::Gather { root: 0 },
        Kind::Scatter { root: 0 },
        Kind::AllToAll,
        Kind::Barrier,
    ];

    /// The root, where there is one.
    pub fn root(self) -> Option<Rank> {
        match self {
            Kind::Broadcast { root }
            | Kind::Reduce { root }
            | Kind::Gather { root }
            | Kind::Scatter { root } => Some(root),
            _ => None,
        }
    }

    /// The kind's name without its root, as in tables and messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::AllReduce => "all_reduce",
            Kind::ReduceScatter => "reduce_scatter",
            Kind::AllGather => "all_gather",
            Kind::Broadcast { .. } => "broadcast",
            Kind::Reduce { .. } => "reduce",
            Kind::Gather { .. } => "gather",
            Kind::Scatter { .. } => "scatter",
            Kind::AllToAll => "all_to_all",
            Kind::Barrier => "barrier",
        }
    }

    /// Whether values are folded, and not only moved.
    pub fn folds(self) -> bool {
        matches!(
            self,
            Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce { .. }
        )
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a collective is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Everyone to everyone, one round a phase.
    Direct,
    /// Both sides of a pair exchange all they have; log2 rounds.
    Doubling,
    /// Both sides of a pair keep half of what they have, then gather it back; 2 log2 rounds.
    Halving,
    /// Neighbours only; as many rounds as ranks.
    Ring,
    /// Binomial, along the fold order's own tree.
    Tree,
    /// In shared memory: inputs are copied to where all find them, and ranks meet once.
    Post,
    /// In shared memory: inputs are loaded where they lie and results stored where they belong, between two meetings.
    Load,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Algorithm; 7] = [
        Algorithm::Direct,
        Algorithm::Doubling,
        Algorithm::Halving,
        Algorithm::Ring,
        Algorithm::Tree,
        Algorithm::Post,
        Algorithm::Load,
    ];

    /// The name used in tables, variables and messages.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Direct => "direct",
            Algorithm::Doubling => "doubling",
            Algorithm::Halving => "halving",
            Algorithm::Ring => "ring",
            Algorithm::Tree => "tree",
            Algorithm::Post => "post",
            Algorithm::Load => "load",
        }
    }

    /// The algorithm of that name.
    pub fn from_name(name: &str) -> Option<Algorithm> {
        Algorithm::ALL
            .into_iter()
            .find(|algorithm| algorithm.name() == name)
    }

    /// Whether this algorithm is one of shared memory, which does every kind, and not one of messages.
    pub fn shares(self) -> bool {
        matches!(self, Algorithm::Post | Algorithm::Load)
    }

    /// Whether this algorithm does this kind by messages; the same answer as `messages(..).is_some()`.
    pub fn does(self, kind: Kind) -> bool {
        if self.shares() {
            return false;
        }
        match kind {
            Kind::AllReduce | Kind::Reduce { .. } => self != Algorithm::Ring,
            Kind::ReduceScatter => matches!(self, Algorithm::Direct | Algorithm::Halving),
            Kind::AllGather => matches!(
                self,
                Algorithm::Direct | Algorithm::Doubling | Algorithm::Ring
            ),
            Kind::Broadcast { .. } => {
                matches!(self, Algorithm::Direct | Algorithm::Tree | Algorithm::Ring)
            }
            Kind::Gather { .. } | Kind::Scatter { .. } => self == Algorithm::Direct,
            Kind::AllToAll => matches!(self, Algorithm::Direct | Algorithm::Ring),
            Kind::Barrier => matches!(
                self,
                Algorithm::Direct | Algorithm::Doubling | Algorithm::Tree
            ),
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which memory of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// The caller's source, in the payload form; never written.
    Input,
    /// The caller's target, in the payload form.
    Output,
    /// `Schedule::scratch[i]`.
    Scratch(usize),
}

/// In which dtype values stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// The buffer's dtype.
    Payload,
    /// The accumulator's dtype.
    Partial,
}

/// One piece of scratch memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The dtype it holds.
    pub form: Form,
    /// Its length; may be 0.
    pub elems: usize,
}

/// Elements of one region, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loc {
    /// Which memory.
    pub region: Region,
    /// Elements of that region, in order.
    pub ranges: Vec<Range<usize>>,
}

impl Loc {
    /// These ranges in this order; neighbours are joined and empty ones dropped.
    pub fn new(region: Region, ranges: impl IntoIterator<Item = Range<usize>>) -> Loc {
        let mut joined: Vec<Range<usize>> = Vec::new();
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => joined.push(range),
            }
        }
        Loc {
            region,
            ranges: joined,
        }
    }

    /// One range.
    pub fn one(region: Region, range: Range<usize>) -> Loc {
        Loc::new(region, std::iter::once(range))
    }

    /// How many elements.
    pub fn elems(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum()
    }
}

/// One step of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Move {
    /// Hands `from` to rank `to`.
    Send {
        /// The receiver.
        to: Rank,
        /// What travels, in the form of its region.
        from: Loc,
    },
    /// Takes what rank `from` sent in this round.
    Recv {
        /// The sender.
        from: Rank,
        /// Where it lands; the same form and length as it was sent.
        into: Loc,
    },
    /// `into = into + with`. `into` is a partial slot; a payload in `with` is widened.
    Fold {
        /// The accumulator.
        into: Loc,
        /// The other operand: a partial, a received payload, or Input where leaves are not lifted.
        with: Loc,
    },
    /// Within one form: as it is. Input into a partial slot lifts (widens, applies the rank's factor); a received
    /// payload into a partial slot widens; a partial slot into Output finishes (avg's 1/n, one rounding). Between
    /// identical memory (Input into Output, in place) it does nothing.
    Copy {
        /// The source.
        from: Loc,
        /// The target.
        into: Loc,
    },
}

/// What one rank does between two matched points of all ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// `Send` and `Recv` only; all proceed at once. Between two ranks they match in order.
    pub wire: Vec<Move>,
    /// `Fold` and `Copy` only; in order, after the whole wire.
    pub local: Vec<Move>,
}

impl Round {
    /// Hands over a message, unless it is empty.
    fn send(&mut self, to: Rank, from: Loc) {
        if !from.ranges.is_empty() {
            self.wire.push(Move::Send { to, from });
        }
    }

    /// Takes a message, unless it is empty.
    fn recv(&mut self, from: Rank, into: Loc) {
        if !into.ranges.is_empty() {
            self.wire.push(Move::Recv { from, into });
        }
    }

    /// Folds, unless there is nothing to fold.
    fn fold(&mut self, into: Loc, with: Loc) {
        debug_assert_eq!(into.elems(), with.elems());
        if !into.ranges.is_empty() {
            self.local.push(Move::Fold { into, with });
        }
    }

    /// Copies, unless there is nothing to copy.
    fn copy(&mut self, from: Loc, into: Loc) {
        debug_assert_eq!(into.elems(), from.elems());
        if !into.ranges.is_empty() {
            self.local.push(Move::Copy { from, into });
        }
    }
}

/// One rank's part. Round k is matched with round k of every other rank; all ranks have the same number of rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// The scratch memory the rank needs.
    pub scratch: Vec<Slot>,
    /// What it does.
    pub rounds: Vec<Round>,
}

impl Schedule {
    /// The form of a region's values. Panics where `region` is a slot the schedule does not have.
    pub fn form(&self, region: Region) -> Form {
        match region {
            Region::Input | Region::Output => Form::Payload,
            Region::Scratch(slot) => self.scratch[slot].form,
        }
    }
}

/// What `rank` does to solve `problem` by messages, or `None` where this algorithm does not do this kind.
pub fn messages(algorithm: Algorithm, problem: &Problem, rank: Rank) -> Option<Schedule> {
    assert!(
        rank < problem.world,
        "rank {rank} is outside a world of {}",
        problem.world
    );
    if !algorithm.does(problem.kind) {
        return None;
    }
    if problem.world == 1 {
        return Some(alone(problem));
    }
    Some(match (problem.kind, algorithm) {
        (Kind::AllReduce | Kind::ReduceScatter, Algorithm::Direct) => direct::reduce(problem, rank),
        (Kind::Reduce { root }, Algorithm::Direct) => direct::reduce_to(problem, root, rank),
        (Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce { .. }, _) => {
            reduce::reduce(algorithm, problem, rank)
        }
        (Kind::AllGather, Algorithm::Direct) => direct::all_gather(problem, rank),
        (Kind::AllGather, Algorithm::Ring) => ring::all_gather(problem, rank),
        (Kind::AllGather, _) => spread::all_gather(problem, rank),
        (Kind::Broadcast { root }, Algorithm::Direct) => direct::broadcast(problem, root, rank),
        (Kind::Broadcast { root }, Algorithm::Ring) => ring::broadcast(problem, root, rank),
        (Kind::Broadcast { root }, _) => spread::broadcast(problem, root, rank),
        (Kind::Gather { root }, _) => direct::gather(problem, root, rank),
        (Kind::Scatter { root }, _) => direct::scatter(problem, root, rank),
        (Kind::AllToAll, Algorithm::Ring) => ring::all_to_all(problem, rank),
        (Kind::AllToAll, _) => direct::all_to_all(problem, rank),
        (Kind::Barrier, Algorithm::Direct) => barrier::direct(problem.world, rank),
        (Kind::Barrier, Algorithm::Doubling) => barrier::dissemination(problem.world, rank),
        (Kind::Barrier, _) => barrier::tree(problem.world, rank),
    })
}

/// A world of one: nothing to fold and an average over one, so Input is the answer, unless the leaf is lifted.
fn alone(problem: &Problem) -> Schedule {
    let whole = |region| Loc::one(region, 0..problem.elems());
    let mut round = Round::default();
    if problem.lifted && problem.kind.folds() {
        round.copy(whole(Region::Input), whole(Region::Scratch(0)));
        round.copy(whole(Region::Scratch(0)), whole(Region::Output));
        let slot = Slot {
            form: Form::Partial,
            elems: problem.elems(),
        };
        return Schedule {
            scratch: vec![slot],
            rounds: vec![round],
        };
    }
    round.copy(whole(Region::Input), whole(Region::Output));
    Schedule {
        scratch: Vec::new(),
        rounds: vec![round],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_the_algorithms_they_name() {
        for algorithm in Algorithm::ALL {
            assert_eq!(
                Algorithm::from_name(&algorithm.to_string()),
                Some(algorithm)
            );
        }
        assert_eq!(Algorithm::from_name("Ring"), None);
    }

    #[test]
    fn a_loc_joins_neighbours_and_keeps_order() {
        let loc = Loc::new(Region::Input, [4..6, 6..6, 6..9, 0..1]);
        assert_eq!(loc.ranges, [4..9, 0..1]);
        assert_eq!(loc.elems(), 6);
    }

    #[test]
    fn what_an_algorithm_does_is_what_it_has_messages_for() {
        let kinds = [
            Kind::AllReduce,
            Kind::ReduceScatter,
            Kind::AllGather,
            Kind::Broadcast { root: 1 },
            Kind::Barrier,
        ];
        for kind in kinds {
            for algorithm in Algorithm::ALL {
                let schedule = messages(algorithm, &Problem::even(kind, 3, 5), 2);
                assert_eq!(
                    schedule.is_some(),
                    algorithm.does(kind),
                    "{algorithm} {kind}"
                );
            }
        }
    }
}
