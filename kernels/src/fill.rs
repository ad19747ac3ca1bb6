//! Values that do not come from another span: a constant, or a bound.

use crate::device::Task;
use crate::dtype::{Bool, Dtype};
use crate::error::KernelError;
use crate::simd;
use crate::span::SpanMut;

/// `into[i] = value`, rounded once into a float dtype. An integer dtype must hold the value exactly; bool is true for any
/// value but zero.
pub fn fill(into: SpanMut<'_>, value: f64) -> Result<(), KernelError> {
    const OP: &str = "fill";
    let dtype = into.dtype();
    if let Some(device) = into.device() {
        return device.run(Task::Fill { into, value });
    }
    if dtype == Dtype::Bool {
        simd::fill(into, Bool::from(value != 0.0));
        return Ok(());
    }
    with_float!(
        dtype,
        |T| { simd::fill(into, <T as simd::Lane>::from_f64(value)); Ok(()) },
        else with_integer!(
            dtype,
            |T| match <T as simd::Int>::exactly(value) {
                Some(value) => { simd::fill(into, value); Ok(()) }
                None => Err(KernelError::Value { op: OP, dtype, value }),
            },
            else Err(KernelError::Unsupported { op: OP, dtype })
        )
    )
}

/// `x[i]` taken into `[-limit, limit]`; NaN stays. Floats only. The limit is rounded to the dtype first, so that a bound is
/// a number of the dtype; an infinite limit bounds nothing.
pub fn clamp(x: SpanMut<'_>, limit: f64) -> Result<(), KernelError> {
    const OP: &str = "clamp";
    let dtype = x.dtype();
    if !dtype.is_float() {
        return Err(KernelError::Unsupported { op: OP, dtype });
    }
    if limit.is_nan() || limit < 0.0 {
        return Err(KernelError::Limit { limit });
    }
    if limit.is_infinite() {
        return Ok(());
    }
    if let Some(device) = x.device() {
        return device.run(Task::Clamp { x, limit });
    }
    with_float!(
        dtype,
        |T| { simd::clamp::<T>(x, <T as simd::Lane>::from_f64(limit)); Ok(()) },
        else Err(KernelError::Unsupported { op: OP, dtype })
    )
}
