//! The lowering for memory that all ranks have mapped: load the peers' values where they lie, fold, store into every
//! output. No message and no staging; a handful of steps however many ranks there are.

use std::ops::Range;

use super::{Kind, Problem, Rank};

/// Whose memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranks {
    /// Every rank's.
    All,
    /// One rank's.
    One(Rank),
}

/// One step of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shared {
    /// All ranks arrive, and each sees what the others stored before.
    Sync,
    /// For each element: load it from the inputs of `from`, fold in the canonical tree and finish (`One`: copy it as it
    /// is), store it into the outputs of `into`. In place, a copy onto itself does nothing.
    LoadFoldStore {
        /// Elements, in the full vector's coordinates.
        ranges: Vec<Range<usize>>,
        /// The sources.
        from: Ranks,
        /// The targets.
        into: Ranks,
    },
}

impl Problem {
    /// The part of the full vector that a rank's Input holds.
    pub fn input(&self, rank: Rank) -> Range<usize> {
        match self.kind {
            Kind::AllReduce | Kind::ReduceScatter => 0..self.elems(),
            Kind::AllGather => self.slices[rank].clone(),
            Kind::Broadcast { root } if rank == root => 0..self.elems(),
            Kind::Broadcast { .. } | Kind::Barrier => 0..0,
        }
    }

    /// The part of the full vector that a rank's Output holds.
    pub fn output(&self, rank: Rank) -> Range<usize> {
        match self.kind {
            Kind::AllReduce | Kind::AllGather | Kind::Broadcast { .. } => 0..self.elems(),
            Kind::ReduceScatter => self.slices[rank].clone(),
            Kind::Barrier => 0..0,
        }
    }
}

/// What `rank` does to solve `problem` in shared memory. The first `Sync` says that all inputs are ready and all
/// outputs may be written, the last that all outputs are.
pub fn shared(problem: &Problem, rank: Rank) -> Vec<Shared> {
    let slice = problem.slices[rank].clone();
    let (range, from, into) = match problem.kind {
        Kind::AllReduce => (slice, Ranks::All, Ranks::All),
        Kind::ReduceScatter => (slice, Ranks::All, Ranks::One(rank)),
        Kind::AllGather => (slice, Ranks::One(rank), Ranks::All),
        Kind::Broadcast { root } => (0..problem.elems(), Ranks::One(root), Ranks::One(rank)),
        Kind::Barrier => return vec![Shared::Sync],
    };
    let ranges = if range.is_empty() {
        Vec::new()
    } else {
        vec![range]
    };
    vec![
        Shared::Sync,
        Shared::LoadFoldStore { ranges, from, into },
        Shared::Sync,
    ]
}
