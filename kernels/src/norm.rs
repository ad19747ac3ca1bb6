//! The squared norm of a span, with the question whether all of it is finite: one pass answers both.

use crate::error::{KernelError, on_host};
use crate::simd;
use crate::span::Span;

/// What [`sum_squares`] found.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct SumSquares {
    /// The sum of the squares, in f64. Infinite or NaN when an element is, or when f64 elements are huge.
    pub sum: f64,
    /// No element is infinite or NaN.
    pub finite: bool,
}

/// The sum of `x[i]^2`, in f64. Floats only.
///
/// [Note: norm order] Element i is squared and added to lane i mod 8, in order of i; the eight lanes are added as
/// ((0+1)+(2+3))+((4+5)+(6+7)). The order depends on the length and on nothing else: not on the instruction set, not on
/// the alignment.
///
/// ```
/// use fabric_kernels::{Span, sum_squares};
/// let found = sum_squares(Span::of(&[3.0f32, 4.0]))?;
/// assert_eq!((found.sum, found.finite), (25.0, true));
/// # Ok::<(), fabric_kernels::KernelError>(())
/// ```
pub fn sum_squares(x: Span<'_>) -> Result<SumSquares, KernelError> {
    const OP: &str = "sum_squares";
    on_host(OP, [x.device()])?;
    with_float!(
        x.dtype(),
        |T| Ok(simd::sum_squares::<T>(x)),
        else Err(KernelError::Unsupported { op: OP, dtype: x.dtype() })
    )
}
