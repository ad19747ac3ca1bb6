//! Casts: elements of one dtype written as another, scaled or divided on the way.

use crate::device::{Task, place};
use crate::dtype::Dtype;
use crate::error::{KernelError, on_host, same_length};
use crate::simd;
use crate::span::{Span, SpanMut};

/// `into[i] = from[i]`, rounded once. Any float goes into any float; equal dtypes of any kind are copied byte for byte.
pub fn cast(from: Span<'_>, into: SpanMut<'_>) -> Result<(), KernelError> {
    same_length("cast", into.len(), from.len())?;
    if let Some(device) = place([into.device(), from.device()]) {
        movable(from.dtype(), into.dtype())?;
        let factor = 1.0;
        return device.run(Task::Move { from, into, factor });
    }
    if from.dtype() == into.dtype() {
        simd::copy(from, into);
        return Ok(());
    }
    let refusal = KernelError::Cast {
        from: from.dtype(),
        into: into.dtype(),
    };
    with_float_pair!(
        from.dtype(), into.dtype(),
        |A, B, C| { simd::cast::<A, B, C>(from, into); Ok(()) },
        else Err(refusal)
    )
}

/// `into[i] = from[i] * factor`, with one multiplication in the accumulator type (f64 if either side is, else f32, to
/// which the factor is rounded first) and one rounding. Integers go into their own dtype and wrap; their factor must be
/// a whole number that the dtype holds, and on a device 1.
///
/// ```
/// use fabric_kernels::{Span, SpanMut, cast_scaled};
/// let mut mean = [0.0f32; 2];
/// cast_scaled(Span::of(&[3.0f64, 5.0]), SpanMut::of(&mut mean), 0.5)?;
/// assert_eq!(mean, [1.5, 2.5]);
/// # Ok::<(), fabric_kernels::KernelError>(())
/// ```
pub fn cast_scaled(from: Span<'_>, into: SpanMut<'_>, factor: f64) -> Result<(), KernelError> {
    const OP: &str = "cast_scaled";
    same_length(OP, into.len(), from.len())?;
    let (source, target) = (from.dtype(), into.dtype());
    if let Some(device) = place([into.device(), from.device()]) {
        movable(source, target)?;
        // Kernels multiply floats; integers that only come or go are multiplied on the host.
        let is_there = from.device().is_some() && into.device().is_some();
        if is_there && factor != 1.0 && !source.is_float() {
            return Err(KernelError::Unsupported {
                op: OP,
                dtype: source,
            });
        }
        return device.run(Task::Move { from, into, factor });
    }
    if source.is_float() {
        return with_float_pair!(
            source, target,
            |A, B, C| { simd::cast_scaled::<A, B, C>(from, into, factor); Ok(()) },
            else Err(KernelError::Cast { from: source, into: target })
        );
    }
    if source != target {
        return Err(KernelError::Cast {
            from: source,
            into: target,
        });
    }
    with_integer!(
        source,
        |T| match <T as simd::Int>::exactly(factor) {
            Some(factor) => { simd::multiply::<T>(from, into, factor); Ok(()) }
            None => Err(KernelError::Value { op: OP, dtype: source, value: factor }),
        },
        else Err(KernelError::Unsupported { op: OP, dtype: source })
    )
}

/// `x[i] *= factor`, rounded once into the dtype. Floats only.
pub fn scale(mut x: SpanMut<'_>, factor: f64) -> Result<(), KernelError> {
    const CHUNK_ELEMS: usize = 1024; // a copy that stays in the first cache
    const OP: &str = "scale";
    let dtype = x.dtype();
    if !dtype.is_float() {
        return Err(KernelError::Unsupported { op: OP, dtype });
    }
    if let Some(device) = x.device() {
        return device.run(Task::Scale { x, factor });
    }
    with_float!(
        dtype,
        |T| {
            let mut copy = [<T as Default>::default(); CHUNK_ELEMS];
            for start in (0..x.len()).step_by(CHUNK_ELEMS) {
                let range = start..x.len().min(start + CHUNK_ELEMS);
                let copy = &mut copy[..range.len()];
                let mut part = x.slice(range);
                cast(part.as_span(), SpanMut::of(copy))?;
                cast_scaled(Span::of(copy), part.reborrow(), factor)?;
            }
            Ok(())
        },
        else Err(KernelError::Unsupported { op: OP, dtype })
    )
}

/// `into[i] = from[i] / by`, truncated toward zero. Integers of one dtype only: floats are multiplied by a factor
/// ([`cast_scaled`]), so that an average rounds once.
pub fn divide(from: Span<'_>, into: SpanMut<'_>, by: u64) -> Result<(), KernelError> {
    const OP: &str = "divide";
    on_host(OP, [from.device(), into.device()])?;
    same_length(OP, into.len(), from.len())?;
    let (source, target) = (from.dtype(), into.dtype());
    if !source.is_integer() {
        return Err(KernelError::Unsupported {
            op: OP,
            dtype: source,
        });
    }
    if source != target {
        return Err(KernelError::Cast {
            from: source,
            into: target,
        });
    }
    if by == 0 {
        return Err(KernelError::DivideByZero);
    }
    with_integer!(
        source,
        |T| { simd::divide::<T>(from, into, by); Ok(()) },
        else Err(KernelError::Unsupported { op: OP, dtype: source })
    )
}

/// Refuses a pair of dtypes between which there is no cast.
fn movable(from: Dtype, into: Dtype) -> Result<(), KernelError> {
    match from == into || (from.is_float() && into.is_float()) {
        true => Ok(()),
        false => Err(KernelError::Cast { from, into }),
    }
}
