//! What is done with integers, wrapping, in their own width; and with bools.

use std::ops::{BitAnd, BitOr, BitXor};

use super::{Binary, Unary};
use crate::dtype::{Bool, Element};

/// An integer in memory and in a register.
pub(crate) trait Int:
    Element + Ord + BitAnd<Output = Self> + BitOr<Output = Self> + BitXor<Output = Self>
{
    /// The integer that `value` is, if it is one.
    fn exactly(value: f64) -> Option<Self>;
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    /// Toward zero; `other` is positive.
    fn over(self, other: Self) -> Self;
    /// `by`, if it is in range.
    fn divisor(by: u64) -> Option<Self>;
    /// `self` divided by a `by` that is out of range: -1 if they are the lowest number and its magnitude, else 0.
    fn over_huge(self, by: u64) -> Self;
}

macro_rules! ints {
    ($($int:ty),*) => {$(
        impl Int for $int {
            fn exactly(value: f64) -> Option<Self> {
                // Within 2^64 every whole f64 is an i128, so the cast loses nothing.
                let whole = value.trunc() == value && value.abs() <= 2.0f64.powi(64);
                if whole { <$int>::try_from(value as i128).ok() } else { None }
            }
            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn times(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn over(self, other: Self) -> Self {
                self.wrapping_div(other)
            }
            fn divisor(by: u64) -> Option<Self> {
                <$int>::try_from(by).ok()
            }
            #[inline(always)]
            #[allow(unused_comparisons, clippy::absurd_extreme_comparisons)]
            fn over_huge(self, by: u64) -> Self {
                let lowest = <$int>::MIN < 0 && self == <$int>::MIN && by == 1u64 << (<$int>::BITS - 1);
                (0 as $int).wrapping_sub(<$int>::from(lowest))
            }
        }
    )*};
}

ints!(i8, i16, i32, i64, u8, u16, u32, u64);

/// The product with a constant.
pub(in crate::simd) struct Multiply<T>(pub(in crate::simd) T);

impl<T: Int> Unary<T, T> for Multiply<T> {
    #[inline(always)]
    fn apply(&self, element: T) -> T {
        element.times(self.0)
    }
}

/// The quotient by a constant, which need not fit the type.
pub(in crate::simd) struct Divide<T> {
    by: u64,
    divisor: Option<T>,
}

impl<T: Int> Divide<T> {
    pub(in crate::simd) fn by(by: u64) -> Self {
        assert_ne!(by, 0, "the caller refuses to divide by zero");
        Divide {
            by,
            divisor: T::divisor(by),
        }
    }
}

impl<T: Int> Unary<T, T> for Divide<T> {
    #[inline(always)]
    fn apply(&self, element: T) -> T {
        match self.divisor {
            Some(divisor) => element.over(divisor),
            None => element.over_huge(self.by),
        }
    }
}

/// The wrapped sum.
pub(in crate::simd) struct IntPlus;
/// The wrapped product.
pub(in crate::simd) struct IntTimes;
/// The smaller one.
pub(in crate::simd) struct IntSmaller;
/// The larger one.
pub(in crate::simd) struct IntLarger;

impl<T: Int> Binary<T, T> for IntPlus {
    #[inline(always)]
    fn apply(&self, ours: T, theirs: T) -> T {
        ours.plus(theirs)
    }
}

impl<T: Int> Binary<T, T> for IntTimes {
    #[inline(always)]
    fn apply(&self, ours: T, theirs: T) -> T {
        ours.times(theirs)
    }
}

impl<T: Int> Binary<T, T> for IntSmaller {
    #[inline(always)]
    fn apply(&self, ours: T, theirs: T) -> T {
        if theirs < ours { theirs } else { ours }
    }
}

impl<T: Int> Binary<T, T> for IntLarger {
    #[inline(always)]
    fn apply(&self, ours: T, theirs: T) -> T {
        if theirs > ours { theirs } else { ours }
    }
}

/// The bits, or the truth, of both.
pub(in crate::simd) struct And;
/// The bits, or the truth, of either.
pub(in crate::simd) struct Or;
/// The bits, or the truth, of one alone.
pub(in crate::simd) struct Xor;

impl<T: Int> Binary<T, T> for And {
    #[inline(always)]
    fn apply(&self, ours: T, theirs: T) -> T {
        ours & theirs
    }
}

impl<T: Int> Binary<T, T> for Or {
    #[inline(always)]
    fn apply(&self, ours: T, theirs: T) -> T {
        ours | theirs
    }
}

impl<T: Int> Binary<T, T> for Xor {
    #[inline(always)]
    fn apply(&self, ours: T, theirs: T) -> T {
        ours ^ theirs
    }
}

impl Binary<Bool, Bool> for And {
    #[inline(always)]
    fn apply(&self, ours: Bool, theirs: Bool) -> Bool {
        Bool::from((ours.0 != 0) & (theirs.0 != 0))
    }
}

impl Binary<Bool, Bool> for Or {
    #[inline(always)]
    fn apply(&self, ours: Bool, theirs: Bool) -> Bool {
        Bool::from((ours.0 | theirs.0) != 0)
    }
}

impl Binary<Bool, Bool> for Xor {
    #[inline(always)]
    fn apply(&self, ours: Bool, theirs: Bool) -> Bool {
        Bool::from((ours.0 != 0) != (theirs.0 != 0))
    }
}
