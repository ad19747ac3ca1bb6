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
    /// This rank's Input is copied to where peers find it until two syncs later; all loads are from such copies.
    Post,
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

impl Shared {
    fn new(range: Range<usize>, from: Ranks, into: Ranks) -> Shared {
        let ranges = Some(range).filter(|range| !range.is_empty());
        let ranges = ranges.into_iter().collect();
        Shared::LoadFoldStore { ranges, from, into }
    }
}

/// What `rank` does to solve `problem` in shared memory. The first `Sync` says that all inputs are ready and all
/// outputs may be written, the last that all outputs are.
pub fn shared(problem: &Problem, rank: Rank) -> Vec<Shared> {
    let slice = problem.slices[rank].clone();
    let own = Ranks::One(rank);
    let work = match problem.kind {
        Kind::AllReduce => vec![Shared::new(slice, Ranks::All, Ranks::All)],
        Kind::ReduceScatter => vec![Shared::new(slice, Ranks::All, own)],
        Kind::AllGather => vec![Shared::new(slice, own, Ranks::All)],
        Kind::Broadcast { root } => {
            vec![Shared::new(0..problem.elems(), Ranks::One(root), own)]
        }
        Kind::Reduce { root } => vec![Shared::new(slice, Ranks::All, Ranks::One(root))],
        Kind::Gather { root } => vec![Shared::new(slice, own, Ranks::One(root))],
        Kind::Scatter { root } => vec![Shared::new(slice, Ranks::One(root), own)],
        Kind::AllToAll => blocks(problem, rank).collect(),
        Kind::Barrier => return vec![Shared::Sync],
    };
    let mut steps = vec![Shared::Sync];
    steps.extend(work);
    steps.push(Shared::Sync);
    steps
}

/// The same for small vectors: each posts its input, and after one meeting everybody works out its own output from all
/// posts. More is loaded than by [`shared()`], but ranks meet once, and buffers may be anywhere.
pub fn posted(problem: &Problem, rank: Rank) -> Vec<Shared> {
    let whole = 0..problem.elems();
    let own = Ranks::One(rank);
    let from_each = || {
        let slices = problem.slices.iter().enumerate();
        slices.map(|(of, slice)| Shared::new(slice.clone(), Ranks::One(of), own))
    };
    let work: Vec<Shared> = match problem.kind {
        Kind::AllReduce => vec![Shared::new(whole, Ranks::All, own)],
        Kind::Reduce { root } if rank == root => vec![Shared::new(whole, Ranks::All, own)],
        Kind::AllGather => from_each().collect(),
        Kind::Gather { root } if rank == root => from_each().collect(),
        Kind::Reduce { .. } | Kind::Gather { .. } => Vec::new(),
        Kind::Barrier => return vec![Shared::Sync],
        Kind::ReduceScatter | Kind::Broadcast { .. } | Kind::Scatter { .. } | Kind::AllToAll => {
            let steps = shared(problem, rank).into_iter();
            steps.filter(|step| *step != Shared::Sync).collect()
        }
    };
    let mut steps = vec![Shared::Post, Shared::Sync];
    steps.extend(work);
    steps
}

/// All-to-all: the blocks for `rank`, its own first and then the next rank's, so that not all load from one rank at once.
fn blocks(problem: &Problem, rank: Rank) -> impl Iterator<Item = Shared> {
    let peers = (0..problem.world).map(move |step| (rank + step) % problem.world);
    peers.map(move |from| {
        Shared::new(
            problem.block(from, rank),
            Ranks::One(from),
            Ranks::One(rank),
        )
    })
}
