//! Gradients that travel together: where they are, which have arrived in this backward, and which hold a value at all.

use std::ops::Range;

use fabric_kernels::{self as kernels, Fold, Span, SpanMut};

use super::plan::BucketPlan;
use crate::{
    buffer::{Buffer, Slab},
    comm::Work,
    error::{Error, Result},
};

/// One bucket at run time.
pub struct Bucket {
    plan: BucketPlan,
    place: Place,
    shard: Option<Shard>,
    arrived: Vec<bool>, // by entry: in this backward
    filled: Vec<bool>, // by entry: holds a gradient that the next reduction takes along, or (unsharded) the whole
    missing: usize,    // entries that have not arrived in this backward
}

/// Where ranks own slices: this rank's, reduced and added up since the last zero_grad. The bucket's own memory is free
/// again after a reduction.
struct Shard {
    own: Range<usize>, // in the bucket
    sum: Slab,
    held: Vec<bool>, // by entry
}

/// Where the bucket's memory is.
enum Place {
    Here(Slab),
    Away(Work),
    Lost, // an operation failed and kept it
}

impl Bucket {
    /// An empty bucket in `slab`.
    pub(super) fn new(plan: BucketPlan, slab: Slab, own: Option<Range<usize>>) -> Self {
        assert_eq!(
            (plan.dtype, plan.padded),
            (slab.dtype(), slab.numel()),
            "a slab that fits the plan"
        );
        let entries = plan.layout.entries().len();
        let shard = own.map(|own| Shard {
            sum: Slab::zeroed(plan.dtype, own.len()),
            own,
            held: vec![false; entries],
        });
        Self {
            plan,
            place: Place::Here(slab),
            shard,
            arrived: vec![false; entries],
            filled: vec![false; entries],
            missing: entries,
        }
    }

    /// Forget what has arrived: a backward begins.
    pub(super) fn begin(&mut self) {
        self.arrived.fill(false);
        self.missing = self.arrived.len();
    }

    /// Whether every gradient has arrived.
    pub(super) fn is_full(&self) -> bool {
        self.missing == 0
    }

    /// Whether entry `entry` has arrived in this backward.
    pub(super) fn has(&self, entry: usize) -> bool {
        self.arrived[entry]
    }

    /// Whether entry `entry` holds a gradient.
    pub(super) fn is_filled(&self, entry: usize) -> bool {
        self.filled[entry]
    }

    /// Say whether any rank had a gradient for `entry` in the reduction that is over.
    pub(super) fn set_used(&mut self, entry: usize, used: bool) {
        match &mut self.shard {
            Some(shard) => {
                shard.held[entry] |= used;
                self.filled[entry] = false;
            }
            None => self.filled[entry] = used,
        }
    }

    /// Whether entry `entry` has a gradient that an optimizer can read.
    pub(super) fn is_held(&self, entry: usize) -> bool {
        match &self.shard {
            Some(shard) => shard.held[entry],
            None => self.filled[entry],
        }
    }

    /// Take a gradient in: copied on the first micro-batch, added on the next, cast on the way.
    pub(super) fn take(&mut self, rank: usize, entry: usize, grad: &dyn Buffer) -> Result<()> {
        let range = self.plan.layout.entries()[entry].1.clone();
        let filled = self.filled[entry];
        let slab = self.here(rank)?;
        if !filled {
            grad.read(0..range.len(), slab.part_mut(range))?;
        } else if let Some(span) = grad.span() {
            kernels::fold(Fold::Sum, slab.part_mut(range), span)
                .map_err(Error::kernel(rank, "add a gradient"))?;
        } else {
            let mut copy = Slab::zeroed(slab.dtype(), range.len());
            grad.read(0..range.len(), copy.part_mut(0..range.len()))?;
            kernels::fold(
                Fold::Sum,
                slab.part_mut(range.clone()),
                copy.part(0..range.len()),
            )
            .map_err(Error::kernel(rank, "add a gradient"))?;
        }
        self.arrived[entry] = true;
        self.filled[entry] = true;
        self.missing -= 1;
        Ok(())
    }

    /// Put zeros where no gradient is: what a rank that did not use a parameter adds to the sum.
    pub(super) fn fill_gaps(&mut self, rank: usize) -> Result<()> {
        let padding = self.plan.layout.numel()..self.plan.padded;
        if !padding.is_empty() {
            let part = self.here(rank)?.part_mut(padding);
            kernels::fill(part, 0.0).map_err(Error::kernel(rank, "clear the padding"))?;
        }
        for entry in 0..self.filled.len() {
            if !self.filled[entry] {
                let range = self.plan.layout.entries()[entry].1.clone();
                let part = self.here(rank)?.part_mut(range);
                kernels::fill(part, 0.0).map_err(Error::kernel(rank, "clear a gradient"))?;
            }
        }
        Ok(())
    }

    /// Send the memory away with `submit`.
    pub(super) fn launch(
        &mut self,
        rank: usize,
        submit: impl FnOnce(Slab) -> Result<Work>,
    ) -> Result<()> {
        self.here(rank)?;
        if let Place::Here(slab) = std::mem::replace(&mut self.place, Place::Lost) {
            self.place = Place::Away(submit(slab)?);
        }
        Ok(())
    }

    /// Wait until the memory is back from its reduction; where ranks own slices, add this rank's to its sum.
    pub(super) fn land(&mut self, rank: usize) -> Result<()> {
        self.settle()?;
        if let (Some(shard), Place::Here(slab)) = (&mut self.shard, &self.place) {
            let (from, all) = (slab.part(shard.own.clone()), 0..shard.own.len());
            let into = shard.sum.part_mut(all);
            let added = if shard.held.contains(&true) {
                kernels::fold(Fold::Sum, into, from)
            } else {
                kernels::cast(from, into)
            };
            added.map_err(Error::kernel(rank, "add a reduced gradient"))?;
        }
        Ok(())
    }

    /// Wait until the memory is back.
    pub(super) fn settle(&mut self) -> Result<()> {
        if let Place::Away(work) = std::mem::replace(&mut self.place, Place::Lost) {
            self.place = Place::Here(work.wait()?.into_output());
        } else {
            unreachable!("only a bucket that was launched lands");
        }
        Ok(())
    }

    /// The bucket's memory, while it holds no gradient: for parameters on their way to all ranks.
    pub(super) fn memory(&mut self, rank: usize) -> Result<&mut Slab> {
        self.here(rank)
    }

    /// Forget all gradients.
    pub(super) fn clear(&mut self) {
        self.filled.fill(false);
        if let Some(shard) = &mut self.shard {
            shard.held.fill(false);
        }
    }

    /// The gradient at `place` in the bucket, of entry `entry`, if there is one that an optimizer can read.
    pub(super) fn piece(&self, entry: usize, place: Range<usize>) -> Option<Span<'_>> {
        match (&self.shard, &self.place) {
            _ if !self.is_held(entry) => None,
            (Some(shard), _) => {
                let start = shard.own.start;
                Some(shard.sum.part(place.start - start..place.end - start))
            }
            (None, Place::Here(slab)) => Some(slab.part(place)),
            (None, _) => None,
        }
    }

    /// The same, to change.
    pub(super) fn piece_mut(&mut self, entry: usize, place: Range<usize>) -> Option<SpanMut<'_>> {
        match (&mut self.shard, &mut self.place) {
            (Some(shard), _) if shard.held[entry] => {
                let start = shard.own.start;
                Some(shard.sum.part_mut(place.start - start..place.end - start))
            }
            (None, Place::Here(slab)) if self.filled[entry] => Some(slab.part_mut(place)),
            _ => None,
        }
    }

    /// The gradient of entry `entry`, if it holds one.
    pub(super) fn grad(&self, entry: usize) -> Option<Span<'_>> {
        match (&self.place, self.filled[entry] && self.shard.is_none()) {
            (Place::Here(slab), true) => {
                Some(slab.part(self.plan.layout.entries()[entry].1.clone()))
            }
            _ => None,
        }
    }

    fn here(&mut self, rank: usize) -> Result<&mut Slab> {
        match &mut self.place {
            Place::Here(slab) => Ok(slab),
            Place::Away(_) => Err(Error::model(
                rank,
                "a gradient became ready while its bucket is being reduced",
                "Call fabric.backward once for each loss, and let it return before the next",
            )),
            Place::Lost => Err(Error::model(
                rank,
                "the gradients were lost with a failed reduction",
                "See the first error; a job continues from its last checkpoint",
            )),
        }
    }
}
