//! Integer arithmetic in i128, where nothing that starts in 64 bits overflows unseen, and the two folds of bool.

use crate::dtype::{Bool, Element};
use crate::fold::Fold;

/// An integer that the oracle can read and write.
pub trait Integer: Element {
    /// The value.
    fn widen(self) -> i128;
    /// The value modulo two to the number of bits.
    fn wrap(value: i128) -> Self;
}

macro_rules! integers {
    ($($integer:ty),*) => {$(
        impl Integer for $integer {
            fn widen(self) -> i128 {
                i128::from(self)
            }
            fn wrap(value: i128) -> Self {
                value as $integer
            }
        }
    )*};
}

integers!(i8, i16, i32, i64, u8, u16, u32, u64);

/// into op with, wrapping.
pub fn fold_integer<T: Integer>(op: Fold, into: T, with: T) -> T {
    let (a, b) = (into.widen(), with.widen());
    T::wrap(match op {
        Fold::Sum => a + b,
        // Two u64 may exceed an i128; the low bits, which are all that is kept, are right even so.
        Fold::Prod => a.wrapping_mul(b),
        Fold::Min => a.min(b),
        Fold::Max => a.max(b),
        Fold::And => a & b,
        Fold::Or => a | b,
        Fold::Xor => a ^ b,
    })
}

/// from * factor, wrapping. The factor is a whole number.
pub fn multiply<T: Integer>(from: T, factor: f64) -> T {
    T::wrap(from.widen().wrapping_mul(factor as i128))
}

/// from / by, toward zero.
pub fn divide<T: Integer>(from: T, by: u64) -> T {
    T::wrap(from.widen() / i128::from(by))
}

/// Logic; min is "and", max is "or". Flags are neither added nor multiplied.
pub fn fold_bool(op: Fold, into: Bool, with: Bool) -> Bool {
    match op {
        Fold::Min | Fold::And => Bool::from(into.get() && with.get()),
        Fold::Max | Fold::Or => Bool::from(into.get() || with.get()),
        Fold::Xor => Bool::from(into.get() != with.get()),
        Fold::Sum | Fold::Prod => panic!("bool has no {op}"),
    }
}
