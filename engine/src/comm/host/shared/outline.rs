//! What a rank does for a kind of call: made once, kept, and run as often as the call comes.

use std::sync::Arc;

use fabric_kernels::Dtype;

use super::super::{
    super::{Call, Spent},
    script::starts,
};
use crate::{
    schedule::{
        self, Algorithm, Kind, Problem, Shared,
        choose::{Tuning, WireKind},
        price::SharedPrice,
    },
    wire::shm::{Needs, POST_BYTES},
};

/// What decides an outline.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) kind: Kind,
    pub(super) lifted: bool,
    pub(super) dtype: Dtype,
    pub(super) numel: usize,
    pub(super) counts: Option<Arc<[usize]>>,
    pub(super) is_window: bool, // of a longer vector, on the stages
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
            is_window: false,
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
    /// Whether inputs are posted.
    pub(super) posts: bool,
    /// Where this rank's input and output start in slabs in place, in elements.
    pub(super) starts: (usize, usize),
    /// Elements in all ranks' inputs and outputs.
    pub(super) touched_elems: usize,
    size: usize,
    rank: usize,
}

impl Outline {
    pub(super) fn new(key: &Key, tuning: &Tuning, size: usize, rank: usize) -> Self {
        let problem = key.problem(size);
        let bytes = key.numel * key.dtype.size();
        let algorithm = tuning.choose(&key.kind, size, bytes, WireKind::Shm);
        let inputs = (0..size).map(|rank| problem.input(rank).len() * key.dtype.size());
        let fits = inputs.max().unwrap_or(0) <= POST_BYTES;
        let posts = algorithm == Algorithm::Post && fits && !key.is_window;
        let steps = if posts {
            schedule::posted(&problem, rank)
        } else {
            schedule::shared(&problem, rank)
        };
        let ranks = 0..size;
        let touched = ranks.map(|rank| problem.input(rank).len() + problem.output_elems(rank));
        Self {
            steps,
            posts,
            starts: starts(&problem, rank, true),
            touched_elems: touched.sum(),
            problem,
            size,
            rank,
        }
    }

    /// For whom this rank waits before it loads what is posted.
    pub(super) fn needs(&self) -> Needs {
        match self.problem.kind {
            Kind::Broadcast { root } | Kind::Scatter { root } => Needs::One(root),
            Kind::Reduce { root } | Kind::Gather { root } if root != self.rank => Needs::Nobody,
            _ => Needs::All,
        }
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
