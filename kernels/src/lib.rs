//! Elementwise arithmetic on raw memory: casts, folds, norms and optimizer updates over [`Span`]s. Nothing here has
//! ever heard of a rank.
//!
//! Every verb exists twice. [`scalar`] says what is meant, one value at a time, and is obviously right; `simd` does it
//! quickly, and a test of bit equality over every length from 0 to 257 holds the two together.
//!
//! ```
//! use fabric_kernels::{Fold, Span, SpanMut, cast, fold};
//! use half::bf16;
//!
//! let mut sum = [1.0f32, 2.0, 3.0];
//! let leaf = [0.5f32, 0.25, 0.125].map(bf16::from_f32);
//! fold(Fold::Sum, SpanMut::of(&mut sum), Span::of(&leaf))?;
//! assert_eq!(sum, [1.5, 2.25, 3.125]);
//!
//! let mut small = [bf16::ZERO; 3];
//! cast(Span::of(&sum), SpanMut::of(&mut small))?;
//! assert_eq!(small.map(f32::from), sum);
//! # Ok::<(), fabric_kernels::KernelError>(())
//! ```
//!
//! # [Note: one rounding]
//!
//! A result is computed in the accumulator type (f64 if any operand is f64, f32 otherwise) and rounded once, to nearest
//! even, into its target. f64 goes into a small float without passing through f32's rounding. f16, bf16 and f32
//! overflow to infinity; the two f8 types saturate at their largest finite number, for infinities too. NaN stays NaN;
//! its payload and its sign are nobody's law. Nothing is ever contracted into a fused multiply-add, so all machines
//! agree.

#![deny(unsafe_code)]

#[macro_use]
mod dispatch;

mod block;
mod cast;
mod combine;
mod combiner;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub mod cuda;
pub mod device;
mod dtype;
mod error;
mod exact;
mod fill;
mod fold;
mod norm;
mod optim;
mod round;
pub mod scalar;
#[allow(unsafe_code)]
mod simd;
mod span;

#[cfg(test)]
mod tests;

pub use block::{dequantize, quantize};
pub use cast::{cast, cast_scaled, divide, scale};
pub use combine::{Finish, Store, combine};
pub use combiner::Combiner;
pub use device::{Device, batch, put_off};
pub use dtype::{Bool, Dtype, Element, F8E4M3, F8E5M2, Memory};
pub use error::KernelError;
pub use exact::SquareBins;
pub use fill::{clamp, fill};
pub use fold::{Fold, fold};
pub use norm::{SumSquares, sum_squares};
pub use optim::{Adam, Lion, Rule, Sgd, update};
pub use round::cast_stochastic;
pub use simd::instruction_set;
pub use span::{Span, SpanMut};
