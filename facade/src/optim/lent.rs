//! An optimizer's state, lent to be saved: vectors where they lie, because a copy of all of them may not fit.

use std::ops::Deref;

use fabric_engine::buffer::Slab;

use super::{OptimizerState, saved::copy_of};

/// An optimizer's state as [`super::Optimizer::lend_state`] shows it.
#[derive(Debug, Default)]
pub struct LentState<'a> {
    /// Steps taken.
    pub steps: u64,
    /// The vectors, named as in [`OptimizerState`].
    pub tensors: Vec<(String, Lent<'a>)>,
}

/// One vector of a state.
#[derive(Debug)]
pub enum Lent<'a> {
    /// Where it lies.
    Here(&'a Slab),
    /// Made for the occasion.
    Made(Slab),
}

impl Deref for Lent<'_> {
    type Target = Slab;
    fn deref(&self) -> &Slab {
        match self {
            Self::Here(slab) => slab,
            Self::Made(slab) => slab,
        }
    }
}

impl From<OptimizerState> for LentState<'_> {
    fn from(state: OptimizerState) -> Self {
        let tensors = state.tensors.into_iter();
        Self {
            steps: state.steps,
            tensors: tensors
                .map(|(name, slab)| (name, Lent::Made(slab)))
                .collect(),
        }
    }
}

impl From<LentState<'_>> for OptimizerState {
    fn from(state: LentState<'_>) -> Self {
        let tensors = state.tensors.into_iter();
        let own = |(name, tensor): (String, Lent<'_>)| match tensor {
            Lent::Here(slab) => (name, copy_of(slab)),
            Lent::Made(slab) => (name, slab),
        };
        Self {
            steps: state.steps,
            tensors: tensors.map(own).collect(),
        }
    }
}
