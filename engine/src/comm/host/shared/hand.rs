//! Where a call's elements lie in the caller's hands: one slab, two, or many that are one vector.

use std::ops::Range;

use smallvec::SmallVec;

use super::{
    super::{super::Data, script::cut},
    Place,
    outline::Outline,
};
use crate::{
    buffer::Slab,
    error::Result,
    wire::shm::{Group, PRIVATE, STAGES},
};

/// Where this rank's input and output lie in the caller's slabs.
pub(super) struct Hand {
    pub(super) input: Range<usize>, // elements of the slab, or of the vector that several make up
    pub(super) output: Range<usize>,
    lengths: SmallVec<[usize; 2]>, // of several
}

impl Hand {
    #[inline(always)]
    pub(super) fn new(outline: &Outline, data: &Data) -> Self {
        let (input, output) = match data {
            Data::InPlace(_) => outline.starts,
            _ => (0, 0),
        };
        let lengths = match data {
            Data::Many(slabs) => slabs.iter().map(Slab::numel).collect(),
            _ => SmallVec::new(),
        };
        Self {
            input: input..input + outline.lengths.0,
            output: output..output + outline.lengths.1,
            lengths,
        }
    }

    /// Where peers find them.
    pub(super) fn announce(&self, group: &Group, data: &Data) -> Place {
        let place = |slab: Option<&Slab>, range: &Range<usize>| {
            if range.is_empty() {
                return STAGES[0]; // no elements: any place will do
            }
            let Some(slab) = slab else { return PRIVATE };
            let size = slab.dtype().size();
            let (start, bytes) = (slab.address() + range.start * size, range.len() * size);
            group.own().place(start, bytes).unwrap_or(PRIVATE)
        };
        let (input, output) = match data {
            Data::None | Data::Many(_) => (None, None),
            Data::InPlace(slab) => (Some(slab), Some(slab)),
            Data::Out { from, into } => (Some(from), Some(into)),
        };
        Place {
            input: place(input, &self.input),
            output: place(output, &self.output),
        }
    }

    /// Go over a part of this rank's input, in order.
    #[inline]
    pub(super) fn read(
        &self,
        data: &Data,
        part: Range<usize>,
        mut each: impl FnMut(&Slab, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let part = self.input.start + part.start..self.input.start + part.end;
        match data {
            _ if part.is_empty() => Ok(()),
            Data::None => Ok(()),
            Data::InPlace(slab) | Data::Out { from: slab, .. } => each(slab, part),
            Data::Many(slabs) => {
                cut(&self.lengths, part).try_for_each(|(slab, range)| each(&slabs[slab], range))
            }
        }
    }

    /// Go over a part of this rank's output, in order: slabs, elements of each, and how many came before.
    #[inline]
    pub(super) fn write(
        &self,
        data: &mut Data,
        part: Range<usize>,
        mut each: impl FnMut(&mut Slab, Range<usize>, usize) -> Result<()>,
    ) -> Result<()> {
        let part = self.output.start + part.start..self.output.start + part.end;
        match data {
            _ if part.is_empty() => Ok(()),
            Data::None => Ok(()),
            Data::InPlace(slab) | Data::Out { into: slab, .. } => each(slab, part, 0),
            Data::Many(slabs) => {
                let mut done = 0;
                cut(&self.lengths, part).try_for_each(|(slab, range)| {
                    let before = done;
                    done += range.len();
                    each(&mut slabs[slab], range, before)
                })
            }
        }
    }
}
