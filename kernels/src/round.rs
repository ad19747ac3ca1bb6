//! Casts that round by chance, over spans.

use crate::cast::cast;
use crate::device::{Task, place};
use crate::dtype::{Dtype, Element, F8E4M3, F8E5M2};
use crate::error::{KernelError, same_length, together};
use crate::scalar::{self, Float};
use crate::span::{Span, SpanMut};
use half::{bf16, f16};

/// `into[i] = from[i] * factor` in f32, rounded up or down with the probability of the distance, so that the mean of many is
/// the value: from f32, f16 or bf16 into a float of fewer digits. Values that the type holds stay, and beyond
/// its largest number nothing is left to chance.
///
/// The chance of an element is a pure function of `seed`, of its pair's number among those with elements, and of its own
/// number: the same on the host and on every device. All pairs are of the same two dtypes and lie in one memory; on a device
/// they are one launch, and there is none from bf16 into f16.
///
/// ```
/// use fabric_kernels::{Span, SpanMut, cast_stochastic};
/// use half::bf16;
///
/// let x = [1.0f32 + 0.25 / 128.0; 4096]; // a quarter of the way from 1 to the next bf16
/// let mut small = [bf16::ZERO; 4096];
/// cast_stochastic(vec![(Span::of(&x), SpanMut::of(&mut small))], 1.0, 7)?;
/// let up = small.iter().filter(|value| f32::from(**value) > 1.0).count();
/// assert!((900..1150).contains(&up));
/// # Ok::<(), fabric_kernels::KernelError>(())
/// ```
pub fn cast_stochastic(
    pairs: Vec<(Span<'_>, SpanMut<'_>)>,
    factor: f64,
    seed: u64,
) -> Result<(), KernelError> {
    const OP: &str = "cast_stochastic";
    let mut pairs = pairs;
    let Some((source, target)) = pairs
        .first()
        .map(|(from, into)| (from.dtype(), into.dtype()))
    else {
        return Ok(());
    };
    if !is_known(source, target) {
        return Err(KernelError::Cast {
            from: source,
            into: target,
        });
    }
    let memory = pairs[0].1.memory();
    for (from, into) in &pairs {
        same_length(OP, into.len(), from.len())?;
        together(OP, [memory, from.memory(), into.memory()])?;
        for (first, other) in [(source, from.dtype()), (target, into.dtype())] {
            if other != first {
                let op = OP;
                return Err(KernelError::Mixed { op, first, other });
            }
        }
    }
    pairs.retain(|(from, _)| !from.is_empty());
    let first = pairs
        .first()
        .and_then(|(from, into)| place([into.device(), from.device()]));
    if let Some(device) = first {
        if (source, target) == (Dtype::BF16, Dtype::F16) {
            // No kernel does this one, which nobody trains with.
            return Err(KernelError::Cast {
                from: source,
                into: target,
            });
        }
        return device.run(Task::Round {
            pairs,
            factor,
            seed,
        });
    }
    for (entry, (from, into)) in pairs.into_iter().enumerate() {
        let chance = Chance {
            factor,
            seed,
            entry: entry as u32,
        };
        match source {
            Dtype::F32 => chance.from::<f32>(from, into)?,
            Dtype::F16 => chance.from::<f16>(from, into)?,
            _ => chance.from::<bf16>(from, into)?,
        }
    }
    Ok(())
}

/// Whether the second holds fewer digits than the first, and both are known here.
fn is_known(from: Dtype, into: Dtype) -> bool {
    match from {
        Dtype::F32 => into.is_float() && into.size() <= 2,
        Dtype::F16 => matches!(into, Dtype::BF16 | Dtype::F8E4M3 | Dtype::F8E5M2),
        Dtype::BF16 => matches!(into, Dtype::F8E4M3 | Dtype::F8E5M2), // f16 holds all its digits
        _ => false,
    }
}

/// What is the same for all elements of one pair.
struct Chance {
    factor: f64,
    seed: u64,
    entry: u32,
}

impl Chance {
    fn from<A: Float>(&self, from: Span<'_>, into: SpanMut<'_>) -> Result<(), KernelError> {
        match into.dtype() {
            Dtype::F16 => self.round::<A, f16>(from, into),
            Dtype::BF16 => self.round::<A, bf16>(from, into),
            Dtype::F8E4M3 => self.round::<A, F8E4M3>(from, into),
            _ => self.round::<A, F8E5M2>(from, into),
        }
    }

    fn round<A: Float + Element, B: Float + Element>(
        &self,
        from: Span<'_>,
        mut into: SpanMut<'_>,
    ) -> Result<(), KernelError> {
        const CHUNK_ELEMS: usize = 1024;
        let (mut here, mut there) = ([A::zeroed(); CHUNK_ELEMS], [B::zeroed(); CHUNK_ELEMS]);
        for start in (0..from.len()).step_by(CHUNK_ELEMS) {
            let range = start..from.len().min(start + CHUNK_ELEMS);
            let (here, there) = (&mut here[..range.len()], &mut there[..range.len()]);
            cast(from.slice(range.clone()), SpanMut::of(here))?;
            for (index, (x, y)) in here.iter().zip(&mut *there).enumerate() {
                let element = (start + index) as u64;
                let random = scalar::random_bits(self.seed, self.entry, element);
                *y = scalar::cast_stochastic(*x, self.factor, random);
            }
            cast(Span::of(there), into.slice(range))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_with_elements_are_numbered_and_wrong_ones_refused() {
        let x = [0.3f32; 2000];
        let round = |pairs: usize| {
            let mut into = vec![bf16::ZERO; 2000 * pairs];
            let mut list = vec![(Span::of::<f32>(&[]), SpanMut::of::<bf16>(&mut []))];
            list.extend(
                into.chunks_mut(2000)
                    .map(|into| (Span::of(&x), SpanMut::of(into))),
            );
            cast_stochastic(list, 1.0, 3).unwrap();
            into
        };
        let two = round(2);
        assert_eq!(two[..2000], round(1));
        assert_ne!(two[..2000], two[2000..], "each pair has chances of its own");
        let mut wide = [0f64; 1];
        let refused = cast_stochastic(vec![(Span::of(&x[..1]), SpanMut::of(&mut wide))], 1.0, 3);
        assert!(matches!(refused, Err(KernelError::Cast { .. })));
        let (mut one, mut other) = ([bf16::ZERO], [f16::ZERO]);
        let pairs = vec![
            (Span::of(&x[..1]), SpanMut::of(&mut one)),
            (Span::of(&x[..1]), SpanMut::of(&mut other)),
        ];
        assert!(matches!(
            cast_stochastic(pairs, 1.0, 3),
            Err(KernelError::Mixed { .. })
        ));
    }
}
