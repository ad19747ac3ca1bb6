//! The kernels: portable loops over raw pointers, compiled once for each instruction set and chosen at run time.
//!
//! This is the only unsafe room of the crate. A kernel is a value with a [`Kernel::run`] that is always inlined;
//! [`launch`] inlines it into a function that may use AVX-512 or AVX2, or into none. The compiler vectorises; there
//! are no intrinsics, and as Rust never contracts a multiplication with an addition, all variants agree bit for bit.

mod join;
mod lane;
mod loops;
mod optim;
mod raw;
mod scratch;
mod squares;
mod stream;

use std::marker::PhantomData;
use std::sync::OnceLock;

pub(crate) use lane::{Acc, Int, Lane};
pub(crate) use optim::{Spans, update};
pub(crate) use raw::copy;
#[cfg(test)]
pub(crate) use raw::{away, twin};
pub(crate) use scratch::{BLOCK_BYTES, LEVELS, Scratch};
pub(crate) use squares::add_squares;
use stream::{Course, Line};
pub(crate) use stream::{settle, store, to_line};

use crate::combine::Store;
use crate::dtype::{Bool, Element};
use crate::fold::Fold;
use crate::norm::SumSquares;
use crate::span::{Span, SpanMut};
use join::Join;
use lane::{And, Binary, IntLarger, IntPlus, IntSmaller, IntTimes, Or, Xor};
use lane::{Clamp, Convert, Divide, Larger, Multiply, Plus, Same, Scale, Smaller, Times};
use loops::{Fill, Map, MapInPlace, Norm, Zip};
use raw::{Reader, Writer, Writers};

pub(crate) fn cast<A: Lane, B: Lane, C: Acc>(from: Span<'_>, into: SpanMut<'_>) {
    let each = Convert::<C>(PhantomData);
    launch(Map {
        from: Reader::<A>::of(from),
        into: Writer::<B>::of(into),
        each,
    });
}

pub(crate) fn cast_scaled<A: Lane, B: Lane, C: Acc>(
    from: Span<'_>,
    into: SpanMut<'_>,
    factor: f64,
) {
    let each = Scale(C::narrow(factor));
    launch(Map {
        from: Reader::<A>::of(from),
        into: Writer::<B>::of(into),
        each,
    });
}

pub(crate) fn multiply<T: Int>(from: Span<'_>, into: SpanMut<'_>, factor: T) {
    launch(Map {
        from: Reader::<T>::of(from),
        into: Writer::<T>::of(into),
        each: Multiply(factor),
    });
}

pub(crate) fn divide<T: Int>(from: Span<'_>, into: SpanMut<'_>, by: u64) {
    launch(Map {
        from: Reader::<T>::of(from),
        into: Writer::<T>::of(into),
        each: Divide::<T>::by(by),
    });
}

/// Runs `body` with `each` as what a fold does with two floats.
macro_rules! with_float_fold {
    ($op:expr, $C:ty, |$each:ident| $body:expr) => {
        match $op {
            Fold::Sum => {
                let $each = Plus::<$C>(PhantomData);
                $body
            }
            Fold::Prod => {
                let $each = Times::<$C>(PhantomData);
                $body
            }
            Fold::Min => {
                let $each = Smaller::<$C>(PhantomData);
                $body
            }
            Fold::Max => {
                let $each = Larger::<$C>(PhantomData);
                $body
            }
            op @ (Fold::And | Fold::Or | Fold::Xor) => {
                unreachable!("floats have no {op}; the caller refuses it")
            }
        }
    };
}

/// Runs `body` with `each` as what a fold does with two integers.
macro_rules! with_int_fold {
    ($op:expr, |$each:ident| $body:expr) => {
        match $op {
            Fold::Sum => {
                let $each = IntPlus;
                $body
            }
            Fold::Prod => {
                let $each = IntTimes;
                $body
            }
            Fold::Min => {
                let $each = IntSmaller;
                $body
            }
            Fold::Max => {
                let $each = IntLarger;
                $body
            }
            Fold::And => {
                let $each = And;
                $body
            }
            Fold::Or => {
                let $each = Or;
                $body
            }
            Fold::Xor => {
                let $each = Xor;
                $body
            }
        }
    };
}

/// Runs `body` with `each` as what a fold does with two bools.
macro_rules! with_bool_fold {
    ($op:expr, |$each:ident| $body:expr) => {
        match $op {
            Fold::Min | Fold::And => {
                let $each = And;
                $body
            }
            Fold::Max | Fold::Or => {
                let $each = Or;
                $body
            }
            Fold::Xor => {
                let $each = Xor;
                $body
            }
            op @ (Fold::Sum | Fold::Prod) => {
                unreachable!("bool has no {op}; the caller refuses it")
            }
        }
    };
}

pub(crate) fn divide_in_place<T: Int>(x: SpanMut<'_>, by: u64) {
    launch(MapInPlace {
        x: Writer::<T>::of(x),
        each: Divide::<T>::by(by),
    });
}

pub(crate) fn fold_floats<B: Lane, A: Lane, C: Acc>(op: Fold, into: SpanMut<'_>, with: Span<'_>) {
    let (into, with) = (Writer::<B>::of(into), Reader::<A>::of(with));
    with_float_fold!(op, C, |each| launch(Zip { into, with, each }))
}

pub(crate) fn fold_integers<T: Int>(op: Fold, into: SpanMut<'_>, with: Span<'_>) {
    let (into, with) = (Writer::<T>::of(into), Reader::<T>::of(with));
    with_int_fold!(op, |each| launch(Zip { into, with, each }))
}

/// The caller has refused sums and products.
pub(crate) fn fold_bools(op: Fold, into: SpanMut<'_>, with: Span<'_>) {
    let (into, with) = (Writer::<Bool>::of(into), Reader::<Bool>::of(with));
    with_bool_fold!(op, |each| launch(Zip { into, with, each }))
}

/// `targets[t][i] = factor * fold over j of from[j][i]`, in C. False if there is no order in which the targets can be
/// streamed in step: then nothing was done.
pub(crate) fn join_floats<A: Lane, B: Lane, C: Acc, const N: usize>(
    op: Fold,
    from: &[Span<'_>],
    factor: f64,
    into: &mut [SpanMut<'_>],
    store: Store,
) -> bool {
    let from = readers::<_, N>(from, |s| Reader::<A>::of(*s));
    let into = Writers::<B>::of(into);
    let Some(course) = course(&from, &into, store) else {
        return false;
    };
    let (lift, end) = (Convert::<C>(PhantomData), Scale(C::narrow(factor)));
    let partial = PhantomData::<C>;
    if const { N > 4 } {
        assert_eq!(op, Fold::Sum); // the others would be much code for little use
        let each = Plus::<C>(PhantomData);
        launch_streamer(Join {
            from,
            into,
            lift,
            each,
            end,
            partial,
            course,
        });
        return true;
    }
    with_float_fold!(op, C, |each| launch_streamer(Join {
        from,
        into,
        lift,
        each,
        end,
        partial,
        course
    }));
    true
}

/// The folds of integers that depend on their sign; as `join_floats`.
pub(crate) fn join_ordered<T: Int, const N: usize>(
    op: Fold,
    from: &[Span<'_>],
    into: &mut [SpanMut<'_>],
    store: Store,
) -> bool {
    let from = readers::<_, N>(from, |s| Reader::<T>::of(*s));
    match op {
        Fold::Min => join_same(from, into, IntSmaller, store),
        Fold::Max => join_same(from, into, IntLarger, store),
        _ => unreachable!("{op} is for `join_bits`"),
    }
}

/// The folds of integers that depend on their size only; as `join_floats`.
pub(crate) fn join_bits<T: Int, const N: usize>(
    op: Fold,
    from: &[Span<'_>],
    into: &mut [SpanMut<'_>],
    store: Store,
) -> bool {
    let from = readers::<_, N>(from, |s| Reader::<T>::bits_of(*s));
    if const { N > 4 } {
        assert_eq!(op, Fold::Sum);
        return join_same(from, into, IntPlus, store);
    }
    match op {
        Fold::Sum => join_same(from, into, IntPlus, store),
        Fold::Prod => join_same(from, into, IntTimes, store),
        Fold::And => join_same(from, into, And, store),
        Fold::Or => join_same(from, into, Or, store),
        Fold::Xor => join_same(from, into, Xor, store),
        Fold::Min | Fold::Max => unreachable!("{op} is for `join_ordered`"),
    }
}

/// The caller has refused sums and products; as `join_floats`.
pub(crate) fn join_bools<const N: usize>(
    op: Fold,
    from: &[Span<'_>],
    into: &mut [SpanMut<'_>],
    store: Store,
) -> bool {
    let from = readers::<_, N>(from, |s| Reader::<Bool>::of(*s));
    with_bool_fold!(op, |each| join_same(from, into, each, store))
}

fn join_same<T: Element, const N: usize>(
    from: [Reader<'_, T>; N],
    into: &mut [SpanMut<'_>],
    each: impl Binary<T, T>,
    store: Store,
) -> bool {
    let into = Writers::<T>::of(into);
    let Some(course) = course(&from, &into, store) else {
        return false;
    };
    launch_streamer(Join {
        from,
        into,
        lift: Same,
        each,
        end: Same,
        partial: PhantomData::<T>,
        course,
    });
    true
}

/// The spans as they lie, none of them moved: a copy of what was just written in parts would wait for it.
#[inline(always)]
fn readers<'a, T: Element, const N: usize>(
    from: &[Span<'a>],
    reader: impl Fn(&Span<'a>) -> Reader<'a, T>,
) -> [Reader<'a, T>; N] {
    assert_eq!(from.len(), N);
    std::array::from_fn(|index| reader(&from[index]))
}

/// What [`Join`] needs to know; none if it cannot be done.
#[inline(always)]
fn course<A: Element, B: Element, const N: usize>(
    from: &[Reader<'_, A>; N],
    into: &Writers<'_, '_, B>,
    store: Store,
) -> Option<Option<Course>> {
    match store {
        Store::Cached => Some(None),
        Store::Streaming => into.course(from).map(Some),
    }
}

pub(crate) fn sum_squares<A: Lane>(x: Span<'_>) -> SumSquares {
    launch(Norm {
        x: Reader::<A>::of(x),
    })
}

pub(crate) fn fill<T: Element>(into: SpanMut<'_>, value: T) {
    launch(Fill {
        into: Writer::<T>::of(into),
        value,
    });
}

/// `limit` is not negative.
pub(crate) fn clamp<A: Lane>(x: SpanMut<'_>, limit: A) {
    launch(MapInPlace {
        x: Writer::<A>::of(x),
        each: Clamp(A::Own::load(limit)),
    });
}

/// Work that gains from wide registers. `run`, and all it calls, must be `#[inline(always)]`: what is not inlined is
/// compiled for the baseline, and slow, though right.
trait Kernel {
    type Out;
    fn run(self) -> Self::Out;
}

/// As [`Kernel`], of work that may store past the caches, by vectors as wide as the instruction set has.
trait Streamer {
    fn run<L: Line>(self);
}

/// A streamer that knows its vectors.
struct With<K, L>(K, PhantomData<L>);

impl<K: Streamer, L: Line> Kernel for With<K, L> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        self.0.run::<L>();
    }
}

/// An instruction set that kernels are compiled for, from poor to rich.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The instruction set for which this processor's kernels are compiled: "avx512", "avx2", or "portable" for what every processor
/// of this kind has.
///
/// ```
/// assert!(["avx512", "avx2", "portable"].contains(&fabric_kernels::instruction_set()));
/// ```
pub fn instruction_set() -> &'static str {
    match Isa::best() {
        Isa::Portable => "portable",
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => "avx2",
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => "avx512",
    }
}

impl Isa {
    /// The richest that this processor has, found once.
    #[inline]
    fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(Isa::find)
    }

    fn find() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            if Isa::Avx512.is_here() {
                return Isa::Avx512;
            }
            if Isa::Avx2.is_here() {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// This processor has it.
    #[inline]
    pub(crate) fn is_here(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_here()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
        }
    }
}

/// Runs a kernel on the best instruction set of this processor.
fn launch<K: Kernel>(kernel: K) -> K::Out {
    match chosen() {
        Isa::Portable => kernel.run(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: the processor has avx2 and fma: `chosen` returns only sets for which `is_here`. A breach is an
            // illegal instruction in the first equality test.
            unsafe { run_avx2(kernel) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            // SAFETY: the processor has all five features: `chosen` returns only sets for which `is_here`. A breach
            // is an illegal instruction in the first equality test.
            unsafe { run_avx512(kernel) }
        }
    }
}

/// As [`launch`], with the vectors that belong to the instruction set.
fn launch_streamer<K: Streamer>(kernel: K) {
    match chosen() {
        Isa::Portable => With(kernel, PhantomData::<stream::Portable>).run(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: as in `launch`.
            unsafe { run_avx2(With(kernel, PhantomData::<stream::Avx>)) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            // SAFETY: as in `launch`.
            unsafe { run_avx512(With(kernel, PhantomData::<stream::Avx512>)) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
    kernel.run()
}

#[cfg(not(test))]
#[inline]
fn chosen() -> Isa {
    Isa::best()
}

#[cfg(test)]
fn chosen() -> Isa {
    FORCED.with(|forced| forced.get()).unwrap_or_else(Isa::best)
}

#[cfg(test)]
thread_local! {
    /// The instruction set that tests on this thread insist on.
    static FORCED: std::cell::Cell<Option<Isa>> = const { std::cell::Cell::new(None) };
}

/// Runs `body` once for each instruction set of this processor.
#[cfg(test)]
pub(crate) fn on_every_isa(mut body: impl FnMut(Isa)) {
    #[cfg(target_arch = "x86_64")]
    let all = [Isa::Portable, Isa::Avx2, Isa::Avx512];
    #[cfg(not(target_arch = "x86_64"))]
    let all = [Isa::Portable];
    for isa in all.into_iter().filter(|isa| isa.is_here()) {
        FORCED.with(|forced| forced.set(Some(isa)));
        body(isa);
    }
    FORCED.with(|forced| forced.set(None));
}
