//! After an update: parameters return to where they stand between steps.

use super::Sequencer;
use fabric_kernels as kernels;

use crate::{
    buffer::Slab,
    comm::{Data, Work},
    error::Result,
    shard::pool::Rest,
};

impl Sequencer {
    /// After an update of pieces: parameters return to where they stand between steps. Where each rank updates its own,
    /// every rank's go to all; what was gathered for a unit is stale.
    ///
    /// # Errors
    /// When a rank is gone, or a parameter refuses to be read or written.
    pub fn step(&mut self) -> Result<()> {
        self.check()?;
        let result = self.spread();
        self.keep(&result);
        result
    }

    /// After the main values were changed by other means than an update that rewrites the model's copies: rewrite them, on
    /// all ranks.
    ///
    /// # Errors
    /// As [`Sequencer::step`].
    pub fn refresh(&mut self) -> Result<()> {
        self.check()?;
        for (index, bucket) in self.plan.buckets().iter().enumerate() {
            if bucket.has_main() && !bucket.axis.shards_param() {
                for piece in self.plan.cut(index, self.rank) {
                    self.mains.store(&self.plan, &piece, &*self.params)?;
                }
            }
        }
        self.step()
    }

    fn spread(&mut self) -> Result<()> {
        self.units.renew(&self.plan, &*self.params)?;
        let mut before = None;
        for index in 0..self.buckets.len() {
            let Some(call) = self.plan.after_step_call(index) else {
                continue;
            };
            let shape = &self.plan.buckets()[index];
            let (mut slab, rest) = self.units.pool().take(shape.param_dtype, shape.padded)?;
            if shape.has_main() {
                self.mains.copy_into(&self.plan, index, &mut slab)?;
            } else {
                kernels::batch(|| {
                    self.plan.cut(index, self.rank).try_for_each(|piece| {
                        self.params.with(piece.param, &mut |buffer| {
                            buffer.read(piece.range.clone(), slab.part_mut(piece.place.clone()))
                        })
                    })
                })?;
            }
            let work = self
                .groups
                .gather
                .lock()
                .submit(call, Data::InPlace(slab))?;
            // The next bucket is filled while the last one travels.
            if let Some(last) = before.replace((index, work, rest)) {
                self.arrive(last)?;
            }
        }
        before.map_or(Ok(()), |last| self.arrive(last))
    }

    /// Write what others have updated of a bucket's parameters.
    fn arrive(&mut self, (index, work, rest): (usize, Work, Rest)) -> Result<()> {
        let slab = work.wait()?.into_output();
        kernels::batch(|| self.write_others(index, &slab))?;
        self.units.pool().give(slab, rest);
        Ok(())
    }

    fn write_others(&self, index: usize, slab: &Slab) -> Result<()> {
        let own = self.plan.own(index, self.rank);
        for (param, range) in self.plan.buckets()[index].layout.entries() {
            let before = range.start..range.end.min(own.start);
            let behind = range.start.max(own.end)..range.end;
            for part in [before, behind] {
                if part.start < part.end {
                    let elements = part.start - range.start..part.end - range.start;
                    self.params.with(*param, &mut |buffer| {
                        buffer.write(elements.clone(), slab.part(part.clone()))
                    })?;
                }
            }
        }
        Ok(())
    }
}
