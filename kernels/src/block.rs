//! f8 with one scale for each 128 elements: a quarter of the memory of f32, and a range that follows the elements.

use crate::cast::cast;
use crate::dtype::{Dtype, Element, F8E4M3, F8E5M2};
use crate::error::{KernelError, on_host, same_length};
use crate::scalar::{BLOCK, Float, dequantize_block, quantize_block};
use crate::span::{Span, SpanMut};

/// Writes `from`, which is f32, f16 or bf16, as one of the two f8, over one f32 scale for each 128 elements; the last block
/// may be short. The scale of a block is the largest magnitude of its finite elements over the largest number of the f8
/// type, and 1 for zeros; at least 2^-126. Infinities become the largest number, NaN stays NaN.
///
/// ```
/// use fabric_kernels::{F8E4M3, Span, SpanMut, dequantize, quantize};
///
/// let (x, mut small, mut scales) = ([896.0f32, -2.0, 0.0], [F8E4M3(0); 3], [0.0f32]);
/// quantize(Span::of(&x), SpanMut::of(&mut small), SpanMut::of(&mut scales))?;
/// assert_eq!(scales, [2.0]); // 896 / 448
///
/// let mut back = [0.0f32; 3];
/// dequantize(Span::of(&small), Span::of(&scales), SpanMut::of(&mut back))?;
/// assert_eq!(back, x);
/// # Ok::<(), fabric_kernels::KernelError>(())
/// ```
pub fn quantize(
    from: Span<'_>,
    mut into: SpanMut<'_>,
    mut scales: SpanMut<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "quantize";
    on_host(OP, [from.memory(), into.memory(), scales.memory()])?;
    same_length(OP, into.len(), from.len())?;
    check(OP, from.dtype(), into.dtype(), scales.as_span(), from.len())?;
    for (block, range) in blocks(from.len()).enumerate() {
        let (from, into) = (from.slice(range.clone()), into.slice(range));
        let scale = match into.dtype() {
            Dtype::F8E4M3 => quantize_into::<F8E4M3>(from, into)?,
            _ => quantize_into::<F8E5M2>(from, into)?,
        };
        let scales = scales.slice(block..block + 1);
        cast(Span::of(&[scale]), scales)?;
    }
    Ok(())
}

/// Writes the elements of [`quantize`] times their scales, rounded once, as f32, f16 or bf16.
pub fn dequantize(
    from: Span<'_>,
    scales: Span<'_>,
    mut into: SpanMut<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "dequantize";
    on_host(OP, [from.memory(), into.memory(), scales.memory()])?;
    same_length(OP, into.len(), from.len())?;
    check(OP, into.dtype(), from.dtype(), scales, from.len())?;
    for (block, range) in blocks(from.len()).enumerate() {
        let mut scale = [0.0f32];
        cast(scales.slice(block..block + 1), SpanMut::of(&mut scale))?;
        let (from, into) = (from.slice(range.clone()), into.slice(range));
        match from.dtype() {
            Dtype::F8E4M3 => dequantize_from::<F8E4M3>(from, scale[0], into)?,
            _ => dequantize_from::<F8E5M2>(from, scale[0], into)?,
        }
    }
    Ok(())
}

/// Refuses dtypes other than these, and scales that are not one for each block.
fn check(
    op: &'static str,
    wide: Dtype,
    small: Dtype,
    scales: Span<'_>,
    len: usize,
) -> Result<(), KernelError> {
    if !matches!(wide, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(KernelError::Unsupported { op, dtype: wide });
    }
    if !matches!(small, Dtype::F8E4M3 | Dtype::F8E5M2) {
        return Err(KernelError::Unsupported { op, dtype: small });
    }
    if scales.dtype() != Dtype::F32 || scales.len() != len.div_ceil(BLOCK) {
        return Err(KernelError::Step {
            op,
            reason: "there is one f32 scale for each 128 elements, a short last block included; \
                     pass a span of len.div_ceil(128) f32",
        });
    }
    Ok(())
}

fn blocks(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len)
        .step_by(BLOCK)
        .map(move |start| start..len.min(start + BLOCK))
}

/// One block; its scale. Elements may not be slices, so they are copied out, exactly, and in.
fn quantize_into<Q: Float>(from: Span<'_>, into: SpanMut<'_>) -> Result<f32, KernelError> {
    let mut values = [0.0f32; BLOCK];
    let values = &mut values[..from.len()];
    cast(from, SpanMut::of(values))?;
    let (scale, quotients) = quantize_block::<f32, Q>(values);
    cast(Span::of(&quotients), into)?;
    Ok(scale)
}

/// One block.
fn dequantize_from<Q: Float>(
    from: Span<'_>,
    scale: f32,
    into: SpanMut<'_>,
) -> Result<(), KernelError> {
    fn products<Q: Float, A: Float + Element>(
        from: &[Q],
        scale: f32,
        into: SpanMut<'_>,
    ) -> Result<(), KernelError> {
        cast(Span::of(&dequantize_block::<Q, A>(from, scale)), into)
    }
    let mut elements = [Q::encode(0.0); BLOCK];
    let elements = &mut elements[..from.len()];
    cast(from, SpanMut::of(elements))?;
    match into.dtype() {
        Dtype::F32 => products::<Q, f32>(elements, scale, into),
        Dtype::F16 => products::<Q, half::f16>(elements, scale, into),
        _ => products::<Q, half::bf16>(elements, scale, into),
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn quantized<Q: Float>(x: &[f32]) -> (Vec<f32>, Vec<f64>) {
        let mut scales = vec![0.0f32; x.len().div_ceil(BLOCK)];
        let mut small = vec![Q::encode(0.0); x.len()];
        quantize(
            Span::of(x),
            SpanMut::of(&mut small),
            SpanMut::of(&mut scales),
        )
        .unwrap();
        (scales, small.iter().map(|q| q.decode()).collect())
    }

    /// Two whole blocks and a short one, each with a largest element of its own.
    #[test]
    fn each_block_has_the_scale_of_its_largest_element() {
        let mut x = vec![1.0f32; 2 * BLOCK + 3];
        (x[5], x[BLOCK + 127], x[2 * BLOCK]) = (-896.0, 448.0, 4480.0);
        let (scales, small) = quantized::<F8E4M3>(&x);
        assert_eq!(scales, [2.0, 1.0, 10.0]);
        assert_eq!((small[5], small[0], small[BLOCK]), (-448.0, 0.5, 1.0));
        assert_eq!((small[2 * BLOCK], small[2 * BLOCK + 1]), (448.0, 0.1015625));
    }

    #[test]
    fn what_is_not_finite_has_no_say_in_the_scale() {
        let (scales, small) = quantized::<F8E5M2>(&[f32::INFINITY, f32::NAN, 57344.0, f32::MIN]);
        assert_eq!(scales, [f32::MAX / 57344.0]);
        assert_eq!((small[0], small[3]), (57344.0, -57344.0));
        assert!(small[1].is_nan());
        let (scales, small) = quantized::<F8E4M3>(&[f32::NEG_INFINITY, 0.0, -0.0]);
        assert_eq!((scales, &small[..2]), (vec![1.0], &[-448.0, 0.0][..]));
        assert!(small[2].is_sign_negative());
    }

    #[test]
    fn the_smallest_elements_keep_a_scale_of_a_normal_number() {
        let tiny = f32::from_bits(1);
        let (scales, small) = quantized::<F8E4M3>(&[tiny, 0.0]);
        // 2^-149 / 2^-126 = 2^-23 is nearer to zero than to the smallest f8.
        assert_eq!((scales, small), (vec![f32::MIN_POSITIVE], vec![0.0, 0.0]));
        let (scales, small) = quantized::<F8E4M3>(&[f32::MIN_POSITIVE]);
        assert_eq!((scales, small), (vec![f32::MIN_POSITIVE], vec![1.0]));
    }

    /// Every element comes back within half a step of f8 at the block's largest, in each of the wide types.
    #[test]
    fn what_was_quantized_comes_back_within_half_a_step() {
        let x: Vec<bf16> = (0..300)
            .map(|index| bf16::from_f32((index as f32 * 0.37).sin() * 1e-3))
            .collect();
        let (mut small, mut scales) = (vec![F8E4M3(0); 300], vec![0.0f32; 3]);
        let (into, per_block) = (SpanMut::of(&mut small), SpanMut::of(&mut scales));
        quantize(Span::of(&x), into, per_block).unwrap();
        let mut back = vec![bf16::ZERO; 300];
        let (from, per_block) = (Span::of(&small), Span::of(&scales));
        dequantize(from, per_block, SpanMut::of(&mut back)).unwrap();
        for (index, (x, back)) in x.iter().zip(&back).enumerate() {
            let step = 32.0 * scales[index / BLOCK];
            let error = (f32::from(*x) - f32::from(*back)).abs();
            assert!(
                error <= 0.51 * step,
                "element {index}: {x} came back as {back}"
            );
        }
    }

    #[test]
    fn nothing_has_no_scales() {
        quantize(
            Span::of::<f32>(&[]),
            SpanMut::of::<F8E5M2>(&mut []),
            SpanMut::of::<f32>(&mut []),
        )
        .unwrap();
    }

    #[test]
    fn other_dtypes_and_other_numbers_of_scales_are_refused() {
        let (x, mut small, mut scales) = ([1.0f32; 129], [F8E4M3(0); 129], [0.0f32; 2]);
        let refused = |from: Span<'_>, into: SpanMut<'_>, scales: SpanMut<'_>| {
            quantize(from, into, scales).unwrap_err().to_string()
        };
        let message = refused(
            Span::of(&x),
            SpanMut::of(&mut small),
            SpanMut::of(&mut scales[..1]),
        );
        assert!(message.contains("len.div_ceil(128)"), "{message}");
        let message = refused(
            Span::of(&[1.0f64; 129]),
            SpanMut::of(&mut small),
            SpanMut::of(&mut scales),
        );
        assert!(message.contains("f64"), "{message}");
        let message = refused(
            Span::of(&x),
            SpanMut::of(&mut [0.0f32; 129]),
            SpanMut::of(&mut scales),
        );
        assert!(message.contains("not defined for f32"), "{message}");
        let message = refused(
            Span::of(&x[..128]),
            SpanMut::of(&mut small),
            SpanMut::of(&mut scales),
        );
        assert!(message.contains("129 elements"), "{message}");
        let message = dequantize(
            Span::of(&small),
            Span::of(&[1.0f64; 2]),
            SpanMut::of(&mut [0.0f32; 129]),
        )
        .unwrap_err()
        .to_string();
        assert!(message.contains("one f32 scale"), "{message}");
    }
}
