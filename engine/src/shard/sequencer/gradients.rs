//! Gradients as whoever updates sees them: in pieces, and still to be multiplied by one factor.

use fabric_kernels::{Span, SpanMut};

use super::Sequencer;
use crate::{
    error::Result,
    shard::{ParamId, bucket::Bucket, plan::Piece},
};

impl Sequencer {
    /// What every gradient is still to be multiplied by.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// Multiply all gradients by `factor`: whoever reads them does it, in the same pass.
    pub fn multiply(&mut self, factor: f64) {
        self.factor *= factor;
    }

    /// Do now what [`Sequencer::multiply`] put off.
    ///
    /// # Errors
    /// When the arithmetic refuses.
    pub fn apply_scale(&mut self) -> Result<()> {
        let factor = std::mem::replace(&mut self.factor, 1.0);
        if factor == 1.0 {
            return Ok(());
        }
        self.squares = None;
        let mut buckets = self.buckets.iter_mut();
        buckets.try_for_each(|bucket| bucket.scale_all(self.rank, factor))
    }

    /// The gradient of `param`, in the reduce dtype and before [`Sequencer::factor`]; `None` when it has none, or this rank
    /// holds a part of it only.
    pub fn grad(&self, param: ParamId) -> Option<Span<'_>> {
        let (bucket, entry) = self.plan.grad_place(param)?;
        let place = self.plan.buckets()[bucket].layout.entries()[entry]
            .1
            .clone();
        let own = self.plan.own(bucket, self.rank);
        let inside = own.start <= place.start && place.end <= own.end;
        if !inside || self.plan.buckets()[bucket].axis.shards_update() {
            return None;
        }
        self.buckets[bucket].piece(entry, place)
    }

    /// The gradient of a piece that this rank updates, in the reduce dtype and before [`Sequencer::factor`]; `None` when its
    /// parameter has none.
    pub fn piece(&self, piece: &Piece) -> Option<Span<'_>> {
        let (bucket, entry) = self.plan.grad_place(piece.param)?;
        self.buckets[bucket].piece(entry, piece.place.clone())
    }

    /// The same, to change (to clip it, say).
    pub fn piece_mut(&mut self, piece: &Piece) -> Option<SpanMut<'_>> {
        self.squares = None;
        let (bucket, entry) = self.plan.grad_place(piece.param)?;
        self.buckets[bucket].piece_mut(entry, piece.place.clone())
    }

    /// Change every gradient that this rank updates with.
    ///
    /// # Errors
    /// `f`'s.
    pub fn each_piece_mut<E>(
        &mut self,
        mut f: impl FnMut(SpanMut<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for bucket in 0..self.buckets.len() {
            for entry in 0..self.plan.buckets()[bucket].layout.entries().len() {
                let piece = self.plan.part(bucket, entry, self.rank);
                if let Some(grad) = piece.and_then(|piece| self.piece_mut(&piece)) {
                    f(grad)?;
                }
            }
        }
        Ok(())
    }

    /// Forget all gradients.
    pub fn zero_grad(&mut self) {
        self.buckets.iter_mut().for_each(Bucket::clear);
        self.squares = None;
        self.factor = 1.0;
        self.is_mean = false;
    }
}
