//! The loops: one for each number of spans, generic over what is done with an element.

use super::Kernel;
use super::lane::{Binary, Lane, Unary};
use super::raw::{Reader, Writer};
use crate::dtype::Element;
use crate::norm::SumSquares;

/// `into[i] = each(from[i])`
pub(super) struct Map<'a, A, B, F> {
    pub(super) from: Reader<'a, A>,
    pub(super) into: Writer<'a, B>,
    pub(super) each: F,
}

impl<A: Element, B: Element, F: Unary<A, B>> Kernel for Map<'_, A, B, F> {
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        assert_eq!(self.from.len(), self.into.len());
        for index in 0..self.from.len() {
            // SAFETY: the loop ends at from.len(). `casts_equal_the_oracle` runs every length.
            let element = unsafe { self.from.at(index) };
            let result = self.each.apply(element);
            // SAFETY: into.len() is from.len(), asserted above. `casts_equal_the_oracle` runs every length.
            unsafe { self.into.set(index, result) };
        }
    }
}

/// `x[i] = each(x[i])`
pub(super) struct MapInPlace<'a, A, F> {
    pub(super) x: Writer<'a, A>,
    pub(super) each: F,
}

impl<A: Element, F: Unary<A, A>> Kernel for MapInPlace<'_, A, F> {
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        for index in 0..self.x.len() {
            // SAFETY: the loop ends at x.len(). `clamps_and_fills_equal_the_oracle` runs every length.
            let element = unsafe { self.x.at(index) };
            let result = self.each.apply(element);
            // SAFETY: as for the load.
            unsafe { self.x.set(index, result) };
        }
    }
}

/// `into[i] = each(into[i], with[i])`
pub(super) struct Zip<'a, B, A, F> {
    pub(super) into: Writer<'a, B>,
    pub(super) with: Reader<'a, A>,
    pub(super) each: F,
}

impl<B: Element, A: Element, F: Binary<B, A>> Kernel for Zip<'_, B, A, F> {
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        assert_eq!(self.into.len(), self.with.len());
        for index in 0..self.into.len() {
            // SAFETY: the loop ends at into.len(). `folds_equal_the_oracle` runs every length.
            let ours = unsafe { self.into.at(index) };
            // SAFETY: with.len() is into.len(), asserted above. `folds_equal_the_oracle` runs every length.
            let theirs = unsafe { self.with.at(index) };
            let result = self.each.apply(ours, theirs);
            // SAFETY: as for the first load.
            unsafe { self.into.set(index, result) };
        }
    }
}

/// `into[i] = value`
pub(super) struct Fill<'a, T> {
    pub(super) into: Writer<'a, T>,
    pub(super) value: T,
}

impl<T: Element> Kernel for Fill<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        for index in 0..self.into.len() {
            // SAFETY: the loop ends at into.len(). `clamps_and_fills_equal_the_oracle` runs every length.
            unsafe { self.into.set(index, self.value) };
        }
    }
}

/// The sum of squares in eight lanes; see [Note: norm order].
pub(super) struct Norm<'a, A> {
    pub(super) x: Reader<'a, A>,
}

impl<A: Lane> Kernel for Norm<'_, A> {
    type Out = SumSquares;

    #[inline(always)]
    fn run(self) -> SumSquares {
        const LANES: usize = 8;
        let len = self.x.len();
        let whole = len - len % LANES;
        let mut sums = [0.0f64; LANES];
        // A finite number times zero is zero, anything else NaN: this stays zero exactly as long as all is finite.
        let mut doubts = [0.0f64; LANES];
        let mut start = 0;
        while start < whole {
            for lane in 0..LANES {
                // SAFETY: start + LANES <= whole <= len. `norms_equal_the_oracle` runs every length.
                let value = unsafe { self.x.at(start + lane) }.to_f64();
                sums[lane] += value * value;
                doubts[lane] += value * 0.0;
            }
            start += LANES;
        }
        for lane in 0..len - whole {
            // SAFETY: whole + lane < len. `norms_equal_the_oracle` runs every length.
            let value = unsafe { self.x.at(whole + lane) }.to_f64();
            sums[lane] += value * value;
            doubts[lane] += value * 0.0;
        }
        SumSquares {
            sum: join(sums),
            finite: join(doubts) == 0.0,
        }
    }
}

#[inline(always)]
fn join([a, b, c, d, e, f, g, h]: [f64; 8]) -> f64 {
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}
