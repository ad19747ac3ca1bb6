//! f8 with one scale for a block of elements.
//!
//! [Note: block scales] The scale of a block is the largest magnitude of its finite elements over the largest finite number
//! of the f8 type, so that this element becomes that number; 1 if all of them are zero or there are none. It is never
//! below 2^-126, the smallest normal f32: a smaller one would have few digits or none, and the quotient no meaning. An
//! element becomes x / scale, divided in f32 and rounded once into the f8 type; so an infinity becomes the largest finite
//! number and NaN stays NaN, and neither has a say in the scale.

use super::float::Float;

/// Elements that share a scale.
pub const BLOCK: usize = 128;

/// The scale of one block of at most [`BLOCK`] elements, no larger than f32, and the elements over it.
pub fn quantize_block<A: Float, Q: Float>(block: &[A]) -> (f32, Vec<Q>) {
    assert!(block.len() <= BLOCK && size_of::<A>() <= 4);
    let values = block.iter().map(|x| x.decode() as f32);
    let most = values
        .clone()
        .filter(|value| value.is_finite())
        .fold(0.0f32, |most, value| most.max(value.abs()));
    // f8 saturates: what infinity becomes is the largest finite number.
    let largest = Q::encode(f64::INFINITY).decode() as f32;
    let scale = if most == 0.0 {
        1.0
    } else {
        (most / largest).max(f32::MIN_POSITIVE)
    };
    let quotients = values.map(|value| Q::encode(f64::from(value / scale)));
    (scale, quotients.collect())
}

/// The elements times their scale, in f32, rounded once.
pub fn dequantize_block<Q: Float, A: Float>(block: &[Q], scale: f32) -> Vec<A> {
    let product = |q: &Q| A::encode(f64::from(q.decode() as f32 * scale));
    block.iter().map(product).collect()
}
