//! How several tensors lie behind one another in one flat slab.

use std::ops::Range;

use super::ParamId;

/// Parameters and their element ranges in a slab, without gaps, in the order given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    entries: Vec<(ParamId, Range<usize>)>,
    numel: usize,
}

impl Layout {
    /// Put `numel` elements of `param` behind everything else.
    pub fn push(&mut self, param: ParamId, numel: usize) {
        self.entries.push((param, self.numel..self.numel + numel));
        self.numel += numel;
    }

    /// Elements in all.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// The parameters and where they lie.
    pub fn entries(&self) -> &[(ParamId, Range<usize>)] {
        &self.entries
    }
}
