//! The values that are updated, where the model itself does not hold them: this rank's slice of each sharded bucket, and,
//! where the model computes with a narrower type, the wider values beside it.

use std::sync::{Mutex, MutexGuard};

use fabric_kernels as kernels;

use super::{
    Parameters,
    plan::{Piece, Plan},
};
use crate::{
    buffer::Slab,
    comm::Rank,
    error::{Error, Result},
};

/// This rank's main values, by bucket. Shared by the sequencer, which gathers them, and the optimizer, which updates them.
pub struct Mains {
    rank: Rank,
    slabs: Vec<Option<Mutex<Slab>>>,
}

impl Mains {
    /// Zeros for what `rank` keeps.
    pub fn new(plan: &Plan, rank: Rank) -> Self {
        let slab = |(index, bucket): (usize, &super::plan::BucketPlan)| {
            let slab = || Slab::zeroed(bucket.main_dtype, plan.own(index, rank).len());
            bucket.has_main().then(|| Mutex::new(slab()))
        };
        Self {
            rank,
            slabs: plan.buckets().iter().enumerate().map(slab).collect(),
        }
    }

    /// The values of bucket `index`, which start at this rank's own slice; `None` where the model holds them.
    pub fn lock(&self, index: usize) -> Option<MutexGuard<'_, Slab>> {
        let slab = self.slabs[index].as_ref()?;
        Some(slab.lock().unwrap_or_else(|held| held.into_inner()))
    }

    /// Bytes kept.
    pub fn bytes(&self) -> usize {
        let bytes = |index| self.lock(index).map_or(0, |slab| slab.bytes());
        (0..self.slabs.len()).map(bytes).sum()
    }

    /// Take this rank's values of `piece` from the model, which has memory for it.
    ///
    /// # Errors
    /// The library's refusal.
    pub(super) fn load(&self, plan: &Plan, piece: &Piece, params: &dyn Parameters) -> Result<()> {
        let Some(mut slab) = self.lock(piece.bucket) else {
            return Ok(());
        };
        let start = plan.own(piece.bucket, self.rank).start;
        let place = piece.place.start - start..piece.place.end - start;
        params.with(piece.param, &mut |buffer| {
            buffer.read(piece.range.clone(), slab.part_mut(place.clone()))
        })
    }

    /// Write this rank's values of `piece` to the model, which has memory for it.
    ///
    /// # Errors
    /// The library's refusal.
    pub(super) fn store(&self, plan: &Plan, piece: &Piece, params: &dyn Parameters) -> Result<()> {
        let Some(slab) = self.lock(piece.bucket) else {
            return Ok(());
        };
        let start = plan.own(piece.bucket, self.rank).start;
        let place = piece.place.start - start..piece.place.end - start;
        params.with(piece.param, &mut |buffer| {
            buffer.write(piece.range.clone(), slab.part(place.clone()))
        })
    }

    /// Copy this rank's slice of bucket `index` into its place in `whole`, cast on the way.
    ///
    /// # Errors
    /// When the cast is impossible.
    pub(super) fn copy_into(&self, plan: &Plan, index: usize, whole: &mut Slab) -> Result<()> {
        let Some(slab) = self.lock(index) else {
            return Ok(());
        };
        let own = plan.own(index, self.rank);
        kernels::cast(slab.part(0..own.len()), whole.part_mut(own))
            .map_err(Error::kernel(self.rank, "cast parameters"))
    }
}
