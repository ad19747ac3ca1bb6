//! A whole reduction in one pass: elements of several spans are folded in the canonical tree, finished, and stored in
//! several places, a block at a time that never leaves the nearest cache.
//!
//! [Note: canonical tree] The order in which sources meet depends on their numbers only: blocks of 2^k sources that
//! start at multiples of 2^k, and where a right side is missing the left one goes up alone.
//!
//! ```text
//! 0   1   2   3   4
//!  \ /     \ /    |     ((0 + 1) + (2 + 3)) + 4
//!    \_____/      |
//!        \_______/
//! ```
//!
//! Two and four sources, and sums of eight, by far the commonest, are folded in registers. Others go through a stack of
//! blocks that wait for their right side, each standing for more sources than the next: what is done to a block there is
//! done by the verbs of this crate, so the bits are theirs.

use std::ops::Range;
use std::{array, slice};

use crate::device::Device;
use crate::dtype::Dtype;
use crate::error::KernelError;
use crate::fold::{Fold, fold};
use crate::simd::{self, BLOCK_BYTES, LEVELS, Scratch};
use crate::span::{Span, SpanMut};
use crate::{cast, cast_scaled};

const OP: &str = "combine";
/// Blocks of 1, 2, 4, .. sources wait for their right side at once, each on a level of the scratch, with a leaf on top.
const SOURCES: usize = 1 << (LEVELS - 1);
/// Copied to several targets at a time.
const COPY_BYTES: usize = 8 << 10;

/// What happens once to a folded value on its way into the targets.
#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Finish {
    /// It is rounded into its dtype.
    Cast,
    /// It is multiplied by a factor in the accumulator's type and rounded, as by [`cast_scaled`]. Floats only.
    Scale(f64),
    /// It is divided and truncated, as by [`divide`](crate::divide). Integers only.
    Divide(u64),
}

/// How results are stored.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// Ordinary stores: somebody wants the results soon.
    Cached,
    /// Past the caches, where the processor can: there are more results than stay in a cache anyway, and not loading
    /// what is overwritten saves a third of the traffic.
    Streaming,
}

/// `targets[t][i] = finish(sources[0][i] op sources[1][i] op ..)`, in one pass over the elements.
///
/// Sources meet in the canonical tree, `((0 + 1) + (2 + 3)) + 4`: blocks of 2^k sources that start at multiples of 2^k,
/// whatever arrives first. Each is first multiplied by its factor, if there are `factors`, as [`cast_scaled`] does.
/// f16, bf16 and f8 are folded in f32, f64 in f64, and rounded once, at the end. A single source without a factor or a
/// finish is copied, whatever its dtype and whatever the fold.
///
/// All spans have one dtype and one length. Targets do not overlap one another; a target may lie exactly where one of
/// the sources does (both from `from_raw`), because a block is loaded from all sources before it is stored to any
/// target. No other overlap is allowed. Nothing is allocated. After [`Store::Streaming`] the stores are ordered before
/// whatever this thread stores next, as ordinary ones are.
///
/// Panics with more than 65536 sources.
///
/// ```
/// use fabric_kernels::{Finish, Fold, Span, SpanMut, Store, combine};
/// let (a, b, c) = ([1.0f32, 2.0], [3.0f32, 4.0], [5.0f32, 9.0]);
/// let (mut x, mut y) = ([0.0f32; 2], [0.0f32; 2]);
/// let sources = [Span::of(&a), Span::of(&b), Span::of(&c)];
/// let mut targets = [SpanMut::of(&mut x), SpanMut::of(&mut y)];
/// let mean = Finish::Scale(1.0 / 3.0);
/// combine(Fold::Sum, &sources, None, mean, &mut targets, Store::Cached)?;
/// assert_eq!((x, y), ([3.0, 5.0], [3.0, 5.0]));
/// # Ok::<(), fabric_kernels::KernelError>(())
/// ```
pub fn combine(
    op: Fold,
    sources: &[Span<'_>],
    factors: Option<&[f64]>,
    finish: Finish,
    targets: &mut [SpanMut<'_>],
    store: Store,
) -> Result<(), KernelError> {
    let work = Work {
        op,
        sources,
        factors,
        finish: &finish,
    };
    let (dtype, len) = work.check(targets)?;
    if len == 0 || targets.is_empty() {
        return Ok(());
    }
    if work.is_copy() {
        copy_to_all(sources[0], targets, store);
    } else if !work.is_joined() || !work.join(sources, dtype, targets, store) {
        work.in_blocks(dtype, len, targets, store)?;
    }
    simd::settle(store);
    Ok(())
}

/// What every element goes through.
#[derive(Copy, Clone)]
struct Work<'w, 'a> {
    op: Fold,
    sources: &'w [Span<'a>],
    factors: Option<&'w [f64]>,
    finish: &'w Finish, // copying what the caller has just written in parts would wait for it
}

impl Work<'_, '_> {
    /// The elements are what they were.
    fn is_copy(&self) -> bool {
        self.sources.len() == 1 && self.factors.is_none() && matches!(self.finish, Finish::Cast)
    }

    /// One loop takes an element all the way in registers.
    fn is_joined(&self) -> bool {
        let whole = self.leaves_at(0) == self.sources.len() && self.sources.len() > 1;
        whole && !matches!(self.finish, Finish::Divide(_))
    }

    /// The dtype and the length of all spans, if this can be done.
    fn check(&self, targets: &[SpanMut<'_>]) -> Result<(Dtype, usize), KernelError> {
        let Some(first) = self.sources.first() else {
            return Err(KernelError::NoSource { op: OP });
        };
        let (dtype, len) = (first.dtype(), first.len());
        let like = |device: Option<&dyn Device>, other: Dtype, other_len: usize| {
            device.is_none() & (other == dtype) & (other_len == len)
        };
        let sources = self.sources.iter();
        let mut is_plain = true;
        for span in sources.clone() {
            is_plain &= like(span.device(), span.dtype(), span.len());
        }
        for span in targets.iter() {
            is_plain &= like(span.device(), span.dtype(), span.len());
        }
        if !is_plain {
            let mut places = sources
                .map(|s| (s.device(), s.dtype(), s.len()))
                .chain(targets.iter().map(|t| (t.device(), t.dtype(), t.len())));
            let odd = places.find(|(device, other, len)| !like(*device, *other, *len));
            return Err(unlike(dtype, len, odd.expect("one is not plain")));
        }
        debug_assert!(self.places_are_clear(targets), "{OP}: targets overlap");
        if self.is_copy() {
            return Ok((dtype, len));
        }
        assert!(self.sources.len() <= SOURCES, "{OP}: too many sources");
        self.op.check(dtype)?;
        match self.finish {
            Finish::Scale(_) if !dtype.is_float() => Err(unsupported("scale", dtype)),
            Finish::Divide(_) if !dtype.is_integer() => Err(unsupported("divide", dtype)),
            Finish::Divide(0) => Err(KernelError::DivideByZero),
            _ => Ok(()),
        }?;
        self.check_factors(dtype)?;
        Ok((dtype, len))
    }

    /// What [`cast_scaled`] would refuse in the middle.
    fn check_factors(&self, dtype: Dtype) -> Result<(), KernelError> {
        let Some(factors) = self.factors else {
            return Ok(());
        };
        if factors.len() != self.sources.len() {
            return Err(KernelError::Factors {
                op: OP,
                sources: self.sources.len(),
                factors: factors.len(),
            });
        }
        if dtype == Dtype::Bool {
            return Err(unsupported("cast_scaled", dtype));
        }
        let fits = |factor: f64| with_integer!(dtype, |T| <T as simd::Int>::exactly(factor).is_some(), else true);
        match factors.iter().find(|factor| !fits(**factor)) {
            None => Ok(()),
            Some(value) => Err(KernelError::Value {
                op: "cast_scaled",
                dtype,
                value: *value,
            }),
        }
    }

    /// No target lies over another, and none over a part of a source.
    fn places_are_clear(&self, targets: &[SpanMut<'_>]) -> bool {
        let place = |ptr: *const u8, bytes: usize| ptr.addr()..ptr.addr() + bytes;
        let apart = |a: &Range<usize>, b: &Range<usize>| a.end <= b.start || b.end <= a.start;
        targets.iter().enumerate().all(|(index, target)| {
            let own = place(target.as_ptr(), target.bytes());
            let others = &targets[..index];
            let mut others = others.iter().map(|o| place(o.as_ptr(), o.bytes()));
            let mut sources = self.sources.iter().map(|s| place(s.as_ptr(), s.bytes()));
            others.all(|other| apart(&own, &other))
                && sources.all(|source| source == own || apart(&own, &source))
        })
    }

    /// Two, four or eight spans meet in registers, for targets of their own dtype, where they are finished, or of its
    /// accumulator.
    /// False if there is no order in which the targets can be streamed in step: then nothing was done.
    fn join(
        &self,
        from: &[Span<'_>],
        into: Dtype,
        targets: &mut [SpanMut<'_>],
        store: Store,
    ) -> bool {
        let factor = match self.finish {
            Finish::Scale(factor) if self.is_joined() => *factor,
            _ => NO_FACTOR,
        };
        let join = joiner(self.op, from[0].dtype(), into, from.len());
        join(self.op, from, factor, targets, store)
    }

    /// Block by block through scratch memory, from where a block goes to all targets.
    #[inline(never)] // the scratch is large: the short way must not make room for it
    fn in_blocks(
        &self,
        dtype: Dtype,
        len: usize,
        targets: &mut [SpanMut<'_>],
        store: Store,
    ) -> Result<(), KernelError> {
        let widest = dtype.accumulator().size();
        let width = BLOCK_BYTES / widest;
        let mut scratch = Scratch::new(len.min(width) * widest);
        for range in blocks(len, width, &targets[0], store) {
            let value = self.block(dtype, range.clone(), &mut scratch)?;
            for target in &mut *targets {
                simd::store(value, target.slice(range.clone()), store);
            }
        }
        Ok(())
    }

    /// One block of finished elements, which lies in the scratch.
    fn block<'s>(
        &self,
        dtype: Dtype,
        range: Range<usize>,
        scratch: &'s mut Scratch,
    ) -> Result<Span<'s>, KernelError> {
        let len = range.len();
        if self.is_joined() {
            self.leaves(0, &range, scratch.span_mut(0, dtype, len))?;
            return Ok(scratch.span(0, dtype, len));
        }
        let partial = dtype.accumulator();
        self.tree(partial, &range, scratch)?;
        let (value, result) = match self.finish {
            Finish::Cast if partial == dtype => return Ok(scratch.span(0, dtype, len)),
            Finish::Divide(by) => {
                let value = scratch.span_mut(0, dtype, len);
                with_integer!(dtype, |T| simd::divide_in_place::<T>(value, *by), else unreachable!("checked"));
                return Ok(scratch.span(0, dtype, len));
            }
            _ => scratch.pair((0, partial), (1, dtype), len),
        };
        match self.finish {
            Finish::Scale(factor) => cast_scaled(value, result, *factor)?,
            _ => cast(value, result)?,
        }
        Ok(scratch.span(1, dtype, len))
    }

    /// [Note: canonical tree], for one block: the value is left on the lowest level of the scratch.
    fn tree(
        &self,
        partial: Dtype,
        range: &Range<usize>,
        scratch: &mut Scratch,
    ) -> Result<(), KernelError> {
        let (count, len) = (self.sources.len(), range.len());
        let mut depth = 0;
        let mut start = 0;
        let pair = |depth: usize, scratch: &mut Scratch| {
            let (right, left) = scratch.pair((depth - 1, partial), (depth - 2, partial), len);
            fold(self.op, left, right)
        };
        while start < count {
            let width = self.leaves_at(start);
            if width == 1 && depth > 0 && self.factors.is_none() {
                // The last one, which folds into the block before it without a copy.
                let left = scratch.span_mut(depth - 1, partial, len);
                fold(self.op, left, self.sources[start].slice(range.clone()))?;
            } else {
                self.leaves(start, range, scratch.span_mut(depth, partial, len))?;
                depth += 1;
            }
            start += width;
            // How many blocks end here, of those that are larger than what came at once.
            for _ in width.ilog2()..(start - 1).trailing_ones() {
                pair(depth, scratch)?;
                depth -= 1;
            }
        }
        while depth > 1 {
            pair(depth, scratch)?;
            depth -= 1;
        }
        Ok(())
    }

    /// How many sources from `start` on are taken at once: a block of the tree that registers can hold.
    fn leaves_at(&self, start: usize) -> usize {
        let rest = self.sources.len() - start;
        match self.factors {
            // Only sums are worth the code of a loop over eight.
            None if self.op == Fold::Sum => 1 << rest.min(8).ilog2(),
            None => 1 << rest.min(4).ilog2(),
            Some(_) => 1,
        }
    }

    /// The block of the tree that starts with source `start`, in the accumulator's type or in the sources' own.
    fn leaves(
        &self,
        start: usize,
        range: &Range<usize>,
        mut into: SpanMut<'_>,
    ) -> Result<(), KernelError> {
        let (width, dtype) = (self.leaves_at(start), into.dtype());
        // Eight spans, of which the first `width` count.
        let from: [Span<'_>; 8] =
            array::from_fn(|leaf| self.sources[start + leaf % width].slice(range.clone()));
        match self.factors {
            Some(factors) => cast_scaled(from[0], into, factors[start]),
            None if width == 1 => cast(from[0], into),
            None => {
                let into = slice::from_mut(&mut into);
                self.join(&from[..width], dtype, into, Store::Cached);
                Ok(())
            }
        }
    }
}

/// A loop in which a few spans meet in registers: as [`Work::join`].
pub(crate) type Joiner = fn(Fold, &[Span<'_>], f64, &mut [SpanMut<'_>], Store) -> bool;

/// The factor that changes no number.
pub(crate) const NO_FACTOR: f64 = 1.0;

/// The loop for two, four or eight spans of `dtype`, of an operation that takes it.
pub(crate) fn joiner(op: Fold, dtype: Dtype, into: Dtype, count: usize) -> Joiner {
    match count {
        2 => joiner_of::<2>(op, dtype, into),
        4 => joiner_of::<4>(op, dtype, into),
        8 => joiner_of::<8>(op, dtype, into),
        count => unreachable!("two, four or eight spans, not {count}"),
    }
}

fn joiner_of<const N: usize>(op: Fold, dtype: Dtype, into: Dtype) -> Joiner {
    if dtype.is_float() {
        with_float!(
            dtype,
            |A| if into == dtype {
                simd::join_floats::<A, A, <A as simd::Lane>::Own, N>
            } else {
                type C = <A as simd::Lane>::Own;
                simd::join_floats::<A, C, C, N>
            },
            else unreachable!("a float")
        )
    } else if const { N > 4 } {
        joiner_of_bits::<N>(dtype) // a sum
    } else if matches!(op, Fold::Min | Fold::Max) {
        with_integer!(
            dtype,
            |T| |op, from, _, targets, store| simd::join_ordered::<T, N>(op, from, targets, store),
            else |op, from, _, targets, store| simd::join_bools::<N>(op, from, targets, store)
        )
    } else if dtype == Dtype::Bool {
        |op, from, _, targets, store| simd::join_bools::<N>(op, from, targets, store)
    } else {
        joiner_of_bits::<N>(dtype)
    }
}

/// Integers of one size are alike.
fn joiner_of_bits<const N: usize>(dtype: Dtype) -> Joiner {
    match dtype.size() {
        1 => |op, from, _, into, store| simd::join_bits::<u8, N>(op, from, into, store),
        2 => |op, from, _, into, store| simd::join_bits::<u16, N>(op, from, into, store),
        4 => |op, from, _, into, store| simd::join_bits::<u32, N>(op, from, into, store),
        _ => |op, from, _, into, store| simd::join_bits::<u64, N>(op, from, into, store),
    }
}

/// One source, for several targets.
fn copy_to_all(source: Span<'_>, targets: &mut [SpanMut<'_>], store: Store) {
    // Several targets take a block while it is in the nearest cache; one takes all at once.
    let width = match targets.len() {
        1 => source.len(),
        _ => COPY_BYTES / source.dtype().size(),
    };
    for range in blocks(source.len(), width, &targets[0], store) {
        for target in &mut *targets {
            let part = source.slice(range.clone());
            simd::store(part, target.slice(range.clone()), store);
        }
    }
}

/// `0..len` in blocks of up to `width` elements. Where they are streamed, the first is short, so that the others start
/// where a line of this target does.
fn blocks(
    len: usize,
    width: usize,
    target: &SpanMut<'_>,
    store: Store,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let lead = match store {
        Store::Cached => 0,
        Store::Streaming => simd::to_line(target).min(len),
    };
    let mut start = 0;
    std::iter::from_fn(move || {
        let end = if start < lead {
            lead
        } else {
            len.min(start + width)
        };
        let range = start..end;
        start = end;
        (!range.is_empty()).then_some(range)
    })
}

/// What a span has that the first source has not.
#[cold]
fn unlike(
    first: Dtype,
    len: usize,
    (device, other, other_len): (Option<&dyn Device>, Dtype, usize),
) -> KernelError {
    if let Some(device) = device {
        let memory = device.memory();
        return KernelError::Device { op: OP, memory };
    }
    if other != first {
        return KernelError::Mixed {
            op: OP,
            first,
            other,
        };
    }
    KernelError::Length {
        op: OP,
        into: other_len,
        from: len,
    }
}

#[cold]
fn unsupported(op: &'static str, dtype: Dtype) -> KernelError {
    KernelError::Unsupported { op, dtype }
}
