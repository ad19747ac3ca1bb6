//! The values that are updated, where the model itself does not hold them: this rank's slice of each sharded bucket, and,
//! where the model computes with a narrower type, the wider values beside it.

use std::sync::{Arc, Mutex, MutexGuard};

use fabric_kernels::{self as kernels, Device, KernelError};

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
    /// Zeros for what `rank` keeps, in the memory of `device`; `None` is the host's.
    ///
    /// # Errors
    /// When the device has no room for them.
    pub fn new(plan: &Plan, rank: Rank, device: Option<&Arc<dyn Device>>) -> Result<Self> {
        let slab = |(index, bucket): (usize, &super::plan::BucketPlan)| {
            let numel = plan.own(index, rank).len();
            let slab = bucket
                .has_main()
                .then(|| Slab::zeroed_on(device, bucket.main_dtype, numel));
            Ok(slab.transpose()?.map(Mutex::new))
        };
        let slabs = plan.buckets().iter().enumerate().map(slab);
        let slabs = slabs.collect::<Result<_, KernelError>>();
        Ok(Self {
            rank,
            slabs: slabs.map_err(Error::kernel(rank, "make room for the main values"))?,
        })
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
