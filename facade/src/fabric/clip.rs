//! Clipping gradients: by their norm, or by value. Where all ranks hold all gradients they clip alike without a word; where
//! each holds pieces the control word has brought the sum of their squares. Scaling is left to whoever reads the gradients
//! next, who does it in the same pass.

use std::ops::Range;

use fabric_engine::{
    kernels::{self, Span, SpanMut},
    shard::sequencer::Sequencer,
};

use super::Fabric;
use crate::{
    error::{Error, Result},
    model::{FabricModule, Model, mistake},
};

/// Elements that are worked on at once where a kernel does not work in place: they stay in the first cache.
const CHUNK_ELEMS: usize = 2048;

/// How gradients are clipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clip {
    /// Scale all so that their norm of this order (2.0; `f64::INFINITY` for the largest element) is at most `max`.
    Norm {
        /// The largest norm allowed.
        max: f64,
        /// The order of the norm.
        order: f64,
    },
    /// Clamp each element to `-value..=value`.
    Value(f64),
}

impl Clip {
    /// By the Euclidean norm.
    pub fn norm(max: f64) -> Self {
        Self::Norm { max, order: 2.0 }
    }
}

impl Fabric {
    /// Clip the gradients of `module`. Returns the total norm before clipping, for [`Clip::Norm`].
    ///
    /// # Errors
    /// When the norm is not finite and the loss is not scaled (where it is, the step that follows is skipped), or the
    /// arguments make no sense.
    pub fn clip_gradients<M: Model>(
        &self,
        module: &FabricModule<M>,
        clip: Clip,
    ) -> Result<Option<f64>> {
        let scaled = self.loss_scaler_state().is_some();
        let mut sequencer = module.core.sequencer();
        match clip {
            Clip::Value(limit) => {
                if scaled && !sequencer.squares()?.is_finite() {
                    return Ok(None); // the step will be skipped, which finite values would prevent
                }
                sequencer.apply_scale()?;
                sequencer.each_piece_mut(|grad| kernels::clamp(grad, limit))?;
                Ok(None)
            }
            Clip::Norm { max, order } => {
                if !(max > 0.0 && (order == 2.0 || order == f64::INFINITY)) {
                    return Err(Error::argument(
                        format!("clipping to a norm of {max} and order {order}"),
                        "Give a positive norm, and the order 2.0 or f64::INFINITY",
                    ));
                }
                let norm = match order {
                    2.0 => sequencer.squares()?.norm(),
                    _ => largest(&mut sequencer)?,
                } * sequencer.factor();
                if !norm.is_finite() && scaled {
                    return Ok(Some(norm)); // the step will be skipped
                }
                if !norm.is_finite() {
                    return Err(mistake(
                        self.global_rank(),
                        format!("the gradients' norm is {norm}"),
                        "Look at the loss and the learning rate; an input may hold NaN",
                    )
                    .into());
                }
                // torch's rule: the 1e-6 keeps the result below the limit.
                let factor = max / (norm + 1e-6);
                if factor < 1.0 {
                    sequencer.multiply(factor);
                }
                Ok(Some(norm))
            }
        }
    }
}

fn chunks(numel: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (0..numel).step_by(CHUNK_ELEMS);
    starts.map(move |start| start..numel.min(start + CHUNK_ELEMS))
}

/// The largest magnitude among all gradients, on all ranks.
fn largest(sequencer: &mut Sequencer) -> Result<f64> {
    let pieces = sequencer.plan().each_piece(sequencer.rank());
    let mut grads = pieces.filter_map(|piece| sequencer.piece(&piece));
    let own = grads.try_fold(0f64, |total, grad| largest_of(grad, total))?;
    drop(grads);
    Ok(sequencer.largest(own)?)
}

/// The largest of `floor` and the elements' magnitudes; NaN when one is NaN.
fn largest_of(grad: Span<'_>, floor: f64) -> Result<f64> {
    let (mut total, mut copy) = (floor, [0f64; CHUNK_ELEMS]);
    for range in chunks(grad.len()) {
        let copy = &mut copy[..range.len()];
        kernels::cast(grad.slice(range), SpanMut::of(copy))?;
        for value in copy {
            // f64::max would drop a NaN.
            if value.is_nan() || value.abs() > total {
                total = value.abs();
            }
        }
        if total.is_nan() {
            break;
        }
    }
    Ok(total)
}
