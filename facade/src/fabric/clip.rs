//! Clipping gradients: by their norm, or by value. Where all ranks hold all gradients they clip alike without a word; where
//! each holds pieces they add their bins. The squares are added exactly, so that no cut changes the norm's bits.

use std::ops::Range;

use fabric_engine::{
    buffer::Slab,
    comm::{Collectives, ReduceOp},
    kernels::{self, Span, SpanMut, SquareBins},
    shard::{SharedComm, plan::Piece, sequencer::Sequencer},
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
    /// When the norm is not finite, or the arguments make no sense.
    pub fn clip_gradients<M: Model>(
        &self,
        module: &FabricModule<M>,
        clip: Clip,
    ) -> Result<Option<f64>> {
        let mut sequencer = module.core.sequencer();
        let pieces = sequencer.plan().pieces(sequencer.rank());
        match clip {
            Clip::Value(limit) => {
                for piece in &pieces {
                    if let Some(grad) = sequencer.piece_mut(piece) {
                        kernels::clamp(grad, limit)?;
                    }
                }
                Ok(None)
            }
            Clip::Norm { max, order } => {
                if !(max > 0.0 && (order == 2.0 || order == f64::INFINITY)) {
                    return Err(Error::argument(
                        format!("clipping to a norm of {max} and order {order}"),
                        "Give a positive norm, and the order 2.0 or f64::INFINITY",
                    ));
                }
                let sharded = module.core.shards.is_some();
                let comm = sharded.then_some(&module.core.comm);
                let norm = total_norm(&sequencer, &pieces, order, comm)?;
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
                    for piece in &pieces {
                        if let Some(grad) = sequencer.piece_mut(piece) {
                            scale(grad, factor)?;
                        }
                    }
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

/// The norm over all gradients; over `comm`, when each rank holds its own pieces.
fn total_norm(
    sequencer: &Sequencer,
    pieces: &[Piece],
    order: f64,
    comm: Option<&SharedComm>,
) -> Result<f64> {
    let grads = || pieces.iter().filter_map(|piece| sequencer.piece(piece));
    if order == 2.0 {
        let mut bins = SquareBins::new();
        grads().try_for_each(|grad| bins.add(grad))?;
        if let Some(comm) = comm {
            let mut words = bins.words().to_vec();
            comm.lock().all_reduce(&mut words, ReduceOp::Sum)?;
            let words = words.try_into().expect("as many words as were sent");
            bins = SquareBins::from_words(&words);
        }
        return Ok(bins.norm());
    }
    let mut total = grads().try_fold(0f64, |total, grad| largest(grad, total))?;
    if let Some(comm) = comm {
        let mut word = vec![total];
        comm.lock().all_reduce(&mut word, ReduceOp::Max)?;
        total = word[0];
    }
    Ok(total)
}

/// The largest of `floor` and the elements' magnitudes; NaN when one is NaN.
fn largest(grad: Span<'_>, floor: f64) -> Result<f64> {
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

fn scale(mut grad: SpanMut<'_>, factor: f64) -> Result<()> {
    let mut copy = Slab::zeroed(grad.dtype(), grad.len().min(CHUNK_ELEMS));
    for range in chunks(grad.len()) {
        let part = 0..range.len();
        let mut grad = grad.slice(range);
        kernels::cast(grad.as_span(), copy.part_mut(part.clone()))?;
        kernels::cast_scaled(copy.part(part), grad.reborrow(), factor)?;
    }
    Ok(())
}
