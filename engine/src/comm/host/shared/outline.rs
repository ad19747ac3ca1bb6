//! What a rank does for a kind of call: made once, kept, and run as often as the call comes.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use fabric_kernels::Dtype;
use smallvec::SmallVec;

use super::super::{
    super::{Call, Spent},
    script::starts,
};
use super::windows::Windows;
use crate::{
    schedule::{
        self, Algorithm, Kind, Problem, Ranks, Shared,
        choose::{Tuning, WireKind},
        price::SharedPrice,
    },
    wire::shm::{Needs, POST_BYTES, WORDS},
};

/// Bytes of an input that fit a flag's cache line, beside the factor.
pub(super) const INLINE_BYTES: usize = (WORDS - 1) * size_of::<u64>();

/// What decides an outline.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) kind: Kind,
    pub(super) lifted: bool,
    pub(super) dtype: Dtype,
    pub(super) numel: usize,
    pub(super) counts: Option<Arc<[usize]>>,
}

impl Key {
    /// None for a message.
    pub(super) fn new(call: &Call, dtype: Dtype, numel: usize) -> Option<Self> {
        Some(Self {
            kind: call.op.kind()?,
            lifted: call.op.is_lifted(),
            dtype,
            numel,
            counts: call.counts.clone(),
        })
    }

    pub(super) fn problem(&self, size: usize) -> Problem {
        let problem = match &self.counts {
            Some(counts) => Problem::with_counts(self.kind, size, counts),
            None => Problem::even(self.kind, size, self.numel),
        };
        problem.with_lifted(self.lifted)
    }
}

/// A problem, and what this rank does to solve it.
pub(super) struct Outline {
    pub(super) problem: Problem,
    pub(super) steps: Vec<Shared>,
    /// What there is to do with inputs that are posted; none where they are not.
    pub(super) posts: Option<Posts>,
    /// Where this rank's input and output start in slabs in place, in elements.
    pub(super) starts: (usize, usize),
    /// Elements of this rank's input and output.
    pub(super) lengths: (usize, usize),
    /// Elements in all ranks' inputs and outputs.
    pub(super) touched_elems: usize,
    windows: OnceLock<Windows>, // for private buffers
    size: usize,
    rank: usize,
}

/// Work on inputs that all ranks have posted, in bytes, which need no multiplication when it is done.
pub(super) struct Posts {
    /// The longest input fits a flag's cache line.
    pub(super) is_inline: bool,
    /// There are elements there.
    pub(super) has_words: bool,
    /// For whom this rank waits before it loads them.
    pub(super) needs: Needs,
    /// All of this rank's input.
    pub(super) whole: [Range<usize>; 1],
    /// What other ranks load of it.
    pub(super) foreign: SmallVec<[Range<usize>; 2]>,
    /// Where input and output start in slabs in place.
    pub(super) starts_bytes: (usize, usize),
    pub(super) works: Vec<Work>,
    /// What it costs.
    pub(super) spent: Spent,
}

/// Elements of this rank's output, and what they are made of.
pub(super) struct Work {
    /// The ranks that are folded.
    pub(super) sources: Range<usize>,
    /// How many of them are peers.
    pub(super) peers: usize,
    /// Where in their inputs the elements start, in all of them.
    pub(super) skip_bytes: usize,
    /// Where in this rank's output they start.
    pub(super) start: usize,
    pub(super) elems: usize,
    pub(super) start_bytes: usize,
    pub(super) bytes: usize,
}

impl Posts {
    fn new(problem: &Problem, dtype: Dtype, rank: usize, steps: &[Shared]) -> Self {
        let inputs = (0..problem.world).map(|rank| problem.input(rank).len());
        let works = Work::all(problem, dtype, rank, steps);
        let mut spent = Spent {
            collectives: 1,
            ..Spent::default()
        };
        for work in &works {
            spent.messages += u64::from(work.peers > 0);
            spent.bytes += (work.peers * work.bytes) as u64;
        }
        let longest_bytes = inputs.max().unwrap_or(0) * dtype.size();
        let is_inline = longest_bytes <= INLINE_BYTES;
        let (whole, own) = (problem.input(rank).len(), own(problem, rank));
        let bytes = |range: Range<usize>| range.start * dtype.size()..range.end * dtype.size();
        let foreign = [0..own.start, own.end..whole].into_iter();
        let (input, output) = starts(problem, rank, true);
        Self {
            is_inline,
            has_words: is_inline && longest_bytes > 0,
            needs: match problem.kind {
                Kind::Broadcast { root } | Kind::Scatter { root } => Needs::One(root),
                Kind::Reduce { root } | Kind::Gather { root } if root != rank => Needs::Nobody,
                _ => Needs::All,
            },
            whole: [bytes(0..whole)],
            foreign: foreign.filter(|part| !part.is_empty()).map(bytes).collect(),
            starts_bytes: (input * dtype.size(), output * dtype.size()),
            works,
            spent,
        }
    }
}

/// Elements of a rank's input that no other rank has a use for, in the input's own coordinates.
pub(super) fn own(problem: &Problem, rank: usize) -> Range<usize> {
    let input = problem.input(rank);
    let own = match problem.kind {
        Kind::ReduceScatter => problem.slices[rank].clone(),
        Kind::Scatter { root } if root == rank => problem.slices[rank].clone(),
        Kind::Reduce { root } | Kind::Gather { root } if root == rank => input.clone(),
        Kind::AllToAll => problem.block(rank, rank),
        _ => input.start..input.start,
    };
    own.start - input.start..own.end - input.start
}

impl Work {
    /// What there is to do in steps that fold nothing for others.
    pub(super) fn all(problem: &Problem, dtype: Dtype, rank: usize, steps: &[Shared]) -> Vec<Self> {
        let works = steps.iter().flat_map(|step| match step {
            Shared::LoadFoldStore { ranges, from, .. } => ranges
                .iter()
                .map(|range| Self::new(problem, dtype, rank, range, *from))
                .collect(),
            Shared::Post | Shared::Sync => Vec::new(),
        });
        works.collect()
    }

    fn new(
        problem: &Problem,
        dtype: Dtype,
        rank: usize,
        range: &Range<usize>,
        from: Ranks,
    ) -> Self {
        let (sources, size) = (members(problem, from), dtype.size());
        let start = problem.output_index(rank, range.start);
        let start = start.expect("the checker proves that outputs hold what is stored");
        let skip = range.start - problem.input(sources.start).start; // where many are folded, all inputs are whole
        Self {
            peers: sources.len() - usize::from(sources.contains(&rank)),
            skip_bytes: skip * size,
            start,
            elems: range.len(),
            start_bytes: start * size,
            bytes: range.len() * size,
            sources,
        }
    }
}

/// The ranks that are folded. In a world of one the input is the answer, unless it is lifted.
pub(super) fn members(problem: &Problem, from: Ranks) -> Range<usize> {
    match from {
        Ranks::All if problem.world > 1 || problem.lifted => 0..problem.world,
        Ranks::All => 0..1,
        Ranks::One(source) => source..source + 1,
    }
}

impl Outline {
    pub(super) fn new(key: &Key, tuning: &Tuning, size: usize, rank: usize) -> Self {
        let problem = key.problem(size);
        let bytes = key.numel * key.dtype.size();
        let algorithm = tuning.choose(&key.kind, size, bytes, WireKind::Shm);
        let inputs = (0..size).map(|rank| problem.input(rank).len() * key.dtype.size());
        let fits = inputs.max().unwrap_or(0) <= POST_BYTES;
        // A barrier is a post of nothing.
        let is_small = algorithm == Algorithm::Post || key.kind == Kind::Barrier;
        let does_post = is_small && fits;
        let steps = if does_post {
            schedule::posted(&problem, rank)
        } else {
            schedule::shared(&problem, rank)
        };
        let ranks = 0..size;
        let touched = ranks.map(|rank| problem.input(rank).len() + problem.output_elems(rank));
        Self {
            posts: does_post.then(|| Posts::new(&problem, key.dtype, rank, &steps)),
            steps,
            lengths: (problem.input(rank).len(), problem.output_elems(rank)),
            starts: starts(&problem, rank, true),
            touched_elems: touched.sum(),
            problem,
            windows: OnceLock::new(),
            size,
            rank,
        }
    }

    /// The windows in which private buffers go through the stages.
    pub(super) fn windows(&self, dtype: Dtype) -> &Windows {
        let windows = || Windows::new(&self.problem, self.rank, dtype);
        self.windows.get_or_init(windows)
    }

    /// What it costs, by the steps.
    pub(super) fn price(&self, dtype: Dtype) -> Spent {
        let mut spent = Spent {
            collectives: 1,
            ..Spent::default()
        };
        for step in &self.steps {
            let price = SharedPrice::of(std::slice::from_ref(step), self.size, self.rank);
            let elems = price.loaded_elems + price.stored_elems;
            spent.messages += u64::from(elems > 0);
            spent.bytes += (elems * dtype.size()) as u64;
        }
        spent
    }
}
