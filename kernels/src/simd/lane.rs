//! One element in a register: how each dtype becomes an accumulator and back, and what is done in between.
//!
//! Everything is branch-free integer and float arithmetic on 32 or 64 bits, so that loops over it vectorise. It is safe
//! code; that it is also right is for the oracle to say.

mod int;
mod ops;
mod small;

pub(crate) use int::Int;
pub(super) use int::{And, Divide, IntLarger, IntPlus, IntSmaller, IntTimes, Multiply, Or, Xor};
pub(super) use ops::{Clamp, Convert, Larger, Plus, Same, Scale, Smaller, Times};

use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use crate::dtype::{Element, F8E4M3, F8E5M2};
use small::{grow, shrink, to_odd};

/// What is done with one element.
pub(super) trait Unary<A, B> {
    fn apply(&self, element: A) -> B;
}

/// What is done with two.
pub(super) trait Binary<B, A> {
    fn apply(&self, ours: B, theirs: A) -> B;
}

/// A float in memory.
pub(crate) trait Lane: Element {
    /// The accumulator of this type alone.
    type Own: Acc;
    /// Exact, but for f64, which is rounded.
    fn to_f32(self) -> f32;
    /// Rounded once.
    fn from_f32(value: f32) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Rounded once.
    fn from_f64(value: f64) -> Self;
}

/// A float to compute in: f32 or f64.
pub(crate) trait Acc:
    Lane
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    fn load<L: Lane>(lane: L) -> Self;
    fn store<L: Lane>(self) -> L;
    fn narrow(value: f64) -> Self;
    fn root(self) -> Self;
    /// All bits set in either.
    fn bit_or(self, other: Self) -> Self;
    /// The bits set in both.
    fn bit_and(self, other: Self) -> Self;
}

impl Lane for f64 {
    type Own = f64;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
}

impl Lane for f32 {
    type Own = f32;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

/// The four small formats: fraction bits, exponent bias, magnitude bits of overflow, of the first special value, of
/// NaN, and the unsigned type of the bits.
macro_rules! small_lanes {
    ($($lane:ty: $fraction:literal, $bias:literal, $overflow:literal, $special:literal, $nan:literal, $bits:ty,
        $wrap:expr, $unwrap:expr;)*) => {$(
        impl Lane for $lane {
            type Own = f32;

            #[inline(always)]
            fn to_f32(self) -> f32 {
                grow::<$fraction, $bias, $special>(u32::from($unwrap(self)), <$bits>::BITS)
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                $wrap(shrink::<$fraction, $bias, $overflow, $nan>(value, <$bits>::BITS) as $bits)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self.to_f32())
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                Self::from_f32(to_odd(value))
            }
        }
    )*};
}

small_lanes! {
    f16: 10, 15, 0x7c00, 0x7c00, 0x7e00, u16, f16::from_bits, f16::to_bits;
    bf16: 7, 127, 0x7f80, 0x7f80, 0x7fc0, u16, bf16::from_bits, bf16::to_bits;
    F8E4M3: 3, 7, 0x7e, 0x7f, 0x7f, u8, F8E4M3, e4m3_bits;
    F8E5M2: 2, 15, 0x7b, 0x7c, 0x7e, u8, F8E5M2, e5m2_bits;
}

#[inline(always)]
fn e4m3_bits(lane: F8E4M3) -> u8 {
    lane.0
}

#[inline(always)]
fn e5m2_bits(lane: F8E5M2) -> u8 {
    lane.0
}

macro_rules! accumulators {
    ($($acc:ty: $load:ident, $store:ident;)*) => {$(
        impl Acc for $acc {
            #[inline(always)]
            fn load<L: Lane>(lane: L) -> Self {
                lane.$load()
            }
            #[inline(always)]
            fn store<L: Lane>(self) -> L {
                L::$store(self)
            }
            #[inline(always)]
            fn narrow(value: f64) -> Self {
                value as $acc
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn bit_or(self, other: Self) -> Self {
                <$acc>::from_bits(self.to_bits() | other.to_bits())
            }
            #[inline(always)]
            fn bit_and(self, other: Self) -> Self {
                <$acc>::from_bits(self.to_bits() & other.to_bits())
            }
        }
    )*};
}

accumulators! {
    f32: to_f32, from_f32;
    f64: to_f64, from_f64;
}
