//! The loop behind [`combine`](crate::combine): a few spans meet in registers and go to any number of targets.
//!
//! A target may lie exactly over a source, which no check for overlap between loops' operands can vouch for; so a step
//! of [`STEP`] elements is computed in whole before any of it is stored. Its results are an array that the compiler
//! keeps in registers.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::Streamer;
use super::lane::{Binary, Unary};
use super::raw::{Reader, Writers};
use super::stream::{Course, LINE_BYTES, Line};
use crate::dtype::Element;

/// Elements that are computed before any of them is stored.
const STEP: usize = 64;
const _: () = assert!(
    STEP.is_multiple_of(LINE_BYTES),
    "a step of any element is whole lines"
);

/// How far ahead sources are fetched, when several results go past the caches.
const AHEAD_BYTES: usize = 2 << 10;

/// Elements that are quicker stored one by one than by a call of memcpy.
const FEW: usize = 8;

/// `into[t][i] = end(tree over j of lift(from[j][i]))`, for two, four or eight spans.
pub(super) struct Join<'f, 't, 'a, A, B, C, L, F, E, const N: usize> {
    pub(super) from: [Reader<'f, A>; N],
    pub(super) into: Writers<'t, 'a, B>,
    pub(super) lift: L,
    pub(super) each: F,
    pub(super) end: E,
    pub(super) partial: PhantomData<C>,
    /// The order of steps, if they are streamed.
    pub(super) course: Option<Course>,
}

impl<A, B, C, L, F, E, const N: usize> Streamer for Join<'_, '_, '_, A, B, C, L, F, E, N>
where
    A: Element,
    B: Element,
    L: Unary<A, C>,
    F: Binary<C, C>,
    E: Unary<C, B>,
{
    #[inline(always)]
    fn run<S: Line>(mut self) {
        let len = self.from[0].len();
        for from in &self.from {
            assert_eq!(from.len(), len);
        }
        assert_eq!(self.into.len(), len);
        let streaming = self.course.is_some();
        let is_down = self.course.is_some_and(|course| course.is_down);
        let (stride, ahead) = match is_down {
            true => (
                STEP.wrapping_neg(),
                (AHEAD_BYTES / size_of::<A>()).wrapping_neg(),
            ),
            false => (STEP, AHEAD_BYTES / size_of::<A>()),
        };
        let fetching = streaming && self.into.count() > 1; // one alone leaves the processor time for it
        let mut start = 0;
        let mut short = self.course.map_or(0, |course| course.lead).min(len);
        loop {
            if short <= FEW {
                for index in start..start + short {
                    // SAFETY: start + short <= len. `combine_equals_the_oracle_on_floats` runs every length.
                    let result = unsafe { self.at(index) };
                    // SAFETY: as above.
                    unsafe { self.into.set(index, &[MaybeUninit::new(result)]) };
                }
            } else {
                // An array of its own, because this one is memory: its end is not known to the compiler.
                let mut results = [MaybeUninit::<B>::uninit(); STEP];
                for (index, result) in results[..short].iter_mut().enumerate() {
                    // SAFETY: start + short <= len. `combine_equals_the_oracle_on_floats` runs every length.
                    result.write(unsafe { self.at(start + index) });
                }
                // SAFETY: start + short <= len, and that many results were written.
                // `combine_equals_the_oracle_on_floats` runs every length.
                unsafe { self.into.set(start, &results[..short]) };
            }
            start += short;
            let steps = (len - start) / STEP;
            let mut at = match is_down {
                true => start + (steps.max(1) - 1) * STEP,
                false => start,
            };
            for _ in 0..steps {
                if fetching {
                    // Processors fetch ahead within a page only, and shared memory often has small ones.
                    for from in &self.from {
                        from.expect(at.wrapping_add(ahead), STEP);
                    }
                }
                let mut results = [MaybeUninit::<B>::uninit(); STEP];
                for (index, result) in results.iter_mut().enumerate() {
                    // SAFETY: at + STEP <= start + steps * STEP <= len, whichever way it goes.
                    // `combine_equals_the_oracle_on_floats` runs every length.
                    result.write(unsafe { self.at(at + index) });
                }
                if streaming {
                    // SAFETY: at + STEP <= len, as above, and all results were written; after the lead all targets
                    // start a line, and a step is whole lines; `combine` calls `settle`.
                    unsafe { self.into.stream::<S>(at, &results) };
                } else {
                    // SAFETY: at + STEP <= len, as above, and all results were written.
                    // `combine_equals_the_oracle_on_floats` runs every length.
                    unsafe { self.into.set(at, &results) };
                }
                at = at.wrapping_add(stride);
            }
            start += steps * STEP;
            short = len - start;
            if short == 0 {
                return;
            }
        }
    }
}

impl<A, B, C, L, F, E, const N: usize> Join<'_, '_, '_, A, B, C, L, F, E, N>
where
    A: Element,
    B: Element,
    L: Unary<A, C>,
    F: Binary<C, C>,
    E: Unary<C, B>,
{
    /// Result `index`.
    ///
    /// # Safety
    ///
    /// `index` is less than the length of all spans.
    #[inline(always)]
    unsafe fn at(&self, index: usize) -> B {
        const { assert!(N == 2 || N == 4 || N == 8) };
        // SAFETY: the caller's promise, as for all that follow; and there are N spans.
        let mut value = unsafe { self.pair(0, index) };
        if N >= 4 {
            // SAFETY: as above.
            let right = unsafe { self.pair(2, index) };
            value = self.each.apply(value, right);
        }
        if N == 8 {
            // SAFETY: as above.
            let left = unsafe { self.pair(4, index) };
            // SAFETY: as above.
            let right = unsafe { self.pair(6, index) };
            value = self.each.apply(value, self.each.apply(left, right));
        }
        self.end.apply(value)
    }

    /// # Safety
    ///
    /// `index` is less than the length of all spans.
    #[inline(always)]
    unsafe fn pair(&self, first: usize, index: usize) -> C {
        // SAFETY: the caller's promise. `combine_equals_the_oracle_on_floats` runs every length.
        let left = unsafe { self.from[first].at(index) };
        // SAFETY: as above.
        let right = unsafe { self.from[first + 1].at(index) };
        self.each
            .apply(self.lift.apply(left), self.lift.apply(right))
    }
}
