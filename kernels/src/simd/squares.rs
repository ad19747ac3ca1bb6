//! The loop behind [`SquareBins`]: many squares at a time into few exact sums, each of which is one entry.
//!
//! [Note: distilling] A chunk of elements becomes a bench of f64 terms whose sum is the sum of the squares, exactly.
//! Then, level by level: every lane holds a sum that starts at 1.5 * 2^p, so its last place is 2^(p-52), and takes the
//! rounded part of its terms, leaving what was cut off on the bench, until nothing is left.
//!
//! ```text
//! term      0001011011101011010011       sum' = sum + term           rounded to 2^(p-52)
//! sum     1.1000101101|                  rest = term - (sum' - sum)  exact: the error of a sum is a float
//!              taken  | left             (Dekker 1971; levels after Rump, Ogita, Oishi 2008)
//! ```
//!
//! With terms up to 2^y and 64 of them in a lane, p = y + 8 keeps every sum between 2^p and 2^(p+1): what is taken of a
//! term is below 2^(y+1), of 64 below 2^(p-1). So the sums are exact, their distances from the start are integers, and
//! what is left is at most 2^(p-53): a level takes 45 bits. How the terms were cut cannot be seen in the end: all of it
//! was added, in integers. Gradients of one layer need one level in bf16 and two in f32.

use std::ops::Range;

use super::lane::{Acc, Lane};
use super::raw::Reader;
use super::{Kernel, launch};
use crate::exact::SquareBins;
use crate::span::Span;

/// Terms on the bench: 16 KiB, half of a small first-level cache.
const TERMS: usize = 2048;
const LANES: usize = 32;
/// Bits in the number of terms of a lane.
const DEPTH: i32 = (TERMS / LANES).ilog2() as i32;

pub(crate) fn add_squares<A: Lane<Own: Exact>>(x: Span<'_>, bins: &mut SquareBins) {
    launch(Squares {
        x: Reader::<A>::of(x),
        bins,
    });
}

/// A float whose square is a sum of few f64.
pub(crate) trait Exact: Acc {
    /// How many.
    const PARTS: usize;
    /// The bits without the sign, which lie as the numbers do.
    type Size: Copy + Ord;
    fn size(self) -> Self::Size;
    /// The number that is not negative and has these bits.
    fn of(size: Self::Size) -> Self;
    /// Where numbers begin whose parts are not exact.
    const HUGE: Self::Size;
    /// Not zero, and so small that its parts are not exact.
    fn is_tiny(self) -> bool;
    /// The parts, the largest first. The sum of `PARTS` of them is the square, if the number is plain.
    fn parts(self) -> [f64; 3];

    /// Neither huge nor tiny.
    #[inline(always)]
    fn is_plain(self) -> bool {
        self.size() < Self::HUGE && !self.is_tiny()
    }
}

impl Exact for f32 {
    const PARTS: usize = 1;
    type Size = i32;
    const HUGE: i32 = 0x7f80_0000;

    #[inline(always)]
    fn size(self) -> i32 {
        self.to_bits() as i32 & i32::MAX
    }
    #[inline(always)]
    fn of(size: i32) -> f32 {
        f32::from_bits(size as u32)
    }
    #[inline(always)]
    fn is_tiny(self) -> bool {
        false
    }
    /// 48 bits, between 2^-298 and 2^256.
    #[inline(always)]
    fn parts(self) -> [f64; 3] {
        let value = f64::from(self);
        [value * value, 0.0, 0.0]
    }
}

impl Exact for f64 {
    const PARTS: usize = 3;
    type Size = i64;
    /// Between 2^-400 and 2^400 no part leaves the range of normal numbers.
    const HUGE: i64 = (1023 + 400) << 52;

    #[inline(always)]
    fn size(self) -> i64 {
        self.to_bits() as i64 & i64::MAX
    }
    #[inline(always)]
    fn of(size: i64) -> f64 {
        f64::from_bits(size as u64)
    }
    #[inline(always)]
    fn is_tiny(self) -> bool {
        const LOW: i64 = (1023 - 400) << 52;
        self.size() < LOW && self.size() != 0
    }
    /// With the number rounded to 26 bits, what was cut off has 26 bits and a sign, and all three products have at most
    /// 52. A fused multiply-add would do with two parts, where there is one.
    #[inline(always)]
    fn parts(self) -> [f64; 3] {
        let high = f64::from_bits(self.to_bits().wrapping_add(1 << 26) & !((1 << 27) - 1));
        let low = self - high;
        [high * high, 2.0 * high * low, low * low]
    }
}

struct Squares<'a, 'b, A> {
    x: Reader<'a, A>,
    bins: &'b mut SquareBins,
}

impl<A: Lane<Own: Exact>> Kernel for Squares<'_, '_, A> {
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        let parts = A::Own::PARTS;
        let room = TERMS / (LANES * parts) * LANES;
        let mut bench = [0.0f64; TERMS];
        let mut start = 0;
        while start < self.x.len() {
            let chunk = start..self.x.len().min(start + room);
            start = chunk.end;
            let rows = chunk.len().div_ceil(LANES);
            let bench = &mut bench[..rows * LANES * parts];
            let mut found = self.spread::<false>(chunk.clone(), bench);
            if found.tiny || found.top >= A::Own::HUGE {
                found = self.spread::<true>(chunk.clone(), bench);
                self.rest(chunk);
            }
            let [top, ..] = A::Own::of(found.top).parts();
            distil(bench, top, self.bins);
        }
    }
}

/// What was met while spreading.
struct Found<S> {
    /// The largest.
    top: S,
    /// Any tiny number.
    tiny: bool,
}

impl<A: Lane<Own: Exact>> Squares<'_, '_, A> {
    /// Puts the parts of some elements on the bench; with `SIEVE`, zeros in place of those that are not plain.
    #[inline(always)]
    fn spread<const SIEVE: bool>(
        &self,
        range: Range<usize>,
        bench: &mut [f64],
    ) -> Found<<A::Own as Exact>::Size> {
        let zero = A::Own::narrow(0.0);
        let mut sizes = [zero.size(); LANES];
        let mut tiny = [0u64; LANES];
        let mut row = |start: usize, count: usize, terms: &mut [f64]| {
            for lane in 0..LANES {
                let value = if lane < count {
                    // SAFETY: start + lane < start + count <= range.end <= x.len(). `bins_equal_the_oracle` runs every
                    // length.
                    A::Own::load(unsafe { self.x.at(start + lane) })
                } else {
                    zero
                };
                let value = if SIEVE && !value.is_plain() {
                    zero
                } else {
                    value
                };
                sizes[lane] = sizes[lane].max(value.size());
                tiny[lane] |= u64::from(value.is_tiny());
                let parts = value.parts();
                for part in 0..A::Own::PARTS {
                    terms[part * LANES + lane] = parts[part];
                }
            }
        };
        let whole = range.len() / LANES;
        let (rows, last) = bench.split_at_mut(whole * LANES * A::Own::PARTS);
        let mut start = range.start;
        for terms in rows.chunks_exact_mut(LANES * A::Own::PARTS) {
            row(start, LANES, terms);
            start += LANES;
        }
        if !last.is_empty() {
            row(start, range.end - start, last);
        }
        Found {
            top: reduce(sizes, |a, b| if a > b { a } else { b }),
            tiny: reduce(tiny, |a, b| a | b) != 0,
        }
    }

    /// Enters the elements that are not plain, one by one.
    #[cold]
    fn rest(&mut self, range: Range<usize>) {
        for index in range {
            // SAFETY: index < range.end <= x.len(). `bins_equal_the_oracle` runs every length, with such elements.
            let element = unsafe { self.x.at(index) };
            if !A::Own::load(element).is_plain() {
                self.bins.square(element.to_f64());
            }
        }
    }
}

/// Enters the sum of the terms, none of which is larger than `top`; see [Note: distilling].
#[inline(always)]
fn distil(bench: &mut [f64], top: f64, bins: &mut SquareBins) {
    let mut y = (top.to_bits() >> 52) as i32 - 1022;
    let mut left = top > 0.0;
    while left {
        let p = y + DEPTH + 2;
        let start = f64::from_bits(((p + 1023) as u64) << 52 | 1 << 51);
        let mut sums = [start; LANES];
        let mut rests = [0u64; LANES];
        for terms in bench.chunks_exact_mut(LANES) {
            for lane in 0..LANES {
                let sum = sums[lane] + terms[lane];
                terms[lane] -= sum - sums[lane];
                rests[lane] |= terms[lane].to_bits();
                sums[lane] = sum;
            }
        }
        // Within a binade floats lie as their bits do.
        let mut units = [0i64; LANES];
        for lane in 0..LANES {
            units[lane] = sums[lane].to_bits() as i64 - start.to_bits() as i64;
        }
        bins.enter(reduce(units, |a, b| a + b), p - 52);
        // What is left is at most half of the last place.
        y = p - 53;
        // Twice the bits, as a zero may have a sign.
        left = reduce(rests, |a, b| a | b) << 1 != 0;
    }
}

/// Joins lanes in halves: in any order, so only for what has none.
#[inline(always)]
fn reduce<T: Copy>(mut lanes: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}
