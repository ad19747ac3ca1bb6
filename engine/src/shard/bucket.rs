//! Gradients that travel together: where they are, which have arrived in this backward, and which hold a value at all.

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
    arrived: Vec<bool>, // by entry: in this backward
    filled: Vec<bool>,  // by entry: since the last zero_grad
    missing: usize,     // entries that have not arrived in this backward
}

/// Where the bucket's memory is.
enum Place {
    Here(Slab),
    Away(Work),
    Lost, // an operation failed and kept it
}

impl Bucket {
    /// An empty bucket in `slab`.
    pub(super) fn new(plan: BucketPlan, slab: Slab) -> Self {
        assert_eq!(
            (plan.dtype, plan.layout.numel()),
            (slab.dtype(), slab.numel()),
            "a slab that fits the plan"
        );
        let entries = plan.layout.entries().len();
        Self {
            plan,
            place: Place::Here(slab),
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

    /// Say that entry `entry` holds a gradient (because other ranks had one), or that it does not.
    pub(super) fn set_filled(&mut self, entry: usize, filled: bool) {
        self.filled[entry] = filled;
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

    /// Wait until the memory is back.
    pub(super) fn land(&mut self) -> Result<()> {
        if let Place::Away(work) = std::mem::replace(&mut self.place, Place::Lost) {
            self.place = Place::Here(work.wait()?.into_output());
        } else {
            unreachable!("only a bucket that was launched lands");
        }
        Ok(())
    }

    /// Forget all gradients.
    pub(super) fn clear(&mut self) {
        self.filled.fill(false);
    }

    /// The gradient of entry `entry`, if it holds one.
    pub(super) fn grad(&self, entry: usize) -> Option<Span<'_>> {
        match (&self.place, self.filled[entry]) {
            (Place::Here(slab), true) => {
                Some(slab.part(self.plan.layout.entries()[entry].1.clone()))
            }
            _ => None,
        }
    }

    /// The gradient of entry `entry`, to change, if it holds one.
    pub(super) fn grad_mut(&mut self, entry: usize) -> Option<SpanMut<'_>> {
        let range = self.plan.layout.entries()[entry].1.clone();
        match (&mut self.place, self.filled[entry]) {
            (Place::Here(slab), true) => Some(slab.part_mut(range)),
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
